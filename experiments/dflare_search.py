"""The searches of DFlare beside each other: tables 1, 2, 4, 5 and 6, and figures 3 and 4.

Tian et al., TOSEM 2023, sections 2.1, 4 and 5.1 to 5.3, on pairs of ``experiments.pairs``; then
what the paper leaves out: how far the triggers lie from their seeds, whether the original model
still gives the seed's label, and searches that are held to either.

``--schedule cpu``: 500 seeds and five random seeds for the searches of table 4 and "best", one
random seed, 200 seeds and at most 2,000 queries for all others, 50 seeds and 20,000 queries for
DiffChaser; the three published pairs take two cores about an hour. ``--schedule published``: 500
seeds, five random seeds, 180 seconds a seed, all searches. ``--schedule whole`` is table 5:
"released" from every test image. ``--schedule tiny`` is for tests. A killed run goes on where it
stopped, in the same ``--work``; rows of other pairs that ``--out`` holds stay.

``python -m experiments.dflare_search --pairs lenet1,lenet5 --pairs_dir ... --data_dir ...``
``python -m experiments.dflare_search --files a.onnx,b.tflite --data imagenet_folder
--test_images 2000 --mean 123.675,116.28,103.53 --std 58.395,57.12,57.375``
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

import difftest
from difftest.diffchaser import diffchase
from experiments import page, pairs
from experiments.provenance import ROOT, origin
from experiments.robust_pruning import merge
from nnslicer_jax import data
from nnslicer_jax.atomic import replacing
from nnslicer_jax.checkpoint import claim, digest

TITLE = "DFlare: triggers of compressed models, and what they cost"
TEXT = (
    "Tian et al., TOSEM 2023, tables 4 to 6. A query is one image through both models. Means and "
    "medians are over the seeds whose trigger still triggers when asked anew, averaged over random "
    "seeds with the standard deviation over those; seeds on which the pair already disagrees enter "
    "no average. Searches end at a number of queries that the notes of the success rates name: on "
    "the cpu schedule released, best and DFlare_R at 1,000,000 a seed, the other searches at "
    "2,000, DiffChaser at 20,000; success rates of searches that end sooner than the paper's are "
    "lower for it. n counts seeds searched for success rates and triggers for what is said of "
    "triggers. Seconds are a seed's share of its batches, without the first batch of each size, in "
    "which programs are compiled; DiffChaser's of MNIST's pairs and of the published ones contain "
    "it, and so do rows made before their commit had that clock. "
    "Paper is the search of the text. Released is that of the published code, from which the "
    "published numbers come; it departs from the text: a mutant is accepted whether D moves up or "
    "down; the first D to beat is 0, not the seed's; the last operator's rank k1 is always -1, so "
    "that operators are drawn by rank alone; the last operator is the last accepted one, not the "
    "last chosen; an operator succeeds when its mutant is accepted or triggers, not when fitness "
    "rises; pixels are cast to uint8 before they are clipped, which wraps bright ones and "
    "truncates all; salt and pepper is an operator that the text does not name; novelty is judged "
    "by an approximate search of nearest neighbours (ours is exact) and by squared L2. "
    "DFlare_D (no novelty) is run as the text says; the published code starts it at a D that none "
    "exceeds, so that it never accepts a mutant. Best is ours: on the lines from a seed to seeds "
    "of other classes it asks between the points where the two models change their label, and "
    "where no line is left it goes on as released does (rows of MNIST's pairs and of "
    "the published ones were made when it went on as paper does). The paper's seconds are from "
    "another machine and through slower calls. L2 is the distance "
    "from the seed on the 0-1 scale; labels are kept where the original model gives the trigger "
    "the label of its seed. The networks beyond the three published pairs are our own of the same "
    "kind, whose compression leaves other differences than the paper's. "
    "Not reproduced: mean queries as few as the published, of most pairs, while medians are near "
    "those of the released code as measured; and that ranked operators beat those drawn "
    "uniformly, of which the Wilcoxon rows say how often they do."
)


class Published(NamedTuple):
    """Of tables 4 and 6: success in per cent, mean seconds, mean queries."""

    success: float
    seconds: float | None
    queries: float | None


@dataclasses.dataclass(frozen=True)
class Kind:
    """One search.

    Attributes:
      words: What it is called in the tables.
      options: Of `difftest.search`; None: DiffChaser.
      main: Whether the cpu schedule gives it all seeds.
    """

    words: str
    options: dict[str, Any] | None
    main: bool = False


KINDS = {
    "released": Kind("released", {"variant": "released"}, True),
    "paper": Kind("paper", {"variant": "paper"}),
    "best": Kind("best", {"variant": "best"}, True),
    "uniform": Kind("DFlare_R", {"variant": "released", "selection": "uniform"}, True),
    "no_novelty": Kind("DFlare_D", {"variant": "paper", "novelty": False}),
    "released_label": Kind("released, label kept", {"variant": "released", "keep_label": True}),
    "released_l2_4": Kind("released, L2 at most 4", {"variant": "released", "max_l2": 4.0}),
    "released_l2_2": Kind("released, L2 at most 2", {"variant": "released", "max_l2": 2.0}),
    "best_label": Kind("best, label kept", {"variant": "best", "keep_label": True}),
    "best_l2_4": Kind("best, L2 at most 4", {"variant": "best", "max_l2": 4.0}),
    "best_l2_2": Kind("best, L2 at most 2", {"variant": "best", "max_l2": 2.0}),
    "best_label_l2_4": Kind(
        "best, label kept, L2 at most 4", {"variant": "best", "keep_label": True, "max_l2": 4.0}
    ),
    "diffchaser": Kind("DiffChaser", None),
}

TABLE_4 = {
    "LeNet-1 Quantization-8-bit": (Published(100, 0.513, 83.97), Published(99.40, 10.654, 5812.47)),
    "LeNet-5 Quantization-8-bit": (
        Published(100, 0.706, 117.02), Published(99.68, 12.598, 6040.53)
    ),
    "ResNet-20 Quantization-8-bit": (
        Published(100, 0.509, 30.43), Published(99.76, 33.980, 2323.58)
    ),
    "LeNet-4 Prune": (Published(100, 0.056, 18.34), Published(99.44, 16.249, 6172.57)),
    "LeNet-4 Quantization": (Published(100, 0.187, 27.83), Published(98.08, 76.254, 6506.53)),
    "LeNet-5 Prune": (Published(100, 0.071, 22.03), Published(98.56, 17.446, 6276.38)),
    "LeNet-5 Quantization": (Published(100, 0.225, 28.08), Published(98.48, 45.618, 6662.88)),
    "CNN Prune": (Published(100, 0.068, 22.51), Published(99.60, 16.381, 6053.82)),
    "CNN Quantization": (Published(100, 0.173, 25.34), Published(99.52, 38.039, 6450.96)),
    "PlainNet-20 Prune": (Published(100, 0.051, 4.31), Published(99.80, 18.222, 1896.59)),
    "PlainNet-20 Quantization": (Published(100, 0.470, 9.13), Published(89.52, 75.191, 1696.16)),
    "PlainNet-20 Knowledge Distillation": (
        Published(100, 0.029, 3.97), Published(99.72, 12.324, 1961.09)
    ),
    "ResNet-20 Prune": (Published(100, 0.063, 4.70), Published(99.88, 23.298, 2145.77)),
    "ResNet-20 Quantization": (Published(100, 0.685, 10.16), Published(74.12, 83.971, 1511.06)),
    "ResNet-20 Knowledge Distillation": (
        Published(100, 0.032, 3.91), Published(99.92, 14.117, 2097.28)
    ),
    "VGG-16 Prune": (Published(100, 0.041, 5.84), Published(99.60, 15.619, 2453.01)),
    "VGG-16 Quantization": (Published(100, 1.183, 26.16), Published(80.08, 85.709, 2129.37)),
    "VGG-16 Knowledge Distillation": (
        Published(100, 0.036, 5.78), Published(99.80, 16.058, 2761.12)
    ),
}  # fmt: skip
# Table 6: DFlare_D and DFlare_R. The labels of its nine own rows of CIFAR-10 are put right: it
# prints ratios to table 4, by which its "Prune" is distillation, its "Quantization" pruning, and
# its "Knowledge Distillation" quantization.
TABLE_6 = {
    "LeNet-1 Quantization-8-bit": (Published(41.44, 39.988, 8140.54), Published(100, 0.537, 89.52)),
    "LeNet-5 Quantization-8-bit": (
        Published(39.44, 38.244, 7422.38), Published(100, 0.752, 125.87)
    ),
    "ResNet-20 Quantization-8-bit": (Published(100, 3.454, 203.91), Published(100, 0.555, 30.59)),
    "LeNet-4 Prune": (Published(92.12, 8.242, 2970.80), Published(100, 0.062, 20.79)),
    "LeNet-4 Quantization": (Published(60.76, 31.162, 4861.92), Published(100, 0.200, 30.06)),
    "LeNet-5 Prune": (Published(93.52, 7.428, 2473.71), Published(100, 0.080, 24.77)),
    "LeNet-5 Quantization": (Published(59.92, 26.699, 3548.56), Published(100, 0.237, 29.99)),
    "CNN Prune": (Published(81.04, 11.396, 4348.22), Published(100, 0.075, 25.14)),
    "CNN Quantization": (Published(63.68, 26.639, 4243.05), Published(100, 0.182, 26.39)),
    "PlainNet-20 Knowledge Distillation": (
        Published(100, 0.037, 5.16), Published(100, 0.031, 4.05)
    ),
    "PlainNet-20 Prune": (Published(100, 0.058, 5.11), Published(100, 0.051, 4.32)),
    "PlainNet-20 Quantization": (Published(100, 0.809, 15.85), Published(100, 0.477, 9.30)),
    "ResNet-20 Knowledge Distillation": (Published(100, 0.039, 4.95), Published(100, 0.031, 3.80)),
    "ResNet-20 Prune": (Published(100, 0.080, 6.07), Published(100, 0.066, 4.89)),
    "ResNet-20 Quantization": (Published(100, 1.329, 19.39), Published(100, 0.690, 10.07)),
    "VGG-16 Knowledge Distillation": (Published(100, 0.047, 7.86), Published(100, 0.035, 5.49)),
    "VGG-16 Prune": (Published(100, 0.050, 7.48), Published(100, 0.042, 5.90)),
    "VGG-16 Quantization": (Published(99.04, 4.986, 117.08), Published(100, 1.133, 24.75)),
}  # fmt: skip
# Our measurement of the published code on its own pairs, 100 seeds: by `Summary`'s fields.
RELEASED = {
    "LeNet-1 Quantization-8-bit": {"queries": 76.8, "median": 52.5, "l2": 8.0, "kept": 23},
    "LeNet-5 Quantization-8-bit": {"queries": 378.8, "median": 86, "l2": 8.9, "kept": 11},
    "ResNet-20 Quantization-8-bit": {"queries": 30.8, "median": 24, "l2": 11.9, "kept": 16},
}
# Table 2: accuracy of the original and of the compressed model, in per cent.
TABLE_2 = {
    "LeNet-1 Quantization-8-bit": (97.88, 97.88),
    "LeNet-5 Quantization-8-bit": (98.81, 98.81),
    "ResNet-20 Quantization-8-bit": (91.20, 91.20),
    "LeNet-4 Prune": (99.21, 99.13),
    "LeNet-4 Quantization": (99.21, 99.21),
    "LeNet-5 Prune": (99.13, 98.99),
    "LeNet-5 Quantization": (99.13, 99.15),
    "CNN Prune": (99.11, 99.23),
    "CNN Quantization": (99.11, 99.13),
    "PlainNet-20 Prune": (87.33, 85.98),
    "PlainNet-20 Quantization": (87.33, 87.12),
    "PlainNet-20 Knowledge Distillation": (87.33, 75.89),
    "ResNet-20 Prune": (89.42, 89.88),
    "ResNet-20 Quantization": (89.42, 88.89),
    "ResNet-20 Knowledge Distillation": (89.42, 74.60),
    "VGG-16 Prune": (87.48, 88.44),
    "VGG-16 Quantization": (87.48, 87.06),
    "VGG-16 Knowledge Distillation": (87.48, 87.59),
}
# Table 1: images on which the pair disagrees, of the training set and of the test set.
TABLE_1 = {
    "LeNet-1 Quantization-8-bit": ("83 of 60,000", "9 of 10,000"),
    "LeNet-5 Quantization-8-bit": ("23 of 60,000", "5 of 10,000"),
    "ResNet-20 Quantization-8-bit": ("75 of 50,000", "62 of 10,000"),
}


# Table 10: success within so many seconds, in per cent; 100 of every pair that is not named.
TIMEOUTS = (15, 10, 5)
TABLE_10 = {
    "ResNet-20 Quantization-8-bit": (100, 100, 99.98),
    "PlainNet-20 Quantization": (76.93, 43.76, 10.90),
    "ResNet-20 Quantization": (100, 99.30, 89.12),
    "VGG-16 Quantization": (95.87, 79.30, 40.06),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      images: Seeds of a random seed; None: every test image.
      searches: Random seeds, of the main searches and of the others.
      others: Seeds of the searches that are not main ones, and their most queries.
      chased: Seeds of DiffChaser.
      chased_queries: DiffChaser's most queries.
      max_queries: Of the main searches.
      timeout: Seconds a seed.
      kinds: What is run, of `KINDS`.
    """

    images: int | None
    searches: tuple[int, int]
    others: tuple[int, int]
    chased: int
    chased_queries: int
    max_queries: int = 1_000_000
    timeout: float = 180.0
    kinds: tuple[str, ...] = tuple(KINDS)


