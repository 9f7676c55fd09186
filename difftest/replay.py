"""Making the triggers of a saved search again, bit for bit, and asking the pair about them."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from difftest import lines, mutate
from difftest.ask import ask
from difftest.pair import ModelPair
from difftest.result import SearchResult
from difftest.seeds import IMPL
from difftest.walk import VARIANTS, mutation_key, within

# Between answers to one image in two batches.
_ROUNDING = 0.01


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
    if result.variant not in VARIANTS:
        raise ValueError(
            f"result is of {result.variant!r}; accepted are those of {', '.join(VARIANTS)}"
        )
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


def confirm(pair: ModelPair, result: SearchResult, batch_size: int = 128) -> np.ndarray:
    """Asks the pair about the saved triggers: bool ``[N]``, whether each still is one.

    Of a search that keeps the label, the original model must give it too.
    """
    good = np.zeros(len(result.triggers), bool)
    for some, original, compressed in _answers(pair, result, result.success, batch_size):
        labels = original.argmax(axis=1)
        good[some] = labels != compressed.argmax(axis=1)
        if result.settings.get("keep_label"):
            good[some] &= labels == result.seed_labels[some]
    return good


def same_answers(pair: ModelPair, result: SearchResult, batch_size: int = 128) -> bool:
    """Whether the pair answers the saved images as the result says, but for rounding.

    The middle one of all rows decides: a network of 8 bits may round a few of them otherwise in
    another batch.
    """
    done = ~np.isin(result.status, ("waiting", "error"))
    apart = [
        np.maximum(
            np.abs(original - result.outputs_original[some]).max(axis=1),
            np.abs(compressed - result.outputs_compressed[some]).max(axis=1),
        )
        for some, original, compressed in _answers(pair, result, done, batch_size)
    ]
    return not apart or float(np.median(np.concatenate(apart))) <= _ROUNDING


def _answers(
    pair: ModelPair, result: SearchResult, rows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Places among the rows that are answered, and both models' answers there, ``[n, K]``."""
    places = np.flatnonzero(rows)
    for start in range(0, len(places), batch_size):
        some = places[start : start + batch_size]
        original, compressed, errors = ask(
            pair, result.triggers[some], result.outputs_original.shape[1]
        )
        answered = np.array([error is None for error in errors])
        yield some[answered], original[answered], compressed[answered]


def _one(table, max_l2, operator, key, query, seed, image):
    return within(max_l2, seed, mutate.mutate(table, operator, mutation_key(key, query), image))


_mutant = jax.jit(_one, static_argnums=(0, 1))
