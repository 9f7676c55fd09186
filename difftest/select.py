"""Which mutation operator comes next: the Metropolis-Hastings choice of DFlare.

Tian et al., TOSEM 2023, section 3.4, algorithm 2. Operators are ranked by their success rate; a
candidate at rank k2 replaces the last one, at rank k1, with probability (1 - p)^(k2 - k1), at most
1, where p = 1 / number of operators. Candidates are drawn until one is accepted, which is one
draw from the law with those weights, and is done as such here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

RULES = ("metropolis", "ranked", "uniform")


class SelectState(NamedTuple):
    """How the operators fared so far, for one seed.

    Attributes:
        last: the operator that k1 belongs to, int32 scalar; -1: none yet.
        tried: times each was used, int32 ``[n]``.
        succeeded: times each succeeded, int32 ``[n]``.
    """

    last: jax.Array
    tried: jax.Array
    succeeded: jax.Array


def init(n: int) -> SelectState:
    """Before the first draw."""
    return SelectState(jnp.int32(-1), jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.int32))


def ranks(key: jax.Array, state: SelectState) -> jax.Array:
    """Rank of each operator by success / (tried + 1e-7), ties shuffled: int32 ``[n]``, 0 best.

    The 1e-7 is lost in 32 bits; what it does is that of equal rates above 0 the one that was tried
    more often comes first.
    """
    rate = state.succeeded / jnp.maximum(state.tried, 1)
    often = jnp.where(state.succeeded > 0, state.tried, 0)
    order = jnp.lexsort((jax.random.uniform(key, rate.shape), -often, -rate))
    return jnp.argsort(order).astype(jnp.int32)


def weights(rank: jax.Array, last: jax.Array, rule: str) -> jax.Array:
    """Unnormalised probability of each operator, float32 ``[n]``.

    Args:
        rank: int32 ``[n]``, 0 best.
        last: int32 scalar, -1: none, and then every operator is as likely.
        rule: "metropolis": the paper's. "ranked": the released code's, where k1 is always -1.
            "uniform": the ablation DFlare_R.

    Raises:
        ValueError: another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; accepted are {', '.join(RULES)}")
    if rule == "uniform":
        return jnp.ones(rank.shape, jnp.float32)
    before = rank[last] if rule == "metropolis" else -1
    ratio = (1 - 1 / rank.shape[0]) ** (rank - before).astype(jnp.float32)
    return jnp.where(last < 0, 1.0, jnp.minimum(ratio, 1.0))


def draw(key: jax.Array, state: SelectState, rule: str) -> jax.Array:
    """Draws the next operator: int32 scalar in 0..n - 1. ``rule`` is as in ``weights``."""
    key_ties, key_draw = jax.random.split(key)
    law = weights(ranks(key_ties, state), state.last, rule)
    return jax.random.categorical(key_draw, jnp.log(law)).astype(jnp.int32)


def update(
    state: SelectState, operator: jax.Array, success: jax.Array, last: jax.Array
) -> SelectState:
    """Counts one use of an operator.

    Args:
        state: before.
        operator: int32 scalar.
        success: bool scalar.
        last: int32 scalar, what k1 belongs to from now on.
    """
    return SelectState(
        last.astype(jnp.int32),
        state.tried.at[operator].add(1),
        state.succeeded.at[operator].add(success.astype(jnp.int32)),
    )
