"""What tracing costs: a jitted fold beside the jitted model, forward and gradient.

Both are compiled once and run in turn in one process, so that whatever else the machine does
meets both alike; the figure is the ratio of their median times.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import app, flags

import nnslicer_jax as nns
from experiments import record
from experiments.provenance import ROOT, origin
from nnslicer_jax import models

TITLE = "Cost of the traced graph"
TEXT = (
    "Time of `jax.jit(nns.evaluate)` against that of the jitted model itself, on one batch of "
    "random images: ratio of the medians of interleaved runs, forward and gradient of the summed "
    "log-likelihood by all parameters. The spread is the 95 % interval of the ratio over "
    "resampled runs."
)
_RESAMPLES = 2000
# Fast networks are run for so many seconds, but not more often than so.
_SECONDS = 4.0
_MOST_RUNS = 1000


class Attention(nn.Module):
    """Two transformer blocks on 64 tokens of 64 features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch [B, 64, 64]."""
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))
            x = x + nn.Dense(64)(hidden)
        return nn.Dense(10)(x.mean(axis=1))


class Perceptron(nn.Module):
    """Three dense layers on 784 numbers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch [B, 784]."""
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Network(NamedTuple):
    """A network to time and the shape of one sample."""

    module: nn.Module
    shape: tuple[int, ...]


NETWORKS = {
    "mlp": Network(Perceptron(), (784,)),
    "lenet5": Network(models.create("lenet5"), (28, 28, 1)),
    "resnet10": Network(models.create("resnet10"), (32, 32, 3)),
    "resnet18": Network(models.create("resnet18"), (32, 32, 3)),
    "vgg16": Network(models.create("vgg16"), (32, 32, 3)),
    "attention": Network(Attention(), (64, 64)),
}


def ratio(
    ours: Callable[[], Any], theirs: Callable[[], Any], runs: int, seed: int
) -> tuple[float, tuple[float, float], float, int]:
    """Times two functions in turn.

    Args:
      ours: What is measured; returns arrays.
      theirs: What it is measured against.
      runs: How often each is run at least; both are run twice before, unmeasured.
      seed: Of the resampling.

    Returns:
      Ratio of medians, its 95 % interval, the median of `theirs` in seconds, and the runs.
    """
    for call in (ours, theirs, ours):
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(theirs())
    pair = 2 * (time.perf_counter() - start)
    runs = max(runs, min(_MOST_RUNS, int(_SECONDS / pair)))
    times = np.zeros((runs, 2))
    for run, turn in itertools.product(range(runs), range(2)):
        # Who goes first changes from run to run.
        which = (run + turn) % 2
        start = time.perf_counter()
        jax.block_until_ready((ours, theirs)[which]())
        times[run, which] = time.perf_counter() - start
    drawn = np.random.default_rng(seed).integers(0, runs, (_RESAMPLES, runs))
    medians = np.median(times[drawn], axis=1)
    low, high = np.quantile(medians[:, 0] / medians[:, 1], (0.025, 0.975))
    middle = np.median(times, axis=0)
    return middle[0] / middle[1], (float(low), float(high)), middle[1], runs


def measure(name: str, batch_size: int, runs: int, seed: int) -> list[dict[str, Any]]:
    """The row fields of one network: row, metric, ours, spread, unit, n."""
    module, shape = NETWORKS[name]
    images = jax.random.uniform(jax.random.key(seed), (batch_size, *shape))
    params = jax.jit(module.init)(jax.random.key(seed), images[:1])
    graph = nns.trace(module.apply, params, images[:1])

    def fold(params: Any, images: jax.Array) -> jax.Array:
        return nns.evaluate(graph, params, images)[0]

    def gradient(apply: Callable) -> Callable:
        def loss(weights: Any, rest: Any, images: jax.Array) -> jax.Array:
            return nn.log_softmax(apply({**rest, "params": weights}, images))[:, 0].sum()

        run = jax.jit(jax.grad(loss))
        rest = {key: value for key, value in params.items() if key != "params"}
        return lambda: run(params["params"], rest, images)

    def forward(apply: Callable) -> Callable:
        run = jax.jit(apply)
        return lambda: run(params, images)

    np.testing.assert_allclose(forward(fold)(), forward(module.apply)(), rtol=1e-3, atol=1e-3)
    rows = []
    for what, made in (("forward", forward), ("gradient", gradient)):
        found, interval, seconds, times = ratio(made(fold), made(module.apply), runs, seed)
        common = {"row": f"{name}, batch {batch_size}", "n": times}
        rows.append({**common, "metric": f"{what}: graph / model", "ours": round(found, 3),
                     "spread": tuple(round(b, 3) for b in interval), "unit": ""})  # fmt: skip
        rows.append({**common, "metric": f"{what}: model alone", "ours": round(1e3 * seconds, 3),
                     "unit": "ms"})  # fmt: skip
        print(
            f"{name:>10} {what:>8}: {found:.3f} ({interval[0]:.3f} to {interval[1]:.3f}) "
            f"of {1e3 * seconds:.2f} ms",
            flush=True,
        )
    return rows


def main(_: Any) -> None:
    """Measures every network and writes one results file."""
    options = flags.FLAGS
    unknown = set(options.networks) - set(NETWORKS)
    if unknown:
        raise app.UsageError(f"--networks: {sorted(unknown)[0]!r} is not in {', '.join(NETWORKS)}")
    about = origin(data="random images", seeds=[options.seed])
    rows = [
        record.Row(study="bench_graph", **row, **about)
        for name in options.networks
        for row in measure(name, options.batch_size, options.runs, options.seed)
    ]
    if options.out:
        path = Path(options.out)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=tuple(rows)))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("networks", list(NETWORKS), "networks to measure")
    flags.DEFINE_integer("batch_size", 32, "images a run", lower_bound=1)
    flags.DEFINE_integer("runs", 30, "fewest runs of each of the two", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "of images, weights and resampling")
    results = ROOT / "experiments" / "results" / "bench_graph.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
