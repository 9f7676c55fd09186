"""The seven mutation operators of DFlare, on uint8 images.

Tian et al., TOSEM 2023, table 3 (which leaves out salt and pepper, that the released code has).
There are two operator tables: "released" does that code's arithmetic, a cast to uint8 before any
clipping, so that multiplicative noise wraps modulo 256 on bright pixels and truncation lowers half
of the non-zero pixels under Gaussian noise; "clean" rounds and clips to 0..255.

Everything is computed in whole numbers, so that a key gives the same image on every device.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from difftest import blur
from difftest.normal import ONE, normal

NAMES = (
    "gaussian_noise",
    "salt_and_pepper",
    "multiplicative_noise",
    "random_pixel_change",
    "mean_blur",
    "gaussian_blur",
    "median_blur",
)
TABLES = ("released", "clean")

_NOISE_VARIANCE = 0.1
_SALT = 0.002
_MOST_CHANGED = 9
_MEAN_SPAN = 0.5
_MOST_VARIANCE = 0.05
_BITS = ONE.bit_length() - 1

_ToBytes = Callable[[jax.Array], jax.Array]


def mutate(table: str, operator: jax.Array, key: jax.Array, image: jax.Array) -> jax.Array:
    """One mutant.

    Args:
        table: of ``TABLES``.
        operator: int32 scalar, the place in ``NAMES``.
        key: of the draw.
        image: uint8 ``[H, W, C]``.

    Returns:
        uint8 ``[H, W, C]``.

    Raises:
        ValueError: another table.
    """
    if table not in TABLES:
        raise ValueError(f"table is {table!r}; accepted are {', '.join(TABLES)}")
    to_bytes = _wrapped if table == "released" else _clipped
    branches = (
        partial(_gaussian_noise, to_bytes),
        _salt_and_pepper,
        partial(_multiplicative_noise, to_bytes),
        _random_pixel_change,
        _mean_blur,
        _gaussian_blur,
        _median_blur,
    )
    return lax.switch(operator, branches, key, image)


def mutate_batch(table: str, operators: jax.Array, keys: jax.Array, images: jax.Array) -> jax.Array:
    """One mutant of each image, as ``mutate`` makes it.

    On a CPU each image goes through its own operator only; elsewhere all images go through all
    operators at once, which an accelerator does in less time.

    Args:
        table: of ``TABLES``.
        operators: int32 ``[B]``.
        keys: ``[B]``.
        images: uint8 ``[B, H, W, C]``.
    """
    one = partial(mutate, table)

    def each(operators: jax.Array, keys: jax.Array, images: jax.Array) -> jax.Array:
        return lax.map(lambda row: one(*row), (operators, keys, images))

    return lax.platform_dependent(operators, keys, images, cpu=each, default=jax.vmap(one))


def _wrapped(values: jax.Array) -> jax.Array:
    """uint8 of fixed-point int32 as a C cast makes it: truncated towards 0, modulo 256."""
    return (jnp.sign(values) * (jnp.abs(values) >> _BITS)).astype(jnp.uint8)


def _clipped(values: jax.Array) -> jax.Array:
    return jnp.clip((values + ONE // 2) >> _BITS, 0, 255).astype(jnp.uint8)


def _gaussian_noise(to_bytes: _ToBytes, key: jax.Array, image: jax.Array) -> jax.Array:
    deviation = round(np.sqrt(_NOISE_VARIANCE) * ONE)
    noise = normal(key, image.shape) * deviation >> _BITS
    return to_bytes((image.astype(jnp.int32) << _BITS) + noise)


def _salt_and_pepper(key: jax.Array, image: jax.Array) -> jax.Array:
    count = int(np.ceil(_SALT * image.size))
    salt, pepper = (_coordinates(each, image.shape, count) for each in jax.random.split(key))
    return image.at[salt].set(255).at[pepper].set(0)


def _multiplicative_noise(to_bytes: _ToBytes, key: jax.Array, image: jax.Array) -> jax.Array:
    key_mean, key_variance, key_noise = jax.random.split(key, 3)
    span = round(_MEAN_SPAN * ONE)
    mean = jax.random.randint(key_mean, (), -span, span)
    # Deviations of variances spread evenly over (0, 0.05).
    deviations = np.sqrt((np.arange(256) + 0.5) / 256 * _MOST_VARIANCE) * ONE
    which = jax.random.bits(key_variance, (), jnp.uint8)
    deviation = jnp.asarray(deviations.round().astype(np.int32))[which]
    factor = mean + (normal(key_noise, image.shape) * deviation >> _BITS)
    return to_bytes(image.astype(jnp.int32) * (ONE + factor))


def _random_pixel_change(key: jax.Array, image: jax.Array) -> jax.Array:
    key_count, key_place, key_value = jax.random.split(key, 3)
    count = jax.random.randint(key_count, (), 0, _MOST_CHANGED + 1)
    places = jnp.ravel_multi_index(
        _coordinates(key_place, image.shape, _MOST_CHANGED), image.shape, mode="clip"
    )
    values = jax.random.bits(key_value, (_MOST_CHANGED,), jnp.uint8)
    flat, pixels = image.reshape(-1), jnp.arange(image.size)
    # One after the other: which of two writes to one place wins must not be the device's choice.
    for turn in range(_MOST_CHANGED):
        here = (pixels == places[turn]) & (turn < count)
        flat = jnp.where(here, values[turn], flat)
    return flat.reshape(image.shape)


def _mean_blur(key: jax.Array, image: jax.Array) -> jax.Array:
    branches = [partial(blur.mean, size=size) for size in (1, 2, 3, 4, 5)]
    return lax.switch(jax.random.randint(key, (), 0, len(branches)), branches, image)


def _gaussian_blur(key: jax.Array, image: jax.Array) -> jax.Array:
    branches = [partial(blur.gaussian, size=size) for size in (1, 3, 5, 7)]
    return lax.switch(jax.random.randint(key, (), 0, len(branches)), branches, image)


def _median_blur(key: jax.Array, image: jax.Array) -> jax.Array:
    branches = [partial(blur.median, size=size) for size in (1, 3, 5, 7)]
    return lax.switch(jax.random.randint(key, (), 0, len(branches)), branches, image)


def _coordinates(key: jax.Array, shape: tuple[int, ...], count: int) -> tuple[jax.Array, ...]:
    """Places drawn axis by axis, int32 ``[count]`` each."""
    highest = jnp.array(shape, jnp.int32)[:, None]
    return tuple(jax.random.randint(key, (len(shape), count), 0, highest))
