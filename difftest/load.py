"""Models from files, by their suffix."""

import os
from pathlib import Path
from typing import Any

from difftest.backends.pixels import Normalise, Preprocess
from difftest.pair import JaxModel, Model, jax_model
from nnslicer_jax import models, zoo

__all__ = ["Normalise", "load_model"]

SUFFIXES = (".tflite", ".lite", ".onnx", ".h5", ".keras", ".safetensors")


def load_model(
    path: str | os.PathLike,
    preprocess: Preprocess | None = None,
    *,
    outputs: str | None = None,
    workers: int | None = None,
) -> Model:
    """Loads a model as a function from uint8 images ``[B, H, W, C]`` to probabilities ``[B, K]``.

    Args:
        path: ``.tflite`` or ``.lite`` (ai-edge-litert), ``.onnx`` (onnxruntime), ``.h5`` or
            ``.keras`` (Keras 3 on JAX), ``.safetensors`` with its card beside it, or the name of
            a network of ``nnslicer_jax.zoo``. The last three give a ``JaxModel``.
        preprocess: from float32 ``[B, H, W, C]``, 0..255, to what the model takes, by arithmetic
            that numpy and JAX share, such as ``Normalise``; None: x / 255.
        outputs: "probabilities", or "logits" where the model ends in them; None: logits for this
            project's own networks, probabilities for all others.
        workers: threads of the runtimes outside JAX, at least 1; None: one a core.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, or not such a model.
        ModuleNotFoundError: the runtime is not installed; says which package it is.
    """
    if isinstance(path, str) and not Path(path).suffix and path in zoo.names():
        return _of_the_zoo(zoo.load(path), preprocess, outputs)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: the suffix is {suffix!r}; accepted are {', '.join(SUFFIXES)}, or a name of "
            f"the zoo ({', '.join(zoo.names())})"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file, not a model")
    if suffix == ".safetensors":
        card = path.with_suffix(".json")
        if not card.is_file():
            raise FileNotFoundError(f"{card}: no such file; the weights need their card beside it")
        written = zoo.read_card(card)
        module = models.create(
            written["model"], written["num_classes"], **written.get("options", {})
        )
        trained = zoo.Trained(module, zoo.read_weights(path, written), written)
        return _of_the_zoo(trained, preprocess, outputs)
    given: dict[str, Any] = {} if outputs is None else {"outputs": outputs}
    if suffix in (".tflite", ".lite"):
        from difftest.backends.tflite import TFLite

        return TFLite(path, preprocess, workers=workers, **given)
    if suffix in (".h5", ".keras"):
        from difftest.backends import keras

        return keras.load(path, preprocess, **given)
    from difftest.backends.onnx import ONNX

    return ONNX(path, preprocess, workers=workers, **given)


def _of_the_zoo(
    trained: zoo.Trained, preprocess: Preprocess | None, outputs: str | None
) -> JaxModel:
    apply: Any = trained.model.apply
    return jax_model(apply, trained.variables, preprocess, outputs=outputs or "logits")
