"""What stands before and behind every runtime: pixels prepared for it, probabilities made of it."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from difftest.pair import ModelError

Preprocess = Callable[[Any], Any]
OUTPUTS = ("logits", "probabilities")


@dataclass(frozen=True)
class Normalise:
    """(x - mean) / std of float32 pixels 0..255 ``[B, H, W, C]``, numpy or JAX.

    Attributes:
        mean: one number, or one a channel.
        std: the same, positive.
    """

    mean: float | Sequence[float]
    std: float | Sequence[float]

    def __post_init__(self):
        mean, std = (np.ravel(np.asarray(value, np.float64)) for value in (self.mean, self.std))
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError(
                f"mean is {self.mean}, std is {self.std}; accepted are finite numbers, std above 0"
            )

    def __call__(self, x: Any) -> Any:
        """float32 ``[B, H, W, C]`` -> the same shape."""
        mean, std = (
            np.asarray(value, np.float32).reshape(1, 1, 1, -1) for value in (self.mean, self.std)
        )
        return (x - mean) / std


def prepared(images: np.ndarray, preprocess: Preprocess | None) -> np.ndarray:
    """Images as a runtime takes them: float32, whatever shape the preprocessing gives.

    Args:
        images: uint8 ``[B, H, W, C]``.
        preprocess: from float32 0..255; None: x / 255.

    Raises:
        ModelError: other images, or not as many rows as images.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ModelError(
            f"images are {images.dtype} of shape {images.shape}; accepted is uint8 [B, H, W, C]"
        )
    x = images.astype(np.float32)
    x = x / np.float32(255) if preprocess is None else np.asarray(preprocess(x), np.float32)
    if len(x) != len(images):
        raise ModelError(f"preprocess gave the shape {x.shape} for {len(images)} images")
    return x


def probabilities(out: np.ndarray, outputs: str) -> np.ndarray:
    """float32 ``[B, K]`` of what a runtime gave, by a softmax where it gave logits."""
    out = np.asarray(out, np.float32)
    if outputs == "probabilities":
        return out
    out = np.exp(out - out.max(axis=-1, keepdims=True))
    return out / out.sum(axis=-1, keepdims=True)


def check_outputs(outputs: str) -> None:
    """Raises ValueError unless ``outputs`` is one of the two."""
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs is {outputs!r}; accepted are {', '.join(OUTPUTS)}")


def optional(module: str, package: str, what: str) -> ModuleType:
    """Imports a library that only ``what`` needs.

    Raises:
        ModuleNotFoundError: it is not installed; says which package to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{what} needs the package {package}, which the extra 'difftest' installs",
            name=error.name,
        ) from None


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
