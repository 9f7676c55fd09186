"""The terms under each output of a windowed operation, laid side by side.

`windows` moves data only, so it is linear and its transpose puts contributions back.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from nnslicer_jax.graph import Node


def windows(
    x: jax.Array,
    size: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int] | None = None,
    window_dilation: Sequence[int] | None = None,
    fill: float = 0.0,
    axis: int = -1,
) -> jax.Array:
    """Every window of `x`, its elements along a new axis.

    Args:
      x: An array of rank R, any dtype.
      size: Window extent along each of the R axes.
      strides: Steps of the window.
      padding: (low, high) along each axis; negative numbers crop.
      base_dilation: Distance of neighbouring elements of `x`.
      window_dilation: Distance of neighbouring elements of the window.
      fill: What stands in the padding.
      axis: Where the new axis goes.

    Returns:
      Array of rank R + 1 and of `x`'s dtype: one entry per window; along `axis` its
      elements in row-major order.
    """
    base = base_dilation or (1,) * x.ndim
    reach = window_dilation or (1,) * x.ndim
    config = [(low, high, b - 1) for (low, high), b in zip(padding, base, strict=True)]
    x = lax.pad(x, jnp.asarray(fill, x.dtype), config)
    count = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape, size, reach, strides, strict=True)
    ]
    taps = []
    for offset in itertools.product(*map(range, size)):
        start = [o * d for o, d in zip(offset, reach, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, count, strides, strict=True)]
        taps.append(lax.slice(x, start, stop, strides))
    return jnp.stack(taps, axis=axis)


def gathering(node: Node, fill: float = 0.0) -> Callable[[jax.Array], jax.Array]:
    """The terms under each output of a reduction along a new last axis; a linear map."""
    q = node.params
    if "window_dimensions" in q:
        return lambda x: windows(
            x, q["window_dimensions"], q["window_strides"], q["padding"], q["base_dilation"],
            q["window_dilation"], fill,
        )  # fmt: skip
    if "reverse" in q:
        axis = q["axis"]

        def through(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, axis, -1)
            square = jnp.ones((x.shape[-1], x.shape[-1]), bool)
            under = jnp.triu(square) if q["reverse"] else jnp.tril(square)
            return jnp.moveaxis(jnp.where(under, x[..., None, :], fill), -2, axis)

        return through

    def reduced(x: jax.Array) -> jax.Array:
        count = len(q["axes"])
        x = jnp.moveaxis(x, q["axes"], range(x.ndim - count, x.ndim))
        return x.reshape(*x.shape[: x.ndim - count], -1)

    return reduced
