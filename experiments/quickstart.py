"""The main job: slices a trained digits network and writes what it finds as one HTML page.

Takes no files and no network: data and weights come with scikit-learn and with this repository.
A new section is a function of the `Case` that returns a `Section`, and one line in `SECTIONS`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from absl import app, flags, logging

from experiments import (
    page,
    provenance,
    quickstart_agreement,
    quickstart_detection,
    quickstart_difftest,
    quickstart_pictures,
    quickstart_protection,
    quickstart_pruning,
    quickstart_robust_pruning,
    quickstart_routes,
    quickstart_similarity,
    quickstart_sizes,
)
from experiments.quickstart_case import Case, prepare
from experiments.record import write_text

SECTIONS: tuple[Callable[[Case], page.Section], ...] = (
    quickstart_pictures.network,
    quickstart_pictures.pictures,
    quickstart_sizes.sizes,
    quickstart_agreement.agreement,
    quickstart_similarity.similarity,
    quickstart_detection.detection,
    quickstart_pruning.pruning,
    quickstart_robust_pruning.robust_pruning,
    quickstart_protection.protection,
    quickstart_routes.routes,
    quickstart_difftest.deviations,
)

_TITLE = "Slicing a network that reads handwritten digits"
_LEAD = (
    "A slice is the part of a network that contributes significantly to chosen outputs for chosen "
    "inputs (NNSlicer: Zhang et al., Dynamic Slicing for Deep Neural Networks, ESEC/FSE 2020). "
    "Each neuron and synapse in it has a CONTRIB: a whole number whose sign says whether it speaks "
    "for or against the output. Theta, 0 to 1, sets how much may be left out of each sum."
)
_PACKAGES = ("jax", "flax", "numpy", "scikit-learn")


def run(
    out: Path, *, theta: float, eps: float, seed: int, image: int | None = None,
    sections: Sequence[Callable[[Case], page.Section]] = SECTIONS,
) -> str:  # fmt: skip
    """Writes the page.

    Args:
      out: The HTML file to write.
      theta: Size of the slices, 0..1.
      eps: Step of FGSM, 0..1, the pixel range being 1.
      seed: Draws the image, and the random synapses that slices are compared with.
      image: Index of a test image to look at instead of one drawn.
      sections: What stands on the page.

    Returns:
      The summary, several lines.

    Raises:
      ValueError: For an option out of range or an image that FGSM does not fool.
      OSError: If the file cannot be written.
    """
    if out.is_dir():
        raise ValueError(f"out must be a file to write, {out} is a folder")
    start = time.monotonic()
    # Before the run: the clone may change while it lasts.
    origin = provenance.origin(data="digits", seeds=[seed])
    case = prepare(theta=theta, eps=eps, seed=seed, image=image)
    made = []
    for number, section in enumerate(sections, 1):
        made.append(section(case))
        seconds = time.monotonic() - start
        print(f"{number}/{len(sections)} {made[-1].title}, {seconds:.0f} s", file=sys.stderr)
    text = page.render(
        _TITLE,
        _LEAD,
        made,
        [
            ("command", origin["command"]),
            ("options", f"theta {theta:g}, eps {eps:g}, seed {seed}, test image {case.index}"),
            ("data", f"scikit-learn's handwritten digits: {len(case.train_labels):,} training and "
                     f"{len(case.test_labels)} test images"),
            ("network", f"made by {case.trained.card['command']}"),
            ("commit", origin["commit"]),
            ("hardware", origin["hardware"]),
            ("packages", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
        ],
    )  # fmt: skip
    write_text(out, text)
    return f"{_TITLE}, theta {theta:g}\n{page.summary_lines(made)}"


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # JAX reports every accelerator that it does not find.
    logging.set_verbosity(logging.WARNING)
    options = flags.FLAGS
    out = Path(options.out)
    try:
        print(
            run(out, theta=options.theta, eps=options.eps, seed=options.seed, image=options.image)
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"\nPage: {out}")


if __name__ == "__main__":
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("out", "out/quickstart.html", "HTML file to write")
    flags.DEFINE_float("theta", 0.2, "size of the slices, 0 (everything) to 1")
    flags.DEFINE_float("eps", 0.1, "step of FGSM, 0 to 1, the pixel range being 1")
    flags.DEFINE_integer("seed", 0, "draws the image to look at, and the random synapses")
    flags.DEFINE_integer("image", None, "test image to look at instead of one drawn")
    app.run(main)
