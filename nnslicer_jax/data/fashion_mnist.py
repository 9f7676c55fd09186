"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017): 60,000 and 10,000 images of 28x28."""

from nnslicer_jax.data import idx
from nnslicer_jax.data.dataset import Dataset

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load(data_dir: str | None = None, *, download: bool = True) -> Dataset:
    """Reads ``FashionMNIST/raw/*-ubyte`` or ``*-ubyte.gz``; images [N, 28, 28, 1] uint8."""
    return idx.load("fashion_mnist", "FashionMNIST/raw", CLASSES, data_dir, download)
