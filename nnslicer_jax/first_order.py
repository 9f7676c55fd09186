"""Convolution and max pooling whose first derivatives are quick on a CPU.

Values and gradients are those of the operations themselves. What is given up is forward mode.

On a CPU, jax 0.10.2, batch 128, two cores, XLA runs a convolution well anywhere, but its gradients
miss the fast path: outside loops somewhat (4x4 windows, stride 2, 32 to 32 channels: 83 GFLOP/s
forward, 18 for the input), and within loops and branches altogether (TRADES of ten steps took 308
ms in a rolled loop, 89 unrolled; a branch with the gradient for a kernel, seconds). Written anew:

- other strides than 1 become these, pixels that a stride moves over together becoming channels;
- for the input: a convolution with a turned kernel, as fast as forward (16x16, 128 to 128 channels:
  176 GFLOP/s; products of patches 71), but with few channels products of patches (32x32, 3 to 64:
  85 GFLOP/s, turned 11);
- for the kernel: products of patches, of so few samples at a time that they stay in the cache
  (16x16, 4x4 windows, stride 2, 16 to 32 channels, batch 1,152: 54 GFLOP/s, all at once 14).

The gradient of max pooling, a select-and-scatter, takes 7 times as long as comparisons element by
element.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nnslicer_jax.convolution import convolve
from nnslicer_jax.graph import Node

_NHWC = (0, 3, 1, 2)
_HWIO = (3, 2, 0, 1)
# With fewer channels, products of patches are quicker than a convolution with a turned kernel.
_MANY_CHANNELS = 5
# Bytes of patches at a time.
_CACHED = 1 << 20


def quick(node: Node, *args: jax.Array) -> tuple[jax.Array, ...] | None:
    """The node on a batch, or None if it has no quicker form on this device.

    Args:
      node: Of a traced model, its samples leading its operands.
      args: Its operands, those that depend on the sample `[B, ...]`.
    """
    if jax.default_backend() != "cpu":
        return None
    q = node.params
    if node.key == "conv_general_dilated" and node.data == (True, False):
        spec = q["dimension_numbers"]
        plain = (spec.lhs_spec, spec.rhs_spec, spec.out_spec) == (_NHWC, _HWIO, _NHWC)
        whole = q["feature_group_count"] == q["batch_group_count"] == 1
        undilated = set(q["lhs_dilation"]) == {1}
        if plain and whole and undilated and args[0].ndim == 4 and _fits(args[0], args[1], q):
            how = _How(
                tuple(q["window_strides"]), tuple(map(tuple, q["padding"])),
                tuple(q["rhs_dilation"]), q["precision"], q["preferred_element_type"],
            )  # fmt: skip
            return (_convolution(how, *args),)
    if node.key == "reduce_window_max":
        window = tuple(q["window_dimensions"])
        apart = tuple(q["window_strides"]) == window and not any(map(any, q["padding"]))
        undilated = {*q["base_dilation"], *q["window_dilation"]} == {1}
        if apart and undilated and all(n >= k for n, k in zip(args[0].shape, window, strict=True)):
            return (_max_pool(window, *args),)
    return None


def _fits(x: jax.Array, kernel: jax.Array, q: Mapping[str, Any]) -> bool:
    """Whether the window is no larger than what it slides over, so that there is a result."""
    reach = [(k - 1) * d for k, d in zip(kernel.shape[:2], q["rhs_dilation"], strict=True)]
    sizes = zip(x.shape[1:3], q["padding"], reach, strict=True)
    return all(n + sum(pad) > most for n, pad, most in sizes)


class _How(NamedTuple):
    """What a convolution is but for its operands."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, int]
    precision: Any
    dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(how: _How, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(
        x, kernel, how.strides, how.padding, (1, 1), how.dilation, ("NHWC", "HWIO", "NHWC"),
        precision=how.precision, preferred_element_type=how.dtype,
    )  # fmt: skip


def _convolution_forward(how, x, kernel):
    return _convolution(how, x, kernel), (x, kernel)


def _convolution_backward(how, kept, back):
    x, kernel = kept
    (x, kernel), pull = jax.vjp(functools.partial(_unstrided, how), x, kernel)
    if set(how.strides) != {1}:
        how = how._replace(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    if x.shape[3] >= _MANY_CHANNELS and x.dtype == kernel.dtype == back.dtype:
        on_x = _turned(how, x, kernel, back)
    else:
        (on_x,) = jax.vjp(lambda x: _product(how, x, kernel), x)[1](back)
    return pull((on_x, _on_kernel(how, x, kernel, back)))


def _unstrided(how: _How, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The operands of the same convolution in strides of 1.

    If it had others, it then has no padding and no dilation: pixels that a stride moves over
    together become the channels of one, and the window is filled up to whole strides.
    """
    if set(how.strides) == {1}:
        return x, kernel
    apart = ((0, 0, d - 1) for d in how.dilation)
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*apart, (0, 0, 0), (0, 0, 0)])
    steps, config = [], []
    for n, k, s, (low, high) in zip(
        x.shape[1:3], kernel.shape[:2], how.strides, how.padding, strict=True
    ):
        steps.append(-(-k // s))
        tiles = (n + low + high - k) // s + steps[-1]
        config.append((low, tiles * s - n - low, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    fill = [(0, m * s - k) for m, s, k in zip(steps, how.strides, kernel.shape[:2], strict=True)]
    kernel = jnp.pad(kernel, (*fill, (0, 0), (0, 0)))
    return _tiled(x, how.strides), _tiled(kernel[None], how.strides, 2)[0]


def _tiled(x: jax.Array, strides: Sequence[int], channels: int = 1) -> jax.Array:
    """`[B, H s, W t, ...]` with each tile of s times t pixels laid into one."""
    s, t = strides
    rest = x.shape[-channels:]
    x = x.reshape(len(x), x.shape[1] // s, s, x.shape[2] // t, t, *rest)
    x = jnp.moveaxis(x, 2, 3)
    return x.reshape(*x.shape[:3], s * t * rest[0], *rest[1:])


def _turned(how: _How, x: jax.Array, kernel: jax.Array, back: jax.Array) -> jax.Array:
    """The gradient for the input of a convolution with strides of 1, as another one."""
    padding = []
    for size, out, k, d, (low, _) in zip(
        x.shape[1:3], back.shape[1:3], kernel.shape[:2], how.dilation, how.padding, strict=True
    ):
        before = (k - 1) * d - low
        padding.append((before, size - out + (k - 1) * d - before))
    if any(low < 0 or high < 0 for low, high in padding):
        back = lax.pad(
            back, jnp.zeros((), back.dtype),
            [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)],
        )  # fmt: skip
        padding = [(0, 0), (0, 0)]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _convolution(how._replace(padding=tuple(padding)), back, turned).astype(x.dtype)


def _product(how: _How, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution, in strides of 1, as patches times a matrix."""
    height, width, *channels = kernel.shape
    x = _padded(how, x)
    columns = _shifted(_shifted(x, 2, width, how.dilation[1]), 1, height, how.dilation[0])
    return lax.dot_general(
        columns, kernel.reshape(-1, channels[1]), (((3,), (0,)), ((), ())),
        precision=how.precision, preferred_element_type=how.dtype,
    )  # fmt: skip


def _padded(how: _How, x: jax.Array) -> jax.Array:
    sides = ((low, high, 0) for low, high in how.padding)
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def _shifted(x: jax.Array, axis: int, count: int, dilation: int) -> jax.Array:
    """What the window sees along an axis at each place, side by side as channels."""
    places = x.shape[axis] - (count - 1) * dilation
    taps = [lax.slice_in_dim(x, t * dilation, t * dilation + places, axis=axis)
            for t in range(count)]  # fmt: skip
    return lax.concatenate(taps, 3)


def _on_kernel(how: _How, x: jax.Array, kernel: jax.Array, back: jax.Array) -> jax.Array:
    """The gradient for the kernel of a convolution with strides of 1.

    Patches are laid out along the width alone, for a few samples at a time; each row of the window
    is then a product with rows of these.
    """
    height, width, channels, count = kernel.shape
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, back.dtype), jnp.float32)
    rows = back.shape[1]

    def some(x: jax.Array, back: jax.Array) -> jax.Array:
        columns, flat = _shifted(_padded(how, x), 2, width, how.dilation[1]), (-1, count)
        found = [
            lax.dot_general(
                columns[:, t : t + rows].reshape(-1, width * channels), back.reshape(flat),
                (((0,), (0,)), ((), ())), precision=how.precision, preferred_element_type=dtype,
            )
            for t in range(0, height * how.dilation[0], how.dilation[0])
        ]  # fmt: skip
        return jnp.stack(found)

    one = jax.eval_shape(lambda x: _shifted(_padded(how, x), 2, width, how.dilation[1]), x[:1])
    parts = min(len(x), -(-len(x) * one.size * one.dtype.itemsize // _CACHED))
    size = -(-len(x) // parts)
    if parts == 1:
        found = some(x, back)
    else:
        operands = [
            jnp.pad(a, ((0, parts * size - len(a)), *((0, 0),) * 3)).reshape(-1, size, *a.shape[1:])
            for a in (x, back)
        ]
        zeros = jnp.zeros((height, width * channels, count), dtype)
        found, _ = lax.scan(lambda sums, part: (sums + some(*part), None), zeros, tuple(operands))
    return found.reshape(kernel.shape).astype(kernel.dtype)


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
