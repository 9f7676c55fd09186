"""ResNet-10 with a CIFAR stem, about 300 K parameters: one block in each of four stages.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016.
"""

import flax.linen as nn
import jax

from nnslicer_jax.models.residual import BasicBlock, convolution


class ResNet10(nn.Module):
    """Images [B, H, W, 3] float32 in [0, 1], 32x32 as published -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float = 0.5
    std: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it updates "batch_stats"."""
        x = (x - self.mean) / self.std
        x = convolution(16, (3, 3), train=train)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage, features in enumerate((16, 32, 64, 128)):
            strides = 2 if stage > 0 else 1
            x = BasicBlock(features, strides, "projection")(x, train=train)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes)(x)
