"""Flax networks, one file each, and the names they go by.

All take images in [0, 1] (normalisation is part of the network) and end in logits.
"""

from typing import Any

import flax.linen as nn

from nnslicer_jax.models.alexnet import AlexNet
from nnslicer_jax.models.cnn_large import CNNLarge
from nnslicer_jax.models.cnn_small import CNNSmall
from nnslicer_jax.models.digits_cnn import DigitsCNN
from nnslicer_jax.models.lenet1 import LeNet1
from nnslicer_jax.models.lenet4 import LeNet4
from nnslicer_jax.models.lenet5 import LeNet5
from nnslicer_jax.models.mlp import MLP
from nnslicer_jax.models.mnist_cnn import MnistCNN
from nnslicer_jax.models.plainnet20 import PlainNet20
from nnslicer_jax.models.resnet10 import ResNet10
from nnslicer_jax.models.resnet18 import ResNet18
from nnslicer_jax.models.resnet20 import ResNet20
from nnslicer_jax.models.resnet50 import ResNet50
from nnslicer_jax.models.vgg16 import VGG11, VGG16
from nnslicer_jax.models.vgg16_imagenet import VGG16ImageNet
from nnslicer_jax.models.wide_resnet import WRN28x4, WRN28x10

MODELS: dict[str, type[nn.Module]] = {
    "alexnet": AlexNet,
    "cnn_large": CNNLarge,
    "cnn_small": CNNSmall,
    "digits_cnn": DigitsCNN,
    "lenet1": LeNet1,
    "lenet4": LeNet4,
    "lenet5": LeNet5,
    "mlp": MLP,
    "mnist_cnn": MnistCNN,
    "plainnet20": PlainNet20,
    "resnet10": ResNet10,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "resnet50": ResNet50,
    "vgg11": VGG11,
    "vgg16": VGG16,
    "vgg16_imagenet": VGG16ImageNet,
    "wrn28_10": WRN28x10,
    "wrn28_4": WRN28x4,
}


def create(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Makes a network by name.

    Args:
        name: one of ``MODELS``.
        num_classes: width of the logits, at least 1.
        **options: other attributes of the network, such as ``mean`` and ``std``.

    Raises:
        ValueError: unknown name or option, or no classes.
    """
    if name not in MODELS:
        raise ValueError(f"model: {name!r} is unknown; known are {', '.join(sorted(MODELS))}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    accepted = set(MODELS[name].__dataclass_fields__) - {"parent", "name", "num_classes"}
    unknown = sorted(set(options) - accepted)
    if unknown:
        known = ", ".join(sorted(accepted)) or "none"
        raise ValueError(f"{unknown[0]}: not an option of {name}, whose options are: {known}")
    return MODELS[name](num_classes=num_classes, **options)
