"""Convolution and max pooling whose gradient for their input is quick on a CPU.

Values and gradients are those of the operations themselves. What is given up is the gradient for
a kernel, which is 0 here, and derivatives beyond the first in reverse mode.

On a CPU, jax 0.10.2, in a rolled loop: XLA's own gradient of a 5x5 convolution from 6 to 16
channels takes 9 times as long as its forward pass, as transposed dimensions miss the fast path;
written as a convolution with a turned kernel it takes as long. The gradient of max pooling, a
select-and-scatter, takes 7 times as long as comparisons element by element.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnslicer_jax.convolution import convolve
from nnslicer_jax.graph import Node

_NHWC = (0, 3, 1, 2)
_HWIO = (3, 2, 0, 1)


def quick(node: Node, *args: jax.Array) -> tuple[jax.Array, ...] | None:
    """The node on a batch, or None if it has no quicker form.

    Args:
      node: Of a traced model, its samples leading its operands.
      args: Its operands, those that depend on the sample `[B, ...]`.
    """
    q = node.params
    if node.key == "conv_general_dilated" and node.data == (True, False):
        spec = q["dimension_numbers"]
        plain = (spec.lhs_spec, spec.rhs_spec, spec.out_spec) == (_NHWC, _HWIO, _NHWC)
        whole = q["feature_group_count"] == q["batch_group_count"] == 1
        if plain and whole and set(q["lhs_dilation"]) == {1} and args[0].ndim == 4:
            precise = q["precision"], q["preferred_element_type"]
            how = tuple(q["window_strides"]), tuple(q["padding"]), tuple(q["rhs_dilation"])
            return (_convolution(args[0].shape, *how, precise, *args),)
    if node.key == "reduce_window_max":
        window = tuple(q["window_dimensions"])
        apart = tuple(q["window_strides"]) == window and not any(map(any, q["padding"]))
        undilated = {*q["base_dilation"], *q["window_dilation"]} == {1}
        if apart and undilated and all(n >= k for n, k in zip(args[0].shape, window, strict=True)):
            return (_max_pool(window, *args),)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _convolution(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    precise: tuple[Any, Any],
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """A convolution of `x` of the given shape."""
    return _convolve(strides, padding, dilation, precise, x, kernel)


def _convolve(
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    precise: tuple[Any, Any],
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    return convolve(
        x, kernel, strides, padding, (1, 1), dilation, ("NHWC", "HWIO", "NHWC"),
        precision=precise[0], preferred_element_type=precise[1],
    )  # fmt: skip


def _convolution_forward(shape, strides, padding, dilation, precise, x, kernel):
    return _convolve(strides, padding, dilation, precise, x, kernel), kernel


def _convolution_backward(shape, strides, padding, dilation, precise, kernel, back):
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    config = []
    for size, out, k, s, (low, _) in zip(
        shape[1:3], back.shape[1:3], reach, strides, padding, strict=True
    ):
        before = k - 1 - low
        config.append((before, size + k - 1 - ((out - 1) * s + 1) - before, s - 1))
    spread = [(0, 0, 0), *config, (0, 0, 0)]
    zero = jnp.zeros((), back.dtype)
    if reach == [1, 1]:
        # A product at each position: nothing is gained by spreading the positions first.
        found = _convolve((1, 1), ((0, 0),) * 2, (1, 1), precise, back, turned)
        found = lax.pad(found, zero.astype(found.dtype), spread)
    elif any(low < 0 or high < 0 or between for low, high, between in config):
        back = lax.pad(back, zero, spread)
        found = _convolve((1, 1), ((0, 0),) * 2, dilation, precise, back, turned)
    else:
        around = [(low, high) for low, high, _ in config]
        found = _convolve((1, 1), around, dilation, precise, back, turned)
    return found.astype(kernel.dtype), jnp.zeros_like(kernel)


_convolution.defvjp(_convolution_forward, _convolution_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(window: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The maximum of each window; windows do not overlap, and what is left over is dropped."""
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    return lax.reduce_window(x, jnp.asarray(low, x.dtype), lax.max, window, window, "VALID")


def _max_pool_forward(window, x):
    out = _max_pool(window, x)
    return out, (x, out)


def _max_pool_backward(window, kept, back):
    x, out = kept
    taken = jnp.zeros(out.shape, bool)
    parts = []
    for tap in itertools.product(*map(range, window)):
        stop = [t + (n - 1) * k + 1 for t, n, k in zip(tap, out.shape, window, strict=True)]
        hit = (lax.slice(x, tap, stop, window) == out) & ~taken
        # Of equal ones the first takes all.
        taken |= hit
        parts.append(jnp.where(hit, back, 0))
    rank = x.ndim
    laid = jnp.stack(parts).reshape(*window, *out.shape)
    laid = laid.transpose([a for axis in range(rank) for a in (rank + axis, axis)])
    covered = [n * k for n, k in zip(out.shape, window, strict=True)]
    rest = [(0, n - c, 0) for n, c in zip(x.shape, covered, strict=True)]
    return (lax.pad(laid.reshape(covered), jnp.zeros((), back.dtype), rest),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
