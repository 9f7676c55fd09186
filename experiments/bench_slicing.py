"""What slicing costs: time and memory beside a plain forward pass and the published figures.

``python -m experiments.bench_slicing`` takes about ten minutes on two free cores. Each network is
measured in a process of its own, so that peaks of memory do not mix, and its rows replace its
former ones in the results file as soon as they are there: ``--models resnet18`` measures that one
anew and leaves the rest. Run on other hardware with an ``--out`` of its own.

Published: Zhang et al., "Dynamic Slicing for Deep Neural Networks", ESEC/FSE 2020 (overhead).
"""

import concurrent.futures
import functools
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

import nnslicer_jax as nns
from experiments import provenance
from experiments.record import Record, Row, read, write
from nnslicer_jax import data, models
from nnslicer_jax.contribution import deltas
from nnslicer_jax.fold import record
from nnslicer_jax.profile import means_by_value

STUDY = "bench_slicing"
TITLE = "Speed and memory of slicing"
TEXT = (
    "Seconds are per image, medians of calls that alternate with a plain jitted forward pass of "
    "the same batch (the median of both gives the ratio); in brackets the fastest and the slowest "
    "call. Backward is a whole call of `slice_network` or `effective_path`, its own forward pass "
    "and forward analysis included; the published backward figures are without them, and the "
    "published forward figures with profiling. Compilation happens in a first call, which is not "
    "counted. Targets are for two CPU cores (a GPU where the hardware names one). Memory is the "
    "greatest resident set of a process that measures nothing else. Published on two GTX 1080 Ti "
    "and two Xeons of 16 cores."
)


class Subject(NamedTuple):
    """A network to measure.

    Attributes:
      title: Its name in the table.
      dataset: The data set its images and its weights in the zoo are of.
      shape: Of one image, (H, W, C).
      batch_size: Images in a batch, unless asked otherwise.
      theta: What the paper's authors use on it.
      published: "forward" and "backward" to the paper's seconds per sample, single and batched.
      parameters: Of the paper's network, in words.
      targets: Backend to kind of measurement to the most seconds per image it should take.
    """

    title: str
    dataset: str
    shape: tuple[int, int, int]
    batch_size: int
    theta: float
    published: Mapping[str, tuple[float, float]]
    parameters: str
    targets: Mapping[str, Mapping[str, float]]


_KINDS = ("signed", "mass", "mass in passes", "theta 0", "largest")

SUBJECTS = {
    "lenet5": Subject(
        "LeNet-5", "mnist", (28, 28, 1), 64, 0.1,
        {"forward": (3.0, 0.3), "backward": (0.5, 0.3)}, "42,784 parameters",
        {"cpu": dict.fromkeys(_KINDS, 0.005)},
    ),
    "resnet10": Subject(
        "ResNet-10", "cifar10", (32, 32, 3), 16, 0.2,
        {"forward": (8.9, 0.4), "backward": (30.1, 3.0)}, "300 K parameters",
        {"cpu": dict.fromkeys(_KINDS, 0.3)},
    ),
    "resnet18": Subject(
        "ResNet-18", "cifar10", (32, 32, 3), 4, 0.2,
        {"forward": (9.6, 0.8), "backward": (543.0, 40.4)}, "11 M parameters",
        {
            "cpu": {"signed": 10.0, "mass": 3.0, "mass in passes": 3.0, "theta 0": 0.3},
            "gpu": {"signed": 0.04},
        },
    ),
}  # fmt: skip

# Most plain forward passes that profiling should cost.
PROFILING_TARGET = 1.3
# GiB.
MEMORY_TARGET = 8
# Images profiled at once: what `profile` takes unless asked otherwise.
_PROFILED = 256


class Options(NamedTuple):
    """How to measure.

    Attributes:
      images: Images to take from the data set; those profiled.
      batch_size: Images in a batch; None for the network's own.
      thetas: Thetas above 0 that the signed and the mass rule run at.
      path_theta: Theta of EffectivePath.
      seconds: A measurement is repeated until it took so long.
      least: Fewest repetitions.
      growth: How many times `batch_size` batches grow to, at theta 0.
      seed: Draws fresh weights, and noise where there is no data set.
      data_dir: Folder searched first for the data sets.
    """

    images: int = 256
    batch_size: int | None = None
    thetas: tuple[float, ...] = (0.1, 0.2)
    path_theta: float = 0.5
    seconds: float = 2.0
    least: int = 3
    growth: int = 4
    seed: int = 0
    data_dir: str | None = None


