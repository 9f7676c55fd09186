"""The quickstart's image and its slices as pictures (Figure 2 of the paper)."""

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from experiments import page
from experiments.quickstart_case import KINDS, Case, layer_name


def network(case: Case) -> page.Section:
    """The network and the image that is looked at."""
    card, label = case.trained.card, case.label
    right = int((case.test_predicted == case.test_labels).sum())
    count = len(case.test_labels)
    before, after = case.predicted
    html = page.paragraph(
        f"The network {card['name']} ({card['parameters']:,} parameters) was trained on "
        f"{len(case.train_labels):,} of scikit-learn's handwritten digits, 8 x 8 pixels each, and "
        f"classifies {right} of {count} test images rightly. Profiling ran the training images "
        "once and kept the mean of every neuron; a slice is made of differences from those means."
    )
    html += page.paragraph(
        f"FGSM moves every pixel by at most {case.eps:g} of the pixel range to where the loss "
        f"grows. It fools the network on {case.fooled} of the {right} images that were right. "
        f"Test image {case.index}, a {label}, is one of them: as it is the network says {before}, "
        f"after FGSM {after}. Its two slices are compared below."
    )
    html += page.beside([_images_figure(case), _probabilities_figure(case)])
    return page.Section(
        "The network and one image",
        html,
        (
            (
                "network",
                f"{card['name']}, {right} of {count} test images right ({right / count:.1%})",
            ),
            ("FGSM", f"eps {case.eps:g} fools it on {case.fooled} of those {right}"),
            (
                "image",
                f"test image {case.index}, a {label}: predicted {before} "
                f"({case.probabilities[0, before]:.1%}); after FGSM {after} "
                f"({case.probabilities[1, after]:.1%})",
            ),
        ),
    )


def pictures(case: Case) -> page.Section:
    """Both slices as pictures, layer by layer (Figure 2 of the paper)."""
    neurons = [_input_figure(case)]
    neurons += [
        _contrib_figure(case, name, "neurons") for name in case.graph.neurons() if "relu" in name
    ]
    synapses = [_contrib_figure(case, name, "synapses") for name in case.slices[0].synapses]
    html = page.paragraph(
        f"CONTRIB of the normal image for class {case.predicted[0]} and of the adversarial image "
        f"for class {case.predicted[1]}, the class the network predicts for each. Blue stands for "
        "the class, red against it, white is not in the slice. Both pictures of a layer share one "
        "scale, logarithmic beyond 1."
    )
    html += page.heading("Neurons") + page.beside(neurons)
    html += page.heading("Synapses") + page.beside(synapses)
    return page.Section("The slices as pictures", html)


def _images_figure(case: Case) -> str:
    drawn = page.drawing(2.5)
    panels = drawn.subplots(1, 3)
    step = case.images[1] - case.images[0]
    for ax, image, title in zip(
        panels[:2],
        case.images,
        (f"normal: {case.predicted[0]}", f"adversarial: {case.predicted[1]}"),
        strict=True,
    ):
        shown = ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=10)
    bar = drawn.colorbar(shown, ax=panels[:2], location="bottom", shrink=0.6)
    bar.set_label("pixel value")
    shown = panels[2].imshow(step[..., 0], cmap="PuOr", vmin=-case.eps, vmax=case.eps)
    panels[2].set_title("difference", fontsize=10)
    drawn.colorbar(shown, ax=panels[2], location="bottom", shrink=0.9).set_label("change")
    for ax in panels:
        ax.set(xticks=[], yticks=[])
    return page.figure(
        drawn,
        f"Three pictures of 8 by 8 pixels: a handwritten {case.label}, the same after FGSM, and "
        "the difference of the two.",
        f"Test image {case.index} as it is and after FGSM; above each what the network predicts.",
    )


def _probabilities_figure(case: Case) -> str:
    drawn = page.drawing(2.5)
    ax = drawn.subplots()
    page.grouped_bars(ax, case.probabilities, KINDS)
    ax.set(xlabel="class", ylabel="probability", ylim=(0, 1.02))
    return page.figure(
        drawn,
        f"Bars of the network's probability of each class for both images: {case.predicted[0]} "
        f"leads for the normal, {case.predicted[1]} for the adversarial one.",
        "What the network makes of the two images.",
    )


def _input_figure(case: Case) -> str:
    """Both images, and below each the CONTRIB of its pixels."""
    drawn = page.drawing(5.6)
    (above, below) = drawn.subplots(2, 2)
    contribs = [piece.neurons["input"] for piece in case.slices]
    for ax, image, kind, predicted in zip(above, case.images, KINDS, case.predicted, strict=True):
        ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.set_title(f"{kind}, predicted {predicted}", fontsize=10)
        ax.set(xticks=[], yticks=[], xlabel="input")
    _show(drawn, below, contribs, "CONTRIB of its pixels")
    return page.figure(
        drawn,
        "The normal and the adversarial image, and below each the CONTRIB of its pixels.",
        _counts("input, neurons", contribs),
    )


