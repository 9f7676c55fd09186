"""The figures of `robust_pruning`: accuracy against the share pruned, and the weights kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from experiments import page
from nnslicer_jax.atomic import replacing


def curves(
    found: Mapping[str, Mapping[float, Sequence[float]]],
    title: str,
    label: str,
    whole: float,
    path: Path,
) -> None:
    """Draws means over seeds with Student's 95 % interval against the share pruned.

    Args:
      found: Method to share pruned to accuracies, 0..1, one a seed.
      title: Above the drawing.
      label: Of the vertical axis.
      whole: What the dense network has, in per cent.
      path: The PNG file to write.
    """
    drawn = page.drawing(4.2)
    ax = drawn.subplots()
    ax.axhline(whole, color="#888888", linewidth=1, linestyle=":", label="dense")
    ratios = sorted({ratio for curve in found.values() for ratio in curve})
    named = {
        name: {f"{100 * ratio:g}%": curve[ratio] for ratio in ratios}
        for name, curve in found.items()
    }
    _lines(ax, named)
    ax.set(xlabel="weights pruned", ylabel=label, ylim=(0, None), title=title)
    _save(drawn, path)


def strengths(found: Mapping[str, Mapping[int, Sequence[float]]], title: str, path: Path) -> None:
    """Draws accuracy under attack against the attack's strength, as `curves`.

    Args:
      found: Method to eps in 255ths to accuracies, 0..1, one a seed.
      title: Above the drawing.
      path: The PNG file to write.
    """
    drawn = page.drawing(4.2)
    ax = drawn.subplots()
    _lines(ax, {n: {f"{eps}/255": v for eps, v in c.items()} for n, c in found.items()})
    ax.set(xlabel="eps of the attack", ylabel="era, %", ylim=(0, None), title=title)
    _save(drawn, path)


def variants(found: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path) -> None:
    """Draws variants side by side, one mark each for every measure, as `curves`.

    Args:
      found: Measure to variant to accuracies, 0..1, one a seed.
      title: Above the drawing.
      path: The PNG file to write.
    """
    drawn = page.drawing(4.2)
    ax = drawn.subplots()
    _lines(ax, found, joined=False)
    ax.set(ylabel="accuracy, %", ylim=(0, None), title=title)
    ax.tick_params(axis="x", rotation=20)
    _save(drawn, path)


def _lines(
    ax: Any, found: Mapping[str, Mapping[str, Sequence[float]]], joined: bool = True
) -> None:
    """Means with intervals by name, at places that have names too."""
    ticks = list(dict.fromkeys(place for curve in found.values() for place in curve))
    places = np.arange(len(ticks))
    for i, (name, curve) in enumerate(found.items()):
        values = [100 * np.asarray(curve[tick]) for tick in ticks]
        means = [v.mean() for v in values]
        halves = [
            scipy.stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v))
            if len(v) > 1 else 0.0
            for v in values
        ]  # fmt: skip
        # Side by side, so that intervals do not hide each other.
        shift = 0.06 * (i - (len(found) - 1) / 2)
        ax.errorbar(
            places + shift, means, yerr=halves, capsize=3, label=name,
            color=page.COLOURS[i % len(page.COLOURS)], marker=page.MARKERS[i % len(page.MARKERS)],
            linestyle="-" if joined else "none",
        )  # fmt: skip
    ax.set_xticks(places, ticks)


def _save(drawn: Figure, path: Path) -> None:
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    with replacing(path) as part:
        drawn.savefig(part, format="png", dpi=160)


def weights(counts: Mapping[str, Sequence[int]], edges: np.ndarray, title: str, path: Path) -> None:
    """Draws how many weights of each size are kept, on a logarithmic axis.

    Args:
      counts: Network to counts, one a bin; the whole network first.
      edges: Ends of the bins.
      title: Above the drawing.
      path: The PNG file to write.
    """
    drawn = page.drawing(3.8)
    ax = drawn.subplots()
    for i, (name, count) in enumerate(counts.items()):
        # As in the other drawings, where the whole network is a grey line.
        colour = page.COLOURS[(i - 1) % len(page.COLOURS)] if i else "#888888"
        ax.stairs(count, edges, label=name, color=colour, linewidth=1.5)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="weight", ylabel="weights", ylim=(0, None), title=title)
    _save(drawn, path)
