"""The model itself, from its graph, on batches of any size and with activations edited.

A fold that carries whole batches. Where a traced shape leads with the batch of one, the batch
stands in that place; elsewhere it leads. So most operations run as the model's author wrote them.
`vmap` of a fold over one sample would leave the axis of one beside the batch, for which XLA lays
out some products anew; it serves for the operations that do not leave the first axis alone.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nnslicer_jax import operations
from nnslicer_jax.first_order import quick
from nnslicer_jax.fold import Rules, check_batch, check_names, forward, leaves, rerun, run
from nnslicer_jax.graph import Graph, Neuron, Node, UnsupportedError, Value, trace

Arrays = tuple[jax.Array, ...]
Edits = Mapping[str, Callable[[jax.Array], jax.Array]]  # neuron name -> edit of its activation

BatchEdits = Mapping[str, Callable[[jax.Array], jax.Array]]  # neuron name -> edit of a batch of it

_SAME_SHAPE = operations.ELEMENTWISE | operations.IDENTITY


def evaluate(
    graph: Graph, params: Any, x: jax.Array, edits: Edits | None = None
) -> tuple[Any, dict[str, jax.Array]]:
    """The model itself, with every activation recorded and `edits` applied.

    Pure and traceable: put it under `jit`, `grad`, `vmap` or a sharding. Activations that the
    caller drops cost nothing under `jit`.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      x: `[B, ...]`, samples of the traced shape, any B of at least one.
      edits: Neuron name to a function of one sample's activation (shape as `graph.neurons()`
        lists it) that returns what to put in its place. Gates and ablations are edits.

    Returns:
      What the model returns, and the activations `[B, ...]` by neuron name.

    Raises:
      ValueError: For a wrong shape, an unknown neuron, or params of another structure.
    """
    check_batch(graph, x)
    check_names(graph, edits or {})
    neurons = graph.neurons()
    rules = Rules("evaluate", default=functools.partial(run_batch, graph))
    changes = {}
    if edits:
        rules.register(operations.CUSTOM_DERIVATIVE)(_body_outputs)
        changes = {neurons[n].value: _on_samples(neurons[n], edit) for n, edit in edits.items()}
    env = forward(graph, rules, [*leaves(graph, params), x], changes)
    outs = [_batch(env[i], graph.values[i], len(x)) for i in graph.outputs]
    activations = {name: env[n.value].reshape(len(x), *n.shape) for name, n in neurons.items()}
    return jax.tree.unflatten(graph.out_tree, outs), activations


def logits(graph: Graph, params: Any, x: jax.Array) -> jax.Array:
    """The logits alone, for loops that follow their gradient: on a CPU its quickest form.

    Pure and traceable, but for forward mode; see `first_order`.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      x: `[B, ...]`, samples of the traced shape, any B of at least one.

    Returns:
      `[B, K]`: what the model returns, or what enters its softmax.

    Raises:
      ValueError: For a wrong shape, or params of another structure.
    """
    check_batch(graph, x)
    rules = Rules("evaluate", default=functools.partial(run_quick, graph))
    found = forward(graph, rules, [*leaves(graph, params), x])[graph.logits]
    return _batch(found, graph.values[graph.logits], len(x)).reshape(len(x), -1)


def quickest(apply: Callable, params: Any, x: Any) -> Callable:
    """A model in the quickest form for loops that follow its gradient.

    On a CPU, the traced model with the operations of `first_order`; elsewhere, or if the model
    cannot be traced or has backward rules of its own, `apply` itself. No forward mode.

    Args:
      apply: Pure function of the parameters and of a batch `[B, ...]`; hashable.
      params: Its parameters.
      x: A batch; only its first sample's shape and dtype matter.

    Returns:
      A function as `apply`; the same one for the same function and shapes, so that programs that
      were compiled for it are found again.
    """
    if jax.default_backend() != "cpu":
        return apply
    found, structure = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in found)
    return _quickest(apply, structure, shapes, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))


@functools.lru_cache(maxsize=32)
def _quickest(apply: Callable, structure: Any, shapes: tuple, x: Any) -> Callable:
    try:
        graph = trace(apply, jax.tree.unflatten(structure, shapes), x)
    except UnsupportedError:
        return apply
    # A model with rules of its own may be in its quickest form already, and not every rule can be
    # traced twice.
    if any(node.primitive.name.startswith("custom_vjp") for node in graph.nodes):
        return apply
    return functools.partial(_outputs, graph)


def _outputs(graph: Graph, params: Any, x: jax.Array) -> Any:
    rules = Rules("evaluate", default=functools.partial(run_quick, graph))
    env = forward(graph, rules, [*leaves(graph, params), x])
    outs = [_batch(env[i], graph.values[i], len(x)) for i in graph.outputs]
    return jax.tree.unflatten(graph.out_tree, outs)


class Evaluated(NamedTuple):
    """A batch that has been run once, and what runs it again under edits.

    Attributes:
      logits: `[B, K]`, of the network as it is.
      activations: Neuron name to `[B, ...]`, of the network as it is.
      again: Function of edits, each of a whole batch `[B, ...]` of activations, to the logits
        under them.
    """

    logits: jax.Array
    activations: Mapping[str, jax.Array]
    again: Callable[[BatchEdits], jax.Array]


def evaluated(graph: Graph, params: Any, x: jax.Array) -> Evaluated:
    """The model on a batch, ready to be run again under edits that depend on the sample.

    What lies behind no edited activation is not run again, so a loop that tries many edits holds
    only the rest of the network. Pure and traceable, but for forward mode in what runs again.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      x: `[B, ...]`, samples of the traced shape.

    Raises:
      ValueError: For a wrong shape, an unknown neuron, or params of another structure.
    """
    check_batch(graph, x)
    neurons = graph.neurons()
    rules = Rules("evaluate", default=functools.partial(run_batch, graph))
    env = forward(graph, rules, [*leaves(graph, params), x])
    changed = Rules("evaluate", default=functools.partial(run_quick, graph))
    changed.register(operations.CUSTOM_DERIVATIVE)(_body_outputs)

    def again(edits: BatchEdits) -> jax.Array:
        check_names(graph, edits)
        changes = {neurons[n].value: _on_batch(neurons[n], edit) for n, edit in edits.items()}
        found = rerun(graph, changed, env, changes)[graph.logits]
        return _batch(found, graph.values[graph.logits], len(x))

    activations = {name: env[n.value].reshape(len(x), *n.shape) for name, n in neurons.items()}
    logits = _batch(env[graph.logits], graph.values[graph.logits], len(x))
    return Evaluated(logits, activations, again)


def _on_batch(neuron: Neuron, edit: Callable) -> Callable[[jax.Array], jax.Array]:
    def edited(activation: jax.Array) -> jax.Array:
        found = edit(activation.reshape(len(activation), *neuron.shape))
        return found.reshape(activation.shape)

    return edited


def _batch(out: jax.Array, value: Value, size: int) -> jax.Array:
    """What the model returns for a batch, also where it does not depend on the sample."""
    if value.data:
        return out
    one = out[0] if _leads(out.shape) else out
    return jnp.broadcast_to(one, (size, *one.shape))


# An edit inside the body of a custom derivative must show in its output, so there the body's
# values count, and the derivative is the body's own.
def _body_outputs(node: Node, *args: jax.Array) -> Arrays:
    return args[len(args) - len(node.outputs) :]


def _on_samples(neuron: Neuron, edit: Callable) -> Callable[[jax.Array], jax.Array]:
    def edited(activation: jax.Array) -> jax.Array:
        found = edit(activation)
        if jnp.shape(found) != neuron.shape:
            raise ValueError(
                f"the edit of {neuron.name} must return shape {neuron.shape}, not "
                f"{jnp.shape(found)}"
            )
        return jnp.asarray(found)

    def all_edited(activation: jax.Array) -> jax.Array:
        each = activation.reshape(len(activation), *neuron.shape)
        return jax.vmap(edited)(each).reshape(activation.shape)

    return all_edited


def run_batch(graph: Graph, node: Node, *args: jax.Array) -> Arrays:
    """Runs a node that reads the sample on a batch.

    Args:
      graph: The traced model.
      node: One of its nodes.
      args: Its operands; those that depend on the sample are `[B, ...]`.

    Returns:
      Its outputs, `[B, ...]`.
    """
    taken = [graph.values[i].shape for i in node.inputs]
    made = [graph.values[i].shape for i in node.outputs]
    whole = _on_all(node, taken, made)
    if whole is not None:
        return whole(*args)
    each = [
        a.reshape(len(a), *shape) if data else a
        for a, shape, data in zip(args, taken, node.data, strict=True)
    ]
    axes = [0 if data else None for data in node.data]
    outs = jax.vmap(functools.partial(run, node), axes)(*each)
    return tuple(
        out.reshape(len(out), *shape[_leads(shape) :])
        for out, shape in zip(outs, made, strict=True)
    )


def run_quick(graph: Graph, node: Node, *args: jax.Array) -> Arrays:
    """As `run_batch`, in the form whose first derivatives are quicker where there is one."""
    shapes = [graph.values[i].shape for i in (*node.inputs[:1], *node.outputs)]
    found = quick(node, *args) if all(map(_leads, shapes)) else None
    return run_batch(graph, node, *args) if found is None else found


def _leads(shape: tuple[int, ...]) -> bool:
    """Whether a traced shape leads with the batch of one."""
    return shape[:1] == (1,)


def _on_all(
    node: Node, taken: list[tuple[int, ...]], made: list[tuple[int, ...]]
) -> Callable[..., Arrays] | None:
    """The node as a function of batches, where it leaves their first axis alone."""
    samples = [shape for shape, data in zip(taken, node.data, strict=True) if data]
    if not all(_leads(shape) for shape in (*samples, *made)):
        return None
    key, q = node.key, node.params
    bind = functools.partial(run, node)
    if key in _SAME_SHAPE or (key == "concatenate" and q["dimension"] != 0):
        return lambda *args: node.bind(*_stretched(node, args))
    if key == "reshape" and q["dimensions"] is None:
        return lambda x: (x.reshape(len(x), *made[0][1:]),)
    if key == "broadcast_in_dim" and q["broadcast_dimensions"][:1] == (0,):
        into = q["broadcast_dimensions"]
        return lambda x: (lax.broadcast_in_dim(x, (len(x), *made[0][1:]), into),)
    if key == "dot_general":
        contracted, batch = q["dimension_numbers"]
        rows = node.data == (True, False) and 0 not in contracted[0] and not batch[0]
        pairs = all(node.data) and [axes[:1] for axes in batch] == [(0,), (0,)]
        return bind if rows or pairs else None
    if key == "conv_general_dilated":
        spec = q["dimension_numbers"]
        first = spec.lhs_spec[0] == spec.out_spec[0] == 0
        return bind if first and node.data == (True, False) else None
    apart = (
        ("axes" in q and 0 not in q["axes"])
        or (key.startswith("cum") and q["axis"] != 0)
        or (key == "transpose" and q["permutation"][0] == 0)
        or (key == "squeeze" and 0 not in q["dimensions"])
        or (key == "pad" and q["padding_config"][0] == (0, 0, 0))
        or (
            key.startswith("reduce_window")
            and q["padding"][0] == (0, 0)
            and all(
                q[name][0] == 1 for name in ("window_dimensions", "window_strides", "base_dilation")
            )
        )
    )
    return bind if apart else None


def _stretched(node: Node, args: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Operands of one shape: what does not depend on the sample is repeated."""
    size = next(len(a) for a, data in zip(args, node.data, strict=True) if data)
    return [
        a if data or not jnp.ndim(a) else jnp.broadcast_to(a, (size, *a.shape[1:]))
        for a, data in zip(args, node.data, strict=True)
    ]
