"""The quickstart's section on how alike slices of classes and of images are."""

import numpy as np

import nnslicer_jax as nns
from experiments import page
from experiments.quickstart_case import KINDS, Case, class_slices


def similarity(case: Case) -> page.Section:
    """How alike the slices of the classes are, and whose the adversarial slice resembles."""
    pieces = list(class_slices(case, case.theta).values())
    classes = np.array([[a.similarity(b) for b in pieces] for a in pieces])
    single = _jaccard(case.image_slices)
    images = single[:-1, :-1].copy()
    np.fill_diagonal(images, np.nan)
    groups = [case.test_predicted == k for k in range(len(pieces))]
    pairs = np.array([[np.nanmean(images[a][:, b]) for b in groups] for a in groups])
    same = case.test_predicted[:, None] == case.test_predicted
    within, between = np.nanmean(images[same]), np.nanmean(images[~same])

    # The image itself is no yardstick for how alike its slices are to others.
    others = np.arange(len(case.test_labels)) != case.index
    closeness = np.array(
        [[single[row, :-1][g & others].mean() for g in groups] for row in (case.index, -1)]
    )
    nearest = closeness.argmax(1)
    off = np.where(np.eye(len(pieces), dtype=bool), np.nan, classes)
    most, least = (
        np.unravel_index(choose(off), off.shape) for choose in (np.nanargmax, np.nanargmin)
    )
    html = page.paragraph(
        "Jaccard similarity of two slices: synapses in both, as a share of those in either. "
        "Slices of whole classes gather the synapses of all their training images, so their "
        "numbers are not on one footing with those of single images."
    )
    html += page.beside(
        [
            _heat_figure(
                off, 1.0, "Slices of classes",
                f"Slices of the training images of each class, theta {case.theta:g}. The diagonal "
                "is 1 and left out of the colour scale.",
            ),
            _heat_figure(
                pairs, None, "Slices of single images",
                f"Mean over pairs of test images, by predicted class, theta {case.theta:g}: "
                f"{within:.2f} within a class, {between:.2f} between classes.",
            ),
            _closeness_figure(case, closeness),
        ]
    )  # fmt: skip
    return page.Section(
        "How alike the slices of the classes are",
        html,
        (
            (
                "classes",
                f"most alike {most[0]} and {most[1]} ({classes[most]:.2f}), least "
                f"{least[0]} and {least[1]} ({classes[least]:.2f}), by Jaccard similarity",
            ),
            ("single images", f"{within:.2f} within a class, {between:.2f} between classes"),
            (
                "nearest class",
                f"of the normal slice {nearest[0]} ({closeness[0, nearest[0]]:.2f}), of the "
                f"adversarial slice {nearest[1]} ({closeness[1, nearest[1]]:.2f})",
            ),
        ),
    )


def _jaccard(pieces: nns.Slice) -> np.ndarray:
    """Similarity of every two samples of a per-sample slice, `[N, N]`; as `Slice.similarity`."""
    inside = [v.reshape(len(v), -1) != 0 for v in pieces.synapses.values()]
    kept = np.concatenate(inside, axis=1).astype(np.float32)
    both = kept @ kept.T
    size = np.diag(both)
    either = size[:, None] + size - both
    return np.where(either > 0, both / np.maximum(either, 1), 1)


def _heat_figure(values: np.ndarray, diagonal: float | None, title: str, caption: str) -> str:
    drawn = page.drawing(5.0)
    ax = drawn.subplots()
    ax.set_facecolor(page.ABSENT)
    shown = ax.imshow(values, cmap="cividis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        light = np.isnan(value) or value > middle
        text = f"{diagonal if np.isnan(value) else value:.2f}"
        ax.text(
            column, row, text, ha="center", va="center", fontsize=8,
            color="black" if light else "white",
        )  # fmt: skip
    ticks = np.arange(len(values))
    ax.set(xticks=ticks, yticks=ticks, xlabel="class", ylabel="class")
    ax.set_title(title, fontsize=11)
    drawn.colorbar(shown, ax=ax, shrink=0.8).set_label("Jaccard similarity")
    return page.figure(
        drawn,
        f"Heat map of {len(values)} by {len(values)} Jaccard similarities, numbers in the cells: "
        f"{title.lower()}.",
        caption,
    )


def _closeness_figure(case: Case, closeness: np.ndarray) -> str:
    drawn = page.drawing(3.2)
    ax = drawn.subplots()
    page.grouped_bars(ax, closeness, KINDS)
    ax.set(xlabel="class of the test images compared with", ylabel="mean Jaccard similarity")
    ax.margins(y=0.25)
    normal, adversarial = closeness.argmax(1)
    return page.figure(
        drawn,
        "Bars of how alike the two slices are to slices of test images of each class: the normal "
        f"one is most like class {normal}, the adversarial one most like class {adversarial}.",
        f"The two slices beside those of the other test images, by predicted class. The image is "
        f"a {case.label}; after FGSM the network predicts {case.predicted[1]}.",
    )
