"""Making the triggers of a saved search again, bit for bit, and asking the pair about them."""

import jax
import jax.numpy as jnp
import numpy as np

from difftest import lines, mutate
from difftest.ask import ask
from difftest.pair import ModelPair
from difftest.result import SearchResult
from difftest.walk import VARIANTS, mutation_key, within


def replay(result: SearchResult, seeds: np.ndarray) -> np.ndarray:
    """Follows each seed's chain.

    Args:
        result: of ``search``.
        seeds: uint8 ``[N, H, W, C]``, those of the search.

    Returns:
        uint8 ``[N, H, W, C]``: the triggers, the seed itself where there is none.

    Raises:
        ValueError: other seeds than the search's by number or shape, or a result of something
            else than ``search``.
    """
    if seeds.shape != result.triggers.shape:
        raise ValueError(f"seeds have shape {seeds.shape}, the search's {result.triggers.shape}")
    if "key" not in result.settings:
        raise ValueError(f"a result of {result.variant!r} has no key to replay it with")
    key = jax.random.wrap_key_data(jnp.asarray(result.settings["key"], jnp.uint32))
    table = VARIANTS["paper" if result.variant == "best" else result.variant].table
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


def confirm(pair: ModelPair, result: SearchResult, batch_size: int = 128) -> np.ndarray:
    """Asks the pair about the saved triggers: bool ``[N]``, whether it disagrees there."""
    disagree = np.zeros(len(result.triggers), bool)
    found = np.flatnonzero(result.success)
    for start in range(0, len(found), batch_size):
        some = found[start : start + batch_size]
        original, compressed, errors = ask(
            pair, result.triggers[some], result.outputs_original.shape[1]
        )
        answered = np.array([error is None for error in errors])
        disagree[some] = answered & (original.argmax(axis=1) != compressed.argmax(axis=1))
    return disagree


def _one(table, max_l2, operator, key, query, seed, image):
    return within(max_l2, seed, mutate.mutate(table, operator, mutation_key(key, query), image))


_mutant = jax.jit(_one, static_argnums=(0, 1))
