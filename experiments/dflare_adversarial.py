"""Whether adversarial images of the original model trigger a pair.

Tian et al., TOSEM 2023, section 2.6: of 10,000 adversarial images that FGSM and C&W make of MNIST
for three original models, 18.6 are triggers on average. Which models and budgets is not said; here
FGSM goes up to three budgets and C&W is told the distance it found.

``python -m experiments.dflare_adversarial --pairs_dir ... --data_dir ...`` takes two cores a few
minutes.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import difftest
from experiments import pairs
from experiments.provenance import ROOT, origin
from experiments.robust_pruning import write
from nnslicer_jax import attacks, data

TITLE = "Adversarial images as triggers"
TEXT = (
    "Tian et al., TOSEM 2023, section 2.6. Test images that the original model labels rightly are "
    "attacked (it alone is looked at) and rounded to 8 bits. Of the images that fool it then, "
    "triggers are those that the compressed model labels in another way; the paper's 18.6 of "
    "10,000 is over both attacks and three models that it does not name."
)
PUBLISHED = 18.6
EPS = (0.1, 0.2, 0.3)


def logits_of(model: difftest.JaxModel) -> Callable[[Any, jax.Array], jax.Array]:
    """From parameters and images `[B, H, W, C]` in 0..1 to logits `[B, K]`, or log-probabilities.

    The softmax of log-probabilities is the probabilities: attacks may take them for logits.
    """

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = images if model.preprocess is None else model.preprocess(images * 255)
        out = model.apply(params, x)
        return out if model.outputs == "logits" else jnp.log(jnp.maximum(out, 1e-30))

    return apply


def measure(
    title: str, pair: difftest.ModelPair, images: np.ndarray, labels: np.ndarray, most: int,
    steps: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The row fields of one pair.

    Args:
      title: Of the pair.
      pair: Its original is a `JaxModel`.
      images: uint8 `[N, H, W, C]`.
      labels: int `[N]`.
      most: Images that C&W attacks.
      steps: Of C&W, for each constant.

    Raises:
      ValueError: The original is no JAX function, so that there are no gradients.
    """
    model = pair.original
    if not isinstance(model, difftest.JaxModel):
        raise ValueError(f"{title}: the original is no JAX function, attacks need its gradients")
    apply = logits_of(model)
    right = np.concatenate(
        [model(images[at : at + 256]).argmax(1) for at in range(0, len(images), 256)]
    ) == labels  # fmt: skip
    images, labels = images[right], labels[right]
    clean = data.to_float(images)
    made = []
    for eps in EPS:
        found = attacks.fgsm(None, apply, model.params, clean, labels, eps=eps)
        made.append(_row(title, f"FGSM {eps:g}", pair, np.asarray(found.images), labels, ""))
    found = attacks.carlini_wagner(
        None, apply, model.params, clean[:most], labels[:most], steps=steps, searches=5
    )
    far = np.asarray(found.distance)[np.asarray(found.success)]
    middle = f"{np.median(far):.2f}" if len(far) else "none"
    note = f"{steps} steps for each of 5 constants, median L2 {middle} before rounding"
    made.append(_row(title, "C&W", pair, np.asarray(found.images), labels[:most], note))
    return made


def _row(
    title: str, attack: str, pair: difftest.ModelPair, images: np.ndarray, labels: np.ndarray,
    note: str,
) -> dict[str, Any]:  # fmt: skip
    pixels = np.rint(255 * images).astype(np.uint8)
    original, compressed = pairs.labels_of(pair, pixels)
    fooled = original != labels
    differ = fooled & (original != compressed)
    share = 10_000 * float(differ.sum()) / max(1, int(fooled.sum()))
    return {
        "row": f"{title}, {attack}", "metric": "triggers among 10,000 adversarial images",
        "ours": round(share, 1), "published": PUBLISHED, "n": int(fooled.sum()),
        "note": ", ".join(filter(None, [f"{differ.sum()} of {fooled.sum()}", note])),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    about = origin(data="", seeds=[0])
    made = []
    try:
        for name in given.pairs:
            pair, dataset, row = pairs.pair(name, given.data_dir, given.pairs_dir)
            whole = data.load(dataset, given.data_dir)
            images = np.asarray(whole.test_images[: given.images])
            labels = np.asarray(whole.test_labels[: given.images])
            rows = measure(pairs.titled(name, row), pair, images, labels, given.most, given.steps)
            made += [{**row, "data": f"{whole.name}, test set"} for row in rows]
    except (OSError, ValueError, difftest.ModelError) as error:
        sys.exit(f"error: {error}")
    write(Path(given.out), "dflare_adversarial", TITLE, TEXT, about, made)


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list("pairs", ["lenet1", "lenet5"], "of experiments.pairs, of MNIST")
    flags.DEFINE_string("pairs_dir", None, "folder of the published pairs' files")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_integer("images", 10_000, "test images that FGSM attacks", lower_bound=1)
    flags.DEFINE_integer("most", 1_000, "test images that C&W attacks", lower_bound=1)
    flags.DEFINE_integer("steps", 200, "of C&W for each constant", lower_bound=1)
    results = ROOT / "experiments" / "results" / "dflare_adversarial.json"
    flags.DEFINE_string("out", str(results), "results file")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
