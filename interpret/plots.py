"""Pictures of routes for a paper or a page, each a matplotlib figure.

Colours are Okabe and Ito's, which colour-blind readers tell apart; curves differ in markers too.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.cluster import hierarchy

from interpret.faithfulness import Curves
from interpret.gates import Layers
from interpret.routes import Ablation, Clustering, Separability
from nnslicer_jax.atomic import replacing

# Yellow left out, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*<>"
_DPI = 160


def save(drawn: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # The program's version would make equal pictures differ.
    drawn.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    with replacing(path) as part:
        part.write_bytes(buffer.getvalue())


def short(names: Sequence[str]) -> list[str]:
    """Layer names without the leading module that all share."""
    parts = [name.split("/") for name in names]
    if len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def ablation(found: Mapping[str, Ablation]) -> Figure:
    """Accuracy over the share of critical nodes switched off, a curve for each mode."""
    drawn = _figure(6.8, 3.2)
    panels = drawn.subplots(1, 2, sharey=True)
    for ax, measure, title in zip(panels, ("top1", "top5"), ("top-1", "top-5"), strict=True):
        for number, (mode, one) in enumerate(found.items()):
            accuracy = 100 * getattr(one, measure).mean(1)
            _curve(ax, 100 * one.shares, accuracy, number, mode)
        ax.set(title=title, xlabel="critical nodes switched off [%]", ylim=(-2, 102))
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy [%]")
    panels[0].legend(frameon=False)
    return drawn


def drift(
    own: Mapping[str, np.ndarray], target: Mapping[str, np.ndarray], *, title: str = ""
) -> Figure:
    """Correlations along depth: a line with the original's route, violins with the target class's.

    Args:
      own: Layer to correlations of adversarial inputs with their originals, any shape.
      target: Layer to correlations with images of the target class, any shape.
      title: Of the figure.
    """
    drawn = _figure(max(5.6, 0.55 * len(own) + 1.5), 3.6)
    ax = drawn.subplots()
    places = np.arange(len(own))
    means = [np.nanmean(values) if np.isfinite(values).any() else np.nan for values in own.values()]
    for place, name in zip(places, own, strict=True):
        values = np.asarray(target[name], float).ravel()
        values = values[np.isfinite(values)]
        # A density needs values that differ.
        if len(values) > 1 and np.ptp(values) > 0:
            parts: dict[str, Any] = ax.violinplot(values, [place], widths=0.8, showmedians=True)
            parts["bodies"][0].set(facecolor=COLOURS[0], alpha=0.35)
            for key in ("cbars", "cmins", "cmaxes", "cmedians"):
                parts[key].set(color=COLOURS[0], linewidth=1)
    ax.plot([], [], color=COLOURS[0], linewidth=6, alpha=0.35, label="images of the target class")
    _curve(ax, places, means, 1, "the original image (mean)")
    ax.set_xticks(places, short(list(own)), rotation=45, ha="right", fontsize=8)
    ax.set(xlabel="layer, from input to output", ylabel="correlation of gates", title=title)
    ax.grid(axis="y", alpha=0.3)
    # Violins may reach anywhere within the axes.
    drawn.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    return drawn


def embeddings(
    planes: Mapping[str, np.ndarray],
    labels: np.ndarray,
    numbers: Mapping[str, Separability] | None = None,
    classes: Sequence[str] | None = None,
) -> Figure:
    """One t-SNE picture a layer, coloured by class.

    Args:
      planes: Layer to points `[N, 2]`.
      labels: `[N]` integers.
      numbers: Layer to what its title says of it.
      classes: Names of the labels; None for their numbers.
    """
    across = min(3, len(planes))
    down = -(-len(planes) // across)
    drawn = _figure(2.5 * across + 1, 2.6 * down + 0.4)
    panels = drawn.subplots(down, across, squeeze=False).ravel()
    present = np.unique(labels)
    for ax, (name, points), title in zip(panels, planes.items(), short(list(planes)), strict=False):
        for number, label in enumerate(present):
            here = labels == label
            # More classes than colours: markers tell the rounds apart.
            ax.scatter(
                *points[here].T, s=9, color=COLOURS[number % len(COLOURS)], linewidths=0,
                marker=MARKERS[number // len(COLOURS) % len(MARKERS)], alpha=0.75,
                label=str(label) if classes is None else classes[label],
            )  # fmt: skip
        if numbers is not None:
            n = numbers[name]
            title += f"\nk-NN {n.neighbours:.2f}, silhouette {n.silhouette:.2f}"
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[])
    for ax in panels[len(planes) :]:
        ax.set_axis_off()
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(
        handles, names, title="class", loc="outside right center", frameon=False, markerscale=2
    )
    drawn.supxlabel("t-SNE, first axis", fontsize=9)
    drawn.supylabel("t-SNE, second axis", fontsize=9)
    return drawn


def separability(numbers: Mapping[str, Separability]) -> Figure:
    """k-NN accuracy and silhouette along depth, with what guessing reaches."""
    drawn = _figure(max(5.6, 0.5 * len(numbers) + 1.5), 3.2)
    ax = drawn.subplots()
    places = np.arange(len(numbers))
    found = list(numbers.values())
    _curve(ax, places, [n.neighbours for n in found], 0, "k-NN accuracy, leave-one-out")
    _curve(ax, places, [n.silhouette for n in found], 1, "silhouette")
    ax.axhline(found[0].chance, color=COLOURS[-1], linestyle=":", label="most frequent class")
    ax.set_xticks(places, short(list(numbers)), rotation=45, ha="right", fontsize=8)
    ax.set(xlabel="layer, from input to output", ylabel="separability of classes")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    return drawn


def dendrogram(
    clustering: Clustering, images: np.ndarray, odd: Sequence[int] = (), clusters: int = 3
) -> Figure:
    """How routes merge, with each image under its leaf.

    Args:
      clustering: Of N routes.
      images: `[N, H, W, C]` in 0..1, C 1 or 3.
      odd: Images framed as outliers.
      clusters: How many clusters are coloured.
    """
    count = len(clustering.order)
    drawn = _figure(max(5.6, 0.32 * count + 1), 3.4)
    above, below = drawn.subplots(2, 1, height_ratios=(4, 1))
    merges = clustering.merges
    cut = merges[-(clusters - 1), 2] if 1 < clusters <= count else 0
    hierarchy.set_link_color_palette(list(COLOURS[:6]))
    try:
        hierarchy.dendrogram(
            merges, ax=above, no_labels=True, color_threshold=cut, above_threshold_color="#666666"
        )
    finally:
        hierarchy.set_link_color_palette(None)
    above.set(ylabel="distance at which routes merge", xlim=(0, 10 * count))
    for side in ("top", "right", "bottom"):
        above.spines[side].set_visible(False)
    for place, image in enumerate(clustering.order):
        picture = images[image][..., 0] if images.shape[-1] == 1 else images[image]
        below.imshow(
            picture, cmap="gray", vmin=0, vmax=1, extent=(place + 0.05, place + 0.95, 0, 0.9)
        )
        if image in odd:
            frame = np.array([(0.02, -0.03), (0.98, -0.03), (0.98, 0.93), (0.02, 0.93)])
            below.fill(*(frame + (place, 0)).T, fill=False, edgecolor=COLOURS[1], linewidth=2)
    below.set(xlim=(0, count), ylim=(-0.05, 1), yticks=[], xticks=[], aspect="auto")
    below.set_xlabel("images, in the order of merging" + ("; framed: outliers" if len(odd) else ""))
    for side in below.spines.values():
        side.set_visible(False)
    return drawn


def path(gates: np.ndarray, layers: Layers, threshold: float = 0.5, most: int = 12) -> Figure:
    """One route drawn across the layers: every gate as a dot, lines between the critical nodes.

    Args:
      gates: `[G]`, of one image.
      layers: Where each layer's gates stand.
      threshold: Above it a node is critical.
      most: Of each layer's critical nodes, how many of the largest the lines join.
    """
    drawn = _figure(max(5.6, 0.8 * len(layers) + 1.5), 3.8)
    ax = drawn.subplots()
    top = max(float(gates.max()), threshold, 1e-6)
    before: np.ndarray = np.zeros((0, 2))
    for place, part in enumerate(layers.values()):
        row = gates[part]
        heights = (np.arange(len(row)) + 0.5) / len(row)
        on = row > threshold
        ax.scatter(np.full((~on).sum(), place), heights[~on], s=3, color="#bbbbbb", linewidths=0)
        ax.scatter(
            np.full(on.sum(), place), heights[on], s=6 + 60 * row[on] / top, color=COLOURS[0],
            alpha=0.8, linewidths=0, zorder=3,
        )  # fmt: skip
        chosen = np.flatnonzero(on)
        chosen = chosen[np.argsort(-row[chosen], kind="stable")[:most]]
        here = np.stack([np.full(len(chosen), float(place)), heights[chosen]], 1)
        lines = [(a, b) for a in before for b in here]
        ax.add_collection(LineCollection(lines, colors=COLOURS[5], linewidths=0.5, alpha=0.35))
        before = here
    ax.set_xticks(range(len(layers)), short(list(layers)), rotation=45, ha="right", fontsize=8)
    ax.set(xlabel="layer, from input to output", ylabel="channel, as a share of its layer")
    ax.scatter([], [], s=30, color=COLOURS[0], label="critical node (size: its gate)")
    ax.scatter([], [], s=6, color="#bbbbbb", label="other node")
    ax.plot([], [], color=COLOURS[5], label=f"between the {most} largest")
    drawn.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=8)
    ax.margins(x=0.05)
    return drawn


def faithfulness(found: Mapping[str, Curves]) -> Figure:
    """Deletion and insertion curves, one colour an explanation, with their mean areas."""
    drawn = _figure(7.6, 4.4)
    panels = drawn.subplots(1, 2, sharey=True)
    for ax, which, title in zip(
        panels, (0, 1), ("deletion (lower is better)", "insertion (higher is better)"), strict=True
    ):
        for number, (name, one) in enumerate(found.items()):
            rows = (one.deletion, one.insertion)[which]
            label = f"{name}: {one.areas[which].mean():.3f}"
            _curve(ax, 100 * one.shares, rows.mean(0), number, label)
        ax.set(title=title, xlabel="units, best first [%]", ylim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
        # Curves may lie anywhere within the axes.
        ax.legend(
            frameon=False, fontsize=8, title="area", title_fontsize=8, ncols=2,
            loc="upper center", bbox_to_anchor=(0.5, -0.16),
        )  # fmt: skip
    panels[0].set_ylabel("probability of the predicted class")
    return drawn


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _curve(ax: Axes, x: Any, y: Any, number: int, label: str) -> None:
    ax.plot(
        x, y, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
        markersize=4, linewidth=1.4, label=label,
    )  # fmt: skip
