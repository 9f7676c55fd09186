"""What a search starts from: seeds and key checked, and both models' answers to the seeds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difftest.ask import ask
from difftest.options import said
from difftest.pair import ModelError, ModelPair
from difftest.result import SearchResult, empty

IMPL = "threefry2x32"


def checked_seeds(seeds: Any) -> np.ndarray:
    """Images to start from, as a NumPy array.

    Raises:
        ValueError: not uint8 ``[N, H, W, C]`` with height and width of at least 8.
    """
    shape, dtype = getattr(seeds, "shape", None), getattr(seeds, "dtype", None)
    if shape is None or len(shape) != 4 or dtype != np.uint8 or min(shape[1:3]) < 8 or not shape[3]:
        given = type(seeds).__name__ if shape is None else f"{dtype} {tuple(shape)}"
        raise ValueError(
            f"seeds are {given}; accepted are uint8 images [N, H, W, C] with height and width of "
            "at least 8"
        )
    return np.asarray(seeds)


def checked_key(key: Any) -> jax.Array:
    """The key as a typed one, of the generator that ``replay`` knows.

    Raises:
        ValueError: no key, several keys, or of another generator.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(key)) != IMPL:
        raise ValueError(f"key is of the generator {jax.random.key_impl(key)}; accepted is {IMPL}")
    # One key: typed, or the two numbers that jax.random.PRNGKey gives.
    if not (typed and shape == ()) and not (dtype == np.uint32 and shape == (2,)):
        given = said(key) if shape is None else f"{dtype} {tuple(shape)}"
        raise ValueError(f"key is {given}; accepted is one key, such as jax.random.key(0)")
    return key if typed else jax.random.wrap_key_data(jnp.asarray(key), impl=IMPL)


def labelled(
    pair: ModelPair, seeds: np.ndarray, variant: str, settings: dict[str, Any], batch_size: int
) -> SearchResult:
    """Rows with the models' answers to the seeds themselves.

    Args:
        pair: the models.
        seeds: uint8 ``[N, H, W, C]``.
        variant: the name of the search.
        settings: its options.
        batch_size: seeds asked at a time.

    Returns:
        Rows that wait, disagree already, or hold an error.

    Raises:
        ModelError: the models fail on every seed.
    """
    classes, answers = None, []
    for start in range(0, len(seeds), batch_size):
        answers.append(ask(pair, seeds[start : start + batch_size], classes))
        classes = classes or answers[-1][0].shape[1] or None
    errors = [error for *_, some in answers for error in some]
    if answers and classes is None:
        raise ModelError(errors[0])
    rows = empty(seeds, classes or 0, variant, settings)
    if not answers:
        return rows
    rows.errors[:] = errors
    for number, (original, compressed, _) in enumerate(answers):
        # Batches that failed before the classes were known have none.
        if original.shape[1]:
            some = slice(number * batch_size, number * batch_size + len(original))
            rows.outputs_original[some], rows.outputs_compressed[some] = original, compressed
    failed = np.array([error is not None for error in errors])
    rows.seed_labels[:] = np.where(failed, -1, rows.outputs_original.argmax(axis=1))
    agree = rows.seed_labels == rows.outputs_compressed.argmax(axis=1)
    rows.status[failed] = "error"
    rows.status[~failed & ~agree] = "disagrees"
    rows.keeps_label[:] = ~failed
    return rows
