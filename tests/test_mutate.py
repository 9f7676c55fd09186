"""The mutation operators, against restatements and against OpenCV."""

from functools import partial

import hypothesis.extra.numpy as numpy_strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difftest import blur, mutate
from difftest.normal import ONE, normal
from tests.naive import blur as naive

SHAPES = [(9, 13, 3), (8, 8, 1)]
KEYS = jax.random.split(jax.random.key(0), 200)
ONE_MUTANT = jax.jit(mutate.mutate, static_argnums=0)
BATCH = jax.jit(mutate.mutate_batch, static_argnums=0)


def _image(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def _mutants(table, name, image, keys=KEYS):
    """One mutant a key, as integers that can be subtracted."""
    operators = jnp.full(len(keys), mutate.NAMES.index(name), jnp.int32)
    images = jnp.broadcast_to(jnp.asarray(image), (len(keys), *image.shape))
    return np.asarray(BATCH(table, operators, keys, images)).astype(int)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [3, 5, 7])
def test_gaussian_and_median_blur(shape, size):
    image = _image(shape)
    assert (blur.gaussian(jnp.asarray(image), size) == naive.gaussian(image, size)).all()
    assert (blur.median(jnp.asarray(image), size) == naive.median(image, size)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_mean_blur_is_the_mean_rounded(shape, size):
    image = _image(shape)
    ours, exact = np.asarray(blur.mean(jnp.asarray(image), size)), naive.mean(image, size)
    if size % 2:
        assert (ours == np.floor(exact + 0.5)).all()
    else:  # OpenCV rounds 1/4 up with four pixels, 7/16 with sixteen.
        assert (ours == np.floor(exact + 0.5 + 1 / size**2)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_blurs_are_opencvs_at_the_borders_too(shape):
    cv2 = pytest.importorskip("cv2")
    image = _image(shape)
    for size in (1, 2, 3, 4, 5):
        theirs = cv2.blur(image, (size, size)).reshape(shape)
        assert (blur.mean(jnp.asarray(image), size) == theirs).all()
    for size in (1, 3, 5, 7):
        theirs = cv2.GaussianBlur(image, (size, size), 0).reshape(shape)
        assert (blur.gaussian(jnp.asarray(image), size) == theirs).all()
        theirs = cv2.medianBlur(image, size).reshape(shape)
        assert (blur.median(jnp.asarray(image), size) == theirs).all()


def test_normal_draws_are_normal():
    draws = np.asarray(normal(jax.random.key(1), (200_000,))) / ONE
    assert abs(draws.mean()) < 5 / np.sqrt(200_000)
    assert abs(draws.std() - 1) < 5 / np.sqrt(2 * 200_000)
    assert abs((draws > 1.96).mean() - 0.025) < 5 * np.sqrt(0.025 * 0.975 / 200_000)


@pytest.mark.parametrize("table", mutate.TABLES)
def test_gaussian_noise(table):
    image = _image((8, 8, 1))
    for key in KEYS[:20]:
        noisy = image + np.asarray(normal(key, image.shape)) / ONE * np.sqrt(0.1)
        expected = np.trunc(noisy) % 256 if table == "released" else np.clip(noisy.round(), 0, 255)
        mutant = _mutants(table, "gaussian_noise", image, key[None])[0]
        # The noise is rounded to 1 / 4096: a value that near a step may fall on either side.
        step = noisy if table == "released" else noisy + 0.5
        clear = np.abs(step - np.round(step)) > 1 / 1024
        assert clear.mean() > 0.9
        assert (mutant == expected)[clear].all()


def test_truncation_lowers_half_of_the_pixels_in_the_released_table():
    image = np.full((20, 20, 1), 100, np.uint8)
    change = _mutants("released", "gaussian_noise", image) - 100
    assert abs((change == -1).mean() - 0.5) < 0.01
    change = _mutants("clean", "gaussian_noise", image) - 100
    assert abs((change == -1).mean() - (change == 1).mean()) < 0.01


def test_multiplicative_noise_wraps_in_the_released_table_only():
    image = np.full((20, 20, 1), 255, np.uint8)
    released = _mutants("released", "multiplicative_noise", image)
    clean = _mutants("clean", "multiplicative_noise", image)
    brighter = clean.min(axis=(1, 2, 3)) == 255
    assert 0.05 < brighter.mean() < 0.6
    # All values between 255 and 2 * 255 became their remainders.
    assert (released[brighter] < 255).mean() > 0.9
    assert clean.min() >= 0 and clean.max() <= 255


def test_multiplicative_noise_has_the_mean_and_deviation_of_the_published_code():
    image = np.full((40, 40, 1), 100, np.uint8)
    factors = _mutants("clean", "multiplicative_noise", image) / 100 - 1
    means, deviations = factors.mean(axis=(1, 2, 3)), factors.std(axis=(1, 2, 3))
    assert -0.55 < means.min() < -0.4 and 0.4 < means.max() < 0.55
    assert deviations.max() < np.sqrt(0.05) * 1.15 and deviations.max() > np.sqrt(0.05) * 0.9
    assert abs((deviations**2).mean() - 0.025) < 0.004


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_salt_and_pepper(shape):
    image = np.full(shape, 100, np.uint8)
    count = int(np.ceil(0.002 * image.size))
    mutants = _mutants("released", "salt_and_pepper", image).reshape(len(KEYS), -1)
    white, black = (mutants == 255).sum(1), (mutants == 0).sum(1)
    assert white.max() <= count and black.max() <= count
    assert (white == count).mean() > 0.7 and (black == count).mean() > 0.7
    assert ((mutants == 100) | (mutants == 255) | (mutants == 0)).all()


def test_random_pixel_change():
    image = np.full((16, 16, 3), 100, np.uint8)
    mutants = _mutants("clean", "random_pixel_change", image).reshape(len(KEYS), -1)
    changed = (mutants != 100).sum(1)
    assert set(changed) == set(range(10))
    values = mutants[mutants != 100]
    assert values.min() < 20 and values.max() > 235
    places = np.flatnonzero((mutants != 100).any(0))
    assert len(places) > 400


@pytest.mark.parametrize("name", ["mean_blur", "gaussian_blur", "median_blur"])
def test_kernels_are_drawn_evenly(name):
    image = _image((9, 13, 3))
    mutants = _mutants("clean", name, image)
    kinds, counts = np.unique(mutants.reshape(len(KEYS), -1), axis=0, return_counts=True)
    assert len(kinds) == (5 if name == "mean_blur" else 4)
    assert (kinds == image.reshape(-1)).all(axis=1).any(), "kernel 1 changes nothing"
    assert counts.min() > 20


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    images=numpy_strategies.arrays(np.uint8, (7, 9, 8, 3)),
    seed=st.integers(0, 2**31),
    table=st.sampled_from(mutate.TABLES),
)
def test_batch_single_and_vmap_agree(images, seed, table):
    keys = jax.random.split(jax.random.key(seed), 7)
    operators = jnp.arange(7, dtype=jnp.int32)
    batch = BATCH(table, operators, keys, images)
    assert batch.dtype == jnp.uint8 and batch.shape == images.shape
    assert (batch == _VMAPPED[table](operators, keys, images)).all()
    for row in range(7):
        assert (batch[row] == ONE_MUTANT(table, operators[row], keys[row], images[row])).all()


_VMAPPED = {table: jax.jit(jax.vmap(partial(mutate.mutate, table))) for table in mutate.TABLES}


def test_unknown_table():
    with pytest.raises(ValueError, match="table is 'other'; accepted are released, clean"):
        mutate.mutate("other", jnp.int32(0), KEYS[0], jnp.zeros((8, 8, 1), jnp.uint8))