class Case(NamedTuple):
    """A network, its images, and where both are from.

    Attributes:
      subject: What it is.
      apply: `apply(variables, images [B, H, W, C]) -> logits`.
      variables: Its parameters.
      graph: Its trace.
      images: `[N, H, W, C]` float32, 0..1.
      about: Weights and images, in words.
    """

    subject: Subject
    apply: Callable
    variables: Any
    graph: nns.Graph
    images: np.ndarray
    about: str


class Measurement(NamedTuple):
    """The fields of a `Row` that are the measurement's own."""

    metric: str
    ours: float
    unit: str
    n: int | None = None
    spread: tuple[float, float] | None = None
    published: float | None = None
    note: str = ""


class Timing(NamedTuple):
    """Seconds of each call.

    Attributes:
      first: Of the first call, which compiles.
      plain: Of the plain forward passes.
      other: Of the calls that alternate with them.
    """

    first: float
    plain: list[float]
    other: list[float]

    @property
    def ratio(self) -> float:
        """How many plain forward passes a call costs."""
        return statistics.median(self.other) / statistics.median(self.plain)


class Kind(NamedTuple):
    """A way of slicing.

    Attributes:
      name: Its targets' name.
      label: Its name in the table.
      rule: As for `nns.estimate`.
      theta: Its theta.
      run: Slices images `[B, ...]`.
    """

    name: str
    label: str
    rule: str
    theta: float
    run: Callable[[np.ndarray], Any]


def load_images(name: str, options: Options) -> tuple[np.ndarray, str]:
    """Images for a network, `[N, H, W, C]` float32, 0..1, and what they are.

    They are its data set's test images, or noise where that is not on this machine.
    """
    subject, count = SUBJECTS[name], options.images
    try:
        found = data.load(subject.dataset, options.data_dir, download=False)
    except FileNotFoundError:
        rng = np.random.default_rng(options.seed)
        size = "x".join(map(str, subject.shape))
        what = f"{count} images of uniform noise, {size} ({subject.dataset} was not at hand)"
        return rng.random((count, *subject.shape), np.float32), what
    some = data.to_float(np.asarray(found.test_images[:count]))
    note = f" ({found.note})" if found.note else ""
    return some, f"{subject.dataset}, first {len(some)} test images{note}"


def prepare(name: str, options: Options, images: np.ndarray, source: str) -> Case:
    """Loads a network, from the zoo where it is there and freshly initialised where not."""
    subject = SUBJECTS[name]
    try:
        trained = nns.zoo.load(f"{name}_{subject.dataset}")
        model, variables, weights = trained.model, trained.variables, "trained, from the zoo"
    except (ValueError, FileNotFoundError):
        model = models.create(name)
        variables = jax.jit(model.init)(jax.random.key(options.seed), images[:1])
        weights = f"not trained, initialised with seed {options.seed}"
    count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(variables["params"]))
    about = f"{source}; {subject.title} of {count:,} parameters, {weights}"
    graph = nns.trace(model.apply, variables, images[:1])
    return Case(subject, model.apply, variables, graph, images, about)


