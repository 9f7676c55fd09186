"""The quickstart's section on slices run as networks: how well they agree with the whole one."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import numpy as np
from sklearn.metrics import roc_auc_score

import nnslicer_jax as nns
from experiments import page
from experiments.quickstart_case import KINDS, Case, class_slices

_FILLS = ("mean", "zero")
# Times that random synapses are drawn.
_DRAWS = 5


class Agreement(NamedTuple):
    """How networks cut down to slices agree with the whole one, at one theta.

    Attributes:
      theta: Size of the slices.
      class_kept: Share of the synapses in a slice of one class, mean over classes.
      own: Agreement of such slices on test images of their class, by fill; mean over classes.
      every: The same on all test images.
      auroc: How well a slice's own logit tells the images that the whole network puts in its
        class from the others (0.5 is chance), fill "mean"; mean over classes.
      all_kept: Share of the synapses in the slice of all classes.
      whole: Agreement of that slice on all test images, by fill.
      drawn: The same for as many synapses in each layer drawn at random, fill "mean"; mean
        over draws.
    """

    theta: float
    class_kept: float
    own: dict[str, float]
    every: dict[str, float]
    auroc: float
    all_kept: float
    whole: dict[str, float]
    drawn: float


def agreement(case: Case) -> page.Section:
    """What the network still does when cut down to a slice, without any retraining."""
    thetas = case.thetas
    found = [agree(case, theta) for theta in thetas]
    chosen = found[thetas.index(case.theta)]
    html = page.paragraph(
        "A slice runs as a network: synapses outside of it are 0, and neurons outside of it are "
        "held at their profiled mean or at 0 (fill mean or zero). Nothing is retrained. Agreement "
        f"is the share of the {len(case.test_labels)} test images on which the reduced network "
        "predicts the class that the whole network predicts."
    )
    html += page.paragraph(
        "The slice of all classes is that of all training images, each for its own class. Beside "
        f"it stand, as a yardstick, as many synapses in each layer drawn at random ({_DRAWS} "
        "draws) with the same neurons."
    )
    html += page.table(
        "Slice of all classes: agreement on all test images",
        ["theta", "synapses kept", "fill mean", "fill zero", "random synapses, fill mean"],
        [
            [f"{a.theta:g}", *_percent(a.all_kept, a.whole["mean"], a.whole["zero"], a.drawn)]
            for a in found
        ],
    )
    html += page.paragraph(
        "A slice of one class is that of the training images of the class. It keeps the way to "
        "one output only; the other outputs stand still, so high agreement on the class and low "
        "agreement on all classes say little by themselves. AUROC asks instead how well the "
        "output that is left still tells its class from the others: 1 is perfect, 0.5 is chance."
    )
    html += page.table(
        f"Slices of one class: means over {len(set(case.train_labels.tolist()))} classes",
        ["theta", "synapses kept", "on the class, fill mean", "on the class, fill zero",
         "on all classes, fill mean", "on all classes, fill zero", "AUROC, fill mean"],
        [
            [
                f"{a.theta:g}",
                *_percent(a.class_kept, a.own["mean"], a.own["zero"]),
                *_percent(a.every["mean"], a.every["zero"]),
                f"{a.auroc:.3f}",
            ]
            for a in found
        ],
    )  # fmt: skip
    html += _agreement_figure(found, case.theta)
    images = _own_images(case)
    html += page.table(
        f"The two images under their own slices, theta {case.theta:g}",
        ["image", "whole network predicts", "slice, fill mean", "slice, fill zero"],
        images,
    )
    return page.Section(
        "What a slice still does on its own",
        html,
        (
            (
                "agreement",
                f"slice of all classes ({chosen.all_kept:.1%} of the synapses): "
                f"{chosen.whole['mean']:.1%} with fill mean, {chosen.whole['zero']:.1%} with zero, "
                f"random synapses {chosen.drawn:.1%}",
            ),
            (
                "class slices",
                f"{chosen.class_kept:.1%} of the synapses: {chosen.own['mean']:.1%} on the class, "
                f"{chosen.every['mean']:.1%} on all classes (fill mean); AUROC {chosen.auroc:.3f}",
            ),
        ),
    )


def agree(case: Case, theta: float) -> Agreement:
    """Runs the test images through networks cut down to slices of each class and of all."""
    by_class = class_slices(case, theta)
    own: dict[str, list[float]] = {fill: [] for fill in _FILLS}
    every: dict[str, list[float]] = {fill: [] for fill in _FILLS}
    aurocs = []
    for label, piece in by_class.items():
        for fill in _FILLS:
            logits = _reduced(case, piece, fill)
            same = logits.argmax(1) == case.test_predicted
            own[fill].append(same[case.test_labels == label].mean())
            every[fill].append(same.mean())
            if fill == "mean":
                aurocs.append(roc_auc_score(case.test_predicted == label, logits[:, label]))
    both = functools.reduce(operator.add, by_class.values())
    whole = {f: _share(case, both, f) for f in _FILLS}
    rng = np.random.default_rng(case.seed)
    drawn = [_share(case, _shuffled(both, rng), "mean") for _ in range(_DRAWS)]
    return Agreement(
        theta=theta,
        class_kept=float(np.mean([np.divide(*piece.size()) for piece in by_class.values()])),
        own={fill: float(np.mean(values)) for fill, values in own.items()},
        every={fill: float(np.mean(values)) for fill, values in every.items()},
        auroc=float(np.mean(aurocs)),
        all_kept=float(np.divide(*both.size())),
        whole=whole,
        drawn=float(np.mean(drawn)),
    )


def _share(case: Case, piece: nns.Slice, fill: str) -> float:
    return float((_reduced(case, piece, fill).argmax(1) == case.test_predicted).mean())


def _reduced(case: Case, piece: nns.Slice, fill: str) -> np.ndarray:
    """Logits `[N, K]` of the test images under the network cut down to a slice."""
    masked = nns.mask_network(case.graph, case.params, piece, fill=fill, profile=case.profile)
    return np.asarray(_logits(case.graph, masked, case.test_images))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nns.Graph, masked: nns.Masked, images: jax.Array) -> jax.Array:
    return nns.evaluate(graph, masked.params, images, masked.edits)[0]


def _shuffled(piece: nns.Slice, rng: np.random.Generator) -> nns.Slice:
    """The slice with the synapses of each layer in random places."""
    synapses = {k: rng.permutation(v.ravel()).reshape(v.shape) for k, v in piece.synapses.items()}
    return dataclasses.replace(piece, synapses=synapses)


def _own_images(case: Case) -> list[list[str]]:
    rows = []
    for row, kind in enumerate(KINDS):
        cells = []
        for fill in _FILLS:
            # The adversarial image runs in the place of the one it was made of.
            images = case.test_images.copy()
            images[case.index] = case.images[row]
            masked = nns.mask_network(
                case.graph, case.params, case.slices[row], fill=fill, profile=case.profile
            )
            cells.append(str(int(_logits(case.graph, masked, images)[case.index].argmax())))
        rows.append([kind, str(case.predicted[row]), *cells])
    return rows


def _percent(*shares: float) -> list[str]:
    return [f"{share:.1%}" for share in shares]


def _agreement_figure(found: list[Agreement], theta: float) -> str:
    thetas = [a.theta for a in found]
    curves = {
        "all classes, fill mean": [a.whole["mean"] for a in found],
        "all classes, fill zero": [a.whole["zero"] for a in found],
        "all classes, random synapses": [a.drawn for a in found],
        "one class, on it, fill mean": [a.own["mean"] for a in found],
        "one class, on it, fill zero": [a.own["zero"] for a in found],
    }
    drawn = page.drawing(4.2)
    ax = drawn.subplots()
    for (label, values), colour, marker in zip(
        curves.items(), page.COLOURS, page.MARKERS, strict=False
    ):
        ax.plot(thetas, np.multiply(values, 100), color=colour, marker=marker, label=label)
    ax.axvline(theta, color="#888888", linewidth=1, linestyle=":", label="theta of this page")
    ax.set(xlabel="theta", ylabel="agreement, %", ylim=(0, 102))
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return page.figure(
        drawn,
        "Curves of agreement against theta for slices of all classes and of one class, with both "
        "fills, and for random synapses.",
        "Agreement of reduced networks with the whole one, against theta.",
    )
