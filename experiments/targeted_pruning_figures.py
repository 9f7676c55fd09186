"""The figures of `targeted_pruning`: accuracy on the target classes against the ratio pruned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments import page
from nnslicer_jax.atomic import replacing


class Accuracy(Protocol):
    """Accuracy on the target classes, 0..1."""

    @property
    def target(self) -> float:
        """Among all outputs."""


def curves(
    found: Mapping[str, Mapping[float, Sequence[Accuracy]]], title: str, before: float, path: Path
) -> None:
    """Draws mean accuracy with its 95 % band over sets of target classes.

    Args:
      found: Method to ratio to accuracies, one a set.
      title: Above the drawing.
      before: Accuracy of the whole network, 0..1.
      path: The PNG file to write.
    """
    drawn = page.drawing(4.4)
    ax = drawn.subplots()
    for (name, curve), colour, marker in zip(
        found.items(), page.COLOURS, page.MARKERS, strict=False
    ):
        ratios = [100 * ratio for ratio in sorted(curve)]
        values = [np.asarray([j.target for j in curve[r]]) * 100 for r in sorted(curve)]
        mean = np.asarray([v.mean() for v in values])
        half = np.asarray([1.96 * v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else 0
                           for v in values])  # fmt: skip
        ax.plot(ratios, mean, color=colour, marker=marker, label=name)
        ax.fill_between(ratios, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    ax.axhline(100 * before, color="#888888", linewidth=1, linestyle=":", label="whole network")
    ax.set(xlabel="synapses pruned, %", ylabel="accuracy on target classes, %", ylim=(0, 102))
    ax.set_title(title)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with replacing(path) as part:
        drawn.savefig(part, format="png", dpi=160)
