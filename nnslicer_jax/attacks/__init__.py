"""Attacks: adversarial images for any `apply(params, images) -> logits`, one attack a file.

Every attack is called as `attack(key, apply, params, images, labels, bounds=..., ...)` and returns
`Adversarial`: images, success, distance. Those of `FIXED_BUDGET` move every image as far as they
may; those of `CLOSEST` look for the adversarial image nearest to the original.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nnslicer_jax.attacks.adef import adef
from nnslicer_jax.attacks.adversarial import Adversarial
from nnslicer_jax.attacks.apgd import apgd
from nnslicer_jax.attacks.boundary import boundary
from nnslicer_jax.attacks.carlini_wagner import carlini_wagner
from nnslicer_jax.attacks.deepfool import deepfool
from nnslicer_jax.attacks.fab import fab
from nnslicer_jax.attacks.fgsm import fgsm
from nnslicer_jax.attacks.gaussian_blur import gaussian_blur
from nnslicer_jax.attacks.jsma import jsma
from nnslicer_jax.attacks.local_search import local_search
from nnslicer_jax.attacks.pointwise import pointwise
from nnslicer_jax.attacks.rpgd import rpgd
from nnslicer_jax.attacks.single_pixel import single_pixel
from nnslicer_jax.attacks.spatial import spatial
from nnslicer_jax.attacks.square import square

# The rows of NNSlicer's table of attacks, for images in 0..1.
FIXED_BUDGET: Mapping[str, Callable[..., Adversarial]] = MappingProxyType(
    {
        "FGSM 2": functools.partial(fgsm, eps=2 / 256),
        "FGSM 4": functools.partial(fgsm, eps=4 / 256),
        "FGSM 8": functools.partial(fgsm, eps=8 / 256),
        "RPGD 2": functools.partial(rpgd, eps=2 / 256),
        "RPGD 4": functools.partial(rpgd, eps=4 / 256),
        "RPGD 8": functools.partial(rpgd, eps=8 / 256),
        "Spatial": spatial,
    }
)
CLOSEST: Mapping[str, Callable[..., Adversarial]] = MappingProxyType(
    {
        "DeepFool Linf": functools.partial(deepfool, norm="linf"),
        "DeepFool L2": functools.partial(deepfool, norm="l2"),
        "JSMA": jsma,
        "CW L2": carlini_wagner,
        "ADef": adef,
        "SinglePixel": single_pixel,
        "LocalSearch": local_search,
        "Boundary": boundary,
        "PointWise": pointwise,
        "GaussianBlur": gaussian_blur,
    }
)
ATTACKS: Mapping[str, Callable[..., Adversarial]] = MappingProxyType({**FIXED_BUDGET, **CLOSEST})

__all__ = [
    "ATTACKS",
    "CLOSEST",
    "FIXED_BUDGET",
    "Adversarial",
    "adef",
    "apgd",
    "boundary",
    "carlini_wagner",
    "deepfool",
    "fab",
    "fgsm",
    "gaussian_blur",
    "jsma",
    "local_search",
    "pointwise",
    "rpgd",
    "single_pixel",
    "spatial",
    "square",
]