def alternate(
    plain: Callable[[], Any], other: Callable[[], Any], *, seconds: float, least: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:  # fmt: skip
    """Times two functions by turns, so that whatever slows the machine down slows both.

    Args:
      plain: Called first of each pair; returns when its work is done.
      other: Called second.
      seconds: Pairs are repeated until they took so long,
      least: and at least so often.
      clock: Seconds from anywhere on.
    """

    def timed(run: Callable[[], Any]) -> float:
        start = clock()
        run()
        return clock() - start

    timed(plain)
    first = timed(other)
    timing = Timing(first, [], [])
    while len(timing.other) < least or sum(timing.plain) + sum(timing.other) < seconds:
        timing.plain.append(timed(plain))
        timing.other.append(timed(other))
    return timing


@functools.partial(jax.jit, static_argnums=0)
def _forward_analysis(graph: nns.Graph, params: Any, means: Any, images: jax.Array) -> Any:
    """Every delta of every image."""

    def one(sample: jax.Array) -> list[jax.Array]:
        terms = deltas(graph, record(graph, params, sample), means)
        return [t.delta for t in terms if t is not None and t.delta is not None]

    return jax.vmap(one)(images)


class Bench:
    """Measures one network.

    Attributes:
      case: The network.
      options: How to measure.
      batch_size: Images in a batch.
    """

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        asked = options.batch_size or case.subject.batch_size
        self.batch_size = min(asked, len(case.images))
        self._plain = jax.jit(case.apply)
        self._compiled: set[str] = set()
        self._targets = case.subject.targets.get(jax.default_backend(), {})

    def measurements(self) -> Iterator[Measurement]:
        """Everything, in the order of the table."""
        # Peaks only grow: what needs the least memory comes first.
        before = peak_bytes()
        yield Measurement("resident before: packages and network", before / 2**20, "MiB")
        case, size = self.case, self.batch_size
        profile = nns.profile(case.graph, case.variables, case.images, batch_size=size)
        yield from self._forward(profile)
        for kind in self._kinds(profile):
            yield from self._backward(kind)
        yield from self._growth(profile)
        yield from self._memory("slicing", before)
        yield self._estimated_memory()
        yield from self._profiling()
        yield from self._memory("all of it", before)

    def _forward(self, profile: nns.Profile) -> Iterator[Measurement]:
        case = self.case
        means = means_by_value(case.graph, profile)

        def analyse(images: np.ndarray) -> None:
            with jax.default_matmul_precision("highest"):
                found = _forward_analysis(case.graph, case.variables, means, images)
            jax.block_until_ready(found)

        for size in self._sizes():
            timing = self._time(analyse, size)
            yield self._seconds("plain forward pass", size, timing.plain)
            published = case.subject.published["forward"][size > 1]
            note = f"published with profiling, {case.subject.parameters}"
            yield self._seconds(
                "forward analysis", size, timing.other, published=published, note=note
            )
            yield self._ratio("forward analysis", size, timing)

    def _kinds(self, profile: nns.Profile) -> Iterator[Kind]:
        case = self.case

        def slicing(theta: float, rule: str, select: str) -> Callable:
            return lambda images: nns.slice_network(
                case.graph, case.variables, profile, images, theta=theta, rule=rule,
                batch_size=len(images), select=select,
            )  # fmt: skip

        yield Kind("theta 0", "backward, theta 0", "signed", 0.0, slicing(0.0, "signed", "auto"))
        selections = [("mass", "mass", "auto"), ("signed", "signed", "auto")]
        if jax.default_backend() == "cpu":
            # Which of the two is taken depends on the number of images.
            selections[:1] = [("mass", "mass", "host"), ("mass in passes", "mass", "device")]
        for name, rule, select in selections:
            for theta in self.options.thetas:
                label = f"backward, {name}, theta {theta:g}"
                yield Kind(name, label, rule, theta, slicing(theta, rule, select))
        theta = self.options.path_theta
        yield Kind(
            "largest", f"EffectivePath, theta {theta:g}", "largest", theta,
            lambda images: nns.effective_path(
                case.graph, case.variables, images, theta=theta, batch_size=len(images)
            ),
        )  # fmt: skip

    def _backward(self, kind: Kind) -> Iterator[Measurement]:
        case = self.case
        for size in self._sizes():
            timing = self._time(kind.run, size)
            published, notes = None, []
            if kind.name == "signed" and kind.theta == case.subject.theta:
                published = case.subject.published["backward"][size > 1]
                notes.append(f"published for {case.subject.parameters}")
            median = statistics.median(timing.other) / size
            # The targets are for batches.
            if kind.name in self._targets and size == self.batch_size:
                notes.append(_verdict(median, self._targets[kind.name], "s"))
            yield self._seconds(
                kind.label, size, timing.other, published=published, note="; ".join(notes)
            )
            yield self._ratio(kind.label, size, timing)
        # Of the last size, the batch.
        expected = nns.estimate(case.graph, kind.theta, kind.rule)
        million = expected.terms / 1e6
        note = f"{million:,.4g} million terms an image, batch of {size}"
        label = f"{kind.label}: per million terms"
        yield Measurement(label, 1e3 * median / million, "ms", size, note=note)
        note = f"{expected.seconds / median:.2g} times what a batch of {size} took"
        label = f"{kind.label}: estimated beforehand"
        yield Measurement(label, expected.seconds, "s/image", size, note=note)
        if kind.name not in self._compiled:
            # Another theta of the rule runs what this one has compiled.
            self._compiled.add(kind.name)
            compiling = max(timing.first - statistics.median(timing.other), 0.0)
            note = "first call less a later one"
            yield Measurement(f"{kind.label}: compiling", compiling, "s", size, note=note)

    def _growth(self, profile: nns.Profile) -> Iterator[Measurement]:
        """Theta 0 and the last theta of the signed rule as batches grow."""
        kinds = list(self._kinds(profile))
        largest = {"theta 0": self.options.growth * self.batch_size}
        if signed := [kind for kind in kinds if kind.name == "signed"]:
            largest[signed[-1].label] = self.batch_size
        for kind in kinds:
            most = largest.get(kind.label, largest.get(kind.name, 0))
            for size in self._powers(most):
                timing = self._time(kind.run, size)
                yield self._seconds(kind.label, size, timing.other)
                yield self._ratio(kind.label, size, timing)

    def _profiling(self) -> Iterator[Measurement]:
        case = self.case
        for size in dict.fromkeys((1, min(_PROFILED, len(case.images)))):
            # Whole batches only: a padded one would be counted against profiling.
            count = 1 if size == 1 else len(case.images) // size * size
            images = case.images[:count]

            def profiled(images: np.ndarray = images, size: int = size) -> None:
                nns.profile(case.graph, case.variables, images, batch_size=size)

            def plain(images: np.ndarray = images, size: int = size) -> None:
                for start in range(0, len(images), size):
                    part = images[start : start + size]
                    self._plain(case.variables, part).block_until_ready()

            timing = self._alternate(plain, profiled)
            what = "one image" if size == 1 else f"{count} images in batches of {size}"
            each = [seconds / count for seconds in timing.other]
            label, spread = f"profiling, {what}", (min(each), max(each))
            median = statistics.median(each)
            yield self._say(Measurement(label, median, "s/image", count, spread))
            note = _verdict(timing.ratio, PROFILING_TARGET, "") if size > 1 else ""
            label += ": in plain forward passes"
            yield self._say(Measurement(label, timing.ratio, "", count, note=note))

    def _memory(self, what: str, before: int) -> Iterator[Measurement]:
        peak = peak_bytes()
        note = f"{peak / 2**20:,.0f} MiB in all"
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu:
            note += f"; {_verdict(peak / 2**30, MEMORY_TARGET, 'GiB')}"
        added = (peak - before) / 2**20
        yield self._say(Measurement(f"peak memory above that, {what}", added, "MiB", note=note))
        if not on_cpu and (used := jax.local_devices()[0].memory_stats()):
            device = used["peak_bytes_in_use"] / 2**20
            yield self._say(Measurement(f"peak memory on the device, {what}", device, "MiB"))

    def _estimated_memory(self) -> Measurement:
        size = max(self.batch_size, *self._powers(self.options.growth * self.batch_size), 1)
        expected = nns.estimate(self.case.graph)
        return Measurement(
            f"estimated memory of a batch of {size}, the largest sliced",
            expected.bytes * size / 2**20,
            "MiB",
            size,
            note=f"{expected.bytes / 2**20:,.0f} MiB an image; unless asked, slicing takes "
            f"batches of {expected.batch_size}",
        )

    def _powers(self, most: int) -> list[int]:
        """Batch sizes by fours up to `most`, but for those that everything is measured at."""
        fours = (4**power for power in range(1, 10))
        top = min(most, len(self.case.images))
        return [size for size in fours if size <= top and size not in self._sizes()]

    def _sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, self.batch_size)))

    def _time(self, run: Callable[[np.ndarray], Any], size: int) -> Timing:
        images = self.case.images[:size]
        return self._alternate(
            lambda: self._plain(self.case.variables, images).block_until_ready(),
            lambda: run(images),
        )

    def _alternate(self, plain: Callable[[], Any], other: Callable[[], Any]) -> Timing:
        return alternate(plain, other, seconds=self.options.seconds, least=self.options.least)

    def _seconds(
        self, label: str, size: int, calls: Sequence[float], *, published: float | None = None,
        note: str = "",
    ) -> Measurement:  # fmt: skip
        each = [seconds / size for seconds in calls]
        label, spread = f"{label}, {_batch(size)}", (min(each), max(each))
        median = statistics.median(each)
        return self._say(Measurement(label, median, "s/image", size, spread, published, note))

    def _ratio(self, label: str, size: int, timing: Timing) -> Measurement:
        return Measurement(
            f"{label}, {_batch(size)}: in plain forward passes", timing.ratio, "", size
        )

    def _say(self, found: Measurement) -> Measurement:
        note = f" ({found.note})" if found.note else ""
        title = self.case.subject.title
        print(
            f"{title}: {found.metric}: {found.ours:.4g} {found.unit}{note}",
            file=sys.stderr,
            flush=True,
        )
        return found


