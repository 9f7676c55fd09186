"""A model and its compressed twin, as two functions from images to probabilities.

Tian et al., TOSEM 2023, section 2.3. Models are black boxes: only probabilities are asked for.
A ``JaxModel`` says more, its function and its parameters, so that a search of a pair of them can
stay on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difftest.narrow import quick

Model = Callable[[np.ndarray], Any]
_OUTPUTS = ("logits", "probabilities")


class ModelError(RuntimeError):
    """A model failed on an image: it raised, hung, or gave something that is no probability."""


@dataclass(frozen=True, eq=False)
class JaxModel:
    """A pure JAX function as a model: uint8 ``[B, H, W, C]`` -> float32 ``[B, K]``.

    Attributes:
        apply: ``apply(params, x)`` with x float32 ``[B, H, W, C]``.
        params: any pytree.
        preprocess: from float32 0..255 to what ``apply`` takes; None: x / 255.
        outputs: "logits", or "probabilities" where the function ends in a softmax.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    preprocess: Callable[[jax.Array], jax.Array] | None = None
    outputs: str = "logits"

    def traced(self, params: Any, images: jax.Array) -> jax.Array:
        """Probabilities float32 ``[B, K]`` of uint8 images, inside someone's jit."""
        x = images.astype(jnp.float32)
        x = x / 255 if self.preprocess is None else self.preprocess(x)
        out = quick(self.apply)(params, x).astype(jnp.float32)
        return jax.nn.softmax(out) if self.outputs == "logits" else out

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 ``[B, K]`` of uint8 images ``[B, H, W, C]``."""
        size = len(images)
        # Batches are filled to a power of two: a shrinking batch compiles few sizes, not each.
        room = 1 << max(size - 1, 0).bit_length()
        filled = np.concatenate([images, np.repeat(images[-1:], room - size, axis=0)])
        return np.asarray(self._program(self.params, filled))[:size]

    @cached_property
    def _program(self) -> Any:
        """Compiled here, not for the module: its memory goes with the model."""
        return jax.jit(self.traced)


def jax_model(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
    *,
    outputs: str = "logits",
) -> JaxModel:
    """Makes a model of a pure function ``apply(params, x)``.

    Args:
        apply: x is float32 ``[B, H, W, C]``; gives ``[B, K]``.
        params: any pytree.
        preprocess: from float32 ``[B, H, W, C]``, 0..255, to what ``apply`` takes; None: x / 255.
        outputs: "logits" (a softmax is added) or "probabilities".

    Raises:
        ValueError: another ``outputs``.
    """
    if outputs not in _OUTPUTS:
        raise ValueError(f"outputs is {outputs!r}; accepted are {', '.join(_OUTPUTS)}")
    return JaxModel(apply, params, preprocess, outputs)


@dataclass(frozen=True, eq=False)
class ModelPair:
    """The original model and its compressed twin.

    Attributes:
        original: uint8 ``[B, H, W, C]`` -> probabilities ``[B, K]``.
        compressed: the same signature, the same K.
    """

    original: Model
    compressed: Model

    @property
    def on_device(self) -> bool:
        """Whether both models are JAX functions, so that a search can stay on the device."""
        return isinstance(self.original, JaxModel) and isinstance(self.compressed, JaxModel)

    def probabilities(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Asks both models: one query an image.

        Args:
            images: uint8 ``[B, H, W, C]``.

        Returns:
            Probabilities of the original and of the compressed model, float32 ``[B, K]``.

        Raises:
            ModelError: one raised, gave another shape or number of classes, or no probabilities.
        """
        original = _asked("original", self.original, images)
        compressed = _asked("compressed", self.compressed, images)
        if original.shape != compressed.shape:
            raise ModelError(
                f"the original model knows {original.shape[1]} classes, the compressed one "
                f"{compressed.shape[1]}; a pair has the same classes"
            )
        return original, compressed


def _asked(name: str, model: Model, images: np.ndarray) -> np.ndarray:
    try:
        out = np.asarray(model(images), np.float32)
    except Exception as error:  # A black box may raise anything.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"the {name} model failed: {reason}") from error
    if out.ndim != 2 or len(out) != len(images) or out.shape[1] < 2:
        raise ModelError(
            f"the {name} model gave the shape {out.shape} for {len(images)} images; "
            f"accepted is ({len(images)}, classes)"
        )
    if not np.isfinite(out).all():
        raise ModelError(f"the {name} model gave NaN or infinity for an image")
    # 8-bit outputs miss a sum of 1 by up to half a step a class.
    if (out < -1e-3).any() or (np.abs(out.sum(axis=1) - 1) > 0.05 + out.shape[1] / 512).any():
        raise ModelError(
            f"the {name} model gave no probabilities (sums from {out.sum(axis=1).min():.3g} to "
            f'{out.sum(axis=1).max():.3g}); models ending in logits take outputs="logits"'
        )
    return out
