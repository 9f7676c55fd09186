"""A small convolutional network for scikit-learn's 8x8 handwritten digits."""

import flax.linen as nn
import jax


class DigitsCNN(nn.Module):
    """Images [B, 8, 8, 1] float32 in [0, 1] -> logits [B, num_classes]."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; training and inference are alike."""
        del train
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(self.num_classes)(x)