def _batch(size: int) -> str:
    return "one image" if size == 1 else f"batch of {size}"


def _verdict(value: float, target: float, unit: str) -> str:
    limit = f"{target:g} {unit}".strip()
    return f"target at most {limit}, {'met' if value <= target else 'missed'}"


def peak_bytes() -> int:
    """Greatest resident set of this process so far, bytes."""
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(name: str, options: Options, images: np.ndarray, source: str) -> list[Row]:
    """All rows of one network; for a process that does nothing else."""
    # JAX reports every accelerator that it does not find.
    logging.set_verbosity(logging.WARNING)
    return rows_of(prepare(name, options, images, source), options)


def rows_of(case: Case, options: Options) -> list[Row]:
    """Measures a network in this process."""
    found = list(Bench(case, options).measurements())
    where = provenance.origin(data=case.about, seeds=[options.seed])
    return [
        Row(
            study=STUDY, row=case.subject.title, metric=m.metric, ours=m.ours, spread=m.spread,
            unit=m.unit, n=m.n, published=m.published, note=m.note, **where,
        )
        for m in found
    ]  # fmt: skip


def replaced(before: Sequence[Row], new: Sequence[Row]) -> tuple[Row, ...]:
    """The rows before, but for those of the networks measured anew; in the networks' order."""
    titles = [subject.title for subject in SUBJECTS.values()]
    measured = {row.row for row in new}
    rows = [row for row in before if row.row not in measured] + list(new)
    rows.sort(key=lambda row: titles.index(row.row) if row.row in titles else len(titles))
    return tuple(rows)


