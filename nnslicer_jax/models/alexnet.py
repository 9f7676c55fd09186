"""AlexNet for ImageNet, 61.1 M parameters: five convolutions and three dense layers.

Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks",
2012, with the widths of one column and no normalisation: Krizhevsky, "One weird trick for
parallelizing convolutional neural networks", 2014.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from nnslicer_jax.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalised
from nnslicer_jax.models.residual import convolution

# Features, window, stride, padding, and whether max pooling follows.
CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)
_SMALLEST = 63


class AlexNet(nn.Module):
    """Images [B, H, W, 3] float32 in [0, 1], 224x224 as published -> logits [B, num_classes].

    H and W are 63 or more; the first dense layer is as wide as they make it.
    """

    num_classes: int = 10
    mean: float | Sequence[float] = IMAGENET_MEAN
    std: float | Sequence[float] = IMAGENET_STD

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it needs a "dropout" key."""
        if min(x.shape[1:3]) < _SMALLEST:
            raise ValueError(
                f"x: AlexNet takes images of a height and width from {_SMALLEST}, got {x.shape}"
            )
        x = normalised(x, self.mean, self.std)
        for features, window, stride, border, pooled in CONVOLUTIONS:
            x = convolution(
                features,
                (window, window),
                (stride, stride),
                train=train,
                use_bias=True,
                padding=border,
            )(x)
            x = nn.relu(x)
            if pooled:
                x = nn.max_pool(x, (3, 3), (2, 2))
        x = x.reshape((x.shape[0], -1))
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            x = nn.relu(nn.Dense(4096)(x))
        return nn.Dense(self.num_classes)(x)
