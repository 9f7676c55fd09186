"""The quickstart's section on pruning for chosen classes, without any retraining."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import nnslicer_jax as nns
from experiments import page, targeted_pruning
from experiments.quickstart_case import Case
from prune import compact, criteria, removal

RATIOS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
# The classes that the network is pruned for.
TARGETS = (0, 1, 2, 3)
# Training images of each of them that the slice is of.
_IMAGES = 16
_CHOSEN = 0.7


def pruning(case: Case) -> page.Section:
    """How well networks pruned for some classes still tell them."""
    scores = _scores(case)
    found = {
        name: [accuracy(case, score, ratio) for ratio in RATIOS] for name, score in scores.items()
    }
    classes = ", ".join(map(str, TARGETS))
    html = page.paragraph(
        f"A network that only has to tell the digits {classes} needs fewer synapses. In every "
        "layer the share with the smallest |CONTRIB| for these classes is taken away, and neurons "
        "left without synapses go too; nothing is retrained. Beside it stand the smallest weights, "
        "the neurons of the smallest weights, and chance. Accuracy is that among all outputs, on "
        "the test images of these digits, then on those of the others."
    )
    html += page.table(
        f"Accuracy on the digits {classes} / on the others, by the share of synapses pruned",
        ["method", *[f"{ratio:.0%}" for ratio in RATIOS]],
        [
            [name, *[f"{target:.1%} / {others:.1%}" for target, others in row]]
            for name, row in found.items()
        ],
    )
    html += _figure(found)
    rows = []
    before = compact.size(case.graph, case.params)
    for name in ("NNSlicer (targeted)", "Channel"):
        small = compact.compact(
            case.graph, case.params, targeted_pruning.prune(scores[name], _CHOSEN)
        )
        after = compact.size(small.graph, small.params)
        rows.append([
            name,
            f"{after.parameters:,} of {before.parameters:,}",
            f"{after.multiplications:,} of {before.multiplications:,}",
        ])  # fmt: skip
    html += page.table(
        f"Channels without synapses or use taken out, {_CHOSEN:.0%} pruned: a smaller network with "
        "the same outputs",
        ["method", "parameters", "multiplications an image"],
        rows,
    )
    at = RATIOS.index(_CHOSEN)
    said = "; ".join(f"{name} {row[at][0]:.1%}" for name, row in found.items())
    return page.Section(
        "Pruning for chosen classes",
        html,
        (("pruning", f"accuracy on digits {classes}, {_CHOSEN:.0%} of synapses pruned: {said}"),),
    )


def _scores(case: Case) -> dict[str, Any]:
    """Method to its scores."""
    graph, params = case.graph, case.params
    rows = [np.flatnonzero(case.train_labels == label)[:_IMAGES] for label in TARGETS]
    images = case.train_images[np.concatenate(rows)]
    piece = nns.slice_network(
        graph, params, case.profile, images, np.tile(TARGETS, (len(images), 1)),
        theta=case.theta, batch_size=len(images),
    )  # fmt: skip
    return {
        "NNSlicer (targeted)": criteria.contributions(graph, params, piece),
        "Weight": criteria.magnitudes(graph, params),
        "Channel": criteria.channels(graph, params),
        "Random": criteria.random(jax.random.key(case.seed), graph, params),
    }


def accuracy(case: Case, scores: Any, ratio: float) -> tuple[float, float]:
    """Accuracy, 0..1, on the test images of the target classes, and on the others."""
    logits = _logits(
        case.graph, case.params, targeted_pruning.prune(scores, ratio), case.test_images
    )
    right = np.asarray(logits).argmax(1) == case.test_labels
    targeted = np.isin(case.test_labels, TARGETS)
    return float(right[targeted].mean()), float(right[~targeted].mean())


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nns.Graph, params: Any, kept: Any, images: jax.Array) -> jax.Array:
    network = removal.reduced(graph, params, kept)
    return nns.evaluate(graph, network.params, images, network.edits)[0]


def _figure(found: dict[str, list[tuple[float, float]]]) -> str:
    ratios: Sequence[float] = [100 * ratio for ratio in RATIOS]
    drawn = page.drawing(3.6)
    ax = drawn.subplots()
    for (name, row), colour, marker in zip(found.items(), page.COLOURS, page.MARKERS, strict=False):
        target, others = (100 * np.asarray(values) for values in zip(*row, strict=True))
        ax.plot(ratios, target, color=colour, marker=marker, label=name)
        ax.plot(ratios, others, color=colour, marker=marker, linestyle=":", markersize=4)
    for style, digits in (("-", "chosen digits"), (":", "other digits")):
        ax.plot([], [], color="#888888", linestyle=style, label=digits)
    # Markers at 0 and 100 stay whole.
    ax.set(xlabel="synapses pruned, %", ylabel="accuracy, %", ylim=(-3, 103))
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return page.figure(
        drawn,
        "Curves of accuracy against the share of synapses pruned, two for each method.",
        "Accuracy on the chosen digits (lines) and on the others (dotted).",
    )
