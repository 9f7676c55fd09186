"""Images moved and blurred: bilinear interpolation and Gaussian filters as matrices."""

import jax
import jax.numpy as jnp

# Where a Gaussian ends, in standard deviations.
_TRUNCATE = 4.0


def blur_matrix(size: int, sigma: jax.Array | float, max_sigma: float) -> jax.Array:
    """A Gaussian filter along an axis that is mirrored at its ends, as a matrix.

    Args:
      size: Length of the axis.
      sigma: Standard deviation in pixels, above 0.
      max_sigma: What sigma stays within.

    Returns:
      `[size, size]` float32; rows sum to 1.
    """
    radius = jnp.floor(_TRUNCATE * sigma + 0.5)
    # Mirrored at both ends, pixel j appears at j + 2 m size and at -1 - j + 2 m size.
    most = int((_TRUNCATE * max_sigma + 0.5 + size) // (2 * size)) + 1
    shifts = 2 * size * jnp.arange(-most, most + 1)
    places = jnp.arange(size)
    seen = jnp.stack([places, -1 - places])[:, :, None] + shifts[None, None, :]
    away = seen[None] - places[:, None, None, None]
    weights = jnp.where(jnp.abs(away) <= radius, jnp.exp(-0.5 * jnp.square(away / sigma)), 0)
    total = weights.sum((1, 3))
    return total / total.sum(1, keepdims=True)


def sample(image: jax.Array, rows: jax.Array, columns: jax.Array, outside: jax.Array) -> jax.Array:
    """Values of an image between its pixels, bilinear.

    Args:
      image: `[H, W, C]`.
      rows: `[...]` float32, places in 0..H-1.
      columns: `[...]` float32, places in 0..W-1.
      outside: Value of pixels outside the image.

    Returns:
      `[..., C]`.
    """
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = (rows - top)[..., None], (columns - left)[..., None]

    def pixel(row: jax.Array, column: jax.Array) -> jax.Array:
        inside = (row >= 0) & (row < image.shape[0]) & (column >= 0) & (column < image.shape[1])
        found = image[
            jnp.clip(row, 0, image.shape[0] - 1).astype(jnp.int32),
            jnp.clip(column, 0, image.shape[1] - 1).astype(jnp.int32),
        ]
        return jnp.where(inside[..., None], found, outside)

    upper = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
    lower = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def rotated(
    image: jax.Array, angle: jax.Array, down: jax.Array, right: jax.Array, outside: jax.Array
) -> jax.Array:
    """The image rotated about its centre, then shifted.

    Args:
      image: `[H, W, C]`.
      angle: Radians, counter-clockwise.
      down: Pixels.
      right: Pixels.
      outside: Value of what comes in.
    """
    height, width, _ = image.shape
    middle = (height - 1) / 2, (width - 1) / 2
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - middle[0] - down, jnp.arange(width) - middle[1] - right, indexing="ij"
    )
    # Every place asks where it came from: the rotation is undone. Rows point down.
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    back_rows = cos * rows + sin * columns + middle[0]
    back_columns = cos * columns - sin * rows + middle[1]
    return sample(image, back_rows, back_columns, outside)
