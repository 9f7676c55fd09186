"""VGG-16 for ImageNet, 138.4 M parameters: thirteen convolutions, five poolings, 4096-4096.

Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015,
configuration D, without batch norm.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from nnslicer_jax.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalised
from nnslicer_jax.models.residual import convolution

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SMALLEST = 2 ** len(STAGES)


class VGG16ImageNet(nn.Module):
    """Images [B, H, W, 3] float32 in [0, 1], 224x224 as published -> logits [B, num_classes].

    H and W are 32 or more; the first dense layer is as wide as they make it.
    """

    num_classes: int = 10
    mean: float | Sequence[float] = IMAGENET_MEAN
    std: float | Sequence[float] = IMAGENET_STD

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it needs a "dropout" key."""
        if min(x.shape[1:3]) < _SMALLEST:
            raise ValueError(
                f"x: VGG-16 takes images of a height and width from {_SMALLEST}, got {x.shape}"
            )
        x = normalised(x, self.mean, self.std)
        for widths in STAGES:
            for features in widths:
                x = nn.relu(convolution(features, (3, 3), train=train, use_bias=True)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        for _ in range(2):
            x = nn.relu(nn.Dense(4096)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)
