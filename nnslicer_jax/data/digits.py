"""The 1,797 handwritten digits of 8x8 pixels that scikit-learn holds (UCI, Alpaydin, Kaynak)."""

import numpy as np
from sklearn.datasets import load_digits

from nnslicer_jax.data.dataset import Dataset

_TEST_IMAGES = 360


def load(data_dir: str | None = None, *, download: bool = True) -> Dataset:
    """Gives 1,437 training and 360 test images [N, 8, 8, 1] uint8, split by a fixed seed.

    The 17 grey levels are spread over 0..255. The arguments are those of every loader and are
    not used: the set is part of scikit-learn.
    """
    del data_dir, download
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
    return Dataset(
        "digits", images[train], labels[train], images[test], labels[test], tuple("0123456789")
    )
