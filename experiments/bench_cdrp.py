"""What routing costs: 30 iterations beside as many passes of the plain network, by batch size.

Both are compiled and run by turns in one process; the figure is the ratio of their median times.
A pass is forward and backward: the gradient of the summed best logits by the images.

``python -m experiments.bench_cdrp`` takes about ten minutes on two free cores.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

import nnslicer_jax as nns
from experiments import record
from experiments.bench_graph import ratio
from experiments.provenance import ROOT, origin
from interpret import cdrp, gates
from nnslicer_jax import models

TITLE = "Speed and memory of routing"
TEXT = (
    "Distillation guided routing of random images on fresh weights, which cost what others cost: "
    "images a second, the time against as many forward and backward passes of the plain jitted "
    "network on the same batch, with the 95 % interval of that ratio of medians over resampled "
    "runs; the same against passes of the network as traced, whose convolutions take the faster "
    "forms that routing takes; and the compiled loop's temporary memory as the compiler plans it. "
    "Targets are for two CPU cores."
)
_ITERATIONS = 30
# Most passes of the plain network that as many iterations may take the time of.
_PASSES = 1.3


class Subject(NamedTuple):
    """A network to route.

    Attributes:
      shape: Of one image.
      target: Fewest images a second at the best batch size; None if none is set.
    """

    shape: tuple[int, ...]
    target: float | None = None


SUBJECTS: Mapping[str, Subject] = {
    "lenet5": Subject((28, 28, 1), target=250),
    "resnet10": Subject((32, 32, 3)),
    "resnet18": Subject((32, 32, 3)),
    # 0.4 s an image.
    "vgg16": Subject((32, 32, 3), target=2.5),
}


def measure(
    name: str, batch_sizes: list[int], runs: int, seed: int, iterations: int = _ITERATIONS
) -> list[dict[str, Any]]:
    """The row fields of one network: row, metric, ours, spread, unit, n, note."""
    subject = SUBJECTS[name]
    module = models.create(name)
    images = jax.random.uniform(jax.random.key(seed), (max(batch_sizes), *subject.shape))
    params = jax.jit(module.init)(jax.random.key(seed), images[:1])
    graph = nns.trace(module.apply, params, images[:1])
    layers = gates.places(graph)
    by = cdrp.Descent()
    rows, rates = [], {}

    def traced(params: Any, images: jax.Array) -> jax.Array:
        return nns.evaluate(graph, params, images)[0]

    for size in batch_sizes:
        some = images[:size]
        routed = functools.partial(
            cdrp.descend, graph, gates.frozen(layers), params, some, iterations, by
        )
        times, interval, seconds, count = ratio(
            routed, passes(module.apply, params, some, iterations), runs, seed
        )
        rates[size] = size / (times * seconds)
        quick = ratio(routed, passes(traced, params, some, iterations), runs, seed)
        common = {"row": f"{name}, batch {size}", "n": count}
        said = "met" if times <= _PASSES else "missed"
        rows += [
            {**common, "metric": "images routed a second", "ours": rates[size], "unit": "images/s"},
            {**common, "metric": f"time against {iterations} passes of the network",
             "ours": float(times), "spread": interval,
             "note": f"target at most {_PASSES}, {said}"},
            {**common, "metric": f"time against {iterations} passes of the network as traced",
             "ours": float(quick[0]), "spread": quick[1], "n": quick[3]},
            {**common, "metric": "temporary memory an image",
             "ours": memory(graph, layers, params, some, iterations, by) / size / 2**20,
             "unit": "MiB"},
        ]  # fmt: skip
        print(f"{name}, batch {size}: {rates[size]:.4g} images/s, {times:.3f} of the passes",
              flush=True)  # fmt: skip
    if subject.target is not None:
        best = max(rates, key=lambda size: rates[size])
        said = "met" if rates[best] >= subject.target else "missed"
        rows.append(
            {"row": f"{name}, best batch", "metric": "images routed a second", "unit": "images/s",
             "ours": rates[best], "note": f"batch {best}; target {subject.target:g}, {said}"}
        )  # fmt: skip
    return rows


def passes(apply: Callable, params: Any, images: jax.Array, count: int) -> Callable[[], Any]:
    """So many forward and backward passes, one after the other."""
    gradient = jax.jit(jax.grad(lambda images, params: apply(params, images).max(-1).sum()))

    def call() -> Any:
        return [gradient(images, params) for _ in range(count)][-1]

    return call


def memory(
    graph: nns.Graph, layers: gates.Layers, params: Any, images: jax.Array, iterations: int,
    by: cdrp.Descent,
) -> int:  # fmt: skip
    """Bytes that the compiled loop takes for what it neither is given nor gives back."""
    lowered = cdrp.descend.lower(graph, gates.frozen(layers), params, images, iterations, by)
    planned: Any = lowered.compile().memory_analysis()
    return int(planned.temp_size_in_bytes)


def main(_: Any) -> None:
    """Measures every network and writes one results file."""
    options = flags.FLAGS
    unknown = set(options.networks) - set(SUBJECTS)
    if unknown:
        raise app.UsageError(f"--networks: {sorted(unknown)[0]!r} is not in {', '.join(SUBJECTS)}")
    if not all(size.isdecimal() and int(size) > 0 for size in options.batch_sizes):
        raise app.UsageError("--batch_sizes: whole numbers above 0 are due")
    about = origin(data="random images", seeds=[options.seed])
    rows = [
        record.Row(study="bench_cdrp", **row, **about)
        for name in options.networks
        for row in measure(name, [*map(int, options.batch_sizes)], options.runs, options.seed)
    ]
    if options.out:
        path = Path(options.out)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=tuple(rows)))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("networks", list(SUBJECTS), "networks to route")
    flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "images routed at once")
    flags.DEFINE_integer("runs", 3, "fewest runs of each of the two", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "of images, weights and resampling", lower_bound=0)
    results = ROOT / "experiments" / "results" / "bench_cdrp.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
