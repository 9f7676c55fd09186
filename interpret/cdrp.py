"""Critical data routing paths: which channels a single input is routed through.

Wang, Su, Zhang, Hu, "Interpret Neural Networks by Identifying Critical Data Routing Paths", CVPR
2018, distillation guided routing: control gates (`gates`), one scalar a channel, are moved by
gradient descent so that the gated network's probabilities stay those of the network itself while
the gates' sum falls. The weights stay. Images do not depend on each other, so a batch of them is
one compiled loop.
"""

import dataclasses
import functools
import json
import math
import numbers
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interpret import gates as control
from nnslicer_jax.batches import across_devices, batches, check_params, count
from nnslicer_jax.checkpoint import digest
from nnslicer_jax.cost import BUDGET
from nnslicer_jax.evaluation import evaluated
from nnslicer_jax.fold import leaves
from nnslicer_jax.graph import Graph
from nnslicer_jax.progress import Progress
from nnslicer_jax.tensors import read_tensors, write_tensors

# More images at once than this fit no cache and are not faster.
_MOST_IMAGES = 256
# Counted in int32.
_MOST_STEPS = 2**31 - 1
_SAVE_EVERY = 60
# Of all gates' sum in the loss, when `balanced`: that of ResNet-10's block outputs as published.
_MOST_WEIGHT = 12.0


@dataclasses.dataclass(frozen=True)
class Routes:
    """The routes of N images: their gates, unthresholded.

    Attributes:
      gates: `[N, G]` float32, 0 or more; 1 leaves a channel as it is.
      layers: Neuron name to where its gates stand in a row.
      predicted: `[N]` int32, the network's classes, which the gated network shares.
      loss: `[N]` float32, cross-entropy plus gamma times the sum of the gates returned.
      step: `[N]` int32, which iterate is returned: 0 is the untouched gates.
      kept: `[N]` int32, how many of the later iterates keep the predicted class.
      options: How the routes were made.
    """

    gates: np.ndarray
    layers: Mapping[str, slice]
    predicted: np.ndarray
    loss: np.ndarray
    step: np.ndarray
    kept: np.ndarray
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Routes({len(self.gates)} images, {self.gates.shape[1]} gates in {len(self.layers)} "
            f"layers, {int(self.lost.sum())} untouched as no step kept the class)"
        )

    def __len__(self) -> int:
        return len(self.gates)

    @property
    def lost(self) -> np.ndarray:
        """`[N]` bool: images whose class every step lost; their gates are untouched."""
        return self.kept == 0

    def layer(self, name: str) -> np.ndarray:
        """Gates of one layer, `[N, C]`."""
        if name not in self.layers:
            raise ValueError(f"no gates at {name!r}; they stand at {', '.join(self.layers)}")
        return self.gates[:, self.layers[name]]

    def take(self, index: Any) -> "Routes":
        """The routes of some images, by an index or mask along N."""
        index = np.atleast_1d(index)
        return dataclasses.replace(
            self,
            **{k: getattr(self, k)[index] for k in ("gates", *_PER_IMAGE)},
        )

    def save(self, path: str | Path) -> None:
        """Writes the routes to a safetensors file, whole or not at all."""
        about = {
            "layers": {name: [part.start, part.stop] for name, part in self.layers.items()},
            "options": dict(self.options),
        }
        arrays = {k: np.ascontiguousarray(getattr(self, k)) for k in ("gates", *_PER_IMAGE)}
        write_tensors(path, arrays, {"routes": json.dumps(about)})


_PER_IMAGE = {"predicted": np.int32, "loss": np.float32, "step": np.int32, "kept": np.int32}


def load_routes(path: str | Path) -> Routes:
    """Reads what `Routes.save` wrote.

    Raises:
      ValueError: If the file is missing, truncated, or holds no routes.
    """
    arrays, about = read_tensors(path, "routes", {"layers": dict, "options": dict})
    kinds = {"gates": np.float32, **_PER_IMAGE}
    if {k: a.dtype for k, a in arrays.items()} != {k: np.dtype(d) for k, d in kinds.items()}:
        raise ValueError(f"{path} holds no routes: its arrays are {', '.join(arrays) or 'none'}")
    gates = arrays["gates"]
    if gates.ndim != 2 or any(arrays[k].shape != gates.shape[:1] for k in _PER_IMAGE):
        raise ValueError(f"{path} holds no routes: its arrays differ in length")
    end = 0
    for part in about["layers"].values():
        if not isinstance(part, list) or len(part) != 2 or part[0] != end or part[1] <= end:
            raise ValueError(f"{path} holds no routes: its layers are not parts of a row")
        end = part[1]
    if end != gates.shape[1]:
        raise ValueError(f"{path} holds no routes: its layers have {end} gates in all")
    layers = {name: slice(*part) for name, part in about["layers"].items()}
    return Routes(layers=layers, options=about["options"], **arrays)


