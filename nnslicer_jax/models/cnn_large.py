"""CNN-large: four convolutions and three dense layers, to train with bounds.

Sehwag, Wang, Mittal, Jana, "HYDRA", 2020, after Wong, Schmidt, Metzen, Kolter, "Scaling provable
adversarial defenses", 2018 (2,466,858 parameters on 32x32x3 images).
"""

import flax.linen as nn
import jax

# Features, width of the window and stride of each convolution.
_CONVOLUTIONS = ((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2))


class CNNLarge(nn.Module):
    """Images [B, H, W, C] float32 in [0, 1] -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float = 0.0
    std: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; training and inference are alike."""
        del train
        x = (x - self.mean) / self.std
        for features, window, stride in _CONVOLUTIONS:
            x = nn.relu(nn.Conv(features, (window, window), (stride, stride), padding=1)(x))
        x = x.reshape((x.shape[0], -1))
        for features in (512, 512):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)
