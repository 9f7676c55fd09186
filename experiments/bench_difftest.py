"""What a search for deviating inputs costs, and where its time goes.

The published pairs are searched in batches and, in the same run, one seed at a time; a pair of JAX
functions, LeNet-1 and its 8-bit twin, is searched on the device. The parts of a query are timed
alone, in batches as a search asks them.

``python -m experiments.bench_difftest --pairs_dir ... --data_dir ... --images ...`` takes about ten
minutes on two free cores; without ``--pairs_dir`` the pair of JAX functions alone. The published
ResNet-20 wants exact pixels of CIFAR-10, which ``--images`` names.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import difftest
import nnslicer_jax as nns
from difftest import fitness, mutate, select
from experiments import pairs, record
from experiments.provenance import ROOT, origin
from nnslicer_jax import data, zoo
from prune import quantize

TITLE = "Speed of differential testing"
TEXT = (
    "The released variant of DFlare. Seconds a seed are the whole search's time over its seeds, at "
    "most 10,000 queries each; the first search, which compiles, is not measured. The tail is "
    "heavy: a few seeds that need thousands of queries decide the mean, so that the time of a "
    "query says more. One at a time is the same search with one seed in a batch, as the published "
    "code goes about it, in the same process. The published code with a fast call path took 0.070 "
    "s a seed on LeNet-1, 0.72 on LeNet-5 and 0.65 on ResNet-20, on two cores, at means of 77, 379 "
    "and 31 queries. The parts are timed alone in batches of 128."
)
_BATCH = 128
_MAX_QUERIES = 10_000


class Subject(NamedTuple):
    """A published pair to search.

    Attributes:
      target: Most seconds a seed; None if none is set.
      seeds: How many are searched, and how many one at a time.
    """

    target: float | None
    seeds: tuple[int, int]


SUBJECTS = {
    "lenet1": Subject(0.007, (500, 20)),
    "lenet5": Subject(None, (500, 20)),
    "resnet20": Subject(0.1, (200, 5)),
}
# Fewest seeds of LeNet-1 a second, of a pair of JAX functions.
JAX_TARGET = 60.0


def quantized_lenet1(images: np.ndarray) -> difftest.ModelPair:
    """LeNet-1 of this repository and its 8-bit twin, weights and activations; calibrated on these.

    Args:
      images: uint8 `[N, 28, 28, 1]`.
    """
    trained = zoo.load("lenet1_mnist")
    return eight_bits(trained.model.apply, trained.variables, data.to_float(images))


def eight_bits(apply: Callable, params: Any, images: Any) -> difftest.ModelPair:
    """A network and its 8-bit twin as a pair on the device.

    Args:
      apply: From images in 0..1 to logits.
      params: Its parameters.
      images: float32 `[N, H, W, C]`, that the ranges of activations are taken from.
    """
    graph = nns.trace(apply, params, images[:1])
    small = quantize.quantize(graph, params, images)
    edits = small.edits()

    def rounded(params: Any, x: jax.Array) -> jax.Array:
        return nns.evaluate(graph, params, x, edits)[0]

    return difftest.ModelPair(
        difftest.jax_model(apply, params), difftest.jax_model(rounded, small.params())
    )


def timed(
    pair: difftest.ModelPair, seeds: np.ndarray, batch_size: int, seed: int
) -> tuple[float, difftest.SearchResult]:
    """Seconds of one search of all seeds, and what it found."""
    start = time.perf_counter()
    found = difftest.search(
        pair, seeds, jax.random.key(seed), max_queries=_MAX_QUERIES, batch_size=batch_size
    )
    return time.perf_counter() - start, found


def searched(
    name: str, pair: difftest.ModelPair, seeds: np.ndarray, alone: int, runs: int
) -> list[dict[str, Any]]:
    """The row fields of one pair's searches."""
    for size, some in ((_BATCH, seeds), (1, seeds[: min(alone, 2)])):
        timed(pair, some, size, runs)
    times, queries, each = [], [], []
    single = []
    for run in range(runs):
        took, found = timed(pair, seeds, _BATCH, run)
        times.append(took / len(seeds))
        queries.append(int(found.queries.sum()))
        each.append(took / queries[-1])
        took, found = timed(pair, seeds[:alone], 1, run)
        single.append(took / max(1, int(found.queries.sum())))
    ratios = np.array(each) / np.array(single)
    about = {"row": name, "n": len(seeds) * runs}
    return [
        {**about, "metric": "seconds a seed", "unit": "s", "ours": float(np.mean(times)),
         "spread": (min(times), max(times)), "note": f"{runs} runs"},
        {**about, "metric": "seeds a second", "ours": float(1 / np.mean(times))},
        {**about, "metric": "queries a seed", "ours": float(np.mean(queries) / len(seeds))},
        {**about, "metric": "time of a query", "unit": "µs", "ours": 1e6 * float(np.median(each))},
        {**about, "metric": "time of a query against one seed at a time",
         "ours": float(np.median(ratios)), "spread": (float(ratios.min()), float(ratios.max())),
         "note": f"{alone} seeds one at a time"},
    ]  # fmt: skip


