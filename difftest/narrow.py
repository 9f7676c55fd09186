"""Convolutions of few taps, such as a first layer's, in the form that is fast on a CPU.

XLA's own convolution on a CPU takes as long for one input channel as for many. Where a window has
few taps in all, a sum of shifted images, the batch innermost, takes a tenth of the time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from difftest.rewrite import rewritten

# Microseconds an image at batch 128, two cores, jax 0.10.2: XLA's convolution, the sum of taps.
#   28x28x1, 5x5 to 4:   76, 4.4        32x32x3, 3x3 to 16: 66, 16
#   12x12x4, 5x5 to 12:  9.5, 12.8      14x14x6, 5x5 to 16: 36, 58
_FEW_TAPS = 32
_NHWC = (0, 3, 1, 2)
_HWIO = (3, 2, 0, 1)


def quick(apply: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    """The same function, whose convolutions of few taps are sums of shifted images on a CPU.

    Args:
        apply: ``apply(params, x) -> out``, any pure function.
    """
    return rewritten(apply, {"conv_general_dilated": _convolved})


def _is_narrow(equation: Any) -> bool:
    params, (x, kernel) = equation.params, (atom.aval for atom in equation.invars)
    layout = params["dimension_numbers"]
    return (
        len(x.shape) == 4
        and (layout.lhs_spec, layout.rhs_spec, layout.out_spec) == (_NHWC, _HWIO, _NHWC)
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and (*params["lhs_dilation"], *params["rhs_dilation"]) == (1, 1, 1, 1)
        and x.dtype == kernel.dtype == equation.outvars[0].aval.dtype == jnp.float32
        and 1 < kernel.shape[0] * kernel.shape[1]
        and kernel.shape[0] * kernel.shape[1] * kernel.shape[2] <= _FEW_TAPS
    )


def _convolved(equation: Any, x: jax.Array, kernel: jax.Array) -> jax.Array | None:
    if not _is_narrow(equation):
        return None
    strides, padding = equation.params["window_strides"], equation.params["padding"]

    def as_it_is(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return equation.primitive.bind(x, kernel, **equation.params)

    def summed(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return by_taps(x, kernel, strides, padding)

    return lax.platform_dependent(x, kernel, cpu=summed, default=as_it_is)


def by_taps(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """A convolution as a sum of shifted images.

    Args:
        x: ``[B, H, W, C]``.
        kernel: ``[kh, kw, C, O]``.
        strides: of the window.
        padding: rows above and below, columns left and right; below 0 crops.

    Returns:
        ``[B, OH, OW, O]``.
    """
    x = lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*ends, 0) for ends in padding), (0, 0, 0))
    )
    x = x.transpose(1, 2, 3, 0)
    rows, columns = (
        (size - reach) // stride + 1
        for size, reach, stride in zip(x.shape, kernel.shape[:2], strides, strict=False)
    )
    out = jnp.zeros((rows, columns, kernel.shape[3], x.shape[3]), x.dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            seen = x[i :: strides[0], j :: strides[1]][:rows, :columns]
            for channel in range(kernel.shape[2]):
                weights = kernel[i, j, channel][None, None, :, None]
                out = out + seen[:, :, channel, None] * weights
    return out.transpose(3, 0, 1, 2)
