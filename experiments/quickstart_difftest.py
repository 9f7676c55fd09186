"""The quickstart's section on differential testing: where an 8-bit network deviates."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import difftest
from experiments import page
from experiments.bench_difftest import eight_bits
from experiments.quickstart_case import Case
from nnslicer_jax import data

# Test images that searches start from, the most queries of each, and triggers that are shown.
SEEDS, QUERIES, SHOWN = 100, 1000, 10
SEARCHES: dict[str, dict[str, Any]] = {
    "DFlare": {"variant": "released"},
    "DFlare, label kept": {"variant": "released", "keep_label": True},
    "on lines": {"variant": "best"},
    "on lines, label kept": {"variant": "best", "keep_label": True},
}
# Searches whose triggers are shown.
DRAWN = ("DFlare", "on lines, label kept")


def deviations(case: Case) -> page.Section:
    """What an 8-bit twin of the network does differently."""
    digits = data.load("digits")
    pair = eight_bits(case.trained.model.apply, case.params, case.train_images)
    original, compressed = pair.probabilities(digits.test_images)
    differ = int((original.argmax(1) != compressed.argmax(1)).sum())
    seeds = digits.test_images[:SEEDS]
    key = jax.random.key(case.seed)
    found = {
        name: difftest.search(pair, seeds, key, max_queries=QUERIES, **options)
        for name, options in SEARCHES.items()
    }
    html = page.paragraph(
        "The network's weights and activations are rounded to 8 bits. Of the "
        f"{len(digits.test_images)} test images the two label {differ} differently: by its "
        "accuracy the smaller network is as good. DFlare (Tian et al., Finding Deviated Behaviors "
        "of the Compressed DNN Models for Image Classifications, TOSEM 2023) mutates an image, "
        "asking both networks for probabilities alone, until they disagree: a trigger. Searching "
        "on the lines between images of two classes, where the networks change their label, is "
        "this project's own. Some triggers lie far from their image; a search can be held to those "
        "to which the original network still gives the image's label."
    )
    html += page.table(
        f"Searches from the first {SEEDS} test images, at most {QUERIES:,} queries each. A query "
        "is one image through both networks. Distances are on the 0 to 1 scale",
        ["search", "triggers found", "queries, median", "mean", "distance L2, median",
         "label kept"],
        [[name, *_told(result)] for name, result in found.items()],
    )  # fmt: skip
    html += _figure({name: found[name] for name in DRAWN}, seeds)
    told = "; ".join(
        f"{name} {int(one.success.sum())} of {int(one.searched.sum())}"
        for name, one in found.items()
    )
    return page.Section(
        "Where an 8-bit network deviates", html, (("inputs where 8 bits deviate", told),)
    )


def _told(result: difftest.SearchResult) -> list[str]:
    good = result.success
    share = f"{good.sum()} of {result.searched.sum()}"
    if not good.any():
        return [share, *["none"] * 4]
    queries = result.queries[good]
    return [
        share, f"{np.median(queries):g}", f"{queries.mean():.1f}",
        f"{np.median(result.l2[good]):.2f}", f"{result.keeps_label[good].mean():.0%}",
    ]  # fmt: skip


def _figure(found: Mapping[str, difftest.SearchResult], seeds: np.ndarray) -> str:
    good = np.all([result.success for result in found.values()], axis=0)
    rows = np.flatnonzero(good)[:SHOWN]
    drawn = page.drawing(0.95 * (1 + len(found)))
    panels = drawn.subplots(1 + len(found), SHOWN, squeeze=False)
    for ax in panels.flat:
        ax.set(xticks=[], yticks=[])
    for ax, name in zip(panels[:, 0], ("image", *found), strict=True):
        ax.set_ylabel(name.replace(", ", ",\n"), fontsize=8)
    for column, row in enumerate(rows):
        pictures = [seeds[row], *(result.triggers[row] for result in found.values())]
        titles = [f"{next(iter(found.values())).seed_labels[row]}"]
        for result in found.values():
            labels = (result.outputs_original[row], result.outputs_compressed[row])
            titles.append(" | ".join(f"{each.argmax()}" for each in labels))
        for ax, image, title in zip(panels[:, column], pictures, titles, strict=True):
            ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
            ax.set_title(title, fontsize=9)
    return page.figure(
        drawn,
        f"{len(rows)} handwritten digits, and below each the inputs made of it on which the two "
        "networks disagree.",
        f"The first {len(rows)} images from which these searches found a trigger, with the label "
        "that both networks give; below, the triggers, with the labels by the original | by the "
        "8-bit network.",
    )
