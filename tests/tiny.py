"""A network and a data set so small that every stage of pruning runs on them in a moment."""

import functools

import flax.linen as nn
import numpy as np

from nnslicer_jax.data import Dataset
from prune.stages import Run, Stage


class Tiny(nn.Module):
    """Convolution with bias, batch norm, ReLU, dense: every kind of parameter."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(6, (2, 2), (2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.relu(nn.Conv(5, (2, 2))(x))
        return nn.Dense(3)(x.reshape((x.shape[0], -1)))


@functools.cache
def data(count=40):
    """Three classes that differ by the row that is bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 100, (count, 4, 4, 1)).astype(np.uint8)
    images[np.arange(count), labels] += 100
    return Dataset("tiny", images, labels, images[:20], labels[:20], ("a", "b", "c"))


class Killed(Exception):
    pass


def dies_at(dataset, reads):
    """The data set, whose images can be read that many times only."""

    class Images(np.ndarray):
        left = reads

        def __getitem__(self, rows):
            if isinstance(rows, np.ndarray):
                if not Images.left:
                    raise Killed
                Images.left -= 1
                return np.asarray(dataset.train_images)[rows]
            return super().__getitem__(rows)

    return dataset._replace(train_images=dataset.train_images.view(Images))


# Five steps an epoch.
NATURAL = Stage(epochs=2, batch_size=8, learning_rate=0.05)
SEARCH = Stage(epochs=2, batch_size=8, learning_rate=0.1)
RUN = Run(seed=3, log_every=5)
