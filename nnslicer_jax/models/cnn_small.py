"""CNN-small: two strided convolutions and two dense layers, the usual network to train with bounds.

Sehwag, Wang, Mittal, Jana, "HYDRA", 2020, after Wong, Schmidt, Metzen, Kolter, "Scaling provable
adversarial defenses", 2018 (214,918 parameters on 32x32x3 images).
"""

import flax.linen as nn
import jax


class CNNSmall(nn.Module):
    """Images [B, H, W, C] float32 in [0, 1] -> logits [B, num_classes]."""

    num_classes: int = 10
    mean: float = 0.0
    std: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the network; training and inference are alike."""
        del train
        x = (x - self.mean) / self.std
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (4, 4), (2, 2), padding=1)(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(100)(x))
        return nn.Dense(self.num_classes)(x)
