"""Wide residual networks for 32x32 images: 28 layers, 4 or 10 times as wide.

Zagoruyko, Komodakis, "Wide residual networks", 2016: blocks that normalise first, no dropout;
WRN-28-4 (5.85 M parameters) and WRN-28-10 (36.5 M) as Sehwag, Wang, Mittal, Jana, "HYDRA", 2020,
prune them.
"""

import functools

import flax.linen as nn
import jax

from nnslicer_jax.models.residual import convolution

_BLOCKS = 4  # in each of three stages: 28 = 6 * 4 + 4


class _Block(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, beside a shortcut.

    Where the shape changes the shortcut is a 1x1 convolution of what is already normalised.
    """

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.strides, self.strides)
        y = nn.relu(norm()(x))
        if x.shape[-1] != self.features or self.strides != 1:
            x = convolution(self.features, (1, 1), strides, train=train)(y)
        y = convolution(self.features, (3, 3), strides, train=train)(y)
        y = convolution(self.features, (3, 3), train=train)(nn.relu(norm()(y)))
        return x + y


class _WideResNet(nn.Module):
    num_classes: int = 10
    mean: float = 0.0
    std: float = 1.0
    width: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it updates "batch_stats"."""
        x = (x - self.mean) / self.std
        x = convolution(16, (3, 3), train=train)(x)
        for stage, features in enumerate((16, 32, 64)):
            for block in range(_BLOCKS):
                strides = 2 if stage > 0 and block == 0 else 1
                x = _Block(self.width * features, strides)(x, train=train)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class WRN28x4(_WideResNet):
    """Images [B, H, W, 3] float32 in [0, 1], 32x32 as published -> logits [B, num_classes]."""

    width: int = 4


class WRN28x10(_WideResNet):
    """Images [B, H, W, 3] float32 in [0, 1], 32x32 as published -> logits [B, num_classes]."""

    width: int = 10
