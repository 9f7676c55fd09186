"""Slicing a network: which neurons and synapses contribute to chosen outputs for chosen inputs.

NNSlicer (Zhang et al., ESEC/FSE 2020) and EffectivePath (Qiu et al., CVPR 2019) over any number
of images: batches are `vmap` of the walk over one sample, local devices share each batch, and
counts merge on the host in int64.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nnslicer_jax import contribution, operations
from nnslicer_jax.batches import batches, check_params, count, devices
from nnslicer_jax.contribution import ROOTS, WEIGHTS, Term, deltas
from nnslicer_jax.cost import estimate, product_shapes
from nnslicer_jax.effective_path import RULES as PATH_RULES
from nnslicer_jax.effective_path import activations
from nnslicer_jax.fold import Rules, backward, check_names, leaves, record, unbatched
from nnslicer_jax.graph import Graph, Neuron
from nnslicer_jax.profile import Profile, means_by_value
from nnslicer_jax.progress import Progress
from nnslicer_jax.selection import Selection
from nnslicer_jax.slices import Slice, load_slice

SELECT = ("auto", "host", "device")
# Seconds between two saves of progress.
_SAVE_EVERY = 60
# Terms of a product from which on passes are faster than the host, and how many of them, over all
# images, make up for compiling it: a second, at 3 ns a term.
_LARGE = 1e7
_PAYS = 3e8
# Images hashed at once.
_HASHED = 1024
# Names that a warning lists.
_LISTED = 4


class Walk(NamedTuple):
    """One way of slicing; hashable, so that a compiled walk is found again.

    Attributes:
      rules: Table of the backward walk.
      rule: Selection rule.
      filtered: Whether theta selects terms at all.
      host: Whether it does so on the host.
      per_sample: Whether samples stay apart.
      devices: How many devices share a batch.
      start: Where the criterion stands: the logits, or a neuron.
    """

    rules: Rules
    rule: str
    filtered: bool
    host: bool
    per_sample: bool
    devices: int
    start: Neuron


def slice_network(
    graph: Graph,
    params: Any,
    profile: Profile,
    images: Any,
    outputs: Any = None,
    theta: float = 0.2,
    rule: str = "signed",
    per_sample: bool = False,
    batch_size: int | None = None,
    *,
    neuron: str | None = None,
    select: str = "auto",
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Slice:
    """Slices a network for the criterion (images, outputs).

    Zhang et al., ESEC/FSE 2020, Algorithm 1; see `contribution` for the local contributions and
    `selection` for theta.

    Args:
      graph: The traced model; its output is logits `[B, K]`, or a softmax of them, which is
        left out.
      params: Its parameters.
      profile: Mean activations, from `profile`.
      images: `[N, ...]`, or an iterable of batches; those that meet a condition make a
        conditioned slice.
      outputs: Output neurons of interest: class index for each image `[N]`, several for each
        `[N, k]` (CONTRIB 1 on each), or None for the predicted class. With `neuron`: indices of
        its channels, CONTRIB 1 on each at every position; or bool `[N, *shape]`, true on the
        single activations that get CONTRIB 1.
      theta: Size of the slice, 0..1: 0 keeps every term, more keeps fewer.
      rule: "signed" (the paper's) or "mass" (terms do not cancel when theta is applied).
      per_sample: Keep samples apart instead of summing them. All are held in the host's memory,
        four bytes for each synapse and activation of each sample: for very many, call this
        batch by batch, as `interpret.features` does.
      batch_size: Samples walked at once, which bounds memory; None chooses by `estimate`.
      neuron: Name of a neuron, as `graph.neurons()` lists it, on which the criterion stands
        instead of the logits. What comes after it has CONTRIB 0.
      select: Where theta is applied: "host" (NumPy's sort through a callback; needs CPU arrays
        at hand), "device" (plain JAX), or "auto": on a CPU the host, but under "mass" (and for
        effective paths) of so many images that compiling `passes` pays.
      progress: Print a line of progress to standard error.
      checkpoint: File to save progress in about once a minute; where it holds progress of the
        same call, that is resumed; of an iterable, the images themselves are not compared. Not
        with `per_sample`.

    Returns:
      The slice; the counts are int32 of one sample each, int64 once summed over several. A
      weight computed from parameters (`tanh(w)`, `w / norm(w)`) counts for each use of those of
      its own shape; parameters that no weight leads back to (biases, variances, the factors of
      `a @ b`) are not among its synapses.

    Raises:
      ValueError: For an option, class index, shape or range that is not accepted.
      UnsupportedError: For an operation without a rule; it names operation and module.

    Warns:
      UserWarning: Where weights are made of parameters in a way that leads back to none of them
        (`a @ b`, `w.sum(0)`); it names them.
    """
    if rule not in ("signed", "mass"):
        raise ValueError(f"rule must be signed or mass, not {rule!r}")
    job = _job(
        graph, params, images, contribution.RULES, rule, theta, per_sample, batch_size, neuron,
        select,
    )  # fmt: skip
    job = job._replace(means=means_by_value(graph, profile), span=(profile.low, profile.high))
    about = {"method": "nnslicer", "rule": rule, "theta": job.theta, "baseline": profile.baseline}
    return _run(job, images, outputs, about, progress, checkpoint)


def effective_path(
    graph: Graph,
    params: Any,
    images: Any,
    outputs: Any = None,
    theta: float = 0.5,
    per_sample: bool = False,
    batch_size: int | None = None,
    *,
    neuron: str | None = None,
    select: str = "auto",
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> Slice:
    """The effective path: what makes up most of the chosen outputs, as a slice of 0 and 1.

    Qiu et al., CVPR 2019; see the module `effective_path`. Over several images the counts add
    up, so what is not 0 is the union of their paths. The path of a class is that of its
    correctly predicted samples.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]`, or an iterable of batches.
      outputs: As for `slice_network`.
      theta: Share of each sum that the kept terms reach, 0..1.
      per_sample: As for `slice_network`.
      batch_size: As for `slice_network`.
      neuron: As for `slice_network`.
      select: As for `slice_network`.
      progress: As for `slice_network`.
      checkpoint: As for `slice_network`.

    Raises:
      ValueError: For an option, class index or shape that is not accepted.
      UnsupportedError: For an operation without a rule; it names operation and module.

    Warns:
      UserWarning: As `slice_network`.
    """
    job = _job(
        graph, params, images, PATH_RULES, "largest", theta, per_sample, batch_size, neuron, select
    )
    about = {"method": "effective path", "theta": job.theta}
    return _run(job, images, outputs, about, progress, checkpoint)


class _Job(NamedTuple):
    """A walk with what it runs on: the network, theta, means and the range that was profiled."""

    walk: Walk
    graph: Graph
    params: Any
    theta: float
    batch_size: int
    means: dict[int, np.ndarray]
    span: tuple[float, float]


def _job(graph, params, images, rules, rule, theta, per_sample, batch_size, neuron, select) -> _Job:
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must be in 0..1, not {theta}")
    theta = float(theta)
    if select not in SELECT:
        raise ValueError(f"select must be one of {', '.join(SELECT)}, not {select!r}")
    start = criterion_neuron(graph, neuron)
    leaves(graph, params)
    check_params(params)
    filtered = rule == "largest" or theta > 0
    host = select == "host"
    if select == "auto" and jax.default_backend() == "cpu":
        shapes, total = product_shapes(graph), count(images) or math.inf
        terms = sum(math.prod(shape) for shape in shapes) / max(len(shapes), 1)
        host = rule == "signed" or terms < _LARGE or total * terms < _PAYS
    if batch_size is None:
        batch_size = estimate(graph, theta if filtered else 0.0, rule).batch_size
    shared = len(devices())
    if batch_size % shared:
        shared = 1
    walk = Walk(rules, rule, filtered, host, per_sample, shared, start)
    return _Job(walk, graph, params, theta, batch_size, {}, (-np.inf, np.inf))


def criterion_neuron(graph: Graph, name: str | None) -> Neuron:
    """Where a criterion stands: the neuron of that name; for None the logits, of no name.

    Raises:
      ValueError: For an unknown name, or None where the model does not return logits `[B, K]`.
    """
    if name is not None:
        return check_names(graph, [name])[name]
    value = graph.values[graph.logits]
    if len(value.shape) != 2 or value.shape[0] != 1:
        shape = ("B", *value.shape[1:])
        raise ValueError(f"slicing needs a model that returns logits [B, K], not {shape}")
    return Neuron("", graph.logits, value.shape[1:], value.dtype, 0, 0)


def _run(job: _Job, images, outputs, about, progress, checkpoint) -> Slice:
    """Walks all images, batch by batch."""
    total = count(images)
    named = job.walk.start.name
    if outputs is not None:
        outputs = check_criterion(job.walk.start, outputs, total)
    elif named:
        raise ValueError(f"outputs must be channel indices of {named}, not None")
    if named:
        about["neuron"] = named
    made: list[Slice] = []
    done, mark = 0, ""
    if checkpoint is not None:
        if job.walk.per_sample:
            raise ValueError("checkpoint saves one merged slice; it does not go with per_sample")
        mark = _fingerprint(job, images, outputs, about)
        if Path(checkpoint).exists():
            before = load_slice(checkpoint)
            if before.criterion.get("fingerprint") != mark:
                raise ValueError(f"{checkpoint} holds the progress of another call; remove it")
            made, done = [dataclasses.replace(before, criterion={})], before.count
    line = Progress("sliced", total, "images", done) if progress else None
    if line:
        cost = estimate(job.graph, job.theta if job.walk.filtered else 0.0, job.walk.rule)
        line.say(f"slicing: {cost}" + (f"; {cost.seconds * total:,.0f} s in all" if total else ""))
    saved = time.monotonic()
    seen = done
    for batch in batches(job.graph, images, job.batch_size, done):
        start, seen = seen, seen + batch.real
        if outputs is not None and len(outputs) < seen:
            raise ValueError(
                f"outputs must have one row for each of at least {seen} images, not {len(outputs)}"
            )
        _check_span(batch.images, job.span)
        chosen = None if outputs is None else outputs[start:seen]
        piece = _walk_some(job, batch.images, batch.real, chosen)
        if job.walk.per_sample or not made:
            made.append(piece)
        else:
            made = [made[0] + piece]
        if line:
            line.at(seen)
        if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
            dataclasses.replace(made[0], criterion={**about, "fingerprint": mark}).save(checkpoint)
            saved = time.monotonic()
    if outputs is not None and len(outputs) != seen:
        raise ValueError(f"outputs must have one row for each of {seen} images, not {len(outputs)}")
    whole = made[0] if len(made) == 1 else _joined(made)
    whole = dataclasses.replace(whole, criterion=about)
    if checkpoint is not None:
        dataclasses.replace(whole, criterion={**about, "fingerprint": mark}).save(checkpoint)
    return whole


def _joined(pieces: list[Slice]) -> Slice:
    """Per-sample slices one after another."""

    def join(kind: str) -> dict[str, np.ndarray]:
        parts = [getattr(p, kind) for p in pieces]
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    count = sum(p.count for p in pieces)
    return dataclasses.replace(
        pieces[0], synapses=join("synapses"), neurons=join("neurons"), count=count
    )


def check_criterion(start: Neuron, outputs: Any, total: int | None) -> np.ndarray:
    """What `outputs` names: indices of channels `[N, k]`, or bool `[N, *shape]`.

    Args:
      start: Where the criterion stands.
      outputs: As for `slice_network`, but None.
      total: Number of images N; None if it is not known yet.

    Raises:
      ValueError: For another shape, type or range, or an image of which nothing is named.
    """
    indices, whose = "class indices", "the model's number of classes"
    if start.name:
        indices, whose = "channel indices", f"the channels of {start.name}"
    outputs = np.asarray(outputs)
    channels = start.shape[start.channel] if start.shape else 1
    single = outputs.dtype == bool and outputs.shape[1:] == start.shape and outputs.ndim
    if not single:
        if not np.issubdtype(outputs.dtype, np.integer) or outputs.ndim not in (1, 2):
            shape = ", ".join(["N", *map(str, start.shape)])
            raise ValueError(
                f"outputs must be {indices} [N] or [N, k], or bool [{shape}], not "
                f"{outputs.dtype} of shape {outputs.shape}"
            )
        if outputs.ndim == 2 and not outputs.shape[1]:
            raise ValueError("outputs [N, k] must name at least one class for each image")
        if outputs.size and (outputs.min() < 0 or outputs.max() >= channels):
            raise ValueError(
                f"outputs must be {indices} below {channels}, {whose}; "
                f"given {outputs.min()}..{outputs.max()}"
            )
        outputs = outputs.reshape(len(outputs), -1)
    elif not outputs.any(tuple(range(1, outputs.ndim))).all():
        raise ValueError("outputs must name at least one of an image's outputs; a row is all False")
    if total is not None and len(outputs) != total:
        raise ValueError(
            f"outputs must have one row for each of {total} images, not {len(outputs)}"
        )
    return outputs


def seeds_of(start: Neuron, outputs: np.ndarray, size: int) -> np.ndarray:
    """A checked criterion as CONTRIB `[size, *shape]` float32, 0 for the images past the last."""
    seeds = np.zeros((size, *start.shape), np.float32)
    if outputs.dtype == bool:
        seeds[: len(outputs)] = outputs
    elif not start.shape:
        # One number, which has no axis of channels.
        seeds[: len(outputs)] = 1
    else:
        rows = np.arange(len(outputs))[:, None]
        # A view, channels second.
        np.moveaxis(seeds, start.channel + 1, 1)[rows, outputs] = 1
    return seeds


def _check_span(images: Any, span: tuple[float, float]) -> None:
    """Raises ValueError where images lie on another scale than those profiled."""
    (low, high), least, most = span, float(images.min()), float(images.max())
    slack = high - low
    # Token ids and blank images have no scale.
    if not slack or not jnp.issubdtype(images.dtype, jnp.floating):
        return
    if most > high + slack or least < low - slack:
        raise ValueError(
            f"images range over {least:g}..{most:g}, those profiled over {low:g}..{high:g}; "
            "give both on one scale"
        )


def _fingerprint(job: _Job, images: Any, outputs: Any, about: dict[str, Any]) -> str:
    """What must be equal for progress to be resumed; the images too, where they are an array."""
    total = count(images)
    mark = hashlib.sha256(json.dumps([about, total, job.walk.rule]).encode())
    for start in range(0, total or 0, _HASHED):
        mark.update(np.ascontiguousarray(images[start : start + _HASHED]).tobytes())
    for leaf in (*leaves(job.graph, job.params), *job.means.values()):
        mark.update(np.ascontiguousarray(leaf).tobytes())
    mark.update(b"" if outputs is None else outputs.tobytes())
    return mark.hexdigest()


def _walk_some(job: _Job, images: Any, count: int, outputs: np.ndarray | None) -> Slice:
    """The slice of one batch, of which the first `count` images are real."""
    graph, walk = job.graph, job.walk
    size = len(images)
    if size % walk.devices:
        walk = walk._replace(devices=1)
    real = np.arange(size) < count
    seeds = None if outputs is None else seeds_of(walk.start, outputs, size)
    images = jnp.asarray(images, graph.values[graph.input].dtype)
    with jax.default_matmul_precision("highest"):
        synapses, neurons = _walk_batch(
            graph, walk, job.params, job.means, images, seeds, real, np.float32(job.theta)
        )

    def host(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        found = {k: np.asarray(v) for k, v in arrays.items()}
        return {k: v[:count] for k, v in found.items()} if walk.per_sample else found

    return as_slice(graph, host(synapses), host(neurons), count, walk.per_sample)


def as_slice(graph: Graph, synapses: Any, neurons: Any, count: int, per_sample: bool) -> Slice:
    """CONTRIB by name, in any order, as a slice."""
    # A jitted function returns dictionaries in the order of their keys; these are in that of
    # the network.
    synapses = {name: synapses[name] for name in graph.params if name in synapses}
    neurons = {name: neurons[name] for name in graph.neurons()}
    axes = {name: neuron.channel for name, neuron in graph.neurons().items()}
    return Slice(synapses, neurons, axes, count, per_sample)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk_batch(graph, walk, params, means, images, seeds, real, theta):
    def some(params, means, images, seeds, real, theta):
        one = functools.partial(_walk_one, graph, walk, params, means, theta)
        found = jax.vmap(one)(images, seeds, real)
        if walk.per_sample:
            return found
        found = jax.tree.map(lambda a: a.sum(0), found)
        return jax.lax.psum(found, "batch") if walk.devices > 1 else found

    if walk.devices > 1:
        mesh = Mesh(np.asarray(devices()), ("batch",))
        each, all_ = PartitionSpec("batch"), PartitionSpec()
        some = jax.shard_map(
            some, mesh=mesh, in_specs=(all_, all_, each, each, each, all_),
            out_specs=each if walk.per_sample else all_, check_vma=False,
        )  # fmt: skip
    return some(params, means, images, seeds, real, theta)


def _walk_one(graph, walk, params, means, theta, sample, seed, real):
    """CONTRIB of every synapse and neuron for one sample, int32."""
    env = record(graph, params, sample)
    if seed is None:
        logits = env[graph.logits][0]
        seed = jax.nn.one_hot(jnp.argmax(logits), logits.shape[0])
    terms = deltas(graph, env, means) if means else activations(graph, env)
    selection = Selection(walk.rule, theta if walk.filtered else None, walk.host)
    return walk_back(graph, walk.rules, terms, walk.start, seed * real, selection)


def _warn_of_lost(graph: Graph, total: Mapping[int, Any]) -> None:
    """Warns of parameters whose synapses are lost, as a walk is compiled.

    Args:
      graph: The traced model.
      total: Value id to what came back to it.
    """
    made: dict[int, frozenset[int]] = {i: frozenset([i]) for i in graph.params.values()}
    for node in graph.nodes:
        if any(node.data):
            continue
        sources: frozenset[int] = frozenset().union(*(made.get(i, ()) for i in node.inputs))
        made |= dict.fromkeys(node.outputs, sources)
        # Roots are of norms and variances, which no synapse is; decisions say what is selected.
        if node.key in ROOTS | operations.DECISIONS or not any(i in total for i in node.outputs):
            continue
        if any(i in total for i, read in zip(node.inputs, node.param, strict=True) if read):
            continue
        lost = [name for name, i in graph.params.items() if i in sources and i not in total]
        if lost:
            names = ", ".join(lost[:_LISTED]) + (", ..." if len(lost) > _LISTED else "")
            product = node.key in operations.PRODUCTS
            advice = "; (x @ a) @ b has synapses where x @ (a @ b) has none" if product else ""
            warnings.warn(
                f"slicing: no synapses of {names}: {node} makes weights of them, through which "
                f"nothing leads back to a single parameter{advice}",
                stacklevel=2,
            )


def walk_back(
    graph: Graph,
    rules: Rules,
    terms: list[Term | None],
    start: Neuron,
    seed: jax.Array,
    selection: Selection,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """CONTRIB of every synapse and neuron for one sample.

    Args:
      graph: The traced model.
      rules: Table of the walk.
      terms: What is known at each value id.
      start: Where the walk starts.
      seed: CONTRIB there, of the neuron's shape.
      selection: Which terms stay.

    Returns:
      Those of the synapses and of the neurons by name, int32.
    """
    # From the logits on, so that what comes after the neuron has its CONTRIB too: 0.
    seeds = {graph.logits: jnp.zeros(graph.values[graph.logits].shape)}
    seeds[start.value] = seed.reshape(graph.values[start.value].shape)
    total = backward(graph, rules, terms, seeds, selection, WEIGHTS)
    _warn_of_lost(graph, total)
    count = (lambda a: a > 0) if selection.rule == "largest" else (lambda a: a)
    synapses = {
        name: count(total[ident]).astype(jnp.int32)
        for name, ident in graph.params.items() if ident in total
    }  # fmt: skip
    neurons = {}
    for name, neuron in graph.neurons().items():
        contrib = total.get(neuron.value)
        if contrib is None:
            contrib = jnp.zeros(graph.values[neuron.value].shape)
        neurons[name] = unbatched(count(contrib), neuron).astype(jnp.int32)
    return synapses, neurons
