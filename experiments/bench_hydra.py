"""What a step of robust pruning costs: every objective, plain and with scores, and beside PyTorch.

Each pair is compiled once and run by turns in one process, so that whatever else the machine does
meets both alike. PyTorch (the bench extra) runs the same network from the same weights.
"""

import functools
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import record, torch_steps
from experiments.bench_autoattack import TWINS, twin
from experiments.bench_graph import ratio
from experiments.provenance import ROOT, origin
from nnslicer_jax import models
from prune import evaluate, hydra, stages
from prune.masks import counts, largest
from prune.objectives import OBJECTIVES, Network, Plan
from prune.objectives.network import statistics
from prune.stages import Masked, Stage, Whole

TITLE = "Speed of robust training and pruning"
TEXT = (
    "Time of a step on a batch of random images: the forward and backward passes of an objective, "
    "the attack or the bounds in it, and the optimiser. Every step beside that of natural "
    "training; the same with HYDRA's scores trained in place of the weights, and with the weights "
    "under a fixed mask, beside the plain step; and where PyTorch is installed, the plain step "
    "beside its own. Medians of runs by turns, the spread being the 95 % interval over resampled "
    "runs. Certification by smoothing counts noisy images, the noise being drawn for each. "
    "A step that is natural or smoothing is the network in training and no more, by XLA's own "
    "convolutions. On a CPU these are quick forward, but their gradients miss the fast path: "
    "clearly where windows move in strides, as in CNN-small, and in all loops and branches. "
    "Attacks and bounds therefore have gradients written anew (`nnslicer_jax/first_order.py`): of "
    "the input by turned kernels, or with few channels by products of patches; of the kernel by "
    "products of patches, few samples at a time; strides laid into channels; max pooling by "
    "comparisons. Tried too, and slower: loops rolled over XLA's gradients, products of all "
    "patches at once, and in bounds convolutions of dilated rows. VGG and residual networks take "
    "products of patches in training too, where channels are many and places few "
    "(`nnslicer_jax/convolution.py`)."
)
SHAPE = (32, 32, 3)
KEEP = 0.1


class Kind(NamedTuple):
    """A step to time.

    Attributes:
      objective: Its name.
      options: Of the objective.
      seconds: The target for a step of CNN-small on two cores; None: none.
      scores: The target for the step with scores, in plain steps; None: none.
      reference: Whether PyTorch's is timed too, and is not to be faster.
    """

    objective: str
    options: Mapping[str, Any] = {}
    seconds: float | None = None
    scores: float | None = None
    reference: bool = False


KINDS: Mapping[str, Kind] = {
    "natural": Kind("natural", reference=True),
    "smoothing": Kind("smoothing", reference=True),
    "free, one of four replays": Kind("free"),
    "pgd, 10 steps": Kind("pgd", reference=True),
    "trades, 10 steps": Kind("trades", scores=1.1, reference=True),
    # Half way up the ramp both bounds are taken, after it the interval's alone.
    "crown_ibp, box growing": Kind("crown_ibp", {"ramp": 1.0}, seconds=0.29),
    "crown_ibp, box at its width": Kind("crown_ibp", {"ramp": 0.0}),
    # A batch of which samples are bounded, as four in five are.
    "mixtrain, 5 samples": Kind("mixtrain", {"samples": 5, "probability": 1.0}, seconds=1.5),
}
# Of PyTorch, those that the targets are about.
MASKED = "trades, 10 steps"
CERTIFIED = 12_000  # Noisy images a second.
# Of noise: the default, and one made to be quick on accelerators.
GENERATORS = ("threefry2x32", "unsafe_rbg")


class Case(NamedTuple):
    """A network and a batch.

    Attributes:
      name: Of the network.
      network: It.
      variables: Fresh ones.
      images: `[B, H, W, C]` uint8.
      labels: `[B]` int32.
    """

    name: str
    network: Network
    variables: Any
    images: np.ndarray
    labels: np.ndarray


