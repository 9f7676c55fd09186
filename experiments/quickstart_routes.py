"""The quickstart's section on routes: the channels that a single image goes through."""

import numpy as np

from experiments import page
from experiments.quickstart_case import KINDS, Case, layer_name
from interpret import cdrp, plots
from interpret import routes as reading

SHARES = (0, 0.01, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
_TITLE = "The route of an image"


def routes(case: Case) -> page.Section:
    """Critical channels of the two images, and what switching such channels off costs."""
    images = np.concatenate([case.test_images, case.images[1:]])
    # One batch, so that one program serves all.
    found = cdrp.route(case.graph, case.params, images, batch_size=len(images))
    pair = found.take([case.index, len(images) - 1])
    tests = found.take(np.arange(len(case.test_images)))
    curves = {
        mode: reading.ablate(
            case.seed, case.graph, case.params, case.test_images, case.test_labels, tests, SHARES,
            mode, batch_size=len(case.test_images),
        )
        for mode in reading.MODES
    }  # fmt: skip
    html = page.paragraph(
        "Every channel of the convolutions is given a gate that multiplies it. For one image the "
        f"gates are moved by {found.options['iterations']} steps of gradient descent so that the "
        "network's probabilities stay while the sum of the gates falls (Wang et al., Interpret "
        "Neural Networks by Identifying Critical Data Routing Paths, CVPR 2018). What is left is "
        "the image's route; channels with a gate above 0.5 are critical to it."
    )
    html += page.beside([
        page.figure(
            plots.path(gates, found.layers),
            f"Gates of the {kind} image's route, a column of dots for each layer.",
            f"The {kind} image, taken for {predicted}.",
        )
        for kind, gates, predicted in zip(KINDS, pair.gates, case.predicted, strict=True)
    ])  # fmt: skip
    on = {name: reading.critical(found.layer(name)) for name in found.layers}
    apart = reading.correlation(pair.take([0]), pair.take([1]))
    numbers = {
        name: reading.separability(tests.layer(name), case.test_labels) for name in found.layers
    }
    html += page.table(
        "Routes by layer",
        ["layer", "channels", *(f"critical, {kind}" for kind in KINDS),
         "critical, mean of the test images", "correlation of the two routes",
         "test images whose 5 nearest by these gates are of their class"],
        [
            [
                layer_name(name), str(on[name].shape[1]),
                str(on[name][case.index].sum()), str(on[name][-1].sum()),
                f"{on[name][:-1].sum(1).mean():.1f}", f"{apart[name][0]:.2f}",
                f"{numbers[name].neighbours:.1%}",
            ]
            for name in found.layers
        ],
    )  # fmt: skip
    html += page.figure(
        plots.ablation(curves),
        "Curves of accuracy against the share of critical channels switched off, by their order.",
        "Critical channels of each layer switched off, for each test image its own: the largest "
        "gates first (top), the smallest first (bottom), or as many channels at random.",
    )
    at = SHARES.index(0.2)
    said = "; ".join(f"{mode} {one.top1[at].mean():.1%}" for mode, one in curves.items())
    return page.Section(
        _TITLE,
        html,
        (
            ("route", f"{sum(o[:-1].sum(1).mean() for o in on.values()):.1f} of "
                      f"{found.gates.shape[1]} channels are critical to a test image"),
            ("switched off", f"accuracy without {SHARES[at]:.0%} of the critical channels: {said}"),
        ),
    )  # fmt: skip
