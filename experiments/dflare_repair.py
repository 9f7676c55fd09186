"""DRepair: how many deviations of a compressed model are repaired, and what a new search finds.

Tian et al., TOSEM 2023, section 5.5, tables 7 and 8. From test images DFlare finds triggers;
DRepair is trained on seeds and triggers and judged by five-fold cross-validation, then trained on
all of them, and the repaired model is searched again: from the same seeds, and from seeds that
neither search nor repair has seen, which the paper leaves out.

``--schedule cpu``: 200 seeds and 200 unseen ones, one search, at most 2,000 queries a seed; a pair
of LeNet's size takes two cores a few minutes. ``--schedule published``: 500 seeds, five searches
with different random seeds, 10,000 queries and 180 seconds a seed.
``--schedule tiny`` is for tests. A killed run goes on where it stopped, in the same ``--work``.

``python -m experiments.dflare_repair --pairs lenet4_mnist_pruned,cnn_mnist_pruned``
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

import difftest
from difftest import repair
from experiments import page, pairs, record
from experiments.provenance import ROOT, origin
from experiments.robust_pruning import merge
from nnslicer_jax import checkpoint
from nnslicer_jax.atomic import replacing

TITLE = "DRepair: deviations repaired, and the search after the repair"
TEXT = (
    "A perceptron behind the compressed model brings the original's labels back (Tian et al., "
    "TOSEM 2023, tables 7 and 8). Repair ratio: triggers that no longer trigger. Inducing ratio: "
    "seeds that now do. Improvement ratio: by how much there are fewer deviations, of those there "
    "were; it may be negative. Means over five folds, five random seeds of the folds and of the "
    "training, and the searches, with the standard deviation over cross-validations. A fold takes "
    "a trigger with its seed. Then the repair is trained on all pairs and the search run again, "
    "from the same seeds and from seeds that the repair has not seen; seeds on which the pair "
    "already deviates enter no average, queries and seconds are of the seeds with a trigger, the "
    "success rate is asked anew from the triggers kept, spreads are standard deviations over "
    "searches. L2 is the distance of a trigger from its seed on the 0-1 scale; labels are kept "
    "where the original model gives the trigger the label of its seed. After the repair "
    "triggers take more queries in the paper and fewer in every pair here. The published networks "
    "are others under the same names; the paper's table 7 may have its rows "
    "of CIFAR-10 in another order than its table 4, as table 6 has."
)


class Ratios(NamedTuple):
    """Of table 7, in per cent."""

    repair: float
    inducing: float
    improvement: float


class Searched(NamedTuple):
    """Of table 8: success in per cent, mean seconds and queries of a trigger."""

    success: float
    seconds: float
    queries: float


# Table 7 by network and compression, improvement as printed.
TABLE_7 = {
    "LeNet-1 Quantization-8-bit": Ratios(30.56, 0.36, 30.20),
    "LeNet-5 Quantization-8-bit": Ratios(24.28, 0.12, 24.16),
    "ResNet-20 Quantization-8-bit": Ratios(15.04, 0.52, 14.52),
    "LeNet-4 Prune": Ratios(48.48, 0.00, 48.48),
    "LeNet-4 Quantization": Ratios(35.68, 0.00, 35.68),
    "LeNet-5 Prune": Ratios(43.20, 0.08, 43.12),
    "LeNet-5 Quantization": Ratios(38.68, 0.00, 38.68),
    "CNN Prune": Ratios(42.44, 0.04, 42.40),
    "CNN Quantization": Ratios(36.55, 0.04, 36.50),
    "PlainNet-20 Prune": Ratios(50.40, 12.92, 37.48),
    "PlainNet-20 Quantization": Ratios(32.20, 8.16, 24.04),
    "PlainNet-20 Knowledge Distillation": Ratios(23.34, 6.77, 16.56),
    "ResNet-20 Prune": Ratios(49.32, 12.24, 37.08),
    "ResNet-20 Quantization": Ratios(36.28, 6.44, 29.84),
    "ResNet-20 Knowledge Distillation": Ratios(24.78, 6.38, 18.40),
    "VGG-16 Prune": Ratios(37.68, 5.12, 32.56),
    "VGG-16 Quantization": Ratios(25.64, 6.88, 18.76),
    "VGG-16 Knowledge Distillation": Ratios(19.28, 4.78, 14.50),
}
# Table 8: before and after the repair.
TABLE_8 = {
    "LeNet-4 Prune": (Searched(100, 0.056, 18.34), Searched(100, 0.245, 55.67)),
    "LeNet-5 Prune": (Searched(100, 0.071, 22.03), Searched(100, 0.169, 33.86)),
    "CNN Prune": (Searched(100, 0.068, 22.51), Searched(100, 0.399, 102.29)),
}


DEFAULT_PAIRS = (
    "lenet4_mnist_pruned",
    "lenet4_mnist_quantized",
    "lenet5_mnist_pruned",
    "lenet5_mnist_quantized",
    "cnn_mnist_pruned",
    "cnn_mnist_quantized",
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      images: Seeds, and as many unseen ones.
      searches: How many, each with its random seed.
      validations: Random seeds of the cross-validation.
      max_queries: A seed.
      timeout: Seconds a seed.
    """

    images: int
    searches: int
    validations: int = 5
    max_queries: int = 10_000
    timeout: float = 180.0


