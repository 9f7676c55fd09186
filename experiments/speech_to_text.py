"""Differential testing of speech to text: table 9.

Tian et al., TOSEM 2023, section 6.1, with DeepSpeech and Librispeech; here a small recogniser of
spoken digits strung into sentences, trained on all speakers but those held out (by default the last
by name) and quantized to 8 bits. Held-out speakers' sentences are what searches start from.

``--schedule cpu``: 1,200 steps of training, 50 sentences and one random seed for both searches, at
most 500 queries each. ``--schedule published``: 500 sentences, five random seeds,
180 seconds each. ``--schedule tiny`` is for tests. A killed run goes on where it
stopped, in the same ``--work``, which keeps the triggers too.

``python -m experiments.speech_to_text --data_dir ...``
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import nnslicer_jax as nns
from difftest.pair import ModelError
from difftest.speech import genetic, recogniser, recordings, search, training, transcripts
from difftest.speech.recogniser import Recogniser, SpeechPair
from difftest.speech.recordings import Sentences
from difftest.speech.replay import replay
from difftest.speech.result import SpeechResult
from experiments.provenance import ROOT, origin
from experiments.robust_pruning import write
from nnslicer_jax.checkpoint import claim, digest
from prune import quantize

TITLE = "Speech to text: audio on which a recogniser of 8 bits hears other words"
TEXT = (
    "Tian et al., TOSEM 2023, table 9. A recogniser of spoken digits (convolutions, CTC) is "
    "trained on sentences of all speakers but those held out; weights and activations are then "
    "rounded to 8 bits. From sentences of the held-out speakers DFlare and a genetic search "
    "(DiffChaser) stretch time, shift pitch and time and change the volume until the two "
    "transcripts differ. "
    "Word error rate: words replaced, left out or put in, of those said. The published figures are "
    "DeepSpeech's, versions 0.9.3 and 0.8.2, whose sentences are longer and whose models are "
    "slower; how the searches were carried over to audio is not published in detail."
)
# Success in per cent, seconds, queries, of version 0.9.3.
PUBLISHED = {"DFlare": (100.0, 5.740, 8.42), "DiffChaser": (95.6, 169.365, 223.04)}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      training: How the recogniser is trained.
      width: Of the recogniser.
      heard: Sentences that word error rates are of.
      calibration: Sentences of the training speakers that ranges of activations are taken from.
      seeds: Sentences of DFlare and of DiffChaser, and random seeds.
      max_queries: Of one sentence.
      timeout: Seconds of one sentence.
    """

    training: training.Options
    width: int
    heard: int
    calibration: int
    seeds: tuple[int, int, int]
    max_queries: int
    timeout: float = 180.0


