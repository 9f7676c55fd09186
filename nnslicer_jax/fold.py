"""Folds over a `Graph`: forward along the computation, backward against it.

An interpretation is a `Rules` table and what it carries; this module knows neither. Most work
on one sample (traced shapes), and batches are `vmap` of the fold; `evaluation` carries batches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.convolution import convolve
from nnslicer_jax.graph import Graph, Neuron, Node, UnsupportedError

Env = list[Any]  # value id -> whatever the interpretation carries


class Rules:
    """Rules of one interpretation, by the key of the node they read."""

    def __init__(self, interpretation: str, default: Callable | None = None) -> None:
        self.interpretation = interpretation
        self._default = default
        self._rules: dict[str, Callable] = {}

    def register(self, *keys: str) -> Callable[[Callable], Callable]:
        """Decorator that makes a function the rule of each of `keys`."""

        def add(rule: Callable) -> Callable:
            for key in keys:
                if key in self._rules:
                    raise ValueError(f"{self.interpretation} has a rule for {key} already")
                self._rules[key] = rule
            return rule

        return add

    def __contains__(self, node: Node) -> bool:
        return node.key in self._rules

    def __getitem__(self, node: Node) -> Callable:
        rule = self._rules.get(node.key, self._default)
        if rule is None:
            raise UnsupportedError(
                f"{self.interpretation}: no rule for {node}; those with one are named in "
                "nnslicer_jax/operations.py"
            )
        return rule


def forward(
    graph: Graph,
    rules: Rules,
    leaves: Sequence[Any],
    edits: Mapping[int, Callable[[Any], Any]] | None = None,
    consts: Mapping[int, Any] | None = None,
) -> Env:
    """Runs `rule(node, *inputs) -> outputs` on every node that reads the sample.

    Args:
      graph: The traced model.
      rules: The interpretation.
      leaves: What to carry for each parameter leaf, then for the sample.
      edits: Value id to a map of what is carried there, applied as soon as it is known.
      consts: What to carry for each constant, in place of the graph's own.

    Returns:
      What is carried at each value id.
    """
    edits = edits or {}
    env: Env = [None] * len(graph.values)

    def put(ident: int, value: Any) -> None:
        env[ident] = edits[ident](value) if ident in edits else value

    for ident, value in (graph.consts if consts is None else consts).items():
        env[ident] = value
    for ident, value in zip((*graph.params.values(), graph.input), leaves, strict=True):
        put(ident, value)
    for node in graph.nodes:
        args = [env[i] for i in node.inputs]
        outs = rules[node](node, *args) if any(node.data) else node.bind(*args)
        for ident, value in zip(node.outputs, outs, strict=True):
            put(ident, value)
    return env


def rerun(graph: Graph, rules: Rules, env: Env, edits: Mapping[int, Callable[[Any], Any]]) -> Env:
    """Runs anew what lies behind edited values; the rest of `env` stays.

    Args:
      graph: The traced model.
      rules: The interpretation.
      env: What is carried at each value id without the edits.
      edits: Value id to a map of what is carried there.

    Returns:
      What is carried at each value id under the edits.
    """
    env = list(env)
    behind = set(edits)
    for ident, edit in edits.items():
        # A value behind another edit is overwritten below.
        env[ident] = edit(env[ident])
    for node in graph.nodes:
        if behind.isdisjoint(node.inputs):
            continue
        outs = rules[node](node, *[env[i] for i in node.inputs])
        for ident, value in zip(node.outputs, outs, strict=True):
            env[ident] = edits[ident](value) if ident in edits else value
        behind.update(node.outputs)
    return env


def backward(
    graph: Graph,
    rules: Rules,
    env: Env,
    seeds: Mapping[int, Any],
    context: Any = None,
    weights: Rules | None = None,
) -> dict[int, Any]:
    """Runs `rule(node, args, outs, back, context) -> what goes to each input` in reverse.

    A value read several times (`x * x`, a residual) receives the sum. Nodes that nothing comes
    back to are not visited.

    Args:
      graph: The traced model.
      rules: The interpretation.
      env: What is known at each value id; a rule gets that of its inputs and outputs.
      seeds: Value id to what starts there.
      context: Handed to every rule.
      weights: Rules of the nodes that do not read the sample, which lead from the weights an
        operation used to the parameters; without it those nodes are not visited.

    Returns:
      Value id to the sum of what came back to it; ids that nothing reached are absent.
    """
    total = dict(seeds)
    for node in reversed(graph.nodes):
        table = rules if any(node.data) else weights
        if table is None or not any(i in total for i in node.outputs):
            continue
        args, outs = [env[i] for i in node.inputs], [env[i] for i in node.outputs]
        back = table[node](node, args, outs, [total.get(i) for i in node.outputs], context)
        for ident, value in zip(node.inputs, back, strict=True):
            if value is not None:
                total[ident] = total[ident] + value if ident in total else value
    return total


def run(node: Node, *args: jax.Array) -> tuple[jax.Array, ...]:
    """The node itself; a convolution in the faster of its two forms."""
    if node.key == "conv_general_dilated":
        lhs, rhs = args
        return (convolve(lhs, rhs, **node.params),)
    return node.bind(*args)


EVALUATE = Rules("evaluate", default=run)


def record(graph: Graph, params: Any, sample: jax.Array) -> Env:
    """Every value of the model on one sample.

    A constant of -inf, such as masks attention, is taken as the lowest number: their exponentials
    are equal, but an infinity has no mean to differ from.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      sample: One sample, without batch axis.

    Returns:
      The array at each value id, in its traced shape.
    """
    consts = {i: _finite(value, graph.values[i].dtype) for i, value in graph.consts.items()}
    return forward(graph, EVALUATE, [*leaves(graph, params), sample[None]], consts=consts)


def _finite(value: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.floating) or not np.any(np.asarray(value) == -np.inf):
        return value
    return jnp.maximum(jnp.asarray(value, dtype), jnp.finfo(dtype).min)


def unbatched(activation: jax.Array, neuron: Neuron) -> jax.Array:
    """A neuron's traced activation without the batch of one."""
    return activation if neuron.batch is None else jnp.squeeze(activation, neuron.batch)


