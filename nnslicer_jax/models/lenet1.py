"""LeNet-1: two convolutions and one dense layer.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
With ReLU, max pooling and "same" padding, the form that the published DFlare and DeepXplore
models have (7,206 parameters on 28x28 images).
"""

import flax.linen as nn
import jax


class LeNet1(nn.Module):
    """Images [B, 28, 28, 1] float32 in [0, 1] -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float = 0.1307
    std: float = 0.3081

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; training and inference are alike."""
        del train
        x = (x - self.mean) / self.std
        for features in (4, 12):
            x = nn.relu(nn.Conv(features, (5, 5))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes)(x)
