"""VGG-16 and VGG-11 with batch norm for 32x32 images, 15.3 and 9.8 M parameters.

Simonyan, Zisserman, "Very deep convolutional networks", 2015, in the layout of Sehwag, Wang,
Mittal, Jana, "HYDRA", 2020: four max poolings, averages over a 2x2 grid, dense layers 256-256.
"""

import flax.linen as nn
import jax

from nnslicer_jax.models.residual import convolution

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_ELEVEN = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG16(nn.Module):
    """Images [B, H, W, 3] float32 in [0, 1] -> logits [B, num_classes].

    H and W are multiples of 32, and 32 as published.
    """

    num_classes: int = 10
    mean: float = 0.5
    std: float = 0.5
    stages: tuple[tuple[int, ...], ...] = _STAGES

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it updates "batch_stats"."""
        if x.shape[1] % 32 or x.shape[2] % 32:
            raise ValueError(
                f"x: VGG-16 takes images of a height and width divisible by 32, got {x.shape}"
            )
        x = (x - self.mean) / self.std
        for stage, widths in enumerate(self.stages):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for features in widths:
                x = convolution(features, (3, 3), train=train, use_bias=True)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        cell = (x.shape[1] // 2, x.shape[2] // 2)
        if cell != (1, 1):
            x = nn.avg_pool(x, cell, cell)
        x = x.reshape((x.shape[0], -1))
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(self.num_classes)(x)


class VGG11(VGG16):
    """As VGG-16, with eight convolutions."""

    stages: tuple[tuple[int, ...], ...] = _ELEVEN
