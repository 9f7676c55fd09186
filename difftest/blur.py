"""Mean, Gaussian and median blur of uint8 images, value for value what OpenCV gives.

Borders as there: mean and Gaussian mirror the image without repeating the edge, the median
repeats it. The Gaussian's deviation is the one OpenCV derives from the kernel's size, where sizes
up to 7 have fixed kernels. Even sizes have their anchor right of and below the middle.
"""

import jax
import jax.numpy as jnp

_GAUSSIAN = {3: (1, 2, 1), 5: (1, 4, 6, 4, 1), 7: (2, 7, 14, 18, 14, 7, 2)}


def mean(image: jax.Array, size: int) -> jax.Array:
    """``cv2.blur`` of uint8 ``[H, W, C]`` with a square kernel."""
    if size == 1:
        return image
    area = size * size
    # OpenCV divides by a 16-bit reciprocal, which for even areas rounds up from a little below
    # one half already.
    half = area // 2 + (area % 2 == 0)
    return ((_separable(image, (1,) * size) + half) // area).astype(jnp.uint8)


def gaussian(image: jax.Array, size: int) -> jax.Array:
    """``cv2.GaussianBlur`` of uint8 ``[H, W, C]``, deviation 0; sizes 1, 3, 5, 7."""
    if size == 1:
        return image
    kernel = _GAUSSIAN[size]
    total = sum(kernel) ** 2
    return ((_separable(image, kernel) + total // 2) // total).astype(jnp.uint8)


def median(image: jax.Array, size: int) -> jax.Array:
    """``cv2.medianBlur`` of uint8 ``[H, W, C]``, odd sizes.

    The median's bits are found from the highest down: a bit is set if fewer than half of the
    window lie below the value that it would make.
    """
    half = size // 2
    if not half:
        return image
    height, width, _ = image.shape
    padded = jnp.pad(image, ((half, half), (half, half), (0, 0)), mode="edge")
    window = jnp.stack(
        [
            padded[row : row + height, column : column + width]
            for row in range(size)
            for column in range(size)
        ]
    )
    found = jnp.zeros_like(image)
    for bit in range(7, -1, -1):
        higher = found | jnp.uint8(1 << bit)
        below = (window < higher[None]).astype(jnp.uint8).sum(axis=0, dtype=jnp.uint8)
        found = jnp.where(below <= (size * size) // 2, higher, found)
    return found


def _separable(image: jax.Array, kernel: tuple[int, ...]) -> jax.Array:
    """Weighted sums over rows and columns, int32 ``[H, W, C]``."""
    size = len(kernel)
    before, after = size // 2, (size - 1) // 2
    height, width, _ = image.shape
    padded = jnp.pad(
        image.astype(jnp.int32), ((before, after), (before, after), (0, 0)), mode="reflect"
    )
    rows = jnp.zeros((height, *padded.shape[1:]), jnp.int32)
    for row, weight in enumerate(kernel):
        rows += weight * padded[row : row + height]
    sums = jnp.zeros(image.shape, jnp.int32)
    for column, weight in enumerate(kernel):
        sums += weight * rows[:, column : column + width]
    return sums