SCHEDULES = {
    "cpu": Schedule(500, (5, 1), (200, 2_000), 50, 20_000),
    "published": Schedule(500, (5, 5), (500, 1_000_000), 500, 1_000_000),
    "whole": Schedule(None, (1, 1), (1, 1), 0, 1, kinds=("released",)),
    "tiny": Schedule(20, (2, 1), (8, 60), 3, 500, max_queries=300),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A pair with the images that seeds are drawn from.

    Attributes:
      name: Of the pair.
      title: Network and compression, as in the paper's tables.
      pair: The models.
      data: The data in words.
      images: uint8 `[N, H, W, C]`.
      labels: int `[N]`, the true classes.
      training: uint8 `[M, H, W, C]`, the training images; None where there are none.
      commands: By which original and compressed model were made; empty of files.
    """

    name: str
    title: str
    pair: difftest.ModelPair
    data: str
    images: np.ndarray
    labels: np.ndarray
    training: Any = None
    commands: tuple[str, str] = ("", "")


class Summary(NamedTuple):
    """One search of one random seed; queries to kept are None where nothing was found."""

    success: float
    searched: int
    disagreeing: int
    found: int
    queries: float | None
    median: float | None
    largest: int | None
    seconds: float | None
    l2: float | None
    kept: float | None
    unique: float | None


def draw(case: Case, schedule: Schedule, kind: str, search: int) -> np.ndarray:
    """Places of the seeds of a random seed, the same for every kind of search that has as many."""
    order = np.random.default_rng(search).permutation(len(case.images))
    if KINDS[kind].options is None:
        return order[: schedule.chased]
    return order[: schedule.images if KINDS[kind].main else schedule.others[0]]


def most_queries(schedule: Schedule, kind: str) -> int:
    """Where a search gives a seed up."""
    if KINDS[kind].options is None:
        return schedule.chased_queries
    return schedule.max_queries if KINDS[kind].main else schedule.others[1]


def run_cell(
    case: Case, schedule: Schedule, kind: str, search: int, folder: Path
) -> difftest.SearchResult:
    """One search from the seeds of one random seed, or what an earlier run kept of it."""
    chosen = KINDS[kind]
    most, timeout = most_queries(schedule, kind), schedule.timeout
    seeds = case.images[draw(case, schedule, kind, search)]
    path = folder / f"{kind}_{search}.npz"
    key = jax.random.key(search)
    if chosen.options is not None:
        return difftest.search(
            case.pair, seeds, key, max_queries=most, timeout=timeout, checkpoint=path,
            **chosen.options,
        )  # fmt: skip
    if path.exists():
        kept = difftest.SearchResult.load(path)
        # Saved whole before there were checkpoints, it does not name its seeds.
        if "waiting" not in kept.status:
            return kept
    return diffchase(case.pair, seeds, key, max_queries=most, timeout=timeout, checkpoint=path)


def summary(pair: difftest.ModelPair, result: difftest.SearchResult) -> Summary:
    """Counts what a search found, success by asking the pair about the triggers anew."""
    good = result.success & difftest.confirm(pair, result)
    searched = int(result.searched.sum())
    success = 100 * float(good.sum()) / searched if searched else 0.0
    disagreeing = int((result.status == "disagrees").sum())
    if not good.any():
        return Summary(success, searched, disagreeing, 0, *[None] * 7)
    queries = result.queries[good]
    triggers = result.triggers[good].reshape(int(good.sum()), -1)
    return Summary(
        success,
        searched,
        disagreeing,
        len(queries),
        float(queries.mean()),
        float(np.median(queries)),
        int(queries.max()),
        float(result.seconds[good].mean()),
        float(np.median(result.l2[good])),
        100 * float(result.keeps_label[good].mean()),
        100 * len(np.unique(triggers, axis=0)) / len(triggers),
    )


Found = dict[str, list[difftest.SearchResult]]


def run(case: Case, schedule: Schedule, work: Path, show: bool = False) -> Found:
    """Runs all searches of a pair, going on where an earlier run stopped.

    Args:
      case: The pair.
      schedule: How much.
      work: Folder for what is done so far, of this pair and of others.
      show: Write progress lines to standard error.

    Raises:
      ValueError: For a folder of another run.
      ModelError: A model fails on every seed.
    """
    folder = work / case.name
    # Kinds may be added later; what was done of the others stays good.
    limits = {**dataclasses.asdict(schedule), "kinds": None}
    claim(folder, {"images": digest(case.images), "schedule": json.loads(json.dumps(limits))})
    # Beside that claim, not in it: folders made before models were told apart stay good.
    claim(folder / "models", {"answers": pairs.probe(case.pair.probabilities(case.images[:16]))})
    found: Found = {}
    for kind in schedule.kinds:
        main = KINDS[kind].main
        for search in range(schedule.searches[0 if main else 1]):
            result = run_cell(case, schedule, kind, search, folder)
            found.setdefault(kind, []).append(result)
            if show:
                told = summary(case.pair, result)
                words = f"{case.title}, {KINDS[kind].words}, random seed {search}: {told}"
                print(words, file=sys.stderr, flush=True)
        # Programs of all kinds and sizes together outgrow what the system lets one map.
        jax.clear_caches()
    return found


# Results --------------------------------------------------------------------------------------

# Metric, unit, decimals, place in `Published`.
_METRICS: dict[str, tuple[str, str, int, int | None]] = {
    "success": ("success rate", "%", 2, 0),
    "queries": ("mean queries", "", 2, 2),
    "median": ("median queries", "", 1, None),
    "largest": ("most queries", "", 0, None),
    "seconds": ("mean seconds", "s", 4, 1),
    "l2": ("median L2", "", 2, None),
    "kept": ("labels kept", "%", 1, None),
    "unique": ("unique triggers", "%", 1, None),
}


def _published(title: str, kind: str) -> Published | None:
    chased = (None, None)
    return {
        "released": TABLE_4.get(title, chased)[0],
        "diffchaser": TABLE_4.get(title, chased)[1],
        "no_novelty": TABLE_6.get(title, chased)[0],
        "uniform": TABLE_6.get(title, chased)[1],
    }.get(kind)


def rows(case: Case, found: Found, schedule: Schedule) -> list[dict[str, Any]]:
    """Fields of the results' rows of one pair, each with its random seeds."""
    made = _accuracies(case)
    for kind, results in found.items():
        told = [summary(case.pair, result) for result in results]
        already = sum(one.disagreeing for one in told)
        notes = {"success": f"at most {most_queries(schedule, kind):,} queries a seed"}
        if already:
            notes["success"] += f"; {already} more seeds already disagreed"
        if kind == "released":
            measured = RELEASED.get(case.title, {}).items()
            notes |= {
                field: f"the released code, measured: {value:g} (100 seeds)"
                for field, value in measured
            }
        published = _published(case.title, kind)
        if published and schedule.images is None:
            # Of all test images the paper says no more.
            published = Published(published.success, None, None)
        for field, (metric, unit, decimals, place) in _METRICS.items():
            values = [getattr(one, field) for one in told]
            values = [value for value in values if value is not None]
            if not values:
                continue
            spread = round(float(np.std(values, ddof=1)), decimals) if len(values) > 1 else None
            made.append({
                "row": _row(case, kind, schedule), "metric": metric, "unit": unit,
                "ours": round(float(np.mean(values)), decimals), "spread": spread,
                "n": sum(one.searched if field == "success" else one.found for one in told),
                "published": published[place] if published and place is not None else None,
                "note": notes.get(field, ""), "seeds": tuple(range(len(results))),
            })  # fmt: skip
    return made + _timeouts(case, found, schedule) + _comparisons(case, found)


def _row(case: Case, kind: str, schedule: Schedule) -> str:
    all_images = ", all test images" if schedule.images is None else ""
    return f"{case.title}, {KINDS[kind].words}{all_images}"


def _timeouts(case: Case, found: Found, schedule: Schedule) -> list[dict[str, Any]]:
    """Table 10: shares of "released" that were done within a shorter time."""
    results = found.get("released", [])
    searched = sum(int(result.searched.sum()) for result in results)
    if not searched:
        return []
    confirmed = [one.success & difftest.confirm(case.pair, one) for one in results]
    published = TABLE_10.get(case.title, (100, 100, 100) if case.title in TABLE_4 else (None,) * 3)
    return [
        {
            "row": _row(case, "released", schedule), "metric": f"success within {limit} s",
            "unit": "%", "published": there, "n": searched, "seeds": tuple(range(len(results))),
            "ours": round(100 * sum(int((good & (one.seconds <= limit)).sum())
                                    for one, good in zip(results, confirmed, strict=True))
                          / searched, 2),
        }
        for limit, there in zip(TIMEOUTS, published, strict=True)
    ]  # fmt: skip


def _accuracies(case: Case) -> list[dict[str, Any]]:
    """Of tables 1 and 2, over all images."""
    labels = pairs.labels_of(case.pair, case.images)
    about: dict[str, Any] = {"row": case.title, "n": len(case.images), "seeds": ()}
    made: list[dict[str, Any]] = [
        {
            **about, "metric": f"accuracy, {name}", "unit": "%", "published": published,
            "ours": round(100 * float((each == case.labels).mean()), 2), "note": command,
        }
        for name, each, published, command in zip(
            ("original", "compressed"), labels, TABLE_2.get(case.title, (None, None)),
            case.commands, strict=True,
        )
    ]  # fmt: skip
    of_training, of_test = TABLE_1.get(case.title, (None, None))
    metric = "images that trigger unchanged"
    made.append({
        **about, "metric": metric, "ours": int((labels[0] != labels[1]).sum()),
        "published": of_test,
    })  # fmt: skip
    # Only where the paper counts them: 50,000 images through a large network cost more than its
    # searches.
    if of_training is not None and case.training is not None and len(case.training):
        labels = pairs.labels_of(case.pair, case.training)
        made.append({
            **about, "metric": f"training {metric}", "ours": int((labels[0] != labels[1]).sum()),
            "published": of_training, "n": len(case.training),
        })  # fmt: skip
    return made


def _comparisons(case: Case, found: Found) -> list[dict[str, Any]]:
    """Section 5.3.2: whether ranked operators need fewer queries, or less time, than uniform."""
    both = list(zip(found.get("released", []), found.get("uniform", []), strict=False))
    made = []
    for name, unit in (("queries", "queries"), ("seconds", "s")):
        apart = [
            (getattr(one, name) - getattr(other, name))[one.success & other.success]
            for one, other in both
        ]
        # The test says nothing of pairs that are all alike.
        differences = np.concatenate(apart) if apart else np.zeros(0)
        if not differences.any():
            continue
        made.append({
            "row": f"{case.title}, released against DFlare_R",
            "metric": f"Wilcoxon p of the {name}",
            "ours": float(f"{wilcoxon(differences).pvalue:.3g}"), "n": len(differences),
            "note": f"mean difference {differences.mean():.3g} {unit}",
            "seeds": tuple(range(len(both))),
        })  # fmt: skip
    return made


def save_histogram(case: Case, found: Found, path: Path) -> None:
    """Figure 4: how many queries the searches needed."""
    drawn: Figure = page.drawing(4.2)
    ax = drawn.subplots()
    shown = {
        kind: np.concatenate([one.queries[one.success] for one in found[kind]])
        for kind in ("best", "released", "diffchaser")
        if kind in found
    }
    shown = {kind: queries for kind, queries in shown.items() if len(queries)}
    longest = max((int(queries.max()) for queries in shown.values()), default=1)
    # Eight bins a decade, up to the longest search.
    decades = max(math.ceil(math.log10(longest)), 1)
    bins = np.geomspace(1, 10.0**decades, 8 * decades + 1)
    for turn, (kind, queries) in enumerate(shown.items()):
        ax.hist(
            queries, bins=list(bins), weights=np.full(len(queries), 100 / len(queries)),
            histtype="stepfilled", alpha=0.6, color=page.COLOURS[turn], hatch="/" * (3 * turn),
            label=f"{KINDS[kind].words}: median {np.median(queries):.0f}, "
            f"mean {queries.mean():.0f}",
        )  # fmt: skip
    ax.set(xscale="log", xlabel="queries until a trigger", ylabel="% of the triggers")
    ax.set_title(case.title)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize="small")
    with replacing(path) as part, part.open("wb") as file:
        drawn.savefig(file, format="png")