SCHEDULES = {
    "cpu": Schedule(images=200, searches=1, max_queries=2_000),
    "published": Schedule(images=500, searches=5),
    "tiny": Schedule(images=24, searches=2, validations=2, max_queries=200),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A pair with its seeds.

    Attributes:
      name: Of the pair.
      title: Network and compression, as in the paper's tables.
      pair: The models.
      data: The data in words.
      seeds: uint8 `[N, H, W, C]`.
      unseen: uint8 `[M, H, W, C]`; no seeds.
    """

    name: str
    title: str
    pair: difftest.ModelPair
    data: str
    seeds: np.ndarray
    unseen: np.ndarray


class Summary(NamedTuple):
    """One search.

    Attributes:
      seeds: How many there were.
      deviating: Those on which the pair deviates without a search.
      searched: The others.
      found: Seeds whose trigger still triggers, asked anew.
      queries: Of the seeds with a trigger, mean; None without one.
      median: The same, median.
      seconds: The same, mean.
      l2: Distance of a trigger from its seed on the 0-1 scale, median.
      kept: Share of the triggers to which the original model gives the seed's label.
    """

    seeds: int
    deviating: int
    searched: int
    found: int
    queries: float | None
    median: float | None
    seconds: float | None
    l2: float | None
    kept: float | None


class Cell(NamedTuple):
    """What one search and the repair by its triggers gave.

    Attributes:
      ratios: One a cross-validation, 0..1: means over its folds.
      before: The search before the repair.
      after: The search after it, from the same seeds.
      unseen_before: From seeds that the repair has not seen.
      unseen_after: The same after the repair.
      commit: Of the code.
    """

    ratios: list[Ratios]
    before: Summary
    after: Summary
    unseen_before: Summary
    unseen_after: Summary
    commit: str

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Cell":
        """From what JSON keeps of it."""
        ratios, *searches, commit = values
        before, after, unseen_before, unseen_after = (Summary(*one) for one in searches)
        made = [Ratios(*one) for one in ratios]
        return cls(made, before, after, unseen_before, unseen_after, commit)


Find = Callable[..., tuple[difftest.ModelPair, str, Any]]


def prepare(
    name: str, find: Find, schedule: Schedule, data_dir: str | None = None, file: str | None = None
) -> Case:
    """Loads a pair, and draws its seeds from the test images, the same for all pairs.

    Args:
      name: Of the pair.
      find: From a name and `data_dir` to the pair, its data set and its row of table 4.
      schedule: How many seeds.
      data_dir: Folder searched first for the data set.
      file: Of `pairs.images_of`.

    Raises:
      ValueError: For an unknown pair, or a file without images.
      FileNotFoundError: For weights or a data set that are nowhere.
    """
    pair, dataset, row = find(name, data_dir=data_dir)
    images, _, words, _ = pairs.images_of(dataset, data_dir, file)
    order = np.random.default_rng(0).permutation(len(images))
    used, free = np.split(order[: 2 * schedule.images], [schedule.images])
    said = f"{words}: {len(used):,} seeds and {len(free):,} unseen ones"
    return Case(name, pairs.titled(name, row), pair, said, images[used], images[free])


_FOLDS = 5


# One cell -------------------------------------------------------------------------------------


def run_cell(case: Case, schedule: Schedule, seed: int, folder: Path, commit: str) -> Cell:
    """Searches, repairs, and searches again.

    Args:
      case: From `prepare`.
      schedule: How much.
      seed: Of the searches.
      folder: Keeps the searches, whole or in part.
      commit: Of the code.

    Raises:
      ValueError: Fewer triggers were found than there are folds.
      ModelError: A model fails on every seed.
    """
    key = jax.random.key(seed)

    def look(pair: difftest.ModelPair, seeds: np.ndarray, name: str) -> difftest.SearchResult:
        folder.mkdir(parents=True, exist_ok=True)
        return difftest.search(
            pair, seeds, key, variant="released", max_queries=schedule.max_queries,
            timeout=schedule.timeout, checkpoint=folder / f"{name}.npz",
        )  # fmt: skip

    first = look(case.pair, case.seeds, "before")
    examples = repair.examples(case.pair, case.seeds, first)
    if len(examples.seeds) < _FOLDS:
        raise ValueError(
            f"{case.name}: {len(examples.seeds)} triggers from {len(case.seeds)} seeds; at least "
            f"{_FOLDS} are due, one a fold"
        )
    judged = repair.cross_validate(examples, folds=_FOLDS, seeds=range(schedule.validations))
    kinds = (judged.repair_ratio, judged.inducing_ratio, judged.improvement_ratio)
    ratios = [Ratios(*map(float, row)) for row in np.stack([k.mean(axis=1) for k in kinds], 1)]
    mended = repair.repaired_pair(case.pair, repair.fit(case.pair.compressed, examples, seed))

    def again(pair: difftest.ModelPair, seeds: np.ndarray, name: str) -> Summary:
        return summary(pair, look(pair, seeds, name))

    return Cell(
        ratios,
        summary(case.pair, first),
        again(mended, case.seeds, "after"),
        again(case.pair, case.unseen, "unseen_before"),
        again(mended, case.unseen, "unseen_after"),
        commit,
    )


def summary(pair: difftest.ModelPair, result: difftest.SearchResult) -> Summary:
    """Counts a search's outcomes, success by asking the pair about the triggers anew."""
    good = result.success & difftest.confirm(pair, result)
    queries, seconds = result.queries[good], result.seconds[good]
    some = bool(good.any())
    return Summary(
        seeds=len(result.status),
        deviating=int((result.status == "disagrees").sum()),
        searched=int(result.searched.sum()),
        found=int(good.sum()),
        queries=float(queries.mean()) if some else None,
        median=float(np.median(queries)) if some else None,
        seconds=float(seconds.mean()) if some else None,
        l2=float(np.median(result.l2[good])) if some else None,
        kept=float(result.keeps_label[good].mean()) if some else None,
    )


# All cells ------------------------------------------------------------------------------------


def run(
    case: Case, schedule: Schedule, work: Path, commit: str = "unknown", show: bool = False
) -> list[Cell]:
    """Runs all searches of a pair, going on where an earlier run stopped.

    Args:
      case: From `prepare`.
      schedule: How much.
      work: Folder for what is done so far, of this pair and of others.
      commit: Of the code.
      show: Write progress lines to standard error.

    Raises:
      ValueError: As `run_cell`, or for a folder of another run.
    """
    folder = work / case.name
    probed = case.pair.probabilities(case.seeds[:1])
    about = {
        "seeds": checkpoint.digest([case.seeds, case.unseen]),
        # Other weights are another run.
        "answer": [[f"{p:.2f}" for p in one[0].tolist()] for one in probed],
        "schedule": dataclasses.asdict(schedule),
        "measures": list(Summary._fields),
    }
    checkpoint.claim(folder, about)
    file = folder / "done.json"
    try:
        kept = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is damaged: not JSON") from None
    for seed in range(schedule.searches):
        if str(seed) in kept:
            continue
        cell = run_cell(case, schedule, seed, folder / f"search_{seed}", commit)
        kept[str(seed)] = cell
        record.write_text(file, json.dumps(kept) + "\n")
        if show:
            print(told(case, seed, cell), file=sys.stderr, flush=True)
    return [Cell.of(kept[str(seed)]) for seed in range(schedule.searches)]


def told(case: Case, seed: int, cell: Cell) -> str:
    """One line about a cell."""
    mean = Ratios(*np.mean(cell.ratios, axis=0))
    queries = [
        "-" if one.queries is None else f"{one.queries:.1f}" for one in (cell.before, cell.after)
    ]
    return (
        f"{case.title}, search {seed}: repaired {mean.repair:.1%}, induced {mean.inducing:.1%}, "
        f"improvement {mean.improvement:.1%}; mean queries {queries[0]}, repaired {queries[1]}"
    )


# Results --------------------------------------------------------------------------------------


def rows(case: Case, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Fields of the results' rows of one pair."""
    commits = sorted({cell.commit for cell in cells})
    about: dict[str, Any] = {"row": case.title, "commit": commits[-1]}
    among = f"made at {', '.join(commits)}" if len(commits) > 1 else ""
    made = []
    ratios = [one for cell in cells for one in cell.ratios]
    triggers = sum(cell.before.found for cell in cells)
    printed = TABLE_7.get(case.title, (None, None, None))
    for place, name in enumerate(Ratios._fields):
        mean, spread = _mean([100 * one[place] for one in ratios])
        made.append({
            **about, "metric": f"{name} ratio", "ours": mean, "spread": spread, "unit": "%",
            "n": len(ratios), "published": printed[place],
            "note": _joined(f"{triggers:,} triggers", among),
        })  # fmt: skip
    before, after = TABLE_8.get(case.title, (None, None))
    parts = (
        ("before", before, "before the repair"),
        ("after", after, "after the repair"),
        ("unseen_before", None, "before the repair, unseen seeds"),
        ("unseen_after", None, "after the repair, unseen seeds"),
    )
    for part, published, words in parts:
        found: list[Summary] = [getattr(cell, part) for cell in cells]
        if not found[0].seeds:
            continue
        for metric, unit, column, values in _measures(found):
            mean, spread = _mean(values)
            none = "" if values else "no trigger was found"
            counted = f"{sum(one.searched for one in found):,} seeds searched"
            made.append({
                **about, "metric": f"{metric}, {words}", "ours": mean, "spread": spread,
                "unit": unit, "n": len(values), "note": _joined(none, counted, among),
                "published": None if published is None or column is None else published[column],
            })  # fmt: skip
    made += _factors(about, cells, before, after, among)
    return made


def _measures(
    found: Sequence[Summary],
) -> list[tuple[str, str, int | None, list[float]]]:
    """Metric, unit, place in `Searched` and values, one a search that has it."""
    return [
        ("seeds that deviate", "%", None, [100 * one.deviating / one.seeds for one in found]),
        ("success rate", "%", 0, [100 * one.found / one.searched for one in found if one.searched]),
        ("mean queries", "", 2, [one.queries for one in found if one.queries is not None]),
        ("median queries", "", None, [one.median for one in found if one.median is not None]),
        ("mean seconds", "s", 1, [one.seconds for one in found if one.seconds is not None]),
        ("median L2", "", None, [one.l2 for one in found if one.l2 is not None]),
        ("labels kept", "%", None, [100 * one.kept for one in found if one.kept is not None]),
    ]


def _factors(
    about: dict[str, Any], cells: Sequence[Cell], before: Any, after: Any, among: str
) -> list[dict[str, Any]]:
    """How many times as many queries a trigger costs after the repair."""
    made = []
    for words, both in (
        ("", [(cell.before, cell.after) for cell in cells]),
        (", unseen seeds", [(cell.unseen_before, cell.unseen_after) for cell in cells]),
    ):
        values = [two.queries / one.queries for one, two in both if one.queries and two.queries]
        if not values:
            continue
        mean, spread = _mean(values)
        made.append({
            **about, "metric": f"queries after the repair to before it{words}", "ours": mean,
            "spread": spread, "unit": "times", "n": len(values), "note": among,
            "published": None if before is None or words else
            round(after.queries / before.queries, 2),
        })  # fmt: skip
    return made


def _mean(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation, rounded; None of too few."""
    if not values:
        return None, None
    spread = round(float(np.std(values, ddof=1)), 3) if len(values) > 1 else None
    return round(float(np.mean(values)), 3), spread


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def save_figure(found: dict[str, list[Cell]], path: Path) -> None:
    """Draws the three ratios of each pair as bars, the published ones as marks.

    Args:
      found: Title of a pair to its cells.
      path: The PNG file to write.
    """
    drawn: Figure = page.drawing(4.2)
    ax = drawn.subplots()
    places = np.arange(len(found))
    for turn, name in enumerate(Ratios._fields):
        ours = [100 * np.mean([r[turn] for c in cells for r in c.ratios]) for cells in
                found.values()]  # fmt: skip
        at = places + 0.27 * (turn - 1)
        ax.bar(at, ours, 0.25, label=name, color=f"C{turn}")
        printed = [(x, TABLE_7[t][turn]) for x, t in zip(at, found, strict=True) if t in TABLE_7]
        if printed:
            ax.plot(*zip(*printed, strict=True), "_", color="black", markersize=12,
                    label="published" if turn == 2 else None)  # fmt: skip
    ax.axhline(0, color="#888888", linewidth=1)
    ax.set(ylabel="%", title="What DRepair does to deviations")
    ax.set_xticks(places, [title.replace(" ", "\n", 1) for title in found], fontsize="small")
    ax.legend()
    with replacing(path) as part, part.open("wb") as file:
        drawn.savefig(file, format="png")


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    schedule = SCHEDULES[given.schedule]
    about = origin(data="", seeds=range(schedule.searches))
    find = functools.partial(pairs.pair, pairs_dir=given.pairs_dir)
    found, made = {}, []
    try:
        for name in given.pairs:
            case = prepare(name, find, schedule, given.data_dir, given.images)
            work = Path(given.work or f"out/dflare_repair/{given.schedule}")
            cells = run(case, schedule, work, about["commit"], show=True)
            found[case.title] = cells
            made += [{**row, "data": case.data} for row in rows(case, cells)]
        save_figure(found, Path(given.figures) / "ratios.png")
    except (OSError, ValueError, difftest.ModelError) as error:
        sys.exit(f"error: {error}")
    merge(Path(given.out), "dflare_repair", TITLE, TEXT, about, made)


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("pairs", list(DEFAULT_PAIRS), "of experiments.pairs")
    flags.DEFINE_string("pairs_dir", None, "folder of the published pairs' files")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_string("images", None, ".npz file whose test images stand for CIFAR-10's")
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    results = ROOT / "experiments" / "results" / "dflare_repair.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", None, "folder for what is done so far")
    flags.DEFINE_string("figures", "out/dflare_repair", "folder of the figures")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