def leaves(graph: Graph, params: Any) -> list[Any]:
    """Parameter leaves in the graph's order.

    Raises:
      ValueError: If the leaves are not those traced.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    if names != list(graph.params):
        odd = sorted(set(names) ^ set(graph.params))
        raise ValueError(
            f"params do not have the structure that was traced: they differ at {odd[:3]}"
        )
    for (name, ident), (_, leaf) in zip(graph.params.items(), found, strict=True):
        traced = graph.values[ident].shape
        if tuple(jnp.shape(leaf)) != traced:
            raise ValueError(f"params {name} has shape {jnp.shape(leaf)}, traced as {traced}")
    return [leaf for _, leaf in found]


def check_batch(graph: Graph, x: Any) -> None:
    """Raises ValueError unless `x` is a batch of at least one sample of the traced shape."""
    shape = graph.values[graph.input].shape[1:]
    if not hasattr(x, "shape") or tuple(x.shape[1:]) != shape or len(x.shape) == 0:
        given = f"shape {tuple(x.shape)}" if hasattr(x, "shape") else type(x).__name__
        raise ValueError(f"x must have shape [B, {', '.join(map(str, shape))}], not {given}")
    if x.shape[0] == 0:
        raise ValueError("x is an empty batch; it must have at least one sample")


def check_names(graph: Graph, names: Any) -> dict[str, Neuron]:
    """The graph's neurons, or ValueError where one of `names` is not among them."""
    neurons = graph.neurons()
    for name in names:
        if name not in neurons:
            some = ", ".join(list(neurons)[:4])
            raise ValueError(f"no neuron {name!r}; graph.neurons() lists them ({some}, ...)")
    return neurons
