"""Which axis of each activation holds the channels; every other axis is a position.

A convolution says so itself (`dimension_numbers`), a matrix product puts its units last, and
everything in between keeps what it was given, so models in NHWC and in NCHW read alike.
"""

from typing import Any

import numpy as np

from nnslicer_jax import operations

_REDUCE = frozenset({
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin",
})  # fmt: skip


def axes(graph: Any) -> list[int]:
    """Channel axis of every value of a graph, counted in its traced shape."""
    last = [max(len(v.shape) - 1, 0) for v in graph.values]
    found: dict[int, int] = {}
    image = _image_axis(graph)
    if image is not None:
        found[graph.input] = image
    for node in graph.nodes:
        if not any(node.data):
            continue
        for ident in node.outputs:
            axis = _axis(graph, node, ident, found)
            if axis is not None:
                found[ident] = axis
    return [found.get(i, last[i]) for i in range(len(last))]


def _image_axis(graph: Any) -> int | None:
    """The layout of the images is that of the first convolution of an array of their rank."""
    rank = len(graph.values[graph.input].shape)
    for node in graph.nodes:
        if node.key == "conv_general_dilated" and node.data[0]:
            spec = node.params["dimension_numbers"].lhs_spec
            return spec[1] if len(spec) == rank else None
    return None


def _kept_by_product(graph: Any, node: Any, found: dict[int, int]) -> int | None:
    """Where a product with a constant leaves the channels; None where it sums over them.

    A constant, as a graph's adjacency, has no units of its own: it mixes positions.
    """
    if all(node.data):
        return None
    side = node.data.index(True)
    if node.param[1 - side]:
        return None
    contract, batch = node.params["dimension_numbers"]
    ranks = [len(graph.values[ident].shape) for ident in node.inputs]
    free = [
        [a for a in range(rank) if a not in (*summed, *shared)]
        for rank, summed, shared in zip(ranks, contract, batch, strict=True)
    ]
    axis = found.get(node.inputs[side], ranks[side] - 1)
    if axis in batch[side]:
        return list(batch[side]).index(axis)
    if axis not in free[side]:
        return None
    return len(batch[0]) + side * len(free[0]) + free[side].index(axis)


def _axis(graph: Any, node: Any, out: int, found: dict[int, int]) -> int | None:
    shape = graph.values[out].shape
    key, q = node.key, node.params
    if key == "conv_general_dilated":
        return q["dimension_numbers"].out_spec[1]
    if key == "dot_general":
        (contract, _), (batch, _) = q["dimension_numbers"]
        mixed = _kept_by_product(graph, node, found)
        if mixed is not None:
            return mixed
        if node.data[0]:
            return len(shape) - 1
        # weights @ x: the free axes of the weights come before those of x.
        free = len(graph.values[node.inputs[0]].shape) - len(contract) - len(batch)
        return len(batch) + free - 1 if free else len(shape) - 1
    sources = [
        i for i, d in zip(node.inputs, node.data, strict=True)
        if d and i in found and graph.values[i].is_float
    ]  # fmt: skip
    if not sources:
        return None
    source = sources[0]
    axis, before = found[source], graph.values[source].shape
    if key == "transpose":
        return int(list(q["permutation"]).index(axis))
    if key == "broadcast_in_dim":
        return q["broadcast_dimensions"][axis] if axis < len(before) else None
    if key in _REDUCE or key == "squeeze":
        gone = q["axes"] if "axes" in q else q["dimensions"]
        if axis in gone:
            return None
        return axis - int(np.sum(np.asarray(gone) < axis))
    if key == "reshape":
        # The axis survives where as many elements stand before it and after it.
        head, tail = int(np.prod(before[:axis])), int(np.prod(before[axis + 1 :]))
        for k, size in enumerate(shape):
            ahead = int(np.prod(shape[:k])), int(np.prod(shape[k + 1 :]))
            if size == before[axis] and ahead == (head, tail):
                return k
        return None
    if key in operations.REARRANGE and len(shape) != len(before):
        return None
    return axis if len(shape) == len(before) else None
