"""A convolutional network for MNIST: two 3x3 convolutions, dropout, one dense layer."""

import flax.linen as nn
import jax


class MnistCNN(nn.Module):
    """Images [B, 28, 28, 1] float32 in [0, 1] -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float = 0.1307
    std: float = 0.3081

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; in training it needs a "dropout" key."""
        x = (x - self.mean) / self.std
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)
