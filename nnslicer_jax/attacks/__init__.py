"""Attacks: adversarial images for any `apply(params, images) -> logits`, one attack a file."""

from nnslicer_jax.attacks.adversarial import Adversarial
from nnslicer_jax.attacks.fgsm import fgsm

__all__ = ["Adversarial", "fgsm"]
