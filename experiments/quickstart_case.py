"""What the quickstart looks at: a network, its data, and one image before and after FGSM."""

import dataclasses
from typing import Any

import jax
import numpy as np

import nnslicer_jax as nns
from nnslicer_jax import attacks, data

# What the two images are called, in the order of the rows below.
KINDS = ("normal", "adversarial")
# Sizes of slices that tables and curves go through, beside the one asked for.
THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
# Classes differ in size; batches of one size smaller than any run one program.
_BATCH = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One network with its data, and the image that is looked at closely.

    Arrays of two rows hold the image as it is, then as FGSM left it.

    Attributes:
      trained: The network, its parameters and its card.
      graph: The traced network.
      profile: Mean activations over the training images.
      train_images: `[N, H, W, C]` float32 in 0..1.
      train_labels: `[N]` int32.
      test_images: As train_images.
      test_labels: As train_labels.
      test_predicted: `[N]` the network's classes of the test images.
      image_slices: Slices of the test images, and last of the adversarial image, for their
        predicted classes at theta, per sample.
      theta: Size of the slices.
      eps: FGSM's step, in units of the pixel range.
      seed: Of every draw.
      fooled: Number of test images classified rightly before FGSM and wrongly after.
      index: Which test image is looked at.
      images: `[2, H, W, C]`, that image.
      probabilities: `[2, K]`, the network's softmax of it.
      predicted: `[2]`, the network's classes of it.
      slices: Its two slices for the predicted classes, at theta.
    """

    trained: nns.zoo.Trained
    graph: nns.Graph
    profile: nns.Profile
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    test_predicted: np.ndarray
    image_slices: nns.Slice
    theta: float
    eps: float
    seed: int
    fooled: int
    index: int
    images: np.ndarray
    probabilities: np.ndarray
    predicted: np.ndarray
    slices: tuple[nns.Slice, nns.Slice]

    @property
    def params(self) -> Any:
        """The network's parameters."""
        return self.trained.variables

    @property
    def thetas(self) -> list[float]:
        """Sizes of slices that tables and curves go through."""
        return sorted({*THETAS, self.theta})

    @property
    def label(self) -> int:
        """True class of the image that is looked at."""
        return int(self.test_labels[self.index])


def prepare(*, theta: float, eps: float, seed: int, image: int | None = None) -> Case:
    """Loads the digits and their network, attacks the test images, profiles and slices.

    Args:
      theta: Size of the slices, 0..1.
      eps: FGSM's step, 0..1.
      seed: Draws the image among those that are right before FGSM and wrong after.
      image: Index of the test image to look at instead.

    Raises:
      ValueError: For values out of range, or an image that FGSM does not fool.
    """
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must be in 0..1, not {theta}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")
    digits = data.load("digits")
    trained = nns.zoo.load("digits_cnn")
    train, test = data.to_float(digits.train_images), data.to_float(digits.test_images)
    if image is not None and not 0 <= image < len(test):
        raise ValueError(f"image must be below {len(test)}, the number of test images, not {image}")

    apply, params = trained.model.apply, trained.variables
    attack = attacks.fgsm(None, apply, params, test, digits.test_labels, eps=eps)
    both = np.concatenate([test, attack.images])
    before, after = np.split(np.asarray(jax.jit(apply)(params, both)), 2)
    right = before.argmax(1) == digits.test_labels
    fooled = right & np.asarray(attack.success)
    index = _draw(fooled, eps, seed) if image is None else image
    if not fooled[index]:
        state = f"withstands FGSM at eps {eps:g}" if right[index] else "is predicted wrongly"
        some = ", ".join(map(str, np.flatnonzero(fooled)[:8])) or "none at this eps"
        raise ValueError(f"test image {index} {state}; images that FGSM fools: {some}")

    graph = nns.trace(apply, params, test[:1])
    profile = nns.profile(graph, params, train)
    # One batch, so that one program serves the whole test set and the adversarial image.
    changed = np.asarray(attack.images[index])
    all_images = np.concatenate([test, changed[None]])
    found = nns.slice_network(
        graph, params, profile, all_images, theta=theta, per_sample=True, batch_size=len(all_images)
    )
    pair = np.stack([before[index], after[index]])
    return Case(
        trained=trained,
        graph=graph,
        profile=profile,
        train_images=train,
        train_labels=digits.train_labels,
        test_images=test,
        test_labels=digits.test_labels,
        test_predicted=before.argmax(1),
        image_slices=found,
        theta=theta,
        eps=eps,
        seed=seed,
        fooled=int(fooled.sum()),
        index=index,
        images=np.stack([test[index], changed]),
        probabilities=np.asarray(jax.nn.softmax(pair)),
        predicted=pair.argmax(1),
        slices=(found.sample(index), found.sample(len(test))),
    )


def _draw(fooled: np.ndarray, eps: float, seed: int) -> int:
    if not fooled.any():
        raise ValueError(f"FGSM at eps {eps:g} fools the network on no test image; raise eps")
    return int(np.random.default_rng(seed).choice(np.flatnonzero(fooled)))


def class_slices(case: Case, theta: float) -> dict[int, nns.Slice]:
    """Slice of each class: its training images, for the class."""
    found = {}
    for label in sorted(set(case.train_labels.tolist())):
        images = case.train_images[case.train_labels == label]
        found[label] = nns.slice_network(
            case.graph, case.params, case.profile, images, np.full(len(images), label),
            theta=theta, batch_size=_BATCH,
        )  # fmt: skip
    return found


def layer_name(name: str) -> str:
    """A parameter's or a neuron's name without what is the same for all."""
    parts = name.split("/")
    return "/".join(p for p in parts[1:] if p != "kernel") if len(parts) > 1 else name
