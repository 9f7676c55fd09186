"""The figures of `targeted_pruning`: accuracy on the target classes against the ratio pruned."""

from collections.abc import Mapping
from pathlib import Path

from experiments import page
from experiments.target_classes import Accuracy
from nnslicer_jax.atomic import replacing

_STYLES = (":", "--")


def curves(
    found: Mapping[str, Mapping[float, Accuracy]],
    title: str,
    levels: Mapping[str, float],
    path: Path,
) -> None:
    """Draws mean accuracy over sets of target classes with its 95 % interval over test images.

    Args:
      found: Method to ratio to accuracy.
      title: Above the drawing.
      levels: Accuracies, 0..1, that are drawn as lines across, by name; at most two.
      path: The PNG file to write.
    """
    drawn = page.drawing(4.4)
    ax = drawn.subplots()
    apart = len(next(iter(found.values()))) == 1
    for place, (name, curve) in enumerate(found.items()):
        ratios = sorted(curve)
        values = [curve[ratio] for ratio in ratios]
        means = [value.percent for value in values]
        low, high = zip(*(value.percents for value in values), strict=True)
        colour, marker = page.COLOURS[place], page.MARKERS[place]
        # Of one ratio the methods stand side by side.
        at = [place] if apart else [100 * ratio for ratio in ratios]
        ax.errorbar(
            at, means, yerr=([m - v for m, v in zip(means, low, strict=True)],
                             [v - m for m, v in zip(means, high, strict=True)]),
            color=colour, marker=marker, capsize=3, label=name,
        )  # fmt: skip
    for (name, level), style in zip(levels.items(), _STYLES, strict=False):
        ax.axhline(100 * level, color="#666666", linewidth=1.2, linestyle=style, label=name)
    ax.set(ylabel="accuracy on target classes, %", ylim=(0, 102))
    if apart:
        (ratio,) = next(iter(found.values()))
        ax.set_xticks([])
        ax.set(xlabel=f"{ratio:.0%} of the synapses pruned", xlim=(-0.7, len(found) - 0.3))
    else:
        ax.set(xlabel="synapses pruned, %")
    ax.set_title(title)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with replacing(path) as part:
        drawn.savefig(part, format="png", dpi=160)
