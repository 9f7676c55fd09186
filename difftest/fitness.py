"""The fitness of a mutant: how far the two models' outputs are apart, and whether they are new.

Tian et al., TOSEM 2023, section 3.3: D, the difference of the top-1 probabilities, and O, whether
the pair of probability vectors lies near one seen before (squared L2 distance at most 0.5).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TOLERANCE = 1e-3
NEAR = 0.5


class Store(NamedTuple):
    """Pairs of probability vectors seen so far, for one seed.

    Attributes:
        vectors: float32 ``[capacity, 2 K]``; rows from ``filled`` on are unused.
        filled: how many rows are used, int32 scalar.
    """

    vectors: jax.Array
    filled: jax.Array


def empty(capacity: int, classes: int) -> Store:
    """A store without vectors, for a pair of models of so many classes."""
    return Store(jnp.zeros((capacity, 2 * classes), jnp.float32), jnp.int32(0))


def difference(original: jax.Array, compressed: jax.Array) -> jax.Array:
    """D: how far the top-1 probabilities are apart, float32 ``[...]`` of ``[..., K]``."""
    return jnp.abs(original.max(axis=-1) - compressed.max(axis=-1))


def novel(store: Store, vector: jax.Array) -> jax.Array:
    """Whether a vector ``[2 K]`` is farther than 0.5 in squared L2 from each stored one: bool."""
    squares = jnp.square(store.vectors - vector[None]).sum(axis=1)
    used = jnp.arange(store.vectors.shape[0]) < store.filled
    return ~jnp.any(used & (squares <= NEAR))


def add(store: Store, vector: jax.Array, new: jax.Array | bool = True) -> Store:
    """With one vector more if it is new; a full store stays, its owner sees to room (``grown``)."""
    # Of one that is not new the row is written too: it lies beyond those that are used.
    vectors = store.vectors.at[store.filled].set(vector, mode="drop")
    return Store(vectors, jnp.minimum(store.filled + new, store.vectors.shape[0]))


def grown(stores: Store) -> Store:
    """Stores of a batch (``[B, capacity, 2 K]``) with twice the room."""
    return Store(
        jnp.concatenate([stores.vectors, jnp.zeros_like(stores.vectors)], 1), stores.filled
    )
