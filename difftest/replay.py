"""Making the triggers of a saved search again, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

from difftest import diffchaser, lines, mutate
from difftest.pair import ModelPair
from difftest.result import SearchResult
from difftest.seeds import IMPL
from difftest.walk import VARIANTS, mutation_key, within


def replay(result: SearchResult, seeds: np.ndarray, pair: ModelPair | None = None) -> np.ndarray:
    """Follows each seed's chain.

    Args:
        result: of ``search`` or ``diffchase``.
        seeds: uint8 ``[N, H, W, C]``, those of the search.
        pair: the models, which DiffChaser's generations follow: their answers are asked for again,
            and are to be the same bit for bit.

    Returns:
        uint8 ``[N, H, W, C]``: the triggers, the seed itself where there is none.

    Raises:
        ValueError: other seeds than the search's by number or shape, or a result of something
            else than ``search`` and ``diffchase``, or of the latter and no pair is given.
        ModelError: a model fails on a generation.
    """
    if seeds.shape != result.triggers.shape:
        raise ValueError(f"seeds have shape {seeds.shape}, the search's {result.triggers.shape}")
    accepted = (*VARIANTS, "diffchaser")
    if result.variant not in accepted:
        raise ValueError(
            f"result is of {result.variant!r}; accepted are those of {', '.join(accepted)}"
        )
    if result.variant == "diffchaser":
        if pair is None:
            raise ValueError(
                "pair is None; accepted for a result of 'diffchaser' is its pair, whose answers "
                "its generations follow"
            )
        return diffchaser.again(pair, result, seeds)
    key = jax.random.wrap_key_data(jnp.asarray(result.settings["key"], jnp.uint32), impl=IMPL)
    table = VARIANTS[result.variant].table
    max_l2 = result.settings["max_l2"]
    images = seeds.copy()
    for place, chain in enumerate(result.chains):
        own = jax.random.fold_in(key, place)
        for name, *how in chain:
            if name == "line":
                target, far = how
                images[place] = lines.at(seeds[place], seeds[target], far)
            else:
                operator = jnp.int32(mutate.NAMES.index(name))
                images[place] = _mutant(
                    table, max_l2, operator, own, how[0], seeds[place], images[place]
                )
    return images


def _one(table, max_l2, operator, key, query, seed, image):
    return within(max_l2, seed, mutate.mutate(table, operator, mutation_key(key, query), image))


_mutant = jax.jit(_one, static_argnums=(0, 1))
