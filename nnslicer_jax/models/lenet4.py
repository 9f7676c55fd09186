"""LeNet-4: two convolutions and two dense layers.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
With ReLU, max pooling and "same" padding, the form that the published DFlare and DeepXplore
models have (69,362 parameters on 28x28 images).
"""

import flax.linen as nn
import jax


class LeNet4(nn.Module):
    """Images [B, 28, 28, 1] float32 in [0, 1] -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float = 0.1307
    std: float = 0.3081

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; training and inference are alike."""
        del train
        x = (x - self.mean) / self.std
        for features in (6, 16):
            x = nn.relu(nn.Conv(features, (5, 5))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(84)(x))
        return nn.Dense(self.num_classes)(x)
