"""Compaction: a masked network as a really smaller one with the same outputs.

Channels that are not used (see `removal`) are taken out of every array: the traced graph is walked
with smaller parameters and traced again. Each value carries which indices of each of its axes are
left; what is left out of it is 0 or changes nothing. An operation with a rule works on what is
left. Any other gets its operands at their full size, with 0 in place of what is gone, so that the
outputs are right whatever the network is made of, if less is saved.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import nnslicer_jax as nns
from nnslicer_jax import operations
from nnslicer_jax.cost import product_shapes
from nnslicer_jax.graph import Graph, Node
from prune.masks import apply_masks
from prune.removal import known_values, remove, springs

Kept = tuple[np.ndarray, ...]  # for each axis, the indices that are left, ascending


class Compact(NamedTuple):
    """A smaller network: `nns.evaluate(graph, params, images)` runs it.

    Attributes:
      graph: The smaller network, traced; it can be profiled and sliced like any other.
      params: Its parameters, structured as the original ones.
    """

    graph: Graph
    params: Any


class Size(NamedTuple):
    """How large a network is.

    Attributes:
      parameters: Numbers in all parameters, batch statistics among them.
      multiplications: Products of an activation and a weight for one sample.
    """

    parameters: int
    multiplications: int


def compact(graph: Graph, params: Any, masks: Any) -> Compact:
    """Takes out of a network the channels that masks leave without synapses or use.

    The outputs are those of `removal.reduced`, up to the order of float additions: within 1e-5 of
    the largest logit for the networks of the zoo. Single synapses within channels that stay are 0,
    as masks of unstructured pruning leave most of them. Custom derivatives are not kept, that of
    relu apart.

    Args:
      graph: The traced model.
      params: Its parameters.
      masks: Bool, like `params`, False where a synapse is gone; None where nothing is masked.

    Raises:
      ValueError: If masks and parameters do not fit.
    """
    removal = jax.jit(functools.partial(remove, graph))(params, masks)
    used = [np.asarray(there) for there in removal.used]
    full = [tuple(np.arange(n) for n in value.shape) for value in graph.values]
    left = [_left(there) for there in used]
    # Random keys are no NumPy arrays.
    known = {
        ident: value if jnp.issubdtype(value.dtype, jax.dtypes.extended) else np.asarray(value)
        for ident, value in ((i, jnp.asarray(v)) for i, v in known_values(graph).items())
    }
    for ident in (graph.input, graph.logits, *graph.outputs, *known):
        left[ident] = full[ident]
    # A neuron that is gone is left where an array would be empty: it is held at 0.
    still = {
        ident: alive[np.ix_(*left[ident])]
        for ident, alive in ((i, np.asarray(removal.alive[i])) for i in springs(graph))
    }
    still = {ident: alive for ident, alive in still.items() if not alive.all()}
    whole = apply_masks(apply_masks(params, masks), removal.masks)
    leaves, structure = jax.tree.flatten(whole)
    small = [
        leaf[np.ix_(*left[ident])] if np.ndim(leaf) else leaf
        for ident, leaf in zip(graph.params.values(), leaves, strict=True)
    ]

    def apply(params: Any, x: jax.Array) -> Any:
        env: dict[int, Any] = dict(known)
        env.update(zip(graph.params.values(), jax.tree.leaves(params), strict=True))
        env[graph.input] = x
        for node in graph.nodes:
            if all(ident in known for ident in node.outputs):
                continue
            args = [_Array(env[i], left[i], full[i]) for i in node.inputs]
            with jax.named_scope(node.scope):
                outs = _run(node, args, [left[i] for i in node.outputs],
                            [full[i] for i in node.outputs])  # fmt: skip
                for ident, out in zip(node.outputs, outs, strict=True):
                    env[ident] = jnp.where(still[ident], out, 0) if ident in still else out
        return jax.tree.unflatten(graph.out_tree, [env[i] for i in graph.outputs])

    value = graph.values[graph.input]
    made = jax.tree.unflatten(structure, small)
    return Compact(nns.trace(apply, made, jax.ShapeDtypeStruct(value.shape, value.dtype)), made)


def size(graph: Graph, params: Any) -> Size:
    """Counts the parameters and the multiplications of a network."""
    weights = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
    return Size(weights, sum(math.prod(shape) for shape in product_shapes(graph)))


def _left(used: np.ndarray) -> Kept:
    """For each axis the indices at which anything is used; the first where nothing is."""
    found = []
    for axis in range(used.ndim):
        others = tuple(a for a in range(used.ndim) if a != axis)
        at = np.flatnonzero(used.any(others))
        found.append(at if len(at) else np.arange(1))
    return tuple(found)


class _Array:
    """A value of which some indices are left.

    Attributes:
      kept: Which.
      full: All there were.
    """

    def __init__(self, value: Any, kept: Kept, full: Kept) -> None:
        self._value, self.kept, self.full = value, kept, full

    @property
    def shape(self) -> tuple[int, ...]:
        """How large it was."""
        return tuple(map(len, self.full))

    def at(self, wanted: Sequence[np.ndarray]) -> Any:
        """The value at the wanted indices of each axis, 0 at those that are gone."""
        return _fitted(self._value, self.kept, wanted)


def _fitted(value: Any, kept: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Any:
    for axis, (have, want) in enumerate(zip(kept, wanted, strict=True)):
        if np.array_equal(have, want):
            continue
        place = np.searchsorted(have, want)
        there = have[np.minimum(place, len(have) - 1)] == want
        if isinstance(value, np.ndarray):
            # Constants are never made smaller, so all of it is there.
            value = value.take(place, axis)
            continue
        if not there.all():
            blank = jnp.zeros((*value.shape[:axis], 1, *value.shape[axis + 1 :]), value.dtype)
            value = jnp.concatenate([value, blank], axis)
        place = np.where(there, place, len(have))
        first, count = int(place[0]) if len(place) else 0, len(place)
        if np.array_equal(place, np.arange(first, first + count)):
            value = lax.slice_in_dim(value, first, first + count, axis=axis)
        else:
            value = jnp.take(value, place, axis, mode="clip")
    return value


# Rules --------------------------------------------------------------------------------------
#
# A rule takes the node, its operands and the shape and indices wanted of its first output, and
# returns that output and the indices that it has, or None where it does not apply.

_Rule = Callable[[Node, Sequence[_Array], Kept, Kept], tuple[Any, Sequence[np.ndarray]] | None]
_RULES: dict[str, _Rule] = {}


def _rule(*keys: str) -> Callable[[_Rule], _Rule]:
    def add(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(keys, rule))
        return rule

    return add


def _run(
    node: Node, args: Sequence[_Array], wanted: Sequence[Kept], full: Sequence[Kept]
) -> Sequence[Any]:
    """A node's outputs, at the indices wanted."""
    if node.key == operations.CUSTOM_DERIVATIVE:
        made = args[len(args) - len(wanted) :]
        return [arg.at(want) for arg, want in zip(made, wanted, strict=True)]
    if node.key in _RULES and len(wanted) == 1:
        found = _RULES[node.key](node, args, wanted[0], full[0])
        if found is not None:
            return [_fitted(*found, wanted[0])]
    outs = node.bind(*[arg.at(arg.full) for arg in args])
    return [_fitted(out, f, want) for out, f, want in zip(outs, full, wanted, strict=True)]


