"""Questions about robust pruning: what of HYDRA does the work, and what pruned networks withstand.

The studies of Sehwag, Wang, Mittal, Jana, "HYDRA: pruning adversarially robust neural networks",
NeurIPS 2020, beside its main tables, each a question (``--questions``): how scores start, how much
data and how many epochs pruning needs, whether to score at all and to divide what is kept among
layers, filters in place of weights, pruning in several steps, robust sub-networks of networks
trained otherwise, and what stronger attacks and 8 bits leave of pruned networks.

``--schedule cpu`` is that of `robust_pruning` (CNN-small, 10,000 training images, 20/5/20 epochs,
three seeds, 1,000 test images), whose trained networks are taken where it has run in the same
folder. On two cores a variant with a seed takes about seven minutes under TRADES, all questions
several nights; later parts go on in the same folder, one run at a time. ``--schedule published``
has the paper's sizes. ``--schedule tiny`` takes minutes on ``--model digits_cnn --data digits``.

``python -m experiments.pruning_questions --questions init,data``
"""

import dataclasses
import functools
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

import nnslicer_jax as nns
from experiments import robust_pruning, robust_pruning_figures
from experiments.provenance import ROOT, origin
from experiments.robust_pruning import (
    SAID,
    Case,
    Ledger,
    Outcome,
    interval,
    made_at,
    merge,
    percent,
    recipe,
    share,
)  # fmt: skip
from prune import evaluate, hydra, lwm, masks, quantize, random_masks, rounds, scratch, snip, stages
from prune.stages import Pruned, Run, Stage

