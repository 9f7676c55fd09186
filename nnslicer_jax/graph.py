"""A traced model as a flat list of nodes, which every interpretation folds over.

The only module that reads jaxprs. Inner calls are spliced in, scans are unrolled and each call
site gets fresh value ids, so nothing downstream meets a `Var`. A call whose body is an
elementwise function of the sample alone (relu, silu, clip, ...) stays one node under its own
name: its derivative at a kink is part of its meaning, and to the papers it is one operation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from nnslicer_jax import channels, operations

# Calls whose body is spliced into the caller, and the parameter that holds the body.
_BODY = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


class UnsupportedError(NotImplementedError):
    """The traced model uses something that an interpretation has no reading for."""


class Value(NamedTuple):
    """What is known of a value before any number is.

    Attributes:
      shape: Traced shape, with the batch of one where the model put it.
      dtype: Element type.
      data: Whether it depends on the sample.
      param: Whether it depends on a parameter.
    """

    shape: tuple[int, ...]
    dtype: Any
    data: bool
    param: bool

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return jnp.issubdtype(self.dtype, jnp.floating)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation of the model.

    Attributes:
      index: Position in `Graph.nodes`.
      key: Its name, which rules are looked up by: the primitive's, or that of a call kept whole.
      primitive: The JAX primitive that computes the node.
      params: Its parameters, as in the jaxpr.
      inputs: Value ids read. A `custom_derivative` node reads its call's operands and then
        what the spliced body computed; it differentiates as the call does.
      outputs: Value ids written.
      data: For each input, whether it depends on the sample.
      param: For each input, whether it depends on a parameter.
      scope: Module path such as "LeNet/Conv_0"; "[t]" marks the step of a scan.
    """

    index: int
    key: str
    primitive: jex.Primitive
    params: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    data: tuple[bool, ...]
    param: tuple[bool, ...]
    scope: str

    @property
    def moved(self) -> range:
        """Which inputs a movement moves; the others say where to."""
        return range(len(self.inputs))[operations.MOVED_OPERANDS.get(self.key, slice(None))]

    def bind(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        """Applies the node to arrays, one for each input; returns one for each output."""
        if self.key == operations.CUSTOM_DERIVATIVE:
            args = args[: len(args) - len(self.outputs)]
        out = self.primitive.bind(*args, **self.primitive.get_bind_params(dict(self.params)))
        return tuple(out) if self.primitive.multiple_results else (out,)

    def __str__(self) -> str:
        return f"{self.key} at {self.scope or 'the top level'}"


class Neuron(NamedTuple):
    """A place whose activations are profiled and sliced.

    Attributes:
      name: "input", or module scope and operation ("LeNet/Conv_0/conv_general_dilated").
      value: Id of the value in the graph.
      shape: Shape of one sample's activation, such as (H, W, C) or (K,).
      dtype: Element type of the activation.
      channel: Axis of `shape` along which the units lie; the others are positions.
      batch: Axis of the batch of one in the traced shape, which `shape` leaves out; None where
        the model has none there.
    """

    name: str
    value: int
    shape: tuple[int, ...]
    dtype: Any
    channel: int
    batch: int | None

    @property
    def axis(self) -> int:
        """The channel axis in the traced shape."""
        return self.channel + (self.batch is not None and self.batch <= self.channel)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in execution order. Hashed by identity, so usable as a static argument.

    Attributes:
      nodes: Operations in execution order.
      values: What is known of each value; a value id is an index into it.
      params: Value id of each parameter leaf, by its path joined with "/".
      input: Value id of the sample.
      outputs: Value ids of the leaves of what the model returns.
      logits: Value id the slicing criterion stands on: the model's output, or what enters a
        softmax at its end.
      consts: Value id to array, for constants of the trace.
      out_tree: Structure of what the model returns.
    """

    nodes: tuple[Node, ...]
    values: tuple[Value, ...]
    params: Mapping[str, int]
    input: int
    outputs: tuple[int, ...]
    logits: int
    consts: Mapping[int, Any]
    out_tree: Any

    def __repr__(self) -> str:
        return (
            f"Graph({len(self.nodes)} nodes, {len(self.params)} parameter arrays, "
            f"input {self.values[self.input].shape[1:]}, "
            f"output {self.values[self.logits].shape[1:]})"
        )

    @functools.cached_property
    def _neurons(self) -> dict[str, Neuron]:
        places = [("input", self.input)]
        for node in self.nodes:
            if self.computes(node):
                name = "/".join(part for part in (node.scope, node.key) if part)
                places += [(name, ident) for ident in node.outputs]
        places = [(name, i) for name, i in places if name == "input" or self.values[i].is_float]
        total: dict[str, int] = {}
        for name, _ in places:
            total[name] = total.get(name, 0) + 1
        seen: dict[str, int] = {}
        axes = channels.axes(self)
        found = {}
        for name, ident in places:
            if total[name] > 1:
                seen[name] = seen.get(name, -1) + 1
                name = f"{name}_{seen[name]}"
            value = self.values[ident]
            batch, axis, shape = _batch(value.shape, axes[ident]), axes[ident], list(value.shape)
            if batch is not None:
                del shape[batch]
                axis = max(axis - (batch <= axis), 0)
            found[name] = Neuron(name, ident, tuple(shape), value.dtype, axis, batch)
        return found

    def neurons(self) -> dict[str, Neuron]:
        """Every neuron by name in execution order, "input" first."""
        return dict(self._neurons)

    @functools.cached_property
    def carried(self) -> frozenset[int]:
        """Ids of the values with a delta: the sample, activations, and what only moves them."""
        found = {self.input}
        for node in self.nodes:
            if any(node.data):
                if node.key in operations.ORDER:
                    # Indices say where from; they are no moved data.
                    pairs = zip(node.inputs, node.outputs, strict=False)
                    found.update(o for i, o in pairs if i in found or self.values[o].is_float)
                    continue
                moves = node.key in operations.MOVEMENT and any(
                    node.inputs[i] in found for i in node.moved
                )
                found.update(i for i in node.outputs if moves or self.values[i].is_float)
        return frozenset(found)

    def computes(self, node: Node) -> bool:
        """Whether the node computes activations of its own, rather than moving some."""
        if not any(node.data):
            return False
        return node.key not in operations.MOVEMENT or not any(
            node.inputs[i] in self.carried for i in node.moved
        )


def _batch(shape: Sequence[int], channel: int) -> int | None:
    """Axis of the batch of one: the first, or where `vmap` and transposes put it."""
    ones = (a for a, n in enumerate(shape) if n == 1 and (a == 0 or a != channel))
    return next(ones, None)


def trace(apply: Callable, params: Any, x: Any) -> Graph:
    """Traces `apply(params, x)` into a `Graph`.

    Args:
      apply: Pure function of the parameters and of a batch `[B, ...]`; call Flax modules with
        `train=False` and `deterministic=True`.
      params: Whatever pytree of arrays `apply` takes.
      x: A batch; only its first sample's shape and dtype matter.

    Raises:
      ValueError: For a batch that is empty or not an array.
      UnsupportedError: For control flow whose path depends on the sample or a parameter.
    """
    if not hasattr(x, "shape") or len(x.shape) == 0 or x.shape[0] == 0:
        raise ValueError(f"x must be a batch [B, ...] of at least one sample, not {_said(x)}")
    if getattr(x.dtype, "kind", "f") in "OSU":
        raise ValueError(f"x must hold numbers, not {x.dtype}")
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))
    try:
        closed, shape = jax.make_jaxpr(apply, return_shape=True)(params, one)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ):
        raise UnsupportedError(
            "apply decides in Python on values that depend on the sample or the parameters; "
            "jnp.where and lax.scan can be traced"
        ) from None
    return _Tracer().graph(closed, params, shape)


def _said(x: Any) -> str:
    return f"an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__


class _Tracer:
    """The nodes and values found so far."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.consts: dict[int, Any] = {}
        self.computed: dict[int, Any] = {}  # of constants, where tracing needs their values

    def graph(self, closed: Any, params: Any, shape: Any) -> Graph:
        named, _ = jax.tree_util.tree_flatten_with_path(params)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
        avals = closed.in_avals
        leaves = [self.fresh(a, param=True) for a in avals[:-1]]
        sample = self.fresh(avals[-1], data=True)
        outs = self.walk(closed.jaxpr, closed.consts, [*leaves, sample], "")
        tree = jax.tree.structure(shape)
        logits = _before_softmax(self.nodes, outs[0]) if len(outs) == 1 else outs[0]
        return Graph(
            tuple(self.nodes), tuple(self.values), dict(zip(names, leaves, strict=True)), sample,
            tuple(outs), logits, self.consts, tree,
        )  # fmt: skip

    def fresh(self, aval: Any, *, data: bool = False, param: bool = False) -> int:
        self.values.append(Value(tuple(aval.shape), aval.dtype, data, param))
        return len(self.values) - 1

    def const(self, value: Any) -> int:
        ident = self.fresh(jax.typeof(value))
        self.consts[ident] = value
        return ident

    def walk(self, jaxpr: Any, consts: Sequence, args: Sequence[int], scope: str) -> list[int]:
        """Appends a jaxpr's equations; returns the ids of its outputs."""
        # Ids come from this table, never from a Var: JAX caches inner jaxprs, so two call
        # sites of one function share their Var objects.
        env: dict[Any, int] = dict(
            zip(jaxpr.constvars, [self.const(c) for c in consts], strict=True)
        )
        env |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> int:
            return self.const(atom.val) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            where = "/".join(s for s in (scope, str(eqn.source_info.name_stack)) if s)
            env |= dict(zip(eqn.outvars, self.equation(eqn, ins, where), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list[int], where: str) -> list[int]:
        name = eqn.primitive.name
        data = [self.values[i].data for i in ins]
        if name in _BODY:
            if self.is_whole(eqn, ins):
                return self.node(_call_name(eqn), eqn, ins, where)
            outs = self.walk(*_open(eqn.params[_BODY[name]]), ins, where)
            if name in _CUSTOM:
                outs = self.node(operations.CUSTOM_DERIVATIVE, eqn, [*ins, *outs], where)
            return outs
        if name == "scan":
            return self.unroll(eqn, ins, where)
        if name == "cond" and self.is_constant(ins[0]):
            branch = eqn.params["branches"][int(self.known(ins[0]))]
            return self.walk(*_open(branch), ins[1:], where)
        if name in ("while", "cond") and any(data):
            by = "the sample" if name == "while" or data[0] else "a parameter"
            raise UnsupportedError(
                f"{name} at {where or 'the top level'} depends on {by}: trace needs one path for "
                "all inputs (scan, select and where are fine)"
            )
        if name == "div" and data[1] and self.values[ins[1]].is_float:
            # a / b is a product with 1/b, so that both factors are neurons.
            def quotient(a: Any, b: Any) -> Any:
                return jax.lax.mul(a, jax.lax.integer_pow(b, -1))

            return self.splice(quotient, [v.aval for v in eqn.invars], ins, where)
        if name == "scatter-add" and data[2] and _is_countable(eqn) and self.is_constant(ins[1]):
            total = _landed(eqn, self.known(ins[1]), of_operand=data[0])
            return self.splice(total, [v.aval for v in eqn.invars], ins, where)
        return self.node(name, eqn, ins, where)

    def is_constant(self, ident: int) -> bool:
        """Whether a value depends neither on the sample nor on a parameter."""
        return not (self.values[ident].data or self.values[ident].param)

    def node(self, key: str, eqn: Any, ins: list[int], where: str) -> list[int]:
        data = tuple(self.values[i].data for i in ins)
        param = tuple(self.values[i].param for i in ins)
        outs = [self.fresh(v.aval, data=any(data), param=any(param)) for v in eqn.outvars]
        self.nodes.append(
            Node(len(self.nodes), key, eqn.primitive, eqn.params, tuple(ins), tuple(outs), data,
                 param, where)
        )  # fmt: skip
        return outs

    def known(self, ident: int) -> Any:
        """A value that depends neither on the sample nor on a parameter."""
        if ident in self.consts:
            return self.consts[ident]
        if ident not in self.computed:
            maker = next(node for node in self.nodes if ident in node.outputs)
            with jax.ensure_compile_time_eval():
                outs = maker.bind(*[self.known(i) for i in maker.inputs])
            self.computed.update(zip(maker.outputs, outs, strict=True))
        return self.computed[ident]

    def is_whole(self, eqn: Any, ins: list[int]) -> bool:
        """Whether a call is an elementwise function of one sample-dependent array alone."""
        if _call_name(eqn) not in operations.NAMED_CALLS:
            return False
        operands = [self.values[i] for i in ins if self.values[i].data]
        settings = [self.values[i] for i in ins if not self.values[i].data]
        outs = eqn.outvars
        if len(operands) != 1 or len(outs) != 1 or any(s.param for s in settings):
            return False
        shape = operands[0].shape
        if not operands[0].is_float or tuple(outs[0].aval.shape) != shape:
            return False
        keys = _elementwise_keys(eqn, shape)
        return keys is not None and not keys <= operations.MOVEMENT

    def splice(self, fn: Callable, avals: Sequence, args: Sequence[int], scope: str) -> list[int]:
        """Appends the equations of `fn`."""
        small = jax.make_jaxpr(fn)(*[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals])
        return self.walk(small.jaxpr, small.consts, args, scope)

    def unroll(self, eqn: Any, ins: list[int], scope: str) -> list[int]:
        """Appends the body of a scan once for each step."""
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        body, consts = _open(eqn.params["jaxpr"])
        fixed, carried = _scan_counts(eqn, body)
        carry = ins[fixed : fixed + carried]
        sliced = eqn.invars[fixed + carried :]
        steps = list(range(length))
        rows: dict[int, list[int]] = {}
        for t in reversed(steps) if reverse else steps:
            at = functools.partial(_rows, t)
            row = self.splice(at, [v.aval for v in sliced], ins[fixed + carried :], scope)
            out = self.walk(body, consts, [*ins[:fixed], *carry, *row], f"{scope}[{t}]")
            carry, rows[t] = out[:carried], out[carried:]
        stacked: list[int] = []
        for j, var in enumerate(body.outvars[carried:]):
            column = [rows[t][j] for t in steps]
            stacked += self.splice(_stack, [var.aval] * length, column, scope)
        return [*carry, *stacked]


def _is_countable(eqn: Any) -> bool:
    """Whether float32 can number the places of a scatter's floats."""
    operand = eqn.invars[0].aval
    return jnp.issubdtype(operand.dtype, jnp.floating) and operand.size < 2**24


def _landed(eqn: Any, indices: Any, of_operand: bool) -> Callable:
    """A `scatter-add` to known places as sums of what lands at each place.

    Args:
      eqn: The equation.
      indices: Where its updates land.
      of_operand: Whether what stood there before is a term too, or is added afterwards.
    """
    operand, _, updates = (v.aval for v in eqn.invars)
    with jax.ensure_compile_time_eval():
        # The transpose of adding reads, for each update, the number of its place; 0 if none.
        number = jnp.arange(1.0, operand.size + 1).reshape(operand.shape)
        blank = jnp.zeros(operand.shape)
        add = functools.partial(eqn.primitive.bind, **eqn.params)
        lands = jax.linear_transpose(lambda u: add(blank, indices, u), jnp.zeros(updates.shape))
        places = np.asarray(lands(number)[0], int).ravel() - 1
    order = np.argsort(places, kind="stable")[np.count_nonzero(places < 0) :]
    counts = np.bincount(places[order], minlength=operand.size)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Where fewer land than at the fullest place, a number past the last reads 0.
    sources = np.full((operand.size, max(counts.max(initial=0), 1)), updates.size)
    sources[places[order], rank] = order

    def total(before: Any, _: Any, some: Any) -> Any:
        padded = jnp.pad(some.ravel(), (0, 1))
        terms = padded[sources].reshape(*operand.shape, -1)
        if of_operand:
            return jnp.concatenate([before[..., None], terms], -1).sum(-1)
        return before + terms.sum(-1)

    return total


def _rows(t: int, *arrays: Any) -> list[Any]:
    return [a[t] for a in arrays]


def _stack(*arrays: Any) -> Any:
    return jnp.concatenate([a[None] for a in arrays])


def _scan_counts(eqn: Any, body: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    Read off the ranks, since JAX releases name the parameters differently: a scanned array has
    one axis more outside the body than inside, a carried one has not.
    """
    scanned = sum(o.aval.ndim != i.aval.ndim for o, i in zip(eqn.invars, body.invars, strict=True))
    stacked = sum(
        o.aval.ndim != i.aval.ndim for o, i in zip(eqn.outvars, body.outvars, strict=True)
    )
    carried = len(body.outvars) - stacked
    return len(body.invars) - scanned - carried, carried


def _open(body: Any) -> tuple[Any, Sequence]:
    """(jaxpr, consts) of a closed or an open jaxpr."""
    return (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())


def _call_name(eqn: Any) -> str:
    """`relu` arrives as custom_jvp_call around jit[name=relu]: the inner name is its name."""
    if "name" in eqn.params:
        return eqn.params["name"]
    body, _ = _open(eqn.params[_BODY[eqn.primitive.name]])
    if len(body.eqns) == 1 and "name" in body.eqns[0].params:
        return body.eqns[0].params["name"]
    return getattr(eqn.params.get("call_name"), "name", None) or eqn.primitive.name


def _elementwise_keys(eqn: Any, shape: tuple[int, ...]) -> set[str] | None:
    """Primitives of a call's body, or None unless all of them work element by element."""
    keys: set[str] = set()
    for inner in _open(eqn.params[_BODY[eqn.primitive.name]])[0].eqns:
        name = inner.primitive.name
        if any(math.prod(v.aval.shape) > 1 and tuple(v.aval.shape) != shape
               for v in inner.outvars):  # fmt: skip
            return None
        if name in _BODY:
            below = _elementwise_keys(inner, shape)
            if below is None:
                return None
            keys |= below
        elif name in operations.ELEMENTWISE or name in operations.ELEMENTWISE_MOVEMENT:
            keys.add(name)
        else:
            return None
    return keys


def _before_softmax(nodes: Sequence[Node], out: int) -> int:
    """The value that enters a softmax which ends the model, or the output itself.

    A softmax is exp(z - max z) over its own sum; traced, the quotient is a product with the
    sum's reciprocal.
    """
    maker = {ident: node for node in nodes for ident in node.outputs}

    def source(ident: int, *through: str) -> Node | None:
        node = maker.get(ident)
        while node is not None and node.key in (*operations.MOVEMENT, *through):
            spliced = node.key == operations.CUSTOM_DERIVATIVE
            first = len(node.inputs) - len(node.outputs) if spliced else 0
            read = list(zip(node.inputs, node.data, strict=True))[first:]
            node = maker.get(next((i for i, data in read if data), -1))
        return node

    product = source(out)
    if product is None or product.key != "mul":
        return out
    top, bottom = (source(i) for i in product.inputs)
    if top is None or bottom is None or top.key != "exp" or bottom.key != "integer_pow":
        return out
    total = source(bottom.inputs[0])
    if total is None or total.key != "reduce_sum" or source(total.inputs[0]) is not top:
        return out
    shifted = source(top.inputs[0])
    if shifted is None or shifted.key != "sub":
        return top.inputs[0]
    peak = source(shifted.inputs[1], "max")
    if peak is None or peak.key != "reduce_max":
        return out
    return shifted.inputs[0]
