"""Operations that only move data, read in both directions.

Deltas of moved data are the moved deltas, and what comes back to moved data goes through the
inverse movement, a value used several times receiving the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnslicer_jax import operations
from nnslicer_jax.graph import Node


def forward(node: Node, values: Sequence[jax.Array], moved: Sequence[Any]) -> tuple[Any, ...]:
    """Moves what accompanies the values (deltas, say) as the node moves the values.

    Args:
      node: A node whose key is in `operations.MOVEMENT`.
      values: Its operands.
      moved: What accompanies each operand, of its shape; None counts as zeros. Indices and
        conditions act with their values.

    Returns:
      What accompanies each output.
    """
    if node.key == operations.CUSTOM_DERIVATIVE:
        return tuple(moved[len(moved) - len(node.outputs) :])
    if node.key in operations.IDENTITY:
        return tuple(moved)
    operands = list(values)
    for i in node.moved:
        given = moved[i]
        operands[i] = _zeros(values[i]) if given is None else given.astype(jnp.float32)
    return _mover(node, values)(*operands)


def backward(
    node: Node, values: Sequence[jax.Array], back: Sequence[Any], wanted: Sequence[bool]
) -> list[Any]:
    """The inverse movement of `back`.

    Args:
      node: A node whose key is in `operations.MOVEMENT`.
      values: Its operands.
      back: What comes back to each output, float32, or None.
      wanted: For each operand, whether something should come back to it.

    Returns:
      What comes back to each operand, None where nothing does.
    """
    if node.key == operations.CUSTOM_DERIVATIVE:
        return [None] * (len(values) - len(back)) + list(back)
    if node.key in operations.IDENTITY:
        return list(back)
    places = [i for i in node.moved if wanted[i]]
    mover = _mover(node, values)

    def move(*numbers: jax.Array) -> tuple[jax.Array, ...]:
        operands = [_zeros(v) if i in node.moved else v for i, v in enumerate(values)]
        for place, number in zip(places, numbers, strict=True):
            operands[place] = number
        return mover(*operands)

    avals = [jax.ShapeDtypeStruct(values[i].shape, jnp.float32) for i in places]
    outs = jax.eval_shape(move, *avals)
    given = tuple(
        jnp.zeros(o.shape, jnp.float32) if b is None else b for o, b in zip(outs, back, strict=True)
    )
    returned: list[Any] = [None] * len(values)
    if places:
        transposed = jax.linear_transpose(move, *avals)(given)
        for place, value in zip(places, transposed, strict=True):
            returned[place] = value
    return returned


def _mover(node: Node, values: Sequence[jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """The node as a linear function of what accompanies the values it moves."""
    if node.key not in operations.ORDER:
        return node.bind
    if node.key == "sort":
        axis = node.params["dimension"]
        places = jax.lax.broadcasted_iota(jnp.int32, values[0].shape, axis)
        *_, order = jax.lax.sort((*values, places), axis, num_keys=node.params["num_keys"])
        return lambda *moved: tuple(jnp.take_along_axis(m, order, axis) for m in moved)
    axis = node.params.get("axis", -1)
    _, order = node.bind(*values)
    # Indices, the second output, are no moved data.
    return lambda moved: (jnp.take_along_axis(moved, order, axis), _zeros(order))


def _zeros(value: Any) -> jax.Array:
    return jnp.zeros(jnp.shape(value), jnp.float32)


def is_number(value: Any) -> bool:
    """Whether an operand is moved, rather than saying where to."""
    return jnp.issubdtype(jnp.result_type(value), jnp.floating)


def unbroadcast(back: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Sums `back` over the axes along which an operand of `shape` was broadcast."""
    if tuple(back.shape) == tuple(shape):
        return back
    lead = back.ndim - len(shape)
    axes = [a for a in range(back.ndim) if a < lead or shape[a - lead] == 1 != back.shape[a]]
    return back.sum(axes).reshape(tuple(shape))


def fitted(back: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What comes back to each operand (one with a `value`), summed to that operand's shape."""
    return [
        None if b is None else unbroadcast(b, jnp.shape(a.value))
        for b, a in zip(back, args, strict=True)
    ]