def save_examples(case: Case, schedule: Schedule, found: Found, path: Path) -> None:
    """Figure 3: the first triggers of "released", of "best", and of "best" with the label kept."""
    kinds = [kind for kind in ("released", "best", "best_label") if kind in found]
    count = 6
    drawn: Figure = page.drawing(1.35 * (len(kinds) + 1))
    axes = drawn.subplots(len(kinds) + 1, count, squeeze=False)
    places = draw(case, schedule, kinds[0], 0)
    shared = min(len(found[kind][0].success) for kind in kinds)
    good = np.all([found[kind][0].success[:shared] for kind in kinds], axis=0)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for column, row in enumerate(np.flatnonzero(good)[:count]):
        seed = case.images[places[row]]
        _show(axes[0, column], seed, f"{found[kinds[0]][0].seed_labels[row]}")
        for line, kind in enumerate(kinds, start=1):
            result = found[kind][0]
            labels = (result.outputs_original[row], result.outputs_compressed[row])
            _show(axes[line, column], result.triggers[row],
                  " | ".join(str(each.argmax()) for each in labels))  # fmt: skip
    for line, words in enumerate(["seed", *(KINDS[kind].words for kind in kinds)]):
        axes[line, 0].set_ylabel(words.replace(", ", ",\n"), fontsize="small")
    drawn.suptitle(f"{case.title}: label of the original | of the compressed model", fontsize=9)
    with replacing(path) as part, part.open("wb") as file:
        drawn.savefig(file, format="png")


