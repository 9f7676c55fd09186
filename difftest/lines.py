"""The variant "best": from each seed towards seeds of another class, to where a model changes.

Somewhere on the line between two images of different classes either model leaves the first
class, and the pair disagrees in between. Each query is placed in the middle of the two crossings
as a secant through the margins of the points already asked puts them; ends that stay are
weighted down by half as in the Illinois method. The margin is the log-odds of the seed's class.
A line whose two crossings fall into one 8-bit image is given up for the next nearest seed.
Only probabilities are asked for, and the ends of the lines are known from the start.
"""

from typing import Any

import numpy as np

from difftest.ask import ask
from difftest.clock import Clock, shares
from difftest.pair import ModelPair
from difftest.result import SearchResult, distance, finish
from difftest.walk import Rules

_TARGETS = 64
_CANDIDATES = 1000
# Finer than one grey level over the longest line; 8-bit models answer in steps of 1 / 256.
_LEAST = 1e-7


class _Line:
    """Where one seed's search stands: a bracket on the line to the present target.

    Attributes:
        targets: places of the seeds not tried yet, nearest first.
        target: the present one.
        ends: how far the bracket's ends lie, 0..1; inside the seed's class, and outside.
        margins: ``[2, 2]``, of both models (columns) at both ends.
        kept: which end the last query left in place; -1: none yet.
    """

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets
        self.target = -1
        self.ends = [0.0, 1.0]
        self.margins = np.zeros((2, 2))
        self.kept = -1


def run(
    pair: ModelPair,
    seeds: np.ndarray,
    rules: Rules,
    rows: SearchResult,
    answers: np.ndarray,
    *,
    max_queries: int,
    timeout: float,
    batch_size: int,
    save: Any,
) -> None:
    """Searches the waiting seeds; those whose lines are used up stay waiting.

    Args:
        pair: the models.
        seeds: uint8 ``[N, H, W, C]``.
        rules: ``keep_label`` and ``max_l2`` are read.
        rows: filled in place; the labels of the seeds are there already.
        answers: ``[2, N, K]``, what the two models gave for the seeds.
        max_queries: a seed.
        timeout: seconds of a seed's share.
        batch_size: seeds at a time.
        save: called after every step with whether it finished rows.
    """
    classes = answers.shape[2]
    waiting = np.flatnonzero(rows.status == "waiting").tolist()
    active: dict[int, _Line] = {}
    clock = Clock()
    while waiting or active:
        clock.start()
        while waiting and len(active) < batch_size:
            place = waiting.pop(0)
            active[place] = _Line(_nearest(seeds, answers, place))
            if not _next_target(active[place], answers, place):
                del active[place]
        asked: dict[int, tuple[np.ndarray, float]] = {}
        for place in list(active):
            proposal = _propose(active[place], seeds, answers, place, rules)
            if proposal is None:
                del active[place]
            else:
                asked[place] = proposal
        if not asked:
            continue
        places = np.array(list(asked))
        images = np.stack([image for image, _ in asked.values()])
        original, compressed, errors = ask(pair, images, classes)
        rows.queries[places] += 1
        failed = np.array([error is not None for error in errors])
        # Models of JAX functions fill their batches up to powers of two.
        took = clock.seconds((len(places) - 1).bit_length())
        rows.seconds[places] += shares(took, failed)
        labels = rows.seed_labels[places]
        found = original.argmax(axis=1) != compressed.argmax(axis=1)
        if rules.keep_label:
            found &= original.argmax(axis=1) == labels
        found &= ~failed
        for place in places[found].tolist():
            rows.chains[place] = (("line", active[place].target, asked[place][1]),)
        finish(rows, seeds, places[found], images[found], (original[found], compressed[found]))
        before = len(active)
        for slot, place in enumerate(places.tolist()):
            line, (_, far) = active[place], asked[place]
            spent = rows.queries[place] >= max_queries or rows.seconds[place] >= timeout
            if failed[slot]:
                rows.errors[place], rows.status[place] = errors[slot], "error"
            elif not found[slot] and spent:
                rows.status[place] = "budget"
            elif not found[slot]:
                _narrow(line, far, [original[slot], compressed[slot]], rows.seed_labels[place])
                continue
            del active[place]
        save(len(active) < before)


def at(seed: np.ndarray, target: np.ndarray, far: float) -> np.ndarray:
    """The uint8 image a part ``far`` (0..1) of the way from the seed to the target."""
    return np.rint(seed + far * (target.astype(np.float64) - seed)).astype(np.uint8)


def _nearest(seeds: np.ndarray, answers: np.ndarray, place: int) -> list[int]:
    """Places of seeds that both models give one other label, nearest first, of some."""
    labels, twins = answers.argmax(axis=2)
    # A seed that a model failed on has no probabilities.
    agreed = (labels == twins) & answers[0].any(axis=1)
    others = np.flatnonzero(agreed & (labels != labels[place]))
    if len(others) > _CANDIDATES:
        # Those behind the seed, around the end: distances to all would cost the square of N.
        others = np.roll(others, -np.searchsorted(others, place))[:_CANDIDATES]
    near = distance(seeds[others], seeds[place][None])
    return others[np.argsort(near, kind="stable")[:_TARGETS]].tolist()


def _margin(outputs: np.ndarray, label: int) -> float:
    """Log-odds of the label against the strongest other class."""
    own = max(float(outputs[label]), _LEAST)
    other = max(float(np.delete(outputs, label).max()), _LEAST)
    # Rounded, so that the company of an image in its batch does not move the next query.
    return round(float(np.log(own / other)), 3)


def _next_target(line: _Line, answers: np.ndarray, place: int) -> bool:
    if not line.targets:
        return False
    line.target = line.targets.pop(0)
    label = answers[0, place].argmax()
    line.ends, line.kept = [0.0, 1.0], -1
    line.margins = np.array(
        [[_margin(each[end], label) for each in answers] for end in (place, line.target)]
    )
    return True


def _propose(
    line: _Line, seeds: np.ndarray, answers: np.ndarray, place: int, rules: Rules
) -> tuple[np.ndarray, float] | None:
    """The next image and how far along it lies, or None if no line is left."""
    while True:
        seed, target = seeds[place], seeds[line.target]
        low, high = line.ends
        inside, outside = line.margins
        # Equal margins at both ends are ruled out by their signs, but for ties at 0.
        crossings = low + (high - low) * inside / np.maximum(inside - outside, 1e-12)
        # With the label kept, the original model must cross after the compressed one.
        hopeless = rules.keep_label and line.kept >= 0 and crossings[0] < crossings[1]
        if not hopeless:
            between = [at(seed, target, end) for end in line.ends]
            for far in (float(crossings.mean()), (low + high) / 2):
                image = at(seed, target, far)
                if _beyond(image, seed, rules.max_l2):
                    continue
                if not any((image == end).all() for end in between):
                    return image, far
        if not _next_target(line, answers, place):
            return None


def _beyond(image: np.ndarray, seed: np.ndarray, max_l2: float | None) -> bool:
    return max_l2 is not None and bool(distance(image[None], seed[None])[0] > max_l2)


def _narrow(line: _Line, far: float, outputs: list[np.ndarray], label: int) -> None:
    """Moves one end of the bracket to the point asked."""
    margins = np.array([_margin(each, label) for each in outputs])
    # The label decides, not the margin's sign, which is 0 in a tie.
    end = 0 if outputs[0].argmax() == label else 1
    line.ends[end], line.margins[end] = far, margins
    if line.kept == 1 - end:
        line.margins[1 - end] /= 2
    line.kept = 1 - end
