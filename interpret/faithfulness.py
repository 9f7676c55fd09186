"""How faithful an explanation is: what the network says as the best-scored units go, or come.

Deletion takes units away in the order of their scores and insertion brings them back onto a
network that has none of them (Petsiuk, Das, Saenko, "RISE", BMVC 2018, on the pixels of an image;
here on pixels, channels or single activations, as the scores have it). The probability of the
class first predicted, over the share of units, encloses an area: a faithful explanation has a
small one under deletion and a large one under insertion.

Scores of slices, effective paths and routes sit beside those of integrated gradients (Sundararajan,
Taly, Yan, 2017), of the activations themselves, and of chance.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interpret import gates as control
from interpret.cdrp import Routes
from interpret.gates import Layers
from nnslicer_jax.batches import across_devices, batches, check_params
from nnslicer_jax.evaluation import evaluate, evaluated
from nnslicer_jax.fold import check_names
from nnslicer_jax.graph import Graph, Neuron
from nnslicer_jax.slices import Slice

Scores = Mapping[str, np.ndarray]  # neuron name -> [N, C] or [N, ...], higher is more important

SCOPES = ("layer", "network")


class Curves(NamedTuple):
    """Probability of the class first predicted, as units go and as they come.

    Attributes:
      shares: `[S]`, of the units, from 0 to 1.
      deletion: `[N, S]` float32, without that share of the best-scored units.
      insertion: `[N, S]` float32, with that share of them only.
    """

    shares: np.ndarray
    deletion: np.ndarray
    insertion: np.ndarray

    @property
    def areas(self) -> tuple[np.ndarray, np.ndarray]:
        """Areas under deletion and insertion, `[N]` each, 0..1."""
        return np.trapezoid(self.deletion, self.shares), np.trapezoid(self.insertion, self.shares)


def curves(
    key: int,
    graph: Graph,
    params: Any,
    images: np.ndarray,
    scores: Scores,
    shares: Sequence[float] | None = None,
    *,
    scope: str = "layer",
    fill: Mapping[str, np.ndarray] | None = None,
    batch_size: int = 256,
) -> Curves:
    """Deletes and inserts what an explanation scores, best first.

    Args:
      key: Seed of the order among equal scores.
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]`.
      scores: Neuron name to scores of its channels `[N, C]` or of its activations `[N, ...]`.
      shares: Of the units, rising from 0 to 1; None for steps of 5 %. A share is the
        ceil(share * n) best.
      scope: "layer": that share of each layer; "network": of all units together, which takes
        scores that compare across layers.
      fill: Neuron name to what stands in place of a missing unit, broadcastable to one sample's
        activation; 0 where there is none.
      batch_size: Images run at once.

    Raises:
      ValueError: For an unknown neuron or scope, or scores of another shape.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
    steps = np.linspace(0, 1, 21) if shares is None else np.asarray(shares, float)
    if steps.ndim != 1 or len(steps) < 2 or (steps[0], steps[-1]) != (0, 1):
        raise ValueError(f"shares must rise from 0 to 1, not {shares}")
    if (np.diff(steps) <= 0).any():
        raise ValueError(f"shares must rise from 0 to 1, not {shares}")
    neurons = _check(graph, scores, len(images))
    place, sizes = _places(np.random.default_rng(key), scores, scope)
    fill = fill or {}
    if not set(fill) <= set(scores):
        odd = sorted(set(fill) - set(scores))
        raise ValueError(f"fill must be for neurons that are scored, not {', '.join(odd)}")
    filling = {
        name: np.broadcast_to(np.asarray(fill.get(name, 0), np.float32), neuron.shape)
        for name, neuron in neurons.items()
    }
    check_params(params)
    exact = [Fraction(f"{step:.12g}") for step in steps]
    limits = {
        name: np.array([math.ceil(share * size) for share in exact], np.int32)
        for name, size in sizes.items()
    }
    deletion, insertion, done = [], [], 0
    for batch in batches(graph, images, batch_size):
        rows = np.minimum(np.arange(done, done + len(batch.images)), len(images) - 1)
        found = _both(
            graph, params, across_devices(batch.images),
            {name: across_devices(ranks[rows]) for name, ranks in place.items()}, limits, filling,
        )  # fmt: skip
        gone, come = (np.asarray(part).T[: batch.real] for part in found)
        deletion.append(gone)
        insertion.append(come)
        done += batch.real
    return Curves(steps, np.concatenate(deletion), np.concatenate(insertion))


def _check(graph: Graph, scores: Scores, count: int) -> dict[str, Neuron]:
    neurons = check_names(graph, scores)
    if not scores:
        raise ValueError("scores is empty; it must score at least one neuron")
    for name, values in scores.items():
        shape = neurons[name].shape
        width = (shape[neurons[name].channel],) if shape else ()
        if np.shape(values) not in ((count, *width), (count, *shape)):
            raise ValueError(
                f"scores of {name} must have shape {(count, *width)} or {(count, *shape)}, not "
                f"{np.shape(values)}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"scores of {name} must be finite")
    return {name: neurons[name] for name in scores}


def _places(
    rng: np.random.Generator, scores: Scores, scope: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Each unit's place in the order of deletion, and how many units there are to count to."""
    rows = {name: np.reshape(v, (len(v), -1)).astype(float) for name, v in scores.items()}
    if scope == "network":
        everything = np.concatenate(list(rows.values()), 1)
        ends = np.cumsum([v.shape[1] for v in rows.values()])[:-1]
        order = dict(zip(rows, np.split(_ranks(rng, everything), ends, 1), strict=True))
        sizes = {name: int(everything.shape[1]) for name in rows}
    else:
        order = {name: _ranks(rng, v) for name, v in rows.items()}
        sizes = {name: int(v.shape[1]) for name, v in rows.items()}
    return {name: order[name].reshape(np.shape(scores[name])) for name in scores}, sizes


def _ranks(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    """Places from 0 for the highest score, equal ones in an order of chance."""
    order = np.lexsort((rng.random(scores.shape), -scores), axis=-1)
    return np.argsort(order, axis=-1).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _both(
    graph: Graph,
    params: Any,
    images: jax.Array,
    place: dict[str, jax.Array],
    limits: dict[str, jax.Array],
    filling: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Deletion and insertion, `[S, B]` each."""
    neurons = graph.neurons()
    network = evaluated(graph, params, images)
    predicted = jnp.argmax(network.logits, -1)

    def probability(limit: dict[str, jax.Array], without: bool) -> jax.Array:
        def edit(name: str, activation: jax.Array) -> jax.Array:
            first = place[name] < limit[name]
            stays = ~first if without else first
            if stays.ndim == 2 and activation.ndim != 2:
                shape = [1] * activation.ndim
                shape[0], shape[neurons[name].channel + 1] = stays.shape
                stays = stays.reshape(shape)
            return jnp.where(stays, activation, filling[name][None].astype(activation.dtype))

        out = network.again({name: functools.partial(edit, name) for name in place})
        return jnp.take_along_axis(jax.nn.softmax(out), predicted[:, None], 1)[:, 0]

    def both(limit: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return probability(limit, True), probability(limit, False)

    return lax.map(both, limits)


# Scores --------------------------------------------------------------------------------------


def of_slice(piece: Slice, names: Sequence[str], by: str = "channels") -> dict[str, np.ndarray]:
    """|CONTRIB| in a slice or an effective path, made with per_sample=True.

    Args:
      piece: The slices of N images.
      names: Neurons to score.
      by: "channels": summed over each channel's positions, `[N, C]`; "activations": of each
        activation, `[N, ...]`.

    Raises:
      ValueError: For an unknown neuron or way, or a slice that is not per sample.
    """
    if by not in ("channels", "activations"):
        raise ValueError(f"by must be channels or activations, not {by!r}")
    if not piece.per_sample:
        raise ValueError("of_slice needs a slice made with per_sample=True")
    for name in names:
        if name not in piece.neurons:
            raise ValueError(f"the slice has no neuron {name!r}")
    # Not the sum's magnitude: at two positions, +1 and -1 are both part of the slice.
    held = {name: np.abs(piece.neurons[name]) for name in names}
    if by == "channels":
        held = dataclasses.replace(piece, neurons=held).channels()
    return {name: held[name].astype(np.float32) for name in names}


def of_routes(routes: Routes) -> dict[str, np.ndarray]:
    """Gates, `[N, C]` for each gated layer."""
    return {name: routes.layer(name) for name in routes.layers}


def of_activations(
    graph: Graph, params: Any, images: np.ndarray, names: Sequence[str], batch_size: int = 256
) -> dict[str, np.ndarray]:
    """Mean |activation| of each channel over its positions, `[N, C]`."""
    check_names(graph, names)
    check_params(params)
    made: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in batches(graph, images, batch_size):
        found = _activity(graph, tuple(names), params, across_devices(batch.images))
        for name in names:
            made[name].append(np.asarray(found[name])[: batch.real])
    return {name: np.concatenate(parts) for name, parts in made.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activity(
    graph: Graph, names: tuple[str, ...], params: Any, images: jax.Array
) -> dict[str, jax.Array]:
    neurons = graph.neurons()
    _, activations = evaluate(graph, params, images)
    found = {}
    for name in names:
        keep = neurons[name].channel + 1
        axes = tuple(a for a in range(1, activations[name].ndim) if a != keep)
        found[name] = jnp.abs(activations[name]).mean(axes)
    return found


def of_integrated_gradients(
    graph: Graph,
    params: Any,
    images: np.ndarray,
    layers: Layers,
    steps: int = 32,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Integrated gradients of the predicted class's logit for the gates of each layer, `[N, C]`.

    Each layer's gates go from 0 to 1 on their own, the other layers staying as they are, so a
    layer's scores add up to what the logit loses when all its channels go.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]`.
      layers: Where gates stand, from `gates.places`.
      steps: Points of the midpoint rule.
      batch_size: Images run at once.

    Raises:
      ValueError: For less than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    check_params(params)
    made = []
    for batch in batches(graph, images, batch_size):
        found = _integrated(
            graph, control.frozen(layers), steps, params, across_devices(batch.images)
        )
        made.append(np.asarray(found)[: batch.real])
    scores = np.concatenate(made)
    return {name: scores[:, part] for name, part in layers.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _integrated(
    graph: Graph,
    static: tuple[tuple[str, int, int], ...],
    steps: int,
    params: Any,
    images: jax.Array,
) -> jax.Array:
    layers = control.thawed(static)
    network = evaluated(graph, params, images)
    predicted = jnp.argmax(network.logits, -1)[:, None]

    def logit(name: str, gates: jax.Array) -> jax.Array:
        alone = {name: slice(0, gates.shape[1])}
        out = network.again(control.edits(graph, alone, gates))
        return jnp.take_along_axis(out, predicted, 1).sum()

    found = []
    for name, part in layers.items():
        width = part.stop - part.start

        def at(i: jax.Array, total: jax.Array, name: str = name) -> jax.Array:
            gates = jnp.full_like(total, (i + 0.5) / steps)
            return total + jax.grad(logit, argnums=1)(name, gates)

        none = jnp.zeros((len(images), width), jnp.float32)
        found.append(lax.fori_loop(0, steps, at, none) / steps)
    return jnp.concatenate(found, 1)


def of_chance(key: int, count: int, layers: Layers) -> dict[str, np.ndarray]:
    """Random scores, `[count, C]` for each layer."""
    rng = np.random.default_rng(key)
    return {
        name: rng.random((count, part.stop - part.start), np.float32)
        for name, part in layers.items()
    }