def _contrib_figure(case: Case, name: str, of: str) -> str:
    """One layer's CONTRIB of both images, positive blue and negative red."""
    contribs = [getattr(piece, of)[name] for piece in case.slices]
    rows, columns = _picture(contribs[0]).shape
    # Two panels above each other for wide pictures, else side by side.
    wide = columns > 1.6 * rows
    height = 1.8 + 10.4 * rows / columns if wide else 1.3 + 2.6 * rows / columns
    drawn = page.drawing(height)
    panels = drawn.subplots(*((2, 1) if wide else (1, 2)))
    for ax, kind, predicted in zip(panels, KINDS, case.predicted, strict=True):
        ax.set_title(f"{kind}, for class {predicted}", fontsize=10)
    across, down = _axis_names(contribs[0].shape, of)
    _show(drawn, panels, contribs, across, down)
    return page.figure(
        drawn,
        f"CONTRIB of the {of} of {layer_name(name)} as two pictures, normal and adversarial.",
        _counts(f"{layer_name(name)}, {of}", contribs),
    )


def _show(
    drawn: Figure, panels: np.ndarray, contribs: list[np.ndarray], across: str, down: str = ""
) -> None:
    """Draws CONTRIBs on one scale, with its bar."""
    most = max(1, *(int(np.abs(c).max()) for c in contribs))
    norm = SymLogNorm(linthresh=1, vmin=-most, vmax=most)
    for ax, contrib in zip(panels, contribs, strict=True):
        ax.set_facecolor(page.ABSENT)
        shown = ax.imshow(_picture(contrib), cmap="RdBu", norm=norm, interpolation="nearest")
        ax.set(xticks=[], yticks=[], xlabel=across, ylabel=down)
    bar = drawn.colorbar(shown, ax=list(panels), location="bottom", shrink=0.7, aspect=40)
    bar.set_label("CONTRIB")
    ticks = [*(10**power for power in range(len(str(most))) if 10**power < most), most]
    bar.set_ticks([*(-tick for tick in reversed(ticks)), 0, *ticks])
    bar.ax.xaxis.set_major_formatter("{x:.0f}")
    bar.minorticks_off()


def _counts(what: str, contribs: list[np.ndarray]) -> str:
    shape = " x ".join(map(str, contribs[0].shape))
    normal, adversarial = (f"{np.count_nonzero(c):,}" for c in contribs)
    return (
        f"{what} ({shape}): of {contribs[0].size:,}, {normal} are in the normal slice and "
        f"{adversarial} in the adversarial one."
    )


def _picture(contrib: np.ndarray) -> np.ndarray:
    """CONTRIB of one layer as one picture `[H, W]`; NaN between the tiles.

    Activations `[H, W, C]` become one tile a channel; kernels `[KH, KW, I, O]` one tile for each
    input (down) and output channel (across), a single input channel wrapped; dense kernels
    `[I, O]` outputs down and inputs across; vectors one row.
    """
    values = contrib.astype(np.float64)
    if values.ndim == 4 and values.shape[2] > 1:
        return _mosaic(values.transpose(2, 3, 0, 1))
    if values.ndim == 4:
        values = values[:, :, 0]
    if values.ndim == 3:
        tiles = values.transpose(2, 0, 1)
        across = int(np.ceil(np.sqrt(len(tiles))))
        fill = -len(tiles) % across
        tiles = np.concatenate([tiles, np.full((fill, *tiles.shape[1:]), np.nan)])
        return _mosaic(tiles.reshape(-1, across, *tiles.shape[1:]))
    return values.T if values.ndim == 2 else values[None]


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """`[R, C, H, W]` to one picture, the tiles a pixel of NaN apart."""
    r, c, h, w = tiles.shape
    framed = np.full((r, c, h + 1, w + 1), np.nan)
    framed[:, :, :h, :w] = tiles
    return framed.transpose(0, 2, 1, 3).reshape(r * (h + 1), c * (w + 1))[:-1, :-1]


def _axis_names(shape: tuple[int, ...], of: str) -> tuple[str, str]:
    """What lies across and down in `_picture` of a shape."""
    if of == "synapses" and len(shape) == 2:
        return "input unit", "output unit"
    if of == "synapses" and shape[2] > 1:
        return "output channel", "input channel"
    if of == "synapses":
        return "one tile an output channel", ""
    return ("one tile a channel" if len(shape) == 3 else "unit"), ""
