"""The quickstart's section on how large slices are, by layer and by theta."""

import numpy as np

import nnslicer_jax as nns
from experiments import page
from experiments.quickstart_case import Case, layer_name


def sizes(case: Case) -> page.Section:
    """How many synapses and neurons are in the slices, by layer."""
    normal, adversarial = case.slices
    paths = nns.effective_path(case.graph, case.params, case.images, per_sample=True, batch_size=2)
    path_normal, path_adversarial = paths.sample(0), paths.sample(1)
    rows = []
    for name in [*normal.synapses, None]:
        both = normal.intersection(adversarial).size(name)[0]
        kept = [p.size(name) for p in (normal, adversarial, path_normal, path_adversarial)]
        total = kept[0][1]
        cells = [f"{k:,} ({k / total:.1%})" for k, _ in kept]
        rows.append(
            [layer_name(name) if name else "all", f"{total:,}", *cells[:2], f"{both:,}", *cells[2:]]
        )
    html = page.paragraph(
        "The smaller theta, the more terms of each sum are kept; theta 0 keeps every term that is "
        "not zero. EffectivePath walks the same graph by other rules, at its own "
        f"theta of {paths.criterion['theta']:g}."
    )
    html += page.table(
        f"Synapses in the slices, theta {case.theta:g}",
        ["layer", "synapses", "normal", "adversarial", "in both",
         "EffectivePath, normal", "EffectivePath, adversarial"],
        rows,
    )  # fmt: skip
    html += page.table(
        f"Neurons in the slices, theta {case.theta:g}: activations, and channels with any",
        [
            "neuron",
            "activations",
            "normal",
            "adversarial",
            "channels",
            "normal, channels",
            "adversarial, channels",
        ],
        [_neuron_row(case, name) for name in case.graph.neurons()],
    )
    html += _sizes_figure(case)
    total = normal.size()[1]
    similar = normal.similarity(adversarial)
    return page.Section(
        "How large the slices are",
        html,
        (
            (
                "slices",
                f"normal {normal.size()[0]:,}, adversarial {adversarial.size()[0]:,} of {total:,} "
                f"synapses at theta {case.theta:g}; Jaccard similarity {similar:.2f}",
            ),
            (
                "EffectivePath",
                f"normal {path_normal.size()[0]:,}, adversarial {path_adversarial.size()[0]:,}; "
                f"Jaccard similarity {path_normal.similarity(path_adversarial):.2f}",
            ),
        ),
    )


def _neuron_row(case: Case, name: str) -> list[str]:
    axis = case.slices[0].axes[name]
    contrib = [piece.neurons[name] for piece in case.slices]
    units = [np.moveaxis(c, axis, -1).reshape(-1, c.shape[axis]).any(0) for c in contrib]
    kept = [f"{np.count_nonzero(c):,} ({np.count_nonzero(c) / c.size:.1%})" for c in contrib]
    channels = [str(int(u.sum())) for u in units]
    width = str(contrib[0].shape[axis])
    return [layer_name(name), f"{contrib[0].size:,}", *kept, width, *channels]


def _sizes_figure(case: Case) -> str:
    """Share of synapses in slices of single images against theta, by layer."""
    images = np.concatenate([case.test_images, case.images[1:]])
    shares: dict[str, list[float]] = {name: [] for name in case.image_slices.synapses}
    thetas = case.thetas
    for theta in thetas:
        pieces = nns.slice_network(
            case.graph, case.params, case.profile, images, theta=theta, per_sample=True,
            batch_size=len(images),
        )  # fmt: skip
        for name, contrib in pieces.synapses.items():
            shares[name].append(float((contrib[:-1] != 0).mean()))
    drawn = page.drawing(3.2)
    ax = drawn.subplots()
    for (name, share), colour, marker in zip(
        shares.items(), page.COLOURS * len(shares), page.MARKERS * len(shares), strict=False
    ):
        ax.plot(
            thetas, np.multiply(share, 100), color=colour, marker=marker, label=layer_name(name)
        )
    ax.set(xlabel="theta", ylabel="synapses in the slice, %", ylim=(0, None))
    ax.legend(frameon=False)
    return page.figure(
        drawn,
        "Curves, one a layer, of the share of synapses in a slice: they fall as theta grows.",
        f"Mean over the slices of {len(case.test_images)} single test images, each for its "
        "predicted class.",
    )
