"""Images as batches of one size: checked, padded at the end, streamed."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nnslicer_jax.fold import check_batch
from nnslicer_jax.graph import Graph


class Batch(NamedTuple):
    """Some images.

    Attributes:
      images: `[B, ...]`, filled up with copies of the last image.
      real: How many of them count.
    """

    images: Any
    real: int


def batches(graph: Graph, images: Any, batch_size: int, skip: int = 0) -> Iterator[Batch]:
    """Cuts images into batches of `batch_size`; none spans two batches of an iterable.

    The first `skip` images are left out.

    Raises:
      ValueError: For a wrong shape, dtype or size, an empty set, or values that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    size, dtype = 0, graph.values[graph.input].dtype
    for part in _parts(images):
        check_images(graph, part)
        if part.dtype != dtype:
            part = part.astype(dtype)
        size = size or min(batch_size, len(part))
        part, skip = part[skip:], max(0, skip - len(part))
        for start in range(0, len(part), size):
            piece = part[start : start + size]
            real = len(piece)
            if real < size:
                fill = np.broadcast_to(np.asarray(piece[-1:]), (size - real, *piece.shape[1:]))
                piece = np.concatenate([np.asarray(piece), fill])
            yield Batch(piece, real)
    if not size:
        raise ValueError("images is empty; it must hold at least one image")


def filled(count: int, size: int) -> Iterator[np.ndarray]:
    """Indices of `count` images in batches of one size; the last is filled up with the last image.

    One compiled program serves them all; what is beyond `count` is to be cut off.
    """
    for at in range(0, count, size):
        yield np.minimum(np.arange(at, at + size), count - 1)


def _parts(images: Any) -> Iterable[Any]:
    if hasattr(images, "shape"):
        return [images]
    if not isinstance(images, Iterable):
        raise ValueError(
            f"images must be an array [N, ...] or an iterable of batches, not "
            f"{type(images).__name__}"
        )
    return images


def count(images: Any) -> int | None:
    """How many images there are; None for an iterable of batches."""
    return images.shape[0] if getattr(images, "shape", ()) else None


def devices() -> list[jax.Device]:
    """The local devices that share a batch; of a CPU's, the first.

    A CPU's virtual devices share its cores, and their collectives and callbacks can wait for each
    other's threads for ever.
    """
    found = jax.local_devices()
    return found[:1] if found[0].platform == "cpu" else found


def across_devices(images: Any) -> jax.Array:
    """A batch on the device, shared out among several where its size allows."""
    shared = devices()
    if len(images) % len(shared):
        return jnp.asarray(images)
    mesh = Mesh(np.asarray(shared), ("batch",))
    return jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))


def check_images(graph: Graph, images: Any) -> None:
    """Raises ValueError unless `images` can be run through the graph."""
    check_batch(graph, images)
    traced = graph.values[graph.input].dtype
    kinds = (jnp.issubdtype(traced, jnp.floating), jnp.issubdtype(images.dtype, jnp.floating))
    if kinds[0] != kinds[1]:
        raise ValueError(f"images must be {traced} as the model was traced, not {images.dtype}")
    if not kinds[0] and images.dtype != traced:
        low, high = int(images.min()), int(images.max())
        info = np.iinfo(traced) if np.issubdtype(traced, np.integer) else None
        least, most = (info.min, info.max) if info else (0, 1)
        if low < least or high > most:
            raise ValueError(f"images range over {low}..{high}, more than {traced} holds")
    if kinds[0] and not np.isfinite(np.asarray(images, np.float32)).all():
        raise ValueError("images must be finite; some are NaN or infinite")


def check_params(params: Any) -> None:
    """Raises ValueError where a parameter is not finite."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # On the host: on the device a check would be compiled for each shape.
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if floating and not np.isfinite(np.asarray(leaf)).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"params must be finite; {name} has NaN or infinite values")