def joined(parts: Sequence[Routes]) -> Routes:
    """The routes of several sets of images as those of one.

    Raises:
      ValueError: For no parts, or parts of different layers or options.
    """
    if not parts:
        raise ValueError("parts is empty; it must hold at least one set of routes")
    first = parts[0]
    for other in parts[1:]:
        if dict(other.layers) != dict(first.layers) or dict(other.options) != dict(first.options):
            raise ValueError("parts must be routes of the same layers, made with the same options")
    arrays: dict[str, Any] = {
        k: np.concatenate([getattr(part, k) for part in parts]) for k in ("gates", *_PER_IMAGE)
    }
    return dataclasses.replace(first, **arrays)


def route(
    graph: Graph,
    params: Any,
    images: Any,
    at: str | Sequence[str] = "auto",
    *,
    gamma: float = 0.05,
    iterations: int = 30,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    bound: float | None = 10.0,
    batch_size: int | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Routes:
    """Routes images: distillation guided routing of each.

    Minimises `cross_entropy(softmax(f(x)), softmax(f(x; gates))) + gamma * sum |gates|` from
    gates of 1 by gradient descent with momentum, clipping after each step. What is returned is
    the iterate of the lowest loss among those that keep the network's class; the untouched gates
    are one of them.

    Args:
      graph: The traced model; its output is logits `[B, K]`, or a softmax of them.
      params: Its parameters.
      images: `[N, ...]`, or an iterable of batches.
      at: Where gates stand; see `gates.places`.
      gamma: Weight of the gates' sum, 0 or more.
      iterations: Steps of the descent, at least 1.
      learning_rate: Above 0.
      momentum: 0 or more and below 1.
      bound: Greatest gate, at least 1; None for no bound.
      batch_size: Images routed at once, which bounds memory; None chooses by the activations.
      progress: Print a line of progress to standard error.
      checkpoint: File to save progress in about once a minute; where it holds progress of the
        same call, that is resumed; of an iterable, the images themselves are not compared. In the
        end it holds the routes.

    Raises:
      ValueError: For a network without a place for gates, an argument out of range, or a
        checkpoint of another call.
    """
    _check_options(gamma, iterations, learning_rate, momentum, bound, batch_size)
    shape = graph.values[graph.logits].shape
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(
            f"routing needs a model that returns logits [B, K], not {('B', *shape[1:])}"
        )
    leaves(graph, params)
    check_params(params)
    layers = control.places(graph, at)
    if batch_size is None:
        carried = sum(4 * math.prod(graph.values[i].shape) for i in graph.carried)
        batch_size = max(1, min(_MOST_IMAGES, BUDGET // max(2 * carried, 1)))
    by = Descent(gamma, learning_rate, momentum, math.inf if bound is None else bound)
    options = {
        "at": list(layers), "gamma": float(gamma), "iterations": int(iterations),
        "learning_rate": float(learning_rate), "momentum": float(momentum),
        "bound": None if bound is None else float(bound),
    }  # fmt: skip
    total, made, mark = count(images), list[Routes](), ""
    if checkpoint is not None:
        mark = digest((images if total else (), leaves(graph, params)))
        if Path(checkpoint).exists():
            before = load_routes(checkpoint)
            if before.options != options | {"fingerprint": mark} or before.layers != layers:
                raise ValueError(f"{checkpoint} holds the progress of another call; remove it")
            made = [dataclasses.replace(before, options=options)]
    done = sum(map(len, made))
    line = Progress("routed", total, "images", done) if progress else None
    saved = time.monotonic()
    for batch in batches(graph, images, batch_size, done):
        found = descend(
            graph, control.frozen(layers), params, across_devices(batch.images), iterations, by
        )
        arrays: dict[str, Any] = {k: np.asarray(v)[: batch.real] for k, v in found.items()}
        made.append(Routes(layers=layers, options=options, **arrays))
        done += batch.real
        if line:
            line.at(done)
        if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
            _save_progress(made, mark, checkpoint)
            saved = time.monotonic()
    if checkpoint is not None:
        _save_progress(made, mark, checkpoint)
    return joined(made)


def _save_progress(made: Sequence[Routes], mark: str, path: str | Path) -> None:
    whole = joined(made)
    dataclasses.replace(whole, options={**whole.options, "fingerprint": mark}).save(path)


def logits(
    graph: Graph,
    params: Any,
    images: Any,
    layers: Mapping[str, slice],
    gates: np.ndarray,
    batch_size: int = 256,
) -> np.ndarray:
    """Logits `[N, K]` of images `[N, ...]`, each under its own gates `[N, G]`.

    Raises:
      ValueError: For gates of another shape, or negative ones.
    """
    check_params(params)
    gates = control.check_gates(graph, layers, gates, len(images))
    static, made, done = control.frozen(layers), [], 0
    for batch in batches(graph, images, batch_size):
        # Rows that only fill the batch up are run under the first gates.
        rows = np.minimum(np.arange(done, done + len(batch.images)), len(gates) - 1)
        found = control.gated_logits(
            graph, static, params, across_devices(batch.images), across_devices(gates[rows])
        )
        made.append(np.asarray(found)[: batch.real])
        done += batch.real
    return np.concatenate(made)


class Descent(NamedTuple):
    """What a step is taken with: gamma, learning rate, momentum and the greatest gate."""

    gamma: float = 0.05
    learning_rate: float = 0.1
    momentum: float = 0.9
    bound: float = 10.0


class DescentState(NamedTuple):
    """Between steps, of B images: where the descent is, and the best iterate so far."""

    gates: jax.Array
    velocity: jax.Array
    best: jax.Array
    loss: jax.Array
    step: jax.Array
    kept: jax.Array


def balanced(count: int) -> dict[str, float]:
    """Gamma and learning rate of `route` for a network of many gates; beyond the publication.

    The published gamma weighs the sum of G gates by 0.05 G beside a cross-entropy of a few units.
    With thousands of gates all of them shrink alike, until the class is lost. Here gamma is at
    most 12 / G, and the rate grows as gamma falls, so that an idle gate moves as fast as published.

    Args:
      count: G, at least 1; up to 240 the published values are returned.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    usual = Descent()
    gamma = min(usual.gamma, _MOST_WEIGHT / count)
    return {"gamma": gamma, "learning_rate": usual.learning_rate * (usual.gamma / gamma)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def descend(
    graph: Graph,
    static: tuple[tuple[str, int, int], ...],
    params: Any,
    images: jax.Array,
    iterations: int | jax.Array,
    by: Descent,
) -> dict[str, jax.Array]:
    """The compiled loop behind `route`, for one batch.

    Args:
      graph: The traced model.
      static: Where gates stand, as `gates.frozen` gives it.
      params: The parameters.
      images: `[B, ...]`.
      iterations: Steps.
      by: What a step is taken with.

    Returns:
      What `Routes` holds of the images, by name.
    """
    layers = control.thawed(static)
    network = evaluated(graph, params, images)
    target = jax.nn.softmax(network.logits.astype(jnp.float32))
    predicted = jnp.argmax(network.logits, -1)

    def objective(gates: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out = network.again(control.edits(graph, layers, gates)).astype(jnp.float32)
        distance = -(target * jax.nn.log_softmax(out)).sum(-1)
        loss = distance + by.gamma * jnp.abs(gates).sum(-1)
        return loss.sum(), (loss, jnp.argmax(out, -1) == predicted)

    def judged(
        i: int | jax.Array, state: DescentState, loss: jax.Array, same: jax.Array
    ) -> DescentState:
        # Run again, the network's own logits may differ by a rounding; the start always counts.
        same = (same & jnp.isfinite(loss)) | (i == 0)
        better = same & (loss < state.loss)
        return state._replace(
            best=jnp.where(better[:, None], state.gates, state.best),
            loss=jnp.where(better, loss, state.loss),
            step=jnp.where(better, i, state.step),
            kept=state.kept + (same & (i > 0)),
        )

    def step(i: jax.Array, state: DescentState) -> DescentState:
        slope, (loss, same) = jax.grad(objective, has_aux=True)(state.gates)
        state = judged(i, state, loss, same)
        velocity = by.momentum * state.velocity + slope
        gates = jnp.clip(state.gates - by.learning_rate * velocity, 0, by.bound)
        return state._replace(gates=gates, velocity=velocity)

    size = len(images)
    ones = jnp.ones((size, static[-1][2]), jnp.float32)
    none = jnp.zeros(size, jnp.int32)
    start = DescentState(ones, jnp.zeros_like(ones), ones, jnp.full(size, jnp.inf), none, none)
    state = lax.fori_loop(0, iterations, step, start)
    _, (loss, same) = objective(state.gates)
    state = judged(iterations, state, loss, same)
    return {
        "gates": state.best, "predicted": predicted.astype(jnp.int32), "loss": state.loss,
        "step": state.step, "kept": state.kept,
    }  # fmt: skip


def _check_options(
    gamma: Any, iterations: Any, learning_rate: Any, momentum: Any, bound: Any, batch_size: Any
) -> None:
    """Raises ValueError for a number that is out of range."""
    if not (_is_number(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a number of 0 or more, not {gamma!r}")
    for name, value in (("iterations", iterations), ("batch_size", batch_size)):
        if name == "batch_size" and value is None:
            continue
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or not 1 <= value <= _MOST_STEPS:
            raise ValueError(f"{name} must be an integer in 1..{_MOST_STEPS}, not {value!r}")
    if not (_is_number(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be a number above 0, not {learning_rate!r}")
    if not (_is_number(momentum) and 0 <= momentum < 1):
        raise ValueError(f"momentum must be a number in 0..1, below 1, not {momentum!r}")
    if bound is not None and not (_is_number(bound) and bound >= 1):
        raise ValueError(f"bound must be None or a number of at least 1, not {bound!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
