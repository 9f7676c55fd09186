"""Pictures of the study of adversarial inputs: slices (Figure 2 of the paper) and measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from experiments.page import COLOURS, MARKERS
from experiments.record import Row
from nnslicer_jax.atomic import replacing

_DPI = 160


def slices(images: np.ndarray, titles: Sequence[str], contribs: np.ndarray, layer: str) -> Figure:
    """Images, and below each the CONTRIB of one layer's synapses for its predicted class.

    Args:
      images: `[2, H, W, C]` in 0..1, normal and adversarial.
      titles: What stands above each.
      contribs: `[2, KH, KW, I, O]` integers, one convolution's kernel.
      layer: Its name.
    """
    drawn = Figure(figsize=(9, 6.2), layout="constrained")
    above, below = drawn.subplots(2, 2, height_ratios=(1, 1.1))
    most = max(1, int(np.abs(contribs).max()))
    norm = SymLogNorm(linthresh=1, vmin=-most, vmax=most)
    for ax, image, title in zip(above, images, titles, strict=True):
        ax.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[])
    for ax, contrib in zip(below, contribs, strict=True):
        shown = ax.imshow(kernel_picture(contrib), cmap="RdBu", norm=norm, interpolation="nearest")
        _, width, inputs, outputs = contrib.shape
        ax.set(
            xlabel=f"{outputs} output channels, {width} weights across each",
            ylabel=f"{inputs} input channels", xticks=[], yticks=[],
        )  # fmt: skip
    drawn.suptitle(f"Slices of {layer} for the predicted class", fontsize=11)
    bar = drawn.colorbar(shown, ax=list(below), location="bottom", shrink=0.7, aspect=40)
    bar.set_label("CONTRIB: blue for the class, red against it, white not in the slice")
    ticks = [*(10**power for power in range(len(str(most))) if 10**power < most), most]
    bar.set_ticks([*(-tick for tick in reversed(ticks)), 0, *ticks])
    bar.ax.xaxis.set_major_formatter("{x:.0f}")
    bar.minorticks_off()
    return drawn


def kernel_picture(contrib: np.ndarray) -> np.ndarray:
    """A kernel `[KH, KW, I, O]` as one picture: inputs down, outputs across."""
    height, width, inputs, outputs = contrib.shape
    return contrib.transpose(2, 0, 3, 1).reshape(inputs * height, outputs * width)


def per_attack(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    """Precision and recall of every attack and method, ours beside the published ones."""
    names = [row.row for row in rows if row.metric == "images fooled"]
    known = {(row.row, row.metric): row for row in rows}
    drawn = Figure(figsize=(9, 6.5), layout="constrained")
    panels = drawn.subplots(2, 1, sharex=True)
    places = np.arange(len(names))
    for ax, metric in zip(panels, ("precision", "recall"), strict=True):
        for number, (method, colour, marker) in enumerate(
            zip(methods, COLOURS, MARKERS, strict=False)
        ):
            found = [known.get((f"{name}, {method}", metric)) for name in names]
            shift = places + (number - 1) * 0.22
            ours = [np.nan if row is None or row.ours is None else row.ours for row in found]
            theirs = [np.nan if row is None else row.published for row in found]
            errors = np.array([_error(row) for row in found]).T
            ax.errorbar(
                shift, ours, errors, fmt=marker, color=colour, markersize=5, elinewidth=1,
                label=f"{method}, ours",
            )  # fmt: skip
            ax.plot(
                shift, theirs, marker=marker, linestyle="", markersize=7, markerfacecolor="none",
                markeredgecolor=colour, label=f"{method}, published",
            )  # fmt: skip
        told = [known.get((f"{name}, {methods[0]} for the true class", metric)) for name in names]
        shown = [np.nan if row is None or row.ours is None else row.ours for row in told]
        ax.plot(places, shown, "kx", label=f"{methods[0]}, ours, told the true class")
        ax.set(ylabel=metric, ylim=(-0.04, 1.06))
        ax.grid(axis="y", color="#dddddd")
    panels[1].set_xticks(places, names, rotation=60, ha="right")
    panels[1].set_xlabel("attack")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return drawn


def _error(row: Row | None) -> tuple[float, float]:
    if row is None or row.ours is None or not isinstance(row.spread, tuple):
        return 0.0, 0.0
    low, high = row.spread
    # A bootstrap interval need not hold the measure itself.
    return max(row.ours - low, 0.0), max(high - row.ours, 0.0)


def averages(rows: Sequence[Row]) -> Figure:
    """Averages over the attacks of every detector: recall, AUROC, false alarms."""
    known = {(row.row, row.metric): row.ours for row in rows}
    names = [row.row for row in rows if row.row.startswith("average, ") and row.metric == "auroc"]
    drawn = Figure(figsize=(9, 1.2 + 0.36 * len(names)), layout="constrained")
    ax = drawn.subplots()
    places = np.arange(len(names))[::-1]
    alarms = [name.removeprefix("average, ") for name in names]
    series: Mapping[str, list] = {
        "AUROC": [known[name, "auroc"] for name in names],
        "recall": [known.get((name, "recall")) for name in names],
        "flagged of clean test images": [
            known.get((name, "flagged of clean test images")) for name in alarms
        ],
    }
    for (label, values), colour, marker in zip(series.items(), COLOURS, MARKERS, strict=False):
        there = [np.nan if value is None else value for value in values]
        ax.plot(there, places, marker=marker, linestyle="", color=colour, label=label)
    ax.axvline(0.5, color="#888888", linewidth=1, linestyle=":", label="chance, of AUROC")
    ax.set_yticks(places, alarms)
    ax.set(xlim=(-0.02, 1.02), xlabel="average over the attacks")
    ax.grid(axis="x", color="#dddddd")
    drawn.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return drawn


def adaptive(rows: Sequence[Row]) -> Figure:
    """Success of the attacker who knows of the detector, by budget and detector."""
    metric = "network fooled and not flagged"
    found: dict[str, list[Row]] = {}
    budgets = [row.row for row in rows if row.metric == "network fooled" and "adversary" in row.row]
    for row in rows:
        for budget in budgets:
            if row.metric == metric and row.row.startswith(f"{budget}, "):
                found.setdefault(row.row.removeprefix(f"{budget}, "), []).append(row)
    drawn = Figure(figsize=(9, 1.2 + 0.4 * len(found)), layout="constrained")
    ax = drawn.subplots()
    places = np.arange(len(found))[::-1]
    for number, (budget, colour, marker) in enumerate(zip(budgets, COLOURS, MARKERS, strict=False)):
        values = [each[number] for each in found.values()]
        errors = np.array([_error(row) for row in values]).T
        shift = places + (1 - number) * 0.2
        ax.errorbar(
            [float(row.ours or 0) for row in values], shift, xerr=errors, fmt=marker, color=colour,
            markersize=5, elinewidth=1, label=budget.removeprefix("feature adversary, "),
        )  # fmt: skip
    ax.set_yticks(places, list(found))
    ax.set(xlim=(-0.02, 1.02), xlabel="share of images: network fooled, nothing flagged")
    ax.grid(axis="x", color="#dddddd")
    drawn.legend(loc="outside upper center", ncols=len(budgets), frameon=False, fontsize=9)
    return drawn


def save(drawn: Figure, path: Path) -> None:
    """Writes a figure as PNG; the same figure gives the same bytes."""
    with replacing(path) as partial:
        # The program's version would make equal pictures differ.
        drawn.savefig(partial, format="png", dpi=_DPI, metadata={"Software": None})
