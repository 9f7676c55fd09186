"""Matrix products and convolutions in one form: rows of terms against columns of weights.

Any `dot_general` and any `conv_general_dilated` is `[G, P, K] x [G, K, O] -> [G, P, O]`: G
batch dimensions or feature groups, P positions, K terms under each output, O outputs at each
position. The three maps to that form only move data, so their transposes lead back.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from nnslicer_jax.graph import Node, UnsupportedError
from nnslicer_jax.windows import windows

Move = Callable[[jax.Array], jax.Array]
Shape = tuple[int, ...]


class Product(NamedTuple):
    """Linear maps from a node's operands and output to rows, columns and results.

    Attributes:
      rows: Left operand to `[G, P, K]`.
      columns: Right operand to `[G, K, O]`.
      results: Output to `[G, P, O]`.
    """

    rows: Move
    columns: Move
    results: Move


def product(node: Node, left: Shape, right: Shape) -> Product:
    """The matrix form of a `dot_general` or `conv_general_dilated` of two traced shapes."""
    return Product(*(_dot(node, left, right) if node.key == "dot_general" else _conv(node, right)))


def inverse(move: Move, shape: Shape, back: jax.Array) -> jax.Array:
    """Transpose of a linear map that moves data, applied to float32 `back`."""
    aval = jax.ShapeDtypeStruct(tuple(shape), back.dtype)
    (out,) = jax.linear_transpose(move, aval)(back)
    return out


def _dot(node: Node, left: Shape, right: Shape) -> tuple[Move, Move, Move]:
    (left_k, right_k), (left_b, right_b) = node.params["dimension_numbers"]
    left_free = [a for a in range(len(left)) if a not in (*left_k, *left_b)]
    right_free = [a for a in range(len(right)) if a not in (*right_k, *right_b)]
    g = _count(left, left_b)
    p, k, o = _count(left, left_free), _count(left, left_k), _count(right, right_free)
    return (
        lambda a: a.transpose(*left_b, *left_free, *left_k).reshape(g, p, k),
        lambda b: b.transpose(*right_b, *right_k, *right_free).reshape(g, k, o),
        lambda y: y.reshape(g, p, o),
    )


def _conv(node: Node, kernel: Shape) -> tuple[Move, Move, Move]:
    q = node.params
    spec = q["dimension_numbers"]
    if q["batch_group_count"] != 1:
        raise UnsupportedError(f"slicing: no rule for {node} with a batch_group_count")
    groups = q["feature_group_count"]
    size = [kernel[a] for a in spec.rhs_spec[2:]]
    taps = _count(kernel, spec.rhs_spec[2:])
    wide = (1, *size, 1)

    def rows(x: jax.Array) -> jax.Array:
        x = x.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
        x = windows(
            x, wide, (1, *q["window_strides"], 1), ((0, 0), *q["padding"], (0, 0)),
            (1, *q["lhs_dilation"], 1), (1, *q["rhs_dilation"], 1), axis=-2,
        )  # fmt: skip
        x = x.reshape(-1, taps, groups, x.shape[-1] // groups)
        return x.transpose(2, 0, 1, 3).reshape(groups, x.shape[0], -1)

    def columns(w: jax.Array) -> jax.Array:
        out, into, *space = spec.rhs_spec
        w = w.transpose(*space, into, out)
        w = w.reshape(-1, groups, w.shape[-1] // groups)
        return w.transpose(1, 0, 2)

    def results(y: jax.Array) -> jax.Array:
        y = y.transpose(spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
        return y.reshape(-1, groups, y.shape[-1] // groups).transpose(1, 0, 2)

    return rows, columns, results


def _count(shape: Shape, axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
