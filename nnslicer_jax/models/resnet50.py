"""ResNet-50 for ImageNet, 25.6 M parameters: bottleneck blocks in four stages.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016, Table 1; a stage's
stride is in the 3x3 convolution of its first block rather than in the 1x1 before it, as published
weights have it.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from nnslicer_jax.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalised
from nnslicer_jax.models.residual import BottleneckBlock, convolution

# Blocks of each stage.
STAGES = (3, 4, 6, 3)


class ResNet50(nn.Module):
    """Images [B, H, W, 3] float32 in [0, 1], 224x224 as published -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float | Sequence[float] = IMAGENET_MEAN
    std: float | Sequence[float] = IMAGENET_STD

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it updates "batch_stats"."""
        x = normalised(x, self.mean, self.std)
        x = convolution(64, (7, 7), (2, 2), train=train, padding=3)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(STAGES):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = BottleneckBlock(64 * 2**stage, strides)(x, train=train)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes)(x)
