"""One seed's search: DFlare's algorithm 1 as two pure steps around the query.

Tian et al., TOSEM 2023, section 3.2. ``choose`` draws an operator, the caller mutates and asks the
models, ``judge`` says whether the mutant triggers and whether the search goes on from it. The
released code departs from the paper in five places; ``Rules`` names them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difftest import fitness, mutate, select


class Rules(NamedTuple):
    """What tells the variants apart.

    Attributes:
        table: of ``mutate.TABLES``.
        either: D may also fall by more than the tolerance (the released code).
        from_seed: the first D to beat is the seed's; else 0 (the released code).
        selection: of ``select.RULES``.
        last_accepted: k1 belongs to the last accepted operator (the released code), else to the
            last chosen one.
        novelty: a mutant whose D is as good is accepted if it is novel; False is DFlare_D.
        keep_label: only inputs count that the original model gives the seed's label.
        max_l2: largest distance from the seed on the 0-1 scale, or None.
    """

    table: str
    either: bool
    from_seed: bool
    selection: str
    last_accepted: bool
    novelty: bool = True
    keep_label: bool = False
    max_l2: float | None = None


_RELEASED = Rules("released", True, False, "ranked", True)
VARIANTS = {
    "paper": Rules("clean", False, True, "metropolis", False),
    "released": _RELEASED,
    # For what its lines (``lines.py``) leave over: with the label kept, the paper's rules find
    # fewer of those than the released ones.
    "best": _RELEASED,
}


class Walk(NamedTuple):
    """Where one seed's search stands.

    Attributes:
        key: the seed's own key.
        seed: uint8 ``[H, W, C]``.
        label: int32 scalar, the label of the seed.
        image: uint8 ``[H, W, C]``, what is mutated next.
        best: float32 scalar, D of that image.
        store: probability vectors seen.
        operators: how the operators fared.
        queries: int32 scalar, asked so far.
    """

    key: jax.Array
    seed: jax.Array
    label: jax.Array
    image: jax.Array
    best: jax.Array
    store: fitness.Store
    operators: select.SelectState
    queries: jax.Array


def begin(
    rules: Rules,
    key: jax.Array,
    seed: jax.Array,
    original: jax.Array,
    compressed: jax.Array,
    capacity: int,
) -> Walk:
    """Before the first query.

    Args:
        rules: the variant.
        key: the seed's own.
        seed: uint8 ``[H, W, C]``.
        original: probabilities ``[K]`` of the seed.
        compressed: the same.
        capacity: room of the store.
    """
    store = fitness.empty(capacity, original.shape[0])
    return Walk(
        key=key,
        seed=seed,
        label=original.argmax().astype(jnp.int32),
        image=seed,
        best=fitness.difference(original, compressed) if rules.from_seed else jnp.float32(0),
        store=fitness.add(store, jnp.concatenate([original, compressed])),
        operators=select.init(len(mutate.NAMES)),
        queries=jnp.int32(0),
    )


def mutation_key(key: jax.Array, query: jax.Array | int) -> jax.Array:
    """The key that the mutant of a query (0 the first) is drawn with."""
    return jax.random.split(jax.random.fold_in(key, query))[1]


def choose(rules: Rules, walk: Walk) -> tuple[jax.Array, jax.Array]:
    """The operator of the next query, int32 scalar, and the key of its mutation."""
    key_operator, key_mutation = jax.random.split(jax.random.fold_in(walk.key, walk.queries))
    return select.draw(key_operator, walk.operators, rules.selection), key_mutation


def within(max_l2: float | None, seed: jax.Array, image: jax.Array) -> jax.Array:
    """The image drawn towards the seed until it is within the distance budget, uint8.

    Args:
        max_l2: on the 0-1 scale, or None.
        seed: uint8 ``[H, W, C]``.
        image: uint8 ``[H, W, C]``.
    """
    if max_l2 is None:
        return image
    change = image.astype(jnp.float32) - seed.astype(jnp.float32)
    # Squares of whole numbers are summed as whole numbers, the same on every machine, and in two
    # parts: of a large image the sum itself has no room in 32 bits.
    whole = jnp.square(change.astype(jnp.int32))
    length = jnp.sqrt((whole >> 8).sum() * jnp.float32(256) + (whole & 255).sum())
    # Truncation never lengthens; the factor stays a little short of the float32 rounding.
    factor = jnp.minimum(1.0, max_l2 * 255 / jnp.maximum(length, 1e-6)) * (1 - 1e-6)
    moved = jnp.trunc(change * factor)
    return jnp.where(length <= max_l2 * 255, image, (seed + moved).astype(jnp.uint8))


def judge(
    rules: Rules,
    walk: Walk,
    operator: jax.Array,
    mutant: jax.Array,
    original: jax.Array,
    compressed: jax.Array,
) -> tuple[Walk, jax.Array, jax.Array]:
    """After the query.

    Args:
        rules: the variant.
        walk: as it was before ``choose``.
        operator: what ``choose`` drew.
        mutant: uint8 ``[H, W, C]``, what was asked.
        original: probabilities ``[K]``.
        compressed: the same.

    Returns:
        The walk, whether the mutant triggers, whether it was accepted: bool scalars.
    """
    label = original.argmax()
    allowed = (label == walk.label) if rules.keep_label else jnp.bool_(True)
    found = (label != compressed.argmax()) & allowed
    gain = fitness.difference(original, compressed) - walk.best
    vector = jnp.concatenate([original, compressed])
    new = fitness.novel(walk.store, vector)
    better = (jnp.abs(gain) if rules.either else gain) > fitness.TOLERANCE
    tied = jnp.abs(gain) <= fitness.TOLERANCE
    accepted = (better | (tied & new & rules.novelty)) & allowed & ~found
    success = accepted | found
    last = jnp.where(success, operator, walk.operators.last) if rules.last_accepted else operator
    return (
        walk._replace(
            image=jnp.where(accepted, mutant, walk.image),
            best=jnp.where(accepted, walk.best + gain, walk.best),
            store=fitness.add(walk.store, vector, new),
            operators=select.update(walk.operators, operator, success, last),
            queries=walk.queries + 1,
        ),
        found,
        accepted,
    )


# Of many seeds at once -------------------------------------------------------------------------


def begin_each(
    rules: Rules,
    key: jax.Array,
    places: jax.Array,
    seeds: jax.Array,
    original: jax.Array,
    compressed: jax.Array,
    capacity: int,
) -> Walk:
    """``begin`` of ``[B, ...]``; the seed at place n draws with ``fold_in(key, n)``."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    start = jax.vmap(begin, (None, 0, 0, 0, 0, None))
    return start(rules, keys, seeds, original, compressed, capacity)


def propose_each(rules: Rules, walks: Walk) -> tuple[jax.Array, jax.Array]:
    """The operators of the next queries, int32 ``[B]``, and their mutants ``[B, H, W, C]``."""
    operators, keys = jax.vmap(choose, (None, 0))(rules, walks)
    mutants = mutate.mutate_batch(rules.table, operators, keys, walks.image)
    return operators, jax.vmap(within, (None, 0, 0))(rules.max_l2, walks.seed, mutants)


def judge_each(
    rules: Rules,
    walks: Walk,
    operators: jax.Array,
    mutants: jax.Array,
    original: jax.Array,
    compressed: jax.Array,
) -> tuple[Walk, jax.Array, jax.Array]:
    """``judge`` of ``[B, ...]``."""
    each = jax.vmap(judge, (None, 0, 0, 0, 0, 0))
    return each(rules, walks, operators, mutants, original, compressed)


def chosen(which: jax.Array, some: Any, others: Any) -> Any:
    """Rows of ``some`` where ``which`` (bool ``[B]``) says so, else of ``others``, leaf by leaf."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(one, some, others)