def prepare(name: str, batch_size: int, seed: int, shape: tuple[int, ...] = SHAPE) -> Case:
    """A fresh network, and random images with random labels.

    Raises:
      ValueError: For an unknown network.
    """
    network = Network.of(models.create(name), shape)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch_size, *shape)).astype(np.uint8)
    labels = rng.integers(0, network.classes, batch_size).astype(np.int32)
    return Case(name, network, network.initialize(jax.random.key(seed)), images, labels)


def make_step(case: Case, kind: Kind, what: str = "plain") -> Callable[[], Any]:
    """A step as a function without arguments, which goes on from where it was.

    Args:
      case: The network and the batch.
      kind: The objective.
      what: "plain": of the weights; "masked": of those that a mask leaves; "scores": of HYDRA's
        scores.
    """
    # Slow enough that many steps on one batch leave the network what it is.
    stage = Stage(kind.objective, kind.options, batch_size=len(case.images), learning_rate=1e-4)
    plan = Plan(len(case.images), epoch_steps=1000, epochs=1000)
    params, rest = case.variables["params"], statistics(case.variables)
    scores = hydra.init_scores(params)
    numbers = counts(scores, KEEP)
    method, trained, fixed = {
        "plain": (Whole(), params, ()),
        "masked": (Masked(), params, largest(jax.tree.map(jnp.abs, scores), numbers)),
        "scores": (
            hydra.Scored(),
            {"scores": scores, "norms": hydra.norms(params, rest.get("batch_stats", {}))},
            {"params": params, "counts": numbers},
        ),
    }[what]
    # A step uses up what it is given.
    start = jax.tree.map(jnp.array, (trained, fixed, rest))
    state = stages.StageState(
        jnp.int32(plan.steps // 2), start[0], start[1], start[2],
        stages.optimizer(stage, plan.steps).init(start[0]),
        stages.first_state(stage, case.network, plan),
    )  # fmt: skip
    if hasattr(state.objective, "step"):
        # Where steps are counted, half of them are done.
        half = state.objective.replace(step=jnp.int32(plan.steps // 2))
        state = state._replace(objective=half)
    step = stages.make_step(case.network, stage, plan, method)
    key = jax.random.key(0)

    def call() -> Any:
        nonlocal state
        state, info = step(state, key, case.images, case.labels)
        return info.loss

    return call


def measure(case: Case, name: str, runs: int, seed: int, torch: bool) -> list[dict[str, Any]]:
    """The row fields of one kind of step: row, metric, ours, spread, unit, n, note.

    Args:
      case: The network and the batch.
      name: A key of `KINDS`.
      runs: Of each of two, at least.
      seed: Of resampling.
      torch: Whether PyTorch is there.
    """
    kind, rows = KINDS[name], _Rows(f"{case.name}, batch {len(case.images)}: {name}")
    plain = make_step(case, kind)
    found = ratio(make_step(case, kind, "scores"), plain, runs, seed)
    target = kind.seconds if case.name == "cnn_small" else None
    rows.say("step", 1e3 * found[2], "ms", n=found[3],
             note="" if target is None else _target(found[2], target, "s"))  # fmt: skip
    note = "" if kind.scores is None else _target(found[0], kind.scores, "times")
    rows.compare("step with scores / step", found, note)
    rows.compare("step under a mask / step", ratio(make_step(case, kind, "masked"), plain, runs,
                                                   seed))  # fmt: skip
    if name != "natural":
        natural = ratio(plain, make_step(case, KINDS["natural"]), runs, seed)
        rows.compare("step / natural step", natural)
    if torch and kind.reference and case.name in TWINS:
        beside = _reference(case, kind.objective)
        found = ratio(plain, beside(), runs, seed)
        rows.say("PyTorch's step", 1e3 * found[2], "ms", n=found[3])
        rows.compare("step / PyTorch's", found, _target(found[0], 1, "times"))
        if name == MASKED:
            rows.compare("PyTorch's step with scores / its step",
                         ratio(beside(KEEP), beside(), runs, seed))  # fmt: skip
    return rows.fields


def certification(case: Case, images: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """The rows of certification by smoothing, one for each generator of noise."""
    pixels = case.images[:images].astype(np.float32) / 255
    run = functools.partial(
        evaluate.vra_s, apply=case.network.predict, params=case.variables, images=pixels,
        labels=case.labels[:images], sigma=0.25, radius=0.1, samples=samples,
    )  # fmt: skip
    rows = _Rows(f"{case.name}: certification by smoothing")
    for generator in GENERATORS:
        key = jax.random.key(seed, impl=generator)
        run(key)
        start = time.perf_counter()
        run(key)
        pace = images * (samples + 100) / (time.perf_counter() - start)
        note = ""
        if case.name == "cnn_small":
            note = f"target at least {CERTIFIED:,}, {'met' if pace >= CERTIFIED else 'missed'}"
        rows.say(f"noisy images, {generator}", pace, "images/s", n=images * samples, note=note)
    return rows.fields


class _Rows:
    """Fields of rows under one name, printed as they come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: list[dict[str, Any]] = []

    def say(self, metric: str, value: float, unit: str, **more: Any) -> None:
        self.fields.append({"row": self.name, "metric": metric, "ours": float(f"{value:.4g}"),
                            "unit": unit, **more})  # fmt: skip
        print(f"{self.name}: {metric} {value:.4g} {unit} {more.get('note', '')}", flush=True)

    def compare(
        self, metric: str, found: tuple[float, tuple[float, float], float, int], note: str = ""
    ) -> None:
        spread = tuple(float(f"{end:.4g}") for end in found[1])
        self.say(metric, found[0], "", spread=spread, n=found[3], note=note)


def _target(value: float, most: float, unit: str) -> str:
    return f"target at most {most:g} {unit}, {'met' if value <= most else 'missed'}"


def _reference(case: Case, objective: str) -> Callable[..., Callable[[], Any]]:
    """PyTorch's step of the same network and batch, given the share to keep or nothing."""
    network = twin(TWINS[case.name], case.network.model, case.variables)
    pixels = case.images.astype(np.float32) / 255
    return functools.partial(torch_steps.make_step, network, objective, pixels, case.labels)


def _torch() -> bool:
    try:
        importlib.import_module("torch")
    except ImportError:
        return False
    return True


def main(_: Any) -> None:
    """Measures every kind of step of every network and writes one results file."""
    options = flags.FLAGS
    try:
        cases = [prepare(name, options.batch_size, options.seed) for name in options.models]
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    unknown = [name for name in options.kinds if name not in {kind.split(",")[0] for kind in KINDS}]
    if unknown:
        known = ", ".join(OBJECTIVES)
        raise app.UsageError(f"--kinds: {unknown[0]!r} is not in {known}")
    torch = _torch()
    if not torch:
        print("torch is not installed (pip install -e .[bench]): ours are timed alone")
    about = origin(data="random images", seeds=[options.seed])
    rows = []
    for case in cases:
        for name in KINDS:
            if name.split(",")[0] in options.kinds:
                rows += measure(case, name, options.runs, options.seed, torch)
        rows += certification(case, min(10, len(case.images)), options.samples, options.seed)
    if options.out:
        path = Path(options.out)
        made = tuple(record.Row(study="bench_hydra", **row, **about) for row in rows)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=made))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("models", ["cnn_small"], "networks to measure")
    flags.DEFINE_list("kinds", list(OBJECTIVES), "objectives to measure")
    flags.DEFINE_integer("batch_size", 128, "images a step", lower_bound=1)
    flags.DEFINE_integer("runs", 20, "fewest runs of each of two", lower_bound=2)
    flags.DEFINE_integer("samples", 10_000, "noisy images that certify one", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of images, weights and resampling")
    results = ROOT / "experiments" / "results" / "bench_hydra.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
