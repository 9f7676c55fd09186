"""The basic residual block of He, Zhang, Ren, Sun, "Deep residual learning", 2016, Section 3."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnslicer_jax.convolution import convolve

SHORTCUTS = ("projection", "pad", "none")


def convolution(
    features: int,
    window: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    *,
    train: bool,
    use_bias: bool = False,
) -> nn.Conv:
    """A 2-D convolution with "SAME" padding and He initialisation.

    In training it takes the faster of two forms (``convolve``); otherwise it stays a convolution,
    so that a traced network shows one, and ``evaluate`` chooses the form.
    """
    return nn.Conv(
        features,
        window,
        strides,
        use_bias=use_bias,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=convolve if train else None,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm: [B, H, W, C] to [B, H / s, W / s, features].

    Attributes:
        features: output channels.
        strides: s, the step of the first convolution.
        shortcut: where the shape changes, "projection" is a 1x1 convolution with batch norm (He et
            al.'s option B) and "pad" a subsampling with zero channels behind it (option A);
            "none" leaves the shortcut out everywhere.
    """

    features: int
    strides: int = 1
    shortcut: str = "projection"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the block; in training it updates "batch_stats"."""
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut: {self.shortcut!r} is not one of {', '.join(SHORTCUTS)}")
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.strides, self.strides)
        y = convolution(self.features, (3, 3), strides, train=train)(x)
        y = nn.relu(norm()(y))
        y = convolution(self.features, (3, 3), train=train)(y)
        y = norm()(y)
        if self.shortcut == "none":
            return nn.relu(y)
        if x.shape != y.shape and self.shortcut == "projection":
            x = norm()(convolution(self.features, (1, 1), strides, train=train)(x))
        elif x.shape != y.shape:
            x = x[:, :: self.strides, :: self.strides]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[3])))
        return nn.relu(y + x)
