"""The residual blocks of He, Zhang, Ren, Sun, "Deep residual learning", 2016, Sections 3 and 4."""

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
    padding: str | int = "SAME",
) -> nn.Conv:
    """A 2-D convolution with He initialisation; padding as a number is that of every side.

    In training it takes the faster of two forms (``convolve``); otherwise it stays a convolution,
    so that a traced network shows one, and ``evaluate`` chooses the form.
    """
    return nn.Conv(
        features,
        window,
        strides,
        use_bias=use_bias,
        padding=padding,
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


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm: [B, H, W, C] to [B, H / s, W / s, 4 features].

    Where the shape changes, the shortcut is a 1x1 convolution with batch norm.

    Attributes:
        features: channels of the 3x3 convolution.
        strides: s, the step of the 3x3 convolution.
    """

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Applies the block; in training it updates "batch_stats"."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.strides, self.strides)
        y = nn.relu(norm()(convolution(self.features, (1, 1), train=train)(x)))
        # Borders of one pixel: "SAME" under a stride of 2 has one on two sides only.
        y = convolution(self.features, (3, 3), strides, train=train, padding=1)(y)
        y = nn.relu(norm()(y))
        y = norm()(convolution(4 * self.features, (1, 1), train=train)(y))
        if x.shape != y.shape:
            x = norm()(convolution(4 * self.features, (1, 1), strides, train=train)(x))
        return nn.relu(y + x)