def _show(ax: Any, image: np.ndarray, title: str) -> None:
    ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    ax.set_title(title, fontsize="small")


def prepare(name: str, options: dict[str, Any], given: Any) -> Case:
    """Loads a pair by its name, with its images."""
    pair, dataset, row = pairs.pair(name, **options)
    pixels, labels, words, training = pairs.images_of(
        dataset, given.data_dir, given.images, given.test_images
    )
    title, commands = pairs.titled(name, row), pairs.commands(name)
    return Case(name, title, pair, words, pixels, labels, training, commands)


def prepare_files(given: Any) -> Case:
    """Loads the user's own pair and the images of its data set."""
    if len(given.files) != 2 or given.data is None:
        raise ValueError(
            f"--files is {','.join(given.files)}, --data is {given.data}; give the original and "
            "the compressed model's file, and the data set of their seeds"
        )
    try:
        mean, std = ([float(value) for value in each] for each in (given.mean, given.std))
    except ValueError as error:
        raise ValueError(f"--mean and --std take numbers: {error}") from None
    pair, title = pairs.of_files(given.files[0], given.files[1], mean, std, given.channels_first)
    pixels, labels, words, _ = pairs.images_of(
        given.data, given.data_dir, given.images, given.test_images
    )
    return Case(title.replace(" ", "_"), title, pair, words, pixels, labels)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    schedule = SCHEDULES[given.schedule]
    if given.kinds:
        schedule = dataclasses.replace(schedule, kinds=tuple(given.kinds))
    about = origin(data="", seeds=range(schedule.searches[0]))
    made = []
    options = {"data_dir": given.data_dir}
    if given.pairs_dir:
        options["pairs_dir"] = given.pairs_dir
    try:
        for kind in schedule.kinds:
            if kind not in KINDS:
                raise ValueError(f"--kinds: {kind!r} is unknown; known are {', '.join(KINDS)}")
        named = (prepare(name, options, given) for name in given.pairs)
        for case in [prepare_files(given)] if given.files else named:
            found = run(case, schedule, Path(given.work or f"out/dflare_search/{given.schedule}"),
                        show=True)  # fmt: skip
            made += [{**row, "data": case.data} for row in rows(case, found, schedule)]
            save_histogram(case, found, Path(given.figures) / f"queries_{case.name}.png")
            save_examples(case, schedule, found, Path(given.figures) / f"triggers_{case.name}.png")
    except (OSError, ValueError, difftest.ModelError) as error:
        sys.exit(f"error: {error}")
    merge(Path(given.out), "dflare_search", TITLE, TEXT, about, made)


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("pairs", ["lenet1", "lenet5"], "of experiments.pairs")
    flags.DEFINE_string("pairs_dir", None, "folder of the published pairs' files")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_string("images", None, ".npz file whose test images stand for CIFAR-10's")
    flags.DEFINE_list("files", [], "files of a pair of your own: original, compressed model")
    flags.DEFINE_enum("data", None, sorted(data.DATASETS), "data set of the seeds of --files")
    flags.DEFINE_list("mean", [], "of --files, subtracted from pixels of 0 to 255, a channel each")
    flags.DEFINE_list("std", [], "of --files, what they are divided by then; else by 255")
    flags.DEFINE_bool("channels_first", False, "ONNX files of --files take [B, C, H, W]")
    flags.DEFINE_integer("test_images", None, "so many of a larger test set", lower_bound=1)
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    flags.DEFINE_list("kinds", [], f"searches, of {', '.join(KINDS)}; all where none is named")
    results = ROOT / "experiments" / "results" / "dflare_search.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", None, "folder for what is done so far")
    flags.DEFINE_string("figures", "out/dflare_search", "folder of the figures")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
