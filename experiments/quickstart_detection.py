"""The quickstart's section on adversarial images: told from normal ones by their slices."""

from typing import NamedTuple

import jax
import numpy as np
from sklearn.metrics import roc_curve

from experiments import page
from experiments.adversarial_detection import ALL, FIRST_HALF, allowed, softmax
from experiments.quickstart_case import Case
from interpret import detect, features
from nnslicer_jax import attacks

# Training images that the detectors learn from.
_TRAIN = 600
_COLUMNS = 1000
_CONFIDENCE = "confidence of the network"


class Images(NamedTuple):
    """Some images and what the network makes of them.

    Attributes:
      images: `[N, H, W, C]`.
      probabilities: `[N, K]`.
    """

    images: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """`[N]` the network's classes."""
        return self.probabilities.argmax(1)


class Told(NamedTuple):
    """How a detector tells an attack's images from their originals.

    Attributes:
      detector: Its name.
      attack: The attack's name.
      normal: Verdict on the originals.
      adversarial: Verdict on the images attacked.
    """

    detector: str
    attack: str
    normal: detect.Verdict
    adversarial: detect.Verdict


def detection(case: Case) -> page.Section:
    """Adversarial images flagged where a classifier of slices disagrees with the network."""
    found = judge(case)
    rows = []
    for told in found:
        measured = detect.measure(told.normal, told.adversarial)
        # Confidence comes without a threshold, so without flags.
        shown = (None, None, None, measured.auroc) if told.detector == _CONFIDENCE else measured
        cells = ["" if value is None else f"{value:.2f}" for value in shown]
        alarms = "" if told.detector == _CONFIDENCE else f"{told.normal.flags.mean():.1%}"
        rows.append([told.detector, f"{told.attack} ({len(told.normal.flags)})", *cells, alarms])
    html = page.paragraph(
        f"A classifier learns from {_TRAIN} normal training images which class the network "
        "predicts, from their slices or from the activations of the convolutions (feature maps). "
        "An image is flagged where the classifier disagrees with the network. Judged are test "
        "images that the network gets right and an attack fools it on, before and after the "
        "attack."
    )
    html += page.paragraph(
        "A slice is made for the class that the network predicts, and the last layers' synapses "
        "in it name that class: a tree that may look at them agrees with the network, rightly or "
        "wrongly. Restricted to the first half of the layers it sees what the image looks like. "
        "AUROC needs no threshold: 1 is perfect, 0.5 is chance. The network's own confidence, 1 - "
        "the probability of its class, is what detectors have to beat."
    )
    html += page.table(
        "Adversarial images detected",
        ["detector", "attack (images)", "precision", "recall", "F1", "AUROC", "false alarms"],
        rows,
    )
    html += _curves(found)
    return page.Section("Adversarial images told by their slices", html, _summary(found))


def _summary(found: list[Told]) -> tuple[tuple[str, str], ...]:
    """Each attack's AUROC, of the forest on each kind of features and of confidence."""
    said: dict[str, list[str]] = {}
    for told in found:
        kind, _, how = told.detector.partition(", ")
        auroc = detect.measure(told.normal, told.adversarial).auroc
        # One way of each kind, not the one that does best on these very images.
        if auroc is not None and (how.startswith("forest") or kind == _CONFIDENCE):
            said.setdefault(told.attack, []).append(f"{told.detector} {auroc:.2f}")
    return tuple(
        (name, "told from normal, AUROC: " + "; ".join(found)) for name, found in said.items()
    )