def run(names: Sequence[str], options: Options, out: Path) -> None:
    """Measures networks, each in a process of its own, and writes each one's rows at once.

    Raises:
      ValueError: For an option that is not accepted, or a results file that is faulty.
      RuntimeError: If a measuring process dies.
    """
    check(names, options)
    spawn = multiprocessing.get_context("spawn")
    for name in names:
        # One task a process: a data set that was in memory is none of the network's.
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=spawn, max_tasks_per_child=1
        ) as pool:
            try:
                images, source = pool.submit(load_images, name, options).result()
                new = pool.submit(measure, name, options, images, source).result()
            except BrokenProcessPool:
                raise RuntimeError(
                    f"{name}: the measuring process was ended from outside, as happens where "
                    "memory runs out; a smaller --batch_size needs less"
                ) from None
        before = read(out).rows if out.exists() else ()
        write(out, Record(title=TITLE, text=TEXT, rows=replaced(before, new)))


def check(names: Sequence[str], options: Options) -> None:
    """Raises ValueError for options that cannot be measured."""
    unknown = [name for name in names if name not in SUBJECTS]
    if unknown or not names:
        given = ", ".join(unknown) or "nothing"
        raise ValueError(f"models must be among {', '.join(SUBJECTS)}, not {given}")
    for theta in options.thetas:
        if not 0 < theta <= 1:
            raise ValueError(f"thetas must be above 0 and at most 1, not {theta}; 0 always runs")
    if options.images < 1:
        raise ValueError(f"images must be at least 1, not {options.images}")
    if options.batch_size is not None and not 1 <= options.batch_size <= options.images:
        raise ValueError(
            f"batch_size must be 1 to {options.images}, the number of images, "
            f"not {options.batch_size}"
        )


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    given = flags.FLAGS
    options = Options(data_dir=given.data_dir, seed=given.seed)
    if given.quick:
        options = options._replace(images=4, batch_size=2, seconds=0.0, least=1, growth=2)
    if given.images is not None:
        options = options._replace(images=given.images)
    if given.batch_size is not None:
        options = options._replace(batch_size=given.batch_size)
    out = Path(given.out)
    try:
        thetas = tuple(dict.fromkeys(float(theta) for theta in given.thetas))
        run(list(dict.fromkeys(given.models)), options._replace(thetas=thetas), out)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{out.name}: written; python -m experiments.report renders it")


if __name__ == "__main__":
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    _ROOT = provenance.ROOT / "experiments" / "results"
    flags.DEFINE_list("models", list(SUBJECTS), "networks to measure")
    flags.DEFINE_integer("images", None, f"images taken and profiled; {Options().images} if unset")
    flags.DEFINE_integer("batch_size", None, "images in a batch; the network's own if unset")
    flags.DEFINE_list("thetas", [str(t) for t in Options().thetas], "thetas above 0; 0 always runs")
    flags.DEFINE_integer("seed", 0, "draws fresh weights, and noise where a data set is missing")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    flags.DEFINE_bool("quick", False, "few images and one repetition: a trial, not a measurement")
    flags.DEFINE_string("out", str(_ROOT / f"{STUDY}.json"), "results file to write")
    app.run(main)
