"""What NNSlicer's paper names as open: five questions about slices, each with a small answer.

Zhang et al., ESEC/FSE 2020, name as open: slices from a hidden neuron (`neuron`), slices composed
into a model (`composed`), masking the neurons that deviate to repair a wrong prediction
(`repair`), static and conditioned slices beside the dynamic ones (`static`), recurrent and
graph-convolution networks (`networks`). The paper gives no figures for them.

``python -m experiments.slice_questions --schedule cpu`` takes about 15 minutes on two cores with
ResNet-10 on CIFAR-10; ``--schedule published`` takes data sets and class subsets of the sizes the
paper's other studies use. ``--model digits_cnn`` needs no files. A run that is killed goes on with
the first question it has no answer to.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from matplotlib.figure import Figure

from experiments import record
from experiments.page import COLOURS, MARKERS
from experiments.provenance import ROOT, origin
from experiments.slice_questions_case import SCHEDULES, Case, Curve, Finding, Sizes, prepare
from experiments.slice_questions_composed import composed
from experiments.slice_questions_networks import networks
from experiments.slice_questions_neuron import neuron
from experiments.slice_questions_repair import repair
from experiments.slice_questions_static import static
from nnslicer_jax.atomic import replacing

QUESTIONS: dict[str, Callable[[Case], Finding]] = {
    "neuron": neuron,
    "composed": composed,
    "repair": repair,
    "static": static,
    "networks": networks,
}

TITLE = "Open questions about slices"
TEXT = (
    "NNSlicer's paper names these as open and gives no figures. The spread is the 95 % interval "
    "of the mean, 1.96 standard errors over the n images, channels, sets of classes, pairs of "
    "slices or draws; pairs that share a slice are not independent, which makes theirs too "
    "narrow. Pairs of images are drawn, at most four for each image. Agreement is the share of "
    "test images on which the network cut down to a slice, the rest held at its mean, predicts "
    "what the whole one does."
)


def run(
    questions: Sequence[str], sizes: Sizes, *, model: str, seed: int, folder: Path,
    figures: Path, revision: str, data_dir: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers questions, going on where an earlier run of the same code and options stopped.

    Args:
      questions: Some of `QUESTIONS`.
      sizes: How much to do.
      model: Name of a network of the zoo.
      seed: Of every draw and of the networks trained here.
      folder: Where answers are kept, one file each.
      figures: Where pictures go, one for each question.
      revision: That of the code which runs.
      data_dir: Folder searched first for the data set.

    Returns:
      Fields of the rows, the data in words among them.

    Raises:
      ValueError: For an unknown question or network.
    """
    unknown = sorted(set(questions) - set(QUESTIONS))
    if unknown:
        raise ValueError(f"questions: {unknown[0]!r} is not in {', '.join(QUESTIONS)}")
    start = time.monotonic()
    case = prepare(model, sizes, seed, data_dir)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(questions, 1):
        mark = _fingerprint(case, name, revision)
        path = folder / f"{model}_{name}.json"
        found = _load(path, mark)
        state = "kept"
        if found is None:
            found, state = QUESTIONS[name](case), "answered"
            record.write_text(path, json.dumps({"mark": mark, "finding": found._asdict()}))
        with replacing(figures / f"slice_questions_{model}_{name}.png") as partial:
            drawing(found).savefig(partial, format="png", dpi=160)
        rows += [{"data": case.data, **row} for row in found.rows]
        seconds = time.monotonic() - start
        print(f"{number}/{len(questions)} {name} {state}, {seconds:.0f} s", file=sys.stderr)
    return rows


def _fingerprint(case: Case, question: str, revision: str) -> str:
    options = [
        revision,
        question,
        case.name,
        case.weights,
        case.seed,
        case.theta,
        case.data,
        case.digest,
    ]
    text = json.dumps([*options, dataclasses.asdict(case.sizes)])
    return hashlib.sha256(text.encode()).hexdigest()


def _load(path: Path, mark: str) -> Finding | None:
    """The answer kept at `path`, if it is that of the same options."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        if kept["mark"] != mark:
            return None
        found = Finding(**kept["finding"])
    except (ValueError, KeyError, TypeError):
        return None
    return found._replace(curves=[Curve(*line) for line in found.curves])


def drawing(found: Finding) -> Figure:
    """The figure of one answer: its curves with their 95 % intervals."""
    drawn = Figure(figsize=(6.4, 4.8), layout="constrained")
    ax = drawn.subplots()
    # Side by side, whatever the steps between them.
    places = sorted({x for line in found.curves for x in line.x})
    for number, line in enumerate(found.curves):
        x = [places.index(place) for place in line.x]
        ax.errorbar(
            x, line.y, yerr=line.spread, label=line.label, capsize=2,
            color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if number < len(COLOURS) else "--",
        )  # fmt: skip
    ax.set_xticks(range(len(places)), [f"{x:g}" for x in places])
    ax.set(xlabel=found.axes[0], ylabel=found.axes[1])
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return drawn


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    options = flags.FLAGS
    # Before the run: the clone may change while it lasts.
    about = origin(data=options.model, seeds=[options.seed])
    try:
        rows = run(
            options.questions,
            SCHEDULES[options.schedule],
            model=options.model,
            seed=options.seed,
            folder=Path(options.folder),
            figures=Path(options.figures),
            revision=about["commit"],
            data_dir=options.data_dir,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    made = [record.Row(study="slice_questions", **(about | row)) for row in rows]
    for row in made:
        spread = "" if row.spread is None else f" ± {row.spread:.1f}"
        shown = "undefined" if row.ours is None else f"{row.ours:.1f}{spread} {row.unit}"
        print(f"{row.row} | {row.metric}: {shown} {row.note}".rstrip())
    if options.out:
        path = Path(options.out)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=tuple(made)))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much to do")
    flags.DEFINE_list("questions", list(QUESTIONS), "questions to answer")
    flags.DEFINE_string("model", "resnet10_cifar10", "network of the zoo")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_integer("seed", 0, "of every draw", lower_bound=0)
    flags.DEFINE_string("folder", "out/slice_questions", "where answers are kept to go on from")
    flags.DEFINE_string("figures", "out/figures", "where pictures go")
    results = ROOT / "experiments" / "results" / "slice_questions.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