def judge(case: Case) -> list[Told]:
    """Trains the detectors and judges the images of two attacks beside their originals."""
    train = _images(case, case.train_images[:_TRAIN])
    clean = _images(case, case.test_images)
    right = clean.predicted == case.test_labels
    apply, params = case.trained.model.apply, case.params
    results = {
        f"FGSM {case.eps:g}": attacks.fgsm(
            None, apply, params, case.test_images, case.test_labels, eps=case.eps
        ),
        "DeepFool L2": attacks.deepfool(
            jax.random.key(case.seed), apply, params, case.test_images, case.test_labels, norm="l2"
        ),
    }
    fooled: dict[str, tuple[Images, np.ndarray]] = {}
    for name, result in results.items():
        changed = _images(case, np.asarray(result.images))
        fooled[name] = changed, np.flatnonzero(right & (changed.predicted != case.test_labels))
    told = []
    sliced = _dense(features.contribs(case.image_slices))
    for kind, extract, normal in (
        ("slices", _slices, sliced.values[: len(case.test_images)]),
        ("feature maps", _maps, _maps(case, clean).values),
    ):
        known = extract(case, train)
        rows = {name: extract(case, images).values for name, (images, _) in fooled.items()}
        width = known.values.shape[1]
        statistic = detect.dependence([(slice(0, _TRAIN), known.values)], train.predicted, width)
        for layers, classifier in ((ALL, "tree"), (FIRST_HALF, "tree"), (FIRST_HALF, "forest")):
            among = allowed(case.graph, known.spans, layers)
            if among.all() and layers != ALL:
                # Nothing but the first half there, the convolutions being it.
                if classifier == "tree":
                    continue
                layers = ALL
            columns = detect.most_dependent(statistic, _COLUMNS, among)
            fitted = detect.fit(
                known.values[:, columns], train.predicted, classifier=classifier, seed=case.seed
            )
            said = detect.judge(fitted, normal[:, columns], clean.predicted)
            for name, (images, which) in fooled.items():
                after = detect.judge(fitted, rows[name][:, columns], images.predicted)
                told.append(
                    Told(
                        f"{kind}, {classifier}, {layers}", name, detect.some(said, which),
                        detect.some(after, which),
                    )
                )  # fmt: skip
    for name, (images, which) in fooled.items():
        verdicts = [
            detect.Verdict(np.zeros(len(which), bool), 1 - found.probabilities.max(1)[which])
            for found in (clean, images)
        ]
        told.append(Told(_CONFIDENCE, name, *verdicts))
    return told


def _images(case: Case, images: np.ndarray) -> Images:
    return Images(images, softmax(case.trained.model.apply, case.params, images))


def _slices(case: Case, found: Images) -> features.Table:
    # As many at once as when the case was made, so that its compiled program serves.
    extract = features.slices(
        case.graph, case.params, case.profile, theta=case.theta,
        batch_size=len(case.test_images) + 1,
    )  # fmt: skip
    return _dense(extract(found.images, found.predicted))


def _maps(case: Case, found: Images) -> features.Table:
    extract = features.maps(case.graph, case.params, features.convolutions(case.graph))
    return _dense(extract(found.images, found.predicted))


def _dense(table: features.Table) -> features.Table:
    values = table.values.toarray() if hasattr(table.values, "toarray") else table.values
    return features.Table(np.asarray(values, np.float32), table.spans)


def _curves(found: list[Told]) -> str:
    names = sorted({told.attack for told in found}, reverse=True)
    drawn = page.drawing(3.6)
    panels = drawn.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, attack in zip(panels, names, strict=True):
        shown = [t for t in found if t.attack == attack and len(t.normal.flags)]
        for told, colour, marker in zip(shown, page.COLOURS, page.MARKERS, strict=False):
            truth = np.repeat([0, 1], len(told.normal.flags))
            score = np.concatenate([told.normal.score, told.adversarial.score])
            alarms, recall, _ = roc_curve(truth, score)
            ax.plot(
                alarms, recall, color=colour, marker=marker, markevery=0.25, markersize=4,
                label=told.detector,
            )  # fmt: skip
        ax.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
        ax.set(xlabel="share of normal images flagged", title=attack)
    panels[0].set_ylabel("share of adversarial images flagged")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return page.figure(
        drawn,
        f"Curves of adversarial against normal images flagged, for {len(labels)} detectors under "
        f"{' and '.join(names)}.",
        "What is caught at the price of which false alarms, as the threshold of suspicion moves.",
    )
