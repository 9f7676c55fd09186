"""Convolution as patches times a matrix, where XLA's own convolution is slow.

``convolve`` takes the arguments of ``jax.lax.conv_general_dilated`` and may be given to
``flax.linen.Conv(conv_general_dilated=...)``.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]

# On the CPU, XLA's convolution collapses where the output has few positions and many channels.
# GFLOP/s with a 3x3 window, batch 128, two cores, jax 0.10.2, forward | both gradients:
#   output 2x2, 512 -> 512: XLA 2.1 | 4.3,    patches 173 | 169
#   output 2x2, 64 -> 64:   XLA 14  | 26,     patches 126 | 121
#   output 2x2, 16 -> 16:   XLA 53  | 44,     patches 46  | 34
#   4x4 to 2x2, 256 -> 512: XLA 157 | 9,      patches 186 | 178
#   output 3x3, 512 -> 512: XLA 174 | 160,    patches 94  | 87
#   output 8x8, 256 -> 256: XLA 98  | 76,     patches 49  | 57
#   output 32x32, 16 -> 16: XLA 98  | 52,     patches 8   | 9
_FEW_POSITIONS = 4
_MANY_CHANNELS = 32

_NHWC = (0, 3, 1, 2)
_HWIO = (3, 2, 0, 1)


def patches(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
) -> jax.Array:
    """Lays out what a 2-D window sees at each of its positions.

    Args:
        x: images [B, H, W, C], any dtype.
        window: height and width of the window.
        strides: steps of the window.
        padding: "SAME", "SAME_LOWER", "VALID" or ((top, bottom), (left, right)); negative
            numbers crop.
        lhs_dilation: distance of neighbouring pixels once spread apart with zeros.
        rhs_dilation: distance of neighbouring taps of the window.

    Returns:
        [B, OH, OW, kh * kw * C], dtype of x; the last axis is tap-major and channel-minor, the
        row order of an HWIO kernel reshaped to [kh * kw * C, O].

    Raises:
        ValueError: x is not [B, H, W, C].
    """
    if x.ndim != 4:
        raise ValueError(f"patches: expected images [B, H, W, C], got an array of shape {x.shape}")
    spread = tuple(lhs_dilation or (1, 1))
    step = tuple(rhs_dilation or (1, 1))
    reach = [(k - 1) * d + 1 for k, d in zip(window, step, strict=True)]
    if isinstance(padding, str):
        spread_shape = [(n - 1) * d + 1 for n, d in zip(x.shape[1:3], spread, strict=True)]
        padding = lax.padtype_to_pads(spread_shape, reach, strides, padding)
    rows, columns = ((*pad, d - 1) for pad, d in zip(padding, spread, strict=True))
    if any(rows) or any(columns):
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))
    height, width = (
        max(0, (size - extent) // stride + 1)
        for size, extent, stride in zip(x.shape[1:3], reach, strides, strict=True)
    )
    if not height or not width:
        return jnp.zeros((x.shape[0], height, width, window[0] * window[1] * x.shape[3]), x.dtype)

    def tap(row: int, column: int) -> jax.Array:
        stop = (row + (height - 1) * strides[0] + 1, column + (width - 1) * strides[1] + 1)
        return lax.slice(
            x, (0, row, column, 0), (x.shape[0], *stop, x.shape[3]), (1, strides[0], strides[1], 1)
        )

    return lax.concatenate(
        [tap(i * step[0], j * step[1]) for i in range(window[0]) for j in range(window[1])], 3
    )


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``, values and gradients, by the faster of two forms.

    The choice depends on shapes alone, so a model traces to the same operations on every device.
    """
    convolution = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if (
        (layout.lhs_spec, layout.rhs_spec, layout.out_spec) != (_NHWC, _HWIO, _NHWC)
        or not feature_group_count == batch_group_count == 1
        or out_sharding is not None
        or rhs.shape[2] < _MANY_CHANNELS
        or rhs.shape[:2] == (1, 1)
    ):
        return convolution(lhs, rhs)
    height, width = jax.eval_shape(convolution, lhs, rhs).shape[1:3]
    if not 0 < height * width <= _FEW_POSITIONS:
        return convolution(lhs, rhs)
    columns = patches(
        lhs,
        (rhs.shape[0], rhs.shape[1]),
        (window_strides[0], window_strides[1]),
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
    )
    return lax.dot_general(
        columns,
        rhs.reshape(-1, rhs.shape[3]),
        (((3,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