def parts(name: str, pair: difftest.ModelPair, images: np.ndarray, runs: int) -> list[dict]:
    """The row fields of the time of each part of a query."""
    images = np.resize(images, (_BATCH, *images.shape[1:]))
    classes = pair.probabilities(images[:1])[0].shape[1]
    keys = jax.random.split(jax.random.key(0), _BATCH)
    operators = jnp.arange(_BATCH, dtype=jnp.int32) % len(mutate.NAMES)
    states = jax.vmap(lambda _: select.init(len(mutate.NAMES)))(keys)
    stores = jax.vmap(lambda _: fitness.empty(64, classes))(keys)
    vectors = jax.random.uniform(jax.random.key(1), (_BATCH, 2 * classes))
    mutated = jax.jit(lambda *given: mutate.mutate_batch("released", *given))
    drawn = jax.jit(jax.vmap(lambda key, state: select.draw(key, state, "ranked")))

    @jax.jit
    @jax.vmap
    def kept(store: fitness.Store, vector: jax.Array) -> tuple[jax.Array, fitness.Store]:
        return fitness.novel(store, vector), fitness.add(store, vector)

    pixels = jnp.asarray(images)
    calls: dict[str, Callable[[], Any]] = {
        "original model": lambda: pair.original(images),
        "compressed model": lambda: pair.compressed(images),
        "mutation": lambda: mutated(operators, keys, pixels),
        "novelty": lambda: kept(stores, vectors),
        "selection": lambda: drawn(keys, states),
    }
    made = []
    for words, call in calls.items():
        times = []
        for _ in range(10 * runs + 2):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append((time.perf_counter() - start) / _BATCH * 1e6)
        # The first two compile.
        low, middle, high = np.quantile(times[2:], (0.25, 0.5, 0.75))
        made.append({
            "row": f"{name}, {words}", "metric": "time of a query", "unit": "µs", "ours": middle,
            "spread": (low, high), "n": len(times) - 2, "note": "spread: the middle half",
        })  # fmt: skip
    return made


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    unknown = set(given.pairs) - set(SUBJECTS)
    if unknown:
        raise app.UsageError(f"--pairs: {sorted(unknown)[0]!r} is not in {', '.join(SUBJECTS)}")
    about = origin(data="", seeds=range(given.runs))
    made: list[dict[str, Any]] = []
    try:
        names = given.pairs if given.pairs_dir else []
        for name in [*names, "jax"]:
            made += measured(name, given)
    except (OSError, ValueError, difftest.ModelError) as error:
        sys.exit(f"error: {error}")
    rows = tuple(record.Row(study="bench_difftest", **{**about, **row}) for row in made)
    if given.out:
        path = Path(given.out)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=rows))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def measured(name: str, given: Any) -> list[dict[str, Any]]:
    """The row fields of one pair: of a published one, or "jax"."""
    if name == "jax":
        whole = data.load("mnist", given.data_dir)
        pair = quantized_lenet1(whole.train_images[:1000])
        title, target, counts = "LeNet-1 and its 8-bit twin in JAX", None, (500, 20)
        images, _, words, _ = pairs.images_of("mnist", given.data_dir)
    else:
        pair, wanted, row = pairs.pair(name, data_dir=given.data_dir, pairs_dir=given.pairs_dir)
        title, (target, counts) = " ".join(row), SUBJECTS[name]
        images, _, words, _ = pairs.images_of(wanted, given.data_dir, given.images)
    most, alone = (min(count, given.seeds or count) for count in counts)
    order = np.random.default_rng(0).permutation(len(images))
    seeds = images[order[:most]]
    made = searched(title, pair, seeds, alone, given.runs) + parts(title, pair, seeds, given.runs)
    if target is not None:
        said = "met" if made[0]["ours"] <= target else "missed"
        made[0]["note"] += f"; target at most {target}, {said}"
    if name == "jax":
        said = "met" if made[1]["ours"] >= JAX_TARGET else "missed"
        made[1]["note"] = f"target at least {JAX_TARGET:g} on two cores, {said}"
    for row in made:
        print(f"{row['row']}: {row['metric']} {row['ours']:.4g}", file=sys.stderr, flush=True)
    return [{**row, "data": words} for row in made]


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("pairs", list(SUBJECTS), "published pairs to search")
    flags.DEFINE_string("pairs_dir", None, "folder of the published pairs' files")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    flags.DEFINE_string("images", None, ".npz file whose test images stand for CIFAR-10's")
    flags.DEFINE_integer("seeds", 0, "most seeds of a search; 0: as many as each pair has")
    flags.DEFINE_integer("runs", 3, "runs of each search", lower_bound=1)
    results = ROOT / "experiments" / "results" / "bench_difftest.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