TITLE = "Robust pruning: questions"
TEXT = (
    "Networks trained, pruned and fine-tuned under one objective by variants of a method, all from "
    "the same trained network of a seed. Measures are those of the method table. In per cent; mean "
    "over seeds, with Student's 95 % interval of that mean (none for one seed). Differences are "
    "within a seed, from the variant named first. Sub-networks are of networks trained under the "
    "objective named, chosen by HYDRA under the other, and not fine-tuned. Attacks on networks of "
    "8 bits follow gradients that pass the rounding as if it were none. Fewer images to prune by "
    "make as many fewer updates of the scores, as epochs stay what they are. Two rounds have half "
    "as many epochs each, rounded up. LWM in steps prunes after each epoch of the search. What is "
    "trained from scratch starts from weights drawn anew, under the masks, for as many epochs as "
    "the whole network was trained, and is not fine-tuned. What is lost to 8 bits is lost within "
    "one network; the paper says less than half a point of networks pruned by 99 %."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A variant is a function of this.

    Attributes:
      case: The network and the data.
      objective: Of pruning and fine-tuning.
      keep: Share of the weights, or filters.
      seed: Of everything drawn.
      variables: The trained network.
      run: How to go about it.
    """

    case: Case
    objective: str
    keep: Fraction
    seed: int
    variables: Any
    run: Run

    @property
    def search(self) -> Stage:
        """How scores are trained."""
        return recipe(self.objective, self.case.schedule, self.case.name)[1]

    @property
    def finetune(self) -> Stage:
        """How what is kept is trained."""
        return recipe(self.objective, self.case.schedule, self.case.name)[2]

    def prune(self, method: Callable[..., Pruned], **options: Any) -> Pruned:
        """The network pruned by a method of `prune` and fine-tuned."""
        given = {"finetune": self.finetune, "variables": self.variables, "run": self.run, **options}
        return method(self.case.network.model, self.case.dataset, self.keep, **given)


Variant = Callable[[Cell], Pruned]


def _hydra(cell: Cell, epochs: int | None = None, **options: Any) -> Pruned:
    search = cell.search
    if epochs is not None:
        search = dataclasses.replace(search, epochs=epochs)
    return cell.prune(hydra.prune, search=search, **options)


def _of_some(cell: Cell, part: float) -> Pruned:
    """HYDRA whose scores are trained on a share of the images."""
    whole, network = cell.case.dataset, cell.case.network
    count = len(whole.train_labels)
    drawn = np.random.default_rng((cell.seed, 2)).permutation(count)[: math.ceil(part * count)]
    some = whole._replace(
        train_images=whole.train_images[drawn], train_labels=whole.train_labels[drawn]
    )
    scores = hydra.init_scores(cell.variables["params"])
    found = hydra.learn(
        network, some, cell.search, cell.variables, scores, masks.counts(scores, cell.keep),
        run=cell.run,
    )  # fmt: skip
    return stages.fine_tune(network, whole, cell.finetune, found, run=cell.run)


def _lwm(cell: Cell, **options: Any) -> Pruned:
    return cell.prune(lwm.prune, **options)


def _random(cell: Cell, **options: Any) -> Pruned:
    return cell.prune(random_masks.prune, **options)


def _snip(cell: Cell, **options: Any) -> Pruned:
    return cell.prune(snip.prune, search=cell.search, **options)


def _from_scratch(cell: Cell) -> Pruned:
    """What HYDRA's filters leave, trained anew for as long as the whole network was."""
    scores = hydra.init_scores(cell.variables["params"], unit="filter")
    found = hydra.learn(
        cell.case.network, cell.case.dataset, cell.search, cell.variables, scores,
        masks.counts(scores, cell.keep), run=cell.run,
    )  # fmt: skip
    train = recipe(cell.objective, cell.case.schedule, cell.case.name)[0]
    return scratch.train(
        cell.case.network.model, cell.case.dataset, found.masks, train, run=cell.run
    )


def _in_steps(cell: Cell) -> Pruned:
    """LWM that prunes after each epoch of the search."""
    return cell.prune(lwm.prune, search=cell.search)


def _in_rounds(cell: Cell) -> Pruned:
    """HYDRA in two rounds of half as many epochs each."""
    halves = {
        name: dataclasses.replace(stage, epochs=math.ceil(stage.epochs / 2))
        for name, stage in (("search", cell.search), ("finetune", cell.finetune))
    }
    return cell.prune(rounds.prune, rounds=2, search=halves["search"], finetune=halves["finetune"])


_STRONG = "era at 8/255, far longer"
_LOST = ", lost to 8 bits of "
# Of attacks, in 255ths; eight is what networks are trained against.
STRENGTHS = (2, 4, 8, 12, 16)


def judge_after(case: Case, objective: str, found: Pruned, seed: int) -> Outcome:
    """Measures what attacks of several strengths, and 8 bits, leave of a network."""
    network, schedule = case.network, case.schedule
    some = case.dataset.train_images[:256].astype(np.float32) / 255
    weights = quantize.quantize(network.graph, found.variables)
    everything = quantize.quantize(network.graph, found.variables, some)
    forms: dict[str, tuple[Callable, Any, Sequence[int]]] = {
        "": (network.predict, found.variables, STRENGTHS),
        ", weights in 8 bits": (network.predict, weights.params(), (8,)),
        ", activations too": (
            functools.partial(_edited, network.graph, everything.edits()), everything.params(), (8,)
        ),
    }  # fmt: skip
    measured: dict[str, float] = {}
    for form, (apply, variables, strengths) in forms.items():
        given = (apply, variables, case.tests, case.labels)
        measured[f"benign accuracy{form}"] = evaluate.benign(*given).accuracy
        for strength in strengths:
            attacked = evaluate.era(
                jax.random.key(seed), *given, eps=strength / 255, steps=schedule.steps,
                restarts=schedule.restarts,
            )  # fmt: skip
            measured[f"era at {strength}/255{form}"] = attacked.accuracy
    for form, said in ((", weights in 8 bits", "weights"), (", activations too", "everything")):
        for name in ("benign accuracy", "era at 8/255"):
            measured[f"{name}{_LOST}{said}"] = measured[name] - measured[f"{name}{form}"]
    count, steps, restarts = schedule.strong
    attacked = evaluate.era(
        jax.random.key(seed), network.predict, found.variables, case.tests[:count],
        case.labels[:count], eps=8 / 255, steps=steps, restarts=restarts,
    )  # fmt: skip
    measured[_STRONG] = attacked.accuracy
    return Outcome(measured, [])


def _edited(graph: nns.Graph, edits: Any, variables: Any, x: jax.Array) -> jax.Array:
    return nns.evaluate(graph, variables, x, edits)[0]


def _sought(cell: Cell) -> Pruned:
    """Some of a network's weights, chosen by HYDRA and not fine-tuned."""
    scores = hydra.init_scores(cell.variables["params"])
    return hydra.learn(
        cell.case.network, cell.case.dataset, cell.search, cell.variables, scores,
        masks.counts(scores, cell.keep), run=cell.run,
    )  # fmt: skip


class Question(NamedTuple):
    """A question, answered by variants.

    Attributes:
      said: In a few words.
      variants: By name; differences are from the first.
      ratio: The share pruned where it is the question's own; None: those asked for.
      objectives: Of pruning, where they are the question's own; None: those asked for.
      trained: Variant to the objective that its network was trained under, where that is another.
      judge: What is measured.
    """

    said: str
    variants: Mapping[str, Variant]
    ratio: float | None = None
    objectives: tuple[str, ...] | None = None
    trained: Mapping[str, str] = {}
    judge: Callable[[Case, str, Pruned, int], Outcome] = robust_pruning.judge


HIDDEN, AFTER = "hidden", "after"
_TRAINED = {f"of {name} training": name for name in ("natural", "trades", "smoothing")}

QUESTIONS: Mapping[str, Question] = {
    "init": Question(
        "first scores",
        {"scaled": _hydra}
        | {init: functools.partial(_hydra, init=init) for init in ("random", "kaiming", "xavier")},
    ),
    "data": Question(
        "images to prune by",
        {"all": _hydra}
        | {f"{part:.0%}": functools.partial(_of_some, part=part) for part in (0.5, 0.1, 0.01)},
    ),
    "epochs": Question(
        "epochs of pruning",
        {"as planned": _hydra}
        | {str(epochs): functools.partial(_hydra, epochs=epochs) for epochs in (1, 2, 10, 20)},
    ),
    "scores": Question(
        "scores and scope",
        {
            "LWM": _lwm,
            "HYDRA": _hydra,
            "SNIP": _snip,
            "random": _random,
            "LWM, global": functools.partial(_lwm, scope="global"),
            "HYDRA, global": functools.partial(_hydra, scope="global"),
            "SNIP, global": functools.partial(_snip, scope="global"),
        },
    ),
    "filters": Question(
        "filters",
        {
            "LWM": functools.partial(_lwm, unit="filter"),
            "HYDRA": functools.partial(_hydra, unit="filter"),
            "random": functools.partial(_random, unit="filter"),
            "HYDRA's from scratch": _from_scratch,
        },
        ratio=0.5,
    ),
    HIDDEN: Question(
        "sub-networks",
        dict.fromkeys(_TRAINED, _sought),
        ratio=0.5,
        objectives=("trades", "smoothing"),
        trained=_TRAINED,
    ),
    AFTER: Question("afterwards", {"LWM": _lwm, "HYDRA": _hydra}, judge=judge_after),
    "steps": Question(
        "steps",
        {
            "LWM": _lwm,
            "LWM in steps": _in_steps,
            "HYDRA": _hydra,
            "HYDRA in two rounds": _in_rounds,
        },
    ),
}  # fmt: skip
# What a folder is not named with.
_PLAIN = re.compile("[^a-z0-9]+", re.IGNORECASE)
# Cells that are those of `robust_pruning`, by its names.
_SHARED: Mapping[Variant, str] = {
    _hydra: "hydra", _in_steps: "lwm_steps", _lwm: "lwm", _random: "random",
}  # fmt: skip
# Question, objective, variant, measure: of VGG-16 on CIFAR-10, in per cent.
_PUBLISHED = {
    ("filters", "trades", "LWM", "era"): 34.7,
    ("filters", "trades", "HYDRA", "era"): 38.0,
    (HIDDEN, "trades", "of natural training", "era"): 43.5,
    (HIDDEN, "smoothing", "of trades training", "vra_s"): 63.6,
    (HIDDEN, "smoothing", "of smoothing training", "vra_s"): 60.7,
}


# All cells ------------------------------------------------------------------------------------


class Key(NamedTuple):
    """Names a variant: its question, the objective, itself, and the share pruned."""

    question: str
    objective: str
    variant: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Part:
    """Which cells are run.

    Attributes:
      questions: Of `QUESTIONS`.
      objectives: Of `robust_pruning.MEASURES`; "after" is of those with an eps of 8/255 alone.
      ratios: Shares that are pruned, 0 to below 1.
      seeds: Of everything drawn.
    """

    questions: tuple[str, ...] = ("init", "data", "filters")
    objectives: tuple[str, ...] = ("trades",)
    ratios: tuple[float, ...] = (0.99,)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for one in self.questions:
            if one not in QUESTIONS:
                raise ValueError(f"questions must be among {', '.join(QUESTIONS)}, not {one}")
        if len(set(self.questions)) < max(1, len(self.questions)):
            raise ValueError("questions must be different, and at least one")
        robust_pruning.Part(objectives=self.objectives, ratios=self.ratios, seeds=self.seeds)
        unfit = [one for one in self.objectives if robust_pruning.EPS.get(one) != 8 / 255]
        if AFTER in self.questions and unfit:
            raise ValueError(f"objectives must have an eps of 8/255 for {AFTER}, not {unfit[0]}")

    @property
    def keys(self) -> list[Key]:
        """The variants, in order; of each question the one that others are compared with first."""
        found = []
        for name in self.questions:
            question = QUESTIONS[name]
            for objective in question.objectives or self.objectives:
                for ratio in self.ratios if question.ratio is None else (question.ratio,):
                    found += [Key(name, objective, one, ratio) for one in question.variants]
        return found


Found = dict[Key, list[Outcome]]  # One a seed.


def run(case: Case, part: Part, work: Path, show: bool = False) -> Found:
    """Runs cells, going on where an earlier run, or one of `robust_pruning`, stopped.

    Args:
      case: From `robust_pruning.prepare`.
      part: Which cells.
      work: Folder for what is done so far; not to be used by two runs at once.
      show: Write progress lines to standard error.

    Raises:
      ValueError: For a folder of another run, or an eps that a question has no attacks for.
      FloatingPointError: Loss or weights stopped being finite.
    """
    eps = case.schedule.eps
    if AFTER in part.questions and eps is not None and not math.isclose(eps, 8 / 255):
        raise ValueError(f"eps must be 8/255 for {AFTER}, not {eps:g}")
    robust_pruning.claim(case, work)
    ledger = Ledger(work / "done.json")
    found: Found = {}
    for seed in part.seeds:

        @functools.cache
        def dense(objective: str, seed: int = seed) -> Any:
            return robust_pruning.trained(case, objective, seed, work, show)

        for key in part.keys:
            name = _named(key)
            root = robust_pruning.folder_of(work, key.objective, seed)
            place = root / _PLAIN.sub("_", name) / f"{key.ratio:g}"

            def of_cell(
                dense: Callable[[str], Any] = dense, key: Key = key, place: Path = place,
                seed: int = seed,
            ) -> Outcome:  # fmt: skip
                question, how = QUESTIONS[key.question], Run(seed=seed, folder=place, show=show)
                variables = dense(question.trained.get(key.variant, key.objective))
                cell = Cell(case, key.objective, share(key.ratio), seed, variables, how)
                made = question.variants[key.variant](cell)
                return question.judge(case, key.objective, made, seed)

            outcome = ledger.part(f"{key.objective}/{seed}/{name}/{key.ratio:g}", of_cell)
            # The ledger has it; checkpoints of many cells would fill a disk.
            shutil.rmtree(place, ignore_errors=True)
            found.setdefault(key, []).append(outcome)
            if show:
                said = ", ".join(f"{k} {v:.1%}" for k, v in outcome.measured.items())
                print(f"{_row(key)}, seed {seed}: {said}", file=sys.stderr, flush=True)
    return found


def _named(key: Key) -> str:
    """What the ledger calls a variant."""
    question = QUESTIONS[key.question]
    own = f"{key.question}: {key.variant}"
    if question.judge is not robust_pruning.judge:
        return own
    return _SHARED.get(question.variants[key.variant], own)


# Results --------------------------------------------------------------------------------------


def _row(key: Key) -> str:
    said = QUESTIONS[key.question].said
    return f"{key.objective}, {said}, {percent(key.ratio)} pruned: {key.variant}"


def rows(case: Case, found: Found) -> list[dict[str, Any]]:
    """Fields of the results' rows: every variant, then its differences from the first one."""
    known = _PUBLISHED if (case.name, case.dataset.name) == ("vgg16", "cifar10") else {}
    made: list[dict[str, Any]] = []
    for key, outcomes in found.items():
        for measure in outcomes[0].measured:
            mean, half = interval([outcome.measured[measure] for outcome in outcomes])
            made.append({
                "row": _row(key), "metric": SAID.get(measure, measure), "ours": mean,
                "spread": half, "unit": "points" if _LOST in measure else "%", "n": len(outcomes),
                **made_at(_note(case, key, measure), outcomes),
                "published": known.get((*key[:3], measure)),
            })  # fmt: skip
    for key, outcomes in found.items():
        first = next(k for k in found if (*k[:2], k.ratio) == (*key[:2], key.ratio))
        if key == first:
            continue
        for measure in outcomes[0].measured:
            apart = [
                a.measured[measure] - b.measured[measure]
                for a, b in zip(outcomes, found[first], strict=True)
            ]
            mean, half = interval(apart)
            made.append({
                "row": f"{_row(key)} - {first.variant}", "metric": SAID.get(measure, measure),
                "ours": mean, "spread": half, "unit": "points", "n": len(apart),
                **made_at(_note(case, key, measure), outcomes + found[first]),
            })  # fmt: skip
    return made


def _note(case: Case, key: Key, measure: str) -> str:
    if measure == _STRONG:
        count, steps, restarts = case.schedule.strong
        return f"{count:,} test images, PGD-{steps:,}, {restarts} restarts"
    if measure in SAID:
        method = _SHARED.get(QUESTIONS[key.question].variants[key.variant], "")
        return robust_pruning.note(case, key.objective, measure, method)
    attack = f", PGD-{case.schedule.steps}, {case.schedule.restarts} restarts"
    return f"{len(case.labels):,} test images{attack if measure.startswith('era') else ''}"


def save_figures(found: Found, folder: Path) -> list[Path]:
    """Draws one picture of each question under each objective at each ratio, and the strengths."""
    paths = []
    for head in dict.fromkeys((key.question, key.objective, key.ratio) for key in found):
        question, objective, ratio = head
        some = {
            key.variant: outcomes for key, outcomes in found.items()
            if (key.question, key.objective, key.ratio) == head
        }  # fmt: skip
        title = f"{QUESTIONS[question].said}, {objective}, {percent(ratio)} pruned".capitalize()
        paths.append(folder / f"{question}_{objective}_{100 * ratio:g}.png")
        if question == AFTER:
            curves = {
                variant: {
                    eps: [o.measured[f"era at {eps}/255"] for o in outcomes] for eps in STRENGTHS
                }
                for variant, outcomes in some.items()
            }
            robust_pruning_figures.strengths(curves, title, paths[-1])
            continue
        measures = {
            SAID[measure]: {v: [o.measured[measure] for o in some[v]] for v in some}
            for measure in next(iter(some.values()))[0].measured
        }
        robust_pruning_figures.variants(measures, title, paths[-1])
    return paths


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        part = Part(
            tuple(given.questions), tuple(given.objectives), tuple(map(float, given.ratios)),
            tuple(map(int, given.seeds)),
        )  # fmt: skip
        # Of the code that ran, should it change on the way.
        about = origin(data="", seeds=part.seeds)
        case = robust_pruning.prepare(
            given.model, given.data, given.data_dir,
            dataclasses.replace(robust_pruning.SCHEDULES[given.schedule], eps=given.eps),
            about["commit"],
        )  # fmt: skip
        place = robust_pruning.work_of(given.model, given.data, given.schedule, given.eps)
        work = Path(given.work or place)
        found = run(case, part, work, show=True)
        save_figures(found, Path(given.figures))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    about["data"] = robust_pruning.described(case)
    merge(Path(given.out), "pruning_questions", TITLE, TEXT, about, rows(case, found))


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    part, schedules = Part(), sorted(robust_pruning.SCHEDULES)
    flags.DEFINE_string("model", "cnn_small", "network")
    flags.DEFINE_string("data", "cifar10", "data set")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_enum("schedule", "cpu", schedules, "how much is run")
    flags.DEFINE_float("eps", None, "half the width of the box; each objective's unless set", 0, 1)
    flags.DEFINE_list("questions", list(part.questions), f"of {', '.join(QUESTIONS)}")
    flags.DEFINE_list("objectives", ["trades"], f"of {', '.join(robust_pruning.MEASURES)}")
    flags.DEFINE_list("ratios", ["0.99"], "shares of the weights that are pruned")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "of everything drawn")
    results = ROOT / "experiments" / "results" / "pruning_questions.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", None, "folder for what is done so far; robust_pruning's unless set")
    flags.DEFINE_string("figures", "out/pruning_questions", "folder of the figures")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