SCHEDULES = {
    "cpu": Schedule(training.Options(), 128, 300, 64, (50, 50, 1), 500),
    "published": Schedule(training.Options(steps=3000), 128, 1000, 256, (500, 500, 5), 1_000_000),
    "tiny": Schedule(
        training.Options(steps=6, batch_size=4, size=6400), 16, 6, 4, (3, 2, 1), 10
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A pair, and the sentences of held-out speakers.

    Attributes:
      pair: The recogniser and its twin.
      heard: Sentences for the word error rate.
      seeds: By random seed, sentences that searches start from.
      held_out: The speakers.
      weights: SHA-256 of the recogniser's.
    """

    pair: SpeechPair
    heard: Sentences
    seeds: list[Sentences]
    held_out: list[str]
    weights: str


def prepare(
    spoken: Sequence[recordings.Recording], held_out: Sequence[str], schedule: Schedule,
    work: Path, show: bool = False,
) -> Case:  # fmt: skip
    """Trains and quantizes the recogniser, and draws sentences.

    Args:
      spoken: All recordings.
      held_out: Speakers left out of the training; none: the last by name.
      schedule: How much.
      work: For checkpoints.
      show: Progress on standard error.

    Raises:
      ValueError: A speaker is unknown, or nobody is left to train on.
    """
    names = recordings.speakers(spoken)
    chosen = list(held_out) or names[-1:]
    for name in chosen:
        if name not in names:
            raise ValueError(f"held_out: {name!r} is unknown; known are {', '.join(names)}")
    learn = [one for one in spoken if one.speaker not in chosen]
    test = [one for one in spoken if one.speaker in chosen]
    network = Recogniser(symbols=len(recordings.WORDS) + 1, width=schedule.width)
    folder = work / "training"
    variables = training.train(network, learn, schedule.training, folder=folder, show=show)
    size = schedule.training.size

    def sentences(seed: int, of: Sequence[recordings.Recording], count: int) -> Sentences:
        return recordings.strung(np.random.default_rng((1, seed)), of, count, size)

    known = sentences(0, learn, schedule.calibration)
    case = Case(
        quantized(network, variables, known),
        sentences(1, test, schedule.heard),
        [sentences(2 + seed, test, schedule.seeds[0]) for seed in range(schedule.seeds[2])],
        chosen,
        digest(variables),
    )
    return case


def quantized(network: Recogniser, variables: Any, known: Sentences) -> SpeechPair:
    """The recogniser and its twin of 8 bits; ranges of activations are those of some sentences."""
    x = recogniser.inputs(jnp.asarray(known.audio), jnp.asarray(known.lengths))

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        # As many rows as outputs: what the quantizer takes for classes.
        found: Any = network.apply(variables, x)
        return found.reshape(x.shape[0], -1)

    graph = nns.trace(apply, variables, x[:1])
    small = quantize.quantize(graph, variables, x, batch_size=16)
    params, edits = small.params(), small.edits()
    symbols = network.symbols

    def rounded(x: jax.Array) -> jax.Array:
        found = nns.evaluate(graph, params, x, edits)[0]
        return found.reshape(x.shape[0], -1, symbols)

    def whole(x: jax.Array) -> jax.Array:
        found: Any = network.apply(variables, x)
        return found

    return SpeechPair(recogniser.model(whole), recogniser.model(rounded))


def error_rates(case: Case) -> tuple[float, float]:
    """Word error rates of the recogniser and of its twin on held-out speakers, in per cent."""
    rates = []
    for model in case.pair:
        heard = np.concatenate([
            np.asarray(transcripts.greedy(model(case.heard.audio[at : at + 32],
                                                case.heard.lengths[at : at + 32])))
            for at in range(0, len(case.heard.audio), 32)
        ])  # fmt: skip
        rates.append(100 * transcripts.word_error_rate(case.heard.words.tolist(), heard.tolist()))
    return rates[0], rates[1]


def searches(case: Case, schedule: Schedule, folder: Path) -> dict[str, list[SpeechResult]]:
    """What both searches find from each random seed's sentences, read again where it is saved.

    Args:
      case: The pair and its sentences.
      schedule: How much.
      folder: Gets one file for each search and random seed.

    Raises:
      ValueError: The folder holds other searches, or a saved trigger is none when asked anew.
    """
    limits: dict[str, Any] = {"max_queries": schedule.max_queries, "timeout": schedule.timeout}
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, {**limits, "sentences": digest(case.seeds), "weights": case.weights,
                   "few": schedule.seeds[1]})  # fmt: skip
    found: dict[str, list[SpeechResult]] = {"DFlare": [], "DiffChaser": []}
    for seed, one in enumerate(case.seeds):
        key = jax.random.key(seed)
        few = schedule.seeds[1]
        for name, run, some in (
            ("DFlare", search.search, one),
            ("DiffChaser", genetic.diffchase, Sentences(*(each[:few] for each in one))),
        ):
            path = folder / f"{name.lower()}_{seed}.npz"
            if not path.is_file() or "waiting" in SpeechResult.load(path).status:
                # What compiles is not the searches' time: every size that a batch shrinks to.
                for size in (1, 2, 4, 8, 16, 32):
                    rows = np.resize(np.arange(len(one.audio)), size)
                    search.ask(case.pair, one.audio[rows], one.lengths[rows])
                run(case.pair, some.audio, some.lengths, key, max_queries=1)
                run(case.pair, some.audio, some.lengths, key, checkpoint=path, **limits)
            result = SpeechResult.load(path)
            _confirm(case.pair, some, key, result, path)
            found[name].append(result)
    return found


def _confirm(
    pair: SpeechPair, seeds: Sentences, key: jax.Array, result: SpeechResult, path: Path
) -> None:
    """Raises ValueError unless chains make the saved triggers again, and they still trigger."""
    good = search.confirm(pair, result)
    # The genetic search's are asked about alone: making them again is searching again.
    if result.variant != "diffchaser":
        audio, lengths = replay(result, seeds.audio, seeds.lengths, key=key)
        same = (audio == result.audio).all(axis=1) & (lengths == result.lengths)
        # Its files of earlier versions have no chains.
        good &= same | np.array([not chain for chain in result.chains])
    if bad := int((result.success & ~good).sum()):
        raise ValueError(f"{path}: {bad} of {int(result.success.sum())} triggers are not confirmed")


def rows(
    case: Case, rates: tuple[float, float], found: dict[str, list[SpeechResult]]
) -> list[dict[str, Any]]:
    """Fields of the results' rows."""
    held = f"held out: {', '.join(case.held_out)}"
    made: list[dict[str, Any]] = [
        {"row": name, "metric": "word error rate", "unit": "%", "ours": round(rate, 2),
         "n": int((case.heard.words >= 0).sum()), "note": held}
        for name, rate in zip(("recogniser", "8 bits"), rates, strict=True)
    ]  # fmt: skip
    for name, results in found.items():
        searched = [one.status != "disagrees" for one in results]
        count = sum(int(one.sum()) for one in searched)
        already = sum(int((~one).sum()) for one in searched)
        triggers = sum(int(one.success.sum()) for one in results)
        values: dict[str, list[float]] = {"success": [], "seconds": [], "queries": []}
        for result, valid in zip(results, searched, strict=True):
            good = result.success
            values["success"].append(100 * float(good.sum()) / max(1, int(valid.sum())))
            if good.any():
                values["seconds"].append(float(result.seconds[good].mean()))
                values["queries"].append(float(result.queries[good].mean()))
        for (metric, unit), published in zip(
            (("success", "%"), ("seconds", "s"), ("queries", "")), PUBLISHED[name], strict=True
        ):
            if values[metric]:
                one = values[metric]
                made.append({
                    "row": name, "unit": unit, "published": published, 
                    "n": count if metric == "success" else triggers,
                    "metric": "success rate" if metric == "success" else f"mean {metric}",
                    "ours": round(float(np.mean(one)), 3),
                    "spread": round(float(np.std(one, ddof=1)), 3) if len(one) > 1 else None,
                    "note": f"{already} more sentences already differed"
                    if metric == "success" and already else "",
                })  # fmt: skip
        queries = [result.queries[result.success] for result in results]
        if any(len(one) for one in queries):
            made.append({"row": name, "metric": "median queries", "n": triggers,
                         "ours": float(np.median(np.concatenate(queries)))})  # fmt: skip
    return made


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    schedule = SCHEDULES[given.schedule]
    about = origin(data="spoken digits, sentences of 3 to 5", seeds=range(schedule.seeds[2]))
    work = Path(given.work or f"out/speech_to_text/{given.schedule}")
    try:
        spoken = recordings.load(given.data_dir)
        case = prepare(spoken, given.held_out, schedule, work, show=True)
        rates = error_rates(case)
        print(f"word error rates: {rates[0]:.1f} %, 8 bits {rates[1]:.1f} %", file=sys.stderr)
        found = searches(case, schedule, work / "searches")
    except (OSError, ValueError, FloatingPointError, ModelError) as error:
        sys.exit(f"error: {error}")
    write(Path(given.out), "speech_to_text", TITLE, TEXT, about, rows(case, rates, found))


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("data_dir", None, "folder searched first for the recordings")
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    flags.DEFINE_list("held_out", [], "speakers left out of the training; the last by name if none")
    results = ROOT / "experiments" / "results" / "speech_to_text.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", None, "folder for checkpoints")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
