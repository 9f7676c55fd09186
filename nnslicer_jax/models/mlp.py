"""A multilayer perceptron with ReLU."""

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Images [B, H, W, C] float32 in [0, 1] -> logits [B, num_classes].

    Attributes:
        hidden: width of each hidden layer.
    """

    num_classes: int = 10
    hidden: tuple[int, ...] = (256, 256)
    mean: float = 0.0
    std: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; training and inference are alike."""
        del train
        x = (x.reshape((x.shape[0], -1)) - self.mean) / self.std
        for features in self.hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)