def _bind(node: Node, *args: Any, **changed: Any) -> Any:
    params: Mapping[str, Any] = {**node.params, **changed}
    return node.primitive.bind(*args, **node.primitive.get_bind_params(params))


def _zeros(node: Node, args: Sequence[Any], wanted: Sequence[np.ndarray]) -> Any:
    dtype = node.params.get("preferred_element_type") or jnp.result_type(*args)
    return jnp.zeros(tuple(map(len, wanted)), dtype)


@_rule(*(operations.ELEMENTWISE | operations.IDENTITY))
def _elementwise(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    shape = tuple(map(len, full))
    fitted = []
    for arg in args:
        if not arg.shape:
            fitted.append(arg.at(()))
            continue
        if len(arg.shape) != len(shape):
            return None
        stretched = zip(arg.shape, shape, arg.full, wanted, strict=True)
        fitted.append(arg.at([want if n == m else have for n, m, have, want in stretched]))
    return _bind(node, *fitted), wanted


@_rule("relu")
def _relu(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    return jax.nn.relu(args[0].at(wanted)), wanted


@_rule("dot_general")
def _dot_general(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    contracted, batch = node.params["dimension_numbers"]
    at: list[dict[int, np.ndarray]] = [{}, {}]
    for left, right in zip(*contracted, strict=True):
        both = np.intersect1d(args[0].kept[left], args[1].kept[right])
        at[0][left] = at[1][right] = both
    for axis, (left, right) in enumerate(zip(*batch, strict=True)):
        at[0][left] = at[1][right] = wanted[axis]
    rest = iter(wanted[len(batch[0]) :])
    for side, arg in enumerate(args):
        for axis in range(len(arg.shape)):
            if axis not in at[side]:
                at[side][axis] = next(rest)
    fitted = [
        arg.at([a[i] for i in range(len(arg.shape))]) for arg, a in zip(args, at, strict=True)
    ]
    if not all(math.prod(f.shape) for f in fitted):
        return _zeros(node, fitted, wanted), wanted
    return _bind(node, *fitted), wanted


@_rule("conv_general_dilated")
def _convolution(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    if node.params["feature_group_count"] != 1 or node.params["batch_group_count"] != 1:
        return None
    spec = node.params["dimension_numbers"]
    image, kernel = list(args[0].full), list(args[1].full)
    features = spec.lhs_spec[1], spec.rhs_spec[1]
    both = np.intersect1d(args[0].kept[features[0]], args[1].kept[features[1]])
    image[features[0]] = kernel[features[1]] = both
    made = list(full)
    made[spec.out_spec[1]] = kernel[spec.rhs_spec[0]] = wanted[spec.out_spec[1]]
    fitted = args[0].at(image), args[1].at(kernel)
    if not len(both):
        return _zeros(node, fitted, made), made
    return _bind(node, *fitted), made


@_rule("reduce_sum", "reduce_max", "reduce_min")
def _reduction(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    # What is gone of a sum is 0; of a largest number, 0 may be the largest.
    rest, axes = iter(wanted), node.params["axes"]
    over = args[0].kept if node.key == "reduce_sum" else args[0].full
    at = [over[axis] if axis in axes else next(rest) for axis in range(len(args[0].shape))]
    return _bind(node, args[0].at(at)), wanted


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _pool(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    names = "window_dimensions", "window_strides", "base_dilation", "window_dilation"
    alone = [
        all(node.params[name][axis] == 1 for name in names)
        and tuple(node.params["padding"][axis]) == (0, 0)
        for axis in range(len(full))
    ]
    at = [
        want if one else have for one, want, have in zip(alone, wanted, args[0].full, strict=True)
    ]
    made = [want if one else have for one, want, have in zip(alone, wanted, full, strict=True)]
    return _bind(node, args[0].at(at)), made


@_rule("broadcast_in_dim")
def _broadcast(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    into = node.params["broadcast_dimensions"]
    at = [
        wanted[d] if len(full[d]) == n else have
        for d, n, have in zip(into, args[0].shape, args[0].full, strict=True)
    ]
    return lax.broadcast_in_dim(args[0].at(at), tuple(map(len, wanted)), into), wanted


@_rule("reshape")
def _reshape(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    if node.params["dimensions"] is not None:
        return None
    number = np.arange(math.prod(args[0].shape)).reshape(args[0].shape)
    number = number[np.ix_(*args[0].kept)].ravel()
    places = np.unravel_index(number, tuple(map(len, full))) if full else ()
    made = [np.unique(place) for place in places]
    if math.prod(map(len, made)) != len(number):
        return None
    return lax.reshape(args[0].at(args[0].kept), tuple(map(len, made))), made


@_rule("transpose")
def _transpose(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    at = [wanted[i] for i in np.argsort(node.params["permutation"])]
    return _bind(node, args[0].at(at)), wanted


@_rule("squeeze")
def _squeeze(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    rest, gone = iter(wanted), node.params["dimensions"]
    at = [args[0].full[axis] if axis in gone else next(rest) for axis in range(len(args[0].shape))]
    return _bind(node, args[0].at(at)), wanted


@_rule("concatenate")
def _concatenate(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    axis, start, parts = node.params["dimension"], 0, []
    for arg in args:
        stop = start + arg.shape[axis]
        own = wanted[axis][(wanted[axis] >= start) & (wanted[axis] < stop)] - start
        if len(own):
            parts.append(arg.at([own if a == axis else want for a, want in enumerate(wanted)]))
        start = stop
    return lax.concatenate(parts, axis), wanted


@_rule("pad")
def _pad(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    alone = [tuple(config) == (0, 0, 0) for config in node.params["padding_config"]]
    at = [
        want if one else have for one, want, have in zip(alone, wanted, args[0].full, strict=True)
    ]
    made = [want if one else have for one, want, have in zip(alone, wanted, full, strict=True)]
    return _bind(node, args[0].at(at), args[1].at(())), made


@_rule("slice")
def _slice(node: Node, args: Sequence[_Array], wanted: Kept, full: Kept) -> Any:
    alone = [n == len(have) for n, have in zip(args[0].shape, full, strict=True)]
    at = [
        want if one else have for one, want, have in zip(alone, wanted, args[0].full, strict=True)
    ]
    made = [want if one else have for one, want, have in zip(alone, wanted, full, strict=True)]
    start, limit = node.params["start_indices"], node.params["limit_indices"]
    start = [0 if one else s for one, s in zip(alone, start, strict=True)]
    limit = [len(a) if one else s for one, a, s in zip(alone, at, limit, strict=True)]
    return lax.slice(args[0].at(at), start, limit, node.params["strides"]), made
