"""NNSlicer and EffectivePath restated one edge at a time, in plain NumPy.

The network is a list of cells, one for each single activation, and every layer is an integer
array that says which cells it is made of. Moving data is therefore indexing of such an array
and nothing else. A cell names the cells it reads, so that the backward analysis is a loop over
cells and edges with the formulas of the papers in it ("Dynamic Slicing for Deep Neural
Networks", ESEC/FSE 2020, Algorithm 1; "Adversarial Defense Through Network Profiling Based Path
Extraction", CVPR 2019). Values are float64, hence exact for small integers and for binary
fractions.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

Synapse = tuple[str, int]  # parameter path, flat index into the parameter
Layer = np.ndarray  # integer array of the sample's shape: the cell of each activation


class Term(NamedTuple):
    """One edge: what is read, by which weight, and the synapse that the weight is."""

    source: int
    weight: float
    synapse: Synapse | None = None


@dataclasses.dataclass(frozen=True)
class Constant:
    """A padded value: the same for every sample."""

    value: float


@dataclasses.dataclass(frozen=True)
class Input:
    """One number of the sample."""


@dataclasses.dataclass(frozen=True)
class Sum:
    """`sum(weight * source) + constant`: dense, convolution, residual, mean, scale."""

    terms: tuple[Term, ...]
    constant: float = 0.0


@dataclasses.dataclass(frozen=True)
class Product:
    """`sum(a * b * ...)` over products of sources."""

    products: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Maximum:
    """The largest of the sources."""

    sources: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Function:
    """`function(source)`, which lets CONTRIB through where `passes(source)`."""

    source: int
    function: Callable[[float], float]
    passes: Callable[[float], bool] = lambda x: True


@dataclasses.dataclass(frozen=True)
class Shift:
    """`source + constant`: a bias."""

    source: int
    constant: float


class Network:
    """A network written down cell by cell; the methods add one operation each.

    Attributes:
      cells: every single activation, in an order in which it can be computed.
      layers: the neurons, (scope, operation) and the layer, in the order added.
      synapses: path and shape of every parameter that is a weight of some edge.
    """

    def __init__(
        self, shape: Sequence[int], parameters: dict[str, np.ndarray], channel: int | None = -1
    ):
        self.parameters = {k: np.asarray(v, np.float64) for k, v in parameters.items()}
        self.cells: list = []
        self.synapses: dict[str, tuple[int, ...]] = {}
        self._named: list[tuple[str, Layer, int | None]] = []
        self._scope: list[str] = []
        self.input = self._array(shape, lambda at: Input())
        self._named.append(("input", self.input, channel))
        self.output = self.input

    # Building -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Operations added inside carry `name` before their own."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def _array(self, shape: Sequence[int], make: Callable[[tuple[int, ...]], object]) -> Layer:
        layer = np.zeros(tuple(shape), int)
        for at in np.ndindex(*layer.shape):
            self.cells.append(make(at))
            layer[at] = len(self.cells) - 1
        return layer

    def _neuron(self, operation, shape, make, channel: int | None = -1) -> Layer:
        layer = self._array(shape, make)
        self._named.append(("/".join([*self._scope, operation]), layer, channel))
        self.output = layer
        return layer

    def _synapse(self, path: str, at: tuple[int, ...]) -> tuple[float, Synapse]:
        array = self.parameters[path]
        self.synapses[path] = array.shape
        return float(array[at]), (path, int(np.ravel_multi_index(at, array.shape)))

    @property
    def layers(self) -> dict[str, tuple[Layer, int | None]]:
        """Name -> (layer, channel axis); names that occur more than once are numbered."""
        names = [name for name, *_ in self._named]
        seen: dict[str, int] = {}
        result = {}
        for name, layer, channel in self._named:
            if names.count(name) > 1:
                seen[name] = seen.get(name, -1) + 1
                name = f"{name}_{seen[name]}"
            result[name] = layer, channel
        return result

    # Operations ---------------------------------------------------------------------------

    def pad(self, x: Layer, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Layer:
        """Moves `x` into a larger array of constants."""
        self.cells.append(Constant(value))
        return np.pad(x, widths, constant_values=len(self.cells) - 1)

    def masked(self, x: Layer, mask: np.ndarray, value: float) -> Layer:
        """Puts a constant where `mask`, which broadcasts against `x`, is false."""
        self.cells.append(Constant(value))
        return np.where(mask, x, len(self.cells) - 1)

    def contract(self, x: Layer, kernel: str, axes: int = 1, label: str = "dot_general") -> Layer:
        """The last `axes` axes of `x` with the first ones of the kernel."""
        shape = self.parameters[kernel].shape
        inner, outer = shape[:axes], shape[axes:]
        free = x.shape[: x.ndim - axes]

        def make(at):
            rows, columns = at[: len(free)], at[len(free) :]
            return Sum(
                tuple(
                    Term(int(x[rows + i]), *self._synapse(kernel, i + columns))
                    for i in np.ndindex(*inner)
                )
            )

        return self._neuron(label, free + outer, make)

    def mix(self, x: Layer, matrix: np.ndarray, channel_first: bool = False) -> Layer:
        """`matrix @ x` of rows `x` [n, C] and a constant: [m, C], or [C, m]."""

        def make(at):
            row, channel = at[::-1] if channel_first else at
            terms = zip(x[:, channel], matrix[row], strict=True)
            return Sum(tuple(Term(int(i), float(w)) for i, w in terms))

        shape = (len(matrix), x.shape[1])
        if channel_first:
            return self._neuron("dot_general", shape[::-1], make, channel=0)
        return self._neuron("dot_general", shape, make)

    def contract_transposed(self, x: Layer, kernel: str) -> Layer:
        """`x @ kernel.T`, with the synapses of `kernel`."""
        outputs, inputs = self.parameters[kernel].shape

        def make(at):
            return Sum(
                tuple(
                    Term(int(x[(*at[:-1], i)]), *self._synapse(kernel, (at[-1], i)))
                    for i in range(inputs)
                )
            )

        return self._neuron("dot_general", (*x.shape[:-1], outputs), make)

    def convolution(
        self,
        x: Layer,
        kernel: str,
        strides: Sequence[int],
        padding: Sequence[tuple[int, int]] | str = "VALID",
        dilation: Sequence[int] | None = None,
        groups: int = 1,
        channel_first: bool = False,
    ) -> Layer:
        """Convolution of `x` [*space, C] by a kernel [*window, C / groups, features].

        With `channel_first`, `x` is [C, *space] and the kernel [features, C / groups, *window].
        """
        shape = self.parameters[kernel].shape
        if channel_first:
            x = np.moveaxis(x, 0, -1)
            features, depth, window = shape[0], shape[1], shape[2:]
        else:
            features, depth, window = shape[-1], shape[-2], shape[:-2]
        dilation = dilation or (1,) * len(window)
        space = x.shape[:-1]
        pads, size = _window_places(space, window, strides, padding, dilation)
        per_group = features // groups

        def make(at):
            place, feature = (at[1:], at[0]) if channel_first else (at[:-1], at[-1])
            first = feature // per_group * depth
            terms = []
            for offset in np.ndindex(*window):
                p = tuple(
                    place[d] * strides[d] + offset[d] * dilation[d] - pads[d][0]
                    for d in range(len(space))
                )
                if not all(0 <= p[d] < space[d] for d in range(len(space))):
                    continue  # padding is not an input, so there is no edge
                for c in range(depth):
                    at_kernel = (feature, c, *offset) if channel_first else (*offset, c, feature)
                    weight = self._synapse(kernel, at_kernel)
                    terms.append(Term(int(x[(*p, first + c)]), *weight))
            return Sum(tuple(terms))

        size = (features, *size) if channel_first else (*size, features)
        channel = 0 if channel_first else -1
        return self._neuron("conv_general_dilated", size, make, channel)

    def convolution_transposed(
        self, x: Layer, kernel: str, strides: Sequence[int], pads: Sequence[tuple[int, int]]
    ) -> Layer:
        """A convolution of `x` with `stride - 1` nothings between its values."""
        space = x.shape[:-1]
        *window, depth, features = self.parameters[kernel].shape
        spread = [(n - 1) * s + 1 for n, s in zip(space, strides, strict=True)]
        size = [n + sum(p) - w + 1 for n, p, w in zip(spread, pads, window, strict=True)]

        def make(at):
            terms = []
            for offset in np.ndindex(*window):
                p = [at[d] + offset[d] - pads[d][0] for d in range(len(space))]
                inside = all(
                    0 <= p[d] < spread[d] and p[d] % strides[d] == 0 for d in range(len(space))
                )
                if not inside:
                    continue
                source = tuple(p[d] // strides[d] for d in range(len(space)))
                for c in range(depth):
                    weight = self._synapse(kernel, (*offset, c, at[-1]))
                    terms.append(Term(int(x[(*source, c)]), *weight))
            return Sum(tuple(terms))

        return self._neuron("conv_general_dilated", (*size, features), make)

    def bias(
        self,
        x: Layer,
        values: str | float | np.ndarray,
        label: str = "add",
        axis: int = -1,
        negative: bool = False,
    ) -> Layer:
        """Adds (or subtracts) numbers that do not depend on the sample, aligned on the right."""
        array = self.parameters[values] if isinstance(values, str) else np.asarray(values, float)
        if axis != -1:
            array = array.reshape(array.shape + (1,) * (x.ndim - 1 - axis % x.ndim))
        array = np.broadcast_to(-array if negative else array, x.shape)
        return self._neuron(label, x.shape, lambda at: Shift(int(x[at]), float(array[at])), axis)

    def scale(
        self,
        x: Layer,
        factor: float | np.ndarray,
        parameter: str | None = None,
        label: str = "mul",
        axis: int = -1,
        constant: float = 0.0,
    ) -> Layer:
        """Multiplies by numbers that do not depend on the sample.

        Args:
          x: the layer.
          factor: the multiplier, which broadcasts against `x`.
          parameter: the path of the synapses behind the factor, if it has any; its shape
            broadcasts against `x` too.
          label: the operation's name.
          axis: the channel axis.
          constant: an addend, as in `constant - x`.
        """
        factor = np.asarray(factor, np.float64)
        shape = np.broadcast_shapes(x.shape, factor.shape)
        x, factor = np.broadcast_to(x, shape), np.broadcast_to(factor, shape)
        flat = None
        if parameter is not None:
            array = self.parameters[parameter]
            self.synapses[parameter] = array.shape
            flat = np.broadcast_to(np.arange(array.size).reshape(array.shape), shape)

        def make(at):
            synapse = None if parameter is None else (parameter, int(flat[at]))
            return Sum((Term(int(x[at]), float(factor[at]), synapse),), constant)

        return self._neuron(label, shape, make, axis)

    def total(
        self, sources: Sequence[tuple[Layer, float]], label: str = "add", axis: int = -1
    ) -> Layer:
        """The weighted sum of layers (broadcast against each other): `a + b`, `a - b`."""
        shape = np.broadcast_shapes(*(x.shape for x, _ in sources))
        spread = [(np.broadcast_to(x, shape), w) for x, w in sources]

        def make(at):
            return Sum(tuple(Term(int(x[at]), w) for x, w in spread))

        return self._neuron(label, shape, make, axis)

    def reduce_sum(
        self, x: Layer, axes: Sequence[int], label: str = "reduce_sum", channel: int | None = -1
    ) -> Layer:
        """Sums over `axes`."""
        lines, shape = _lines(x, axes)

        def make(at):
            return Sum(tuple(Term(int(i), 1.0) for i in lines[at]))

        return self._neuron(label, shape, make, channel)

    def reduce_max(
        self, x: Layer, axes: Sequence[int], label: str = "reduce_max", channel: int | None = -1
    ) -> Layer:
        """The maximum over `axes`."""
        lines, shape = _lines(x, axes)
        return self._neuron(
            label, shape, lambda at: Maximum(tuple(int(i) for i in lines[at])), channel
        )

    def landing(
        self, x: Layer, places: Sequence[int], count: int, before: Layer | None = None
    ) -> Layer:
        """Row i of the result sums the rows of `x` whose place is i, and that of `before`."""

        def make(at):
            sources = [x[(r, *at[1:])] for r, place in enumerate(places) if place == at[0]]
            sources += [] if before is None else [before[at]]
            return Sum(tuple(Term(int(s), 1.0) for s in sources))

        return self._neuron("reduce_sum", (count, *x.shape[1:]), make)

    def reduce_prod(self, x: Layer, axes: Sequence[int]) -> Layer:
        """The product over `axes`."""
        lines, shape = _lines(x, axes)
        return self._neuron("reduce_prod", shape, lambda at: Product((tuple(map(int, lines[at])),)))

    def cumulative(self, x: Layer, label: str, axis: int = 0, reverse: bool = False) -> Layer:
        """Along `axis`, the sum, product or maximum of what came so far."""

        def make(at):
            line = x[(*at[:axis], slice(None), *at[axis + 1 :])]
            some = [int(i) for i in (line[at[axis] :] if reverse else line[: at[axis] + 1])]
            if label == "cumsum":
                return Sum(tuple(Term(i, 1.0) for i in some))
            return Product((tuple(some),)) if label == "cumprod" else Maximum(tuple(some))

        return self._neuron(label, x.shape, make)

    def maximum(self, a: Layer, b: Layer, label: str = "max") -> Layer:
        """The larger of two layers, place by place."""
        return self._neuron(label, a.shape, lambda at: Maximum((int(a[at]), int(b[at]))))

    def pool(
        self,
        x: Layer,
        kind: str,
        window: Sequence[int],
        strides: Sequence[int],
        padding: Sequence[tuple[int, int]] | str = "VALID",
    ) -> Layer:
        """Maximum or sum of windows of `x` [*space, C]; padding is not an input."""
        space = x.shape[:-1]
        pads, size = _window_places(space, window, strides, padding, (1,) * len(window))

        def make(at):
            sources = []
            for offset in np.ndindex(*window):
                p = tuple(at[d] * strides[d] + offset[d] - pads[d][0] for d in range(len(space)))
                if all(0 <= p[d] < space[d] for d in range(len(space))):
                    sources.append(int(x[(*p, at[-1])]))
            if kind == "max":
                return Maximum(tuple(sources))
            return Sum(tuple(Term(s, 1.0) for s in sources))

        return self._neuron(f"reduce_window_{kind}", (*size, x.shape[-1]), make)

    def relu(self, x: Layer, label: str = "relu", floor: float = 0.0, axis: int = -1) -> Layer:
        """`max(x, floor)`, which passes where `x > floor`."""
        return self.function(x, lambda v: max(v, floor), label, lambda v: v > floor, axis)

    def function(
        self,
        x: Layer,
        function: Callable[[float], float],
        label: str,
        passes: Callable[[float], bool] = lambda v: True,
        axis: int = -1,
    ) -> Layer:
        """Any elementwise function of one input."""
        return self._neuron(label, x.shape, lambda at: Function(int(x[at]), function, passes), axis)

    def product(self, a: Layer, b: Layer, label: str = "mul", axis: int = -1) -> Layer:
        """`a * b` of two layers that both depend on the sample."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        a, b = np.broadcast_to(a, shape), np.broadcast_to(b, shape)
        return self._neuron(label, shape, lambda at: Product(((int(a[at]), int(b[at])),)), axis)

    def matrix_product(self, a: Layer, b: Layer, label: str = "dot_general") -> Layer:
        """`[..., n, k] @ [..., k, m]` of two layers that both depend on the sample."""

        def make(at):
            *batch, row, column = at
            rows, columns = a[(*batch, row)], b[(*batch, slice(None), column)]
            return Product(tuple((int(i), int(j)) for i, j in zip(rows, columns, strict=True)))

        return self._neuron(label, (*a.shape[:-1], b.shape[-1]), make)

    def divide(self, a: Layer, b: Layer, reciprocal: str, label: str = "div") -> Layer:
        """`a / b` of two layers: a product with `1 / b`, which is a neuron of its own."""
        one_over = self.function(b, lambda v: 1.0 / v, reciprocal)
        return self.product(a, one_over, label)

    # Values -------------------------------------------------------------------------------

    def run(self, sample: np.ndarray) -> np.ndarray:
        """The value of every cell for one sample."""
        values = np.zeros(len(self.cells))
        values[self.input] = sample
        for i, cell in enumerate(self.cells):
            match cell:
                case Constant(value):
                    values[i] = value
                case Sum(terms, constant):
                    values[i] = sum(t.weight * values[t.source] for t in terms) + constant
                case Product(products):
                    values[i] = sum(math.prod(values[s] for s in factors) for factors in products)
                case Maximum(sources):
                    values[i] = max(values[s] for s in sources)
                case Function(source, function, _):
                    values[i] = function(values[source])
                case Shift(source, constant):
                    values[i] = values[source] + constant
        return values

    def gather(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The value of every cell from one array a layer."""
        values = np.zeros(len(self.cells))
        for i, cell in enumerate(self.cells):
            if isinstance(cell, Constant):
                values[i] = cell.value
        for name, (layer, _) in self.layers.items():
            values[layer] = arrays[name]
        return values

    def scatter(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """One array a layer from the value of every cell."""
        return {name: values[layer] for name, (layer, _) in self.layers.items()}

    def means(self, samples: Iterable[np.ndarray], baseline: str) -> np.ndarray:
        """Phase 1 (Eq. 1): the mean of every cell, over positions too for a channel."""
        mean = np.mean([self.run(s) for s in samples], axis=0)
        if baseline == "position":
            return mean
        for layer, channel in self.layers.values():
            if channel is None or layer.ndim == 0:
                continue
            for line in np.moveaxis(layer, channel, 0):
                mean[line] = mean[line].mean()
        return mean


class Answer(NamedTuple):
    """CONTRIB of every neuron and synapse, and how clear the decisions behind it were.

    Attributes:
      neurons: name -> integer array of the layer's shape.
      synapses: parameter path -> integer array of the parameter's shape.
      margin: the smallest relative distance of any comparison from the other outcome.
    """

    neurons: dict[str, np.ndarray]
    synapses: dict[str, np.ndarray]
    margin: float


def contributions(
    network: Network,
    values: np.ndarray,
    means: np.ndarray,
    outputs: Sequence[int],
    theta: float = 0.0,
    rule: str = "signed",
) -> Answer:
    """Phases 2 and 3 (Algorithm 1) for one sample."""
    delta = values - means
    for i, cell in enumerate(network.cells):
        if isinstance(cell, Constant):
            delta[i] = 0.0
    contrib = np.zeros(len(network.cells), int)
    synapses = {path: np.zeros(shape, int) for path, shape in network.synapses.items()}
    margin = math.inf
    for output in outputs:
        contrib[network.output[output]] += 1
    for i in reversed(range(len(network.cells))):
        if contrib[i] == 0:
            continue
        cell = network.cells[i]
        if isinstance(cell, Shift):
            contrib[cell.source] += contrib[i]
            continue
        for terms in _groups(cell, values):
            if isinstance(cell, Sum | Product):
                sizes = [t.weight * delta[t.source] for t in terms]
                keep, distance = significant(sizes, theta, rule)
                margin = min(margin, distance)
                terms = [t for t, kept in zip(terms, keep, strict=True) if kept]
            for term in terms:
                factors = contrib[i], delta[i], term.weight, delta[term.source]
                local = math.prod(_sign(f) for f in factors)
                contrib[term.source] += local
                if term.synapse is not None:
                    path, at = term.synapse
                    synapses[path].flat[at] += local
    return Answer(network.scatter(contrib), synapses, margin)


def effective_path(
    network: Network, values: np.ndarray, outputs: Sequence[int], theta: float = 0.5
) -> Answer:
    """The effective path of one sample: 1 for what is on it."""
    reached = np.zeros(len(network.cells), int)
    synapses = {path: np.zeros(shape, int) for path, shape in network.synapses.items()}
    margin = math.inf
    reached[network.output[list(outputs)]] = 1
    for i in reversed(range(len(network.cells))):
        if not reached[i]:
            continue
        cell = network.cells[i]
        if isinstance(cell, Shift):
            reached[cell.source] = 1
            continue
        for terms in _groups(cell, values):
            if isinstance(cell, Sum | Product):
                sizes = [t.weight * values[t.source] for t in terms]
                keep, distance = effective(sizes, theta)
                margin = min(margin, distance)
                terms = [t for t, kept in zip(terms, keep, strict=True) if kept]
            for term in terms:
                reached[term.source] = 1
                if term.synapse is not None:
                    path, at = term.synapse
                    synapses[path].flat[at] = 1
    return Answer(network.scatter(reached), synapses, margin)


def significant(
    terms: Sequence[float], theta: float, rule: str = "signed"
) -> tuple[list[bool], float]:
    """Which terms of one activation stay, and the margin of that decision.

    Keep |t| >= tau and t != 0, where tau is the largest magnitude among the terms with
    |sum of t with |t| < tau| < theta * |sum of t|; no such tau: keep every non-zero term.
    """
    limit = Fraction(theta).limit_denominator(1000)
    up, down = limit.numerator, limit.denominator

    def influence(chosen: list[float]) -> float:
        return abs(sum(chosen)) if rule == "signed" else sum(abs(t) for t in chosen)

    mass = sum(abs(t) for t in terms)
    if up == 0 or mass == 0:
        return [t != 0 for t in terms], math.inf
    whole = influence(list(terms))
    margin = math.inf
    tau = 0.0
    magnitudes = sorted({abs(t) for t in terms}, reverse=True)
    for candidate in magnitudes:
        below = influence([t for t in terms if abs(t) < candidate])
        # Over a common denominator, so that a tie is a tie for every theta.
        margin = min(margin, abs(below * down - up * whole) / (down * mass))
        if below * down < up * whole:
            tau = candidate
            break
    dropped = [m for m in magnitudes if m < tau]
    if dropped:
        margin = min(margin, (tau - dropped[0]) / tau)
    return [t != 0 and abs(t) >= tau for t in terms], margin


def effective(terms: Sequence[float], theta: float) -> tuple[list[bool], float]:
    """Which terms of one activation are effective, and the margin of that decision.

    The smallest set of largest terms whose sum reaches theta * sum; equal terms stay
    together; where the sum is not positive, the largest term alone. A term of 0 is no term, so
    that it makes no difference whether a padded or a silent input is listed.
    """
    limit = Fraction(theta).limit_denominator(1000)
    up, down = limit.numerator, limit.denominator
    values = sorted({t for t in terms if t != 0}, reverse=True)
    if not values:
        return [False for _ in terms], math.inf
    whole, mass = sum(terms), sum(abs(t) for t in terms)
    # A sum of exactly 0 is made so (x - x), not rounded to it.
    margin = abs(whole) / mass if whole else math.inf
    tau = values[0]
    if whole > 0:
        for candidate in values:
            reached = sum(t for t in terms if t >= candidate)
            margin = min(margin, abs(reached * down - up * whole) / (down * mass))
            if reached * down >= up * whole:
                tau = candidate
                break
    below = [v for v in values if v < tau]
    if below:
        margin = min(margin, (tau - below[0]) / mass)
    return [t >= tau and t != 0 for t in terms], margin


def _sign(number: float) -> int:
    return int(number > 0) - int(number < 0)


def _groups(cell, values: np.ndarray) -> list[list[Term]]:
    """The edges of a cell, in the groups that are weighed against each other."""
    match cell:
        case Sum(terms, _):
            return [list(terms)]
        case Product(products):
            return [
                [Term(factors[k], _others(factors, k, values)) for factors in products]
                for k in range(len(products[0]))
            ]
        case Maximum(sources):
            top = max(values[s] for s in sources)
            return [[Term(s, 1.0) for s in sources if values[s] == top]]
        case Function(source, _, passes):
            return [[Term(source, 1.0)]] if passes(values[source]) else []
    return []


def _others(factors: Sequence[int], k: int, values: np.ndarray) -> float:
    """The product of all factors but one: the weight of that one."""
    return math.prod(float(values[s]) for i, s in enumerate(factors) if i != k)


def _lines(x: Layer, axes: Sequence[int]) -> tuple[Layer, tuple[int, ...]]:
    """`x` with `axes` flattened into a last one, and the shape of the rest."""
    axes = [a % x.ndim for a in axes]
    rest = [a for a in range(x.ndim) if a not in axes]
    shape = tuple(x.shape[a] for a in rest)
    return np.transpose(x, rest + axes).reshape(*shape, -1), shape


def _window_places(space, window, strides, padding, dilation):
    """The padding (before, after) of each dimension, and how many windows fit."""
    reach = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    if padding == "VALID":
        pads = [(0, 0)] * len(space)
    elif padding == "SAME":
        pads = []
        for n, r, s in zip(space, reach, strides, strict=True):
            need = max((math.ceil(n / s) - 1) * s + r - n, 0)
            pads.append((need // 2, need - need // 2))
    else:
        pads = list(padding)
    size = tuple(
        (n + sum(p) - r) // s + 1 for n, p, r, s in zip(space, pads, reach, strides, strict=True)
    )
    return pads, size


def merged(answers: Iterable[Answer]) -> Answer:
    """Over several samples CONTRIB is the signed sum."""
    answers = list(answers)

    def add(parts):
        return {name: np.sum([p[name] for p in parts], axis=0) for name in parts[0]}

    return Answer(
        add([a.neurons for a in answers]),
        add([a.synapses for a in answers]),
        min(a.margin for a in answers),
    )
