"""Trained networks: weights as safetensors, each with a JSON card that says how it was made.

Small ones are part of the package; larger ones are made by the command on their card and looked
for in ``weights`` of the user's cache.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from nnslicer_jax import models
from nnslicer_jax.atomic import replacing
from nnslicer_jax.data import files

SHIPPED = Path(__file__).parent / "weights"
_NEEDED = {"name": str, "model": str, "num_classes": int, "input_shape": list, "command": str}


class Trained(NamedTuple):
    """A network of the zoo.

    Attributes:
        model: the Flax module; images [B, H, W, C] float32 in [0, 1] -> logits.
        variables: what ``model.apply`` takes, float32.
        card: data, seed, command, accuracy and sizes, as the training command wrote them.
    """

    model: nn.Module
    variables: dict[str, Any]
    card: dict[str, Any]


def weights_folder() -> Path:
    """Where weights go that are trained on this machine: ``weights`` in the user's cache."""
    return files.cache_folder() / "weights"


def names() -> list[str]:
    """Lists the networks that have a card, in the package or in the user's cache."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.json")})


def load(name: str) -> Trained:
    """Loads a trained network by name.

    Raises:
        ValueError: no such name, or damaged files.
        FileNotFoundError: a card is there but no weights; says the command that makes them.
    """
    cards = [folder / f"{name}.json" for folder in _folders()]
    known = [path for path in cards if path.is_file()]
    if not known:
        raise ValueError(f"zoo: {name!r} is unknown; known are {', '.join(names()) or 'none'}")
    for path in known:
        weights = path.with_suffix(".safetensors")
        if weights.is_file():
            return _read(path, weights)
    card = read_card(known[0])
    raise FileNotFoundError(
        f"zoo: {name} is not shipped with its weights; make them with: {card['command']}"
    )


def save(
    name: str,
    model_name: str,
    variables: Mapping[str, Any],
    card: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    options: Mapping[str, Any] | None = None,
    rounded: bool = True,
    measure: Callable[[nn.Module, dict[str, Any]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes ``name.safetensors`` and ``name.json``.

    Arrays with more than one axis are rounded to float16 unless told otherwise, the others
    (biases, batch statistics) stay float32.

    Args:
        name: of the two files.
        model_name: one of ``models.MODELS``.
        variables: what the model's ``apply`` takes.
        card: what to say; "num_classes" and "input_shape" [H, W, C] and "command" are needed.
        folder: made if it is missing.
        options: further attributes of the model.
        rounded: whether to round; False keeps float32.
        measure: called with the model and its variables as read back from the file; what it
            returns goes onto the card.

    Returns:
        The card as written.

    Raises:
        ValueError: an array holds NaN or infinity once rounded, or the card lacks an entry.
    """
    folder = Path(folder)
    arrays = {}
    for key, value in flax.traverse_util.flatten_dict(dict(variables), sep="/").items():
        array = np.asarray(value, np.float32)
        with np.errstate(over="ignore"):
            stored = array.astype(np.float16) if rounded and array.ndim > 1 else array
        if not np.isfinite(stored).all():
            raise ValueError(f"{name}: {key} holds NaN, infinity or a number beyond {stored.dtype}")
        arrays[key] = stored
    content = safetensors.numpy.save(arrays)
    written = {
        "name": name,
        "model": model_name,
        **({"options": dict(options)} if options else {}),
        **card,
        "parameters": sum(int(np.size(p)) for p in jax.tree.leaves(variables["params"])),
        "weights_bytes": len(content),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    _check(written, name)
    weights = folder / f"{name}.safetensors"
    with replacing(weights) as partial:
        partial.write_bytes(content)
    if measure is not None:
        written |= measure(_model(written), read_weights(weights, written))
    with replacing(folder / f"{name}.json") as partial:
        partial.write_text(json.dumps(written, indent=2) + "\n")
    return written


def read_card(path: Path) -> dict[str, Any]:
    """Reads a card; raises ValueError if it is not one."""
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(card, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(card).__name__}")
    _check(card, str(path))
    return card


def read_weights(path: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Reads weights as float32 variables of the card's model.

    Raises:
        ValueError: a damaged file, or one whose arrays are not that model's.
    """
    try:
        arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # The reader's own error type is not public.
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    example = jax.ShapeDtypeStruct((1, *card["input_shape"]), jnp.float32)
    wanted = flax.traverse_util.flatten_dict(
        jax.eval_shape(_model(card).init, jax.random.key(0), example), sep="/"
    )
    for key in sorted(set(wanted) ^ set(arrays)):
        state = "missing" if key in wanted else "not part of the model"
        raise ValueError(f"{path}: {key} is {state} ({card['model']})")
    for key, array in arrays.items():
        if array.shape != wanted[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {array.shape}, {card['model']} takes {wanted[key].shape}"
            )
        if array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} must hold finite float16 or float32 numbers")
    floats = {key: jnp.asarray(array, jnp.float32) for key, array in arrays.items()}
    return flax.traverse_util.unflatten_dict(floats, sep="/")


def _folders() -> list[Path]:
    return [SHIPPED, weights_folder()]


def _model(card: Mapping[str, Any]) -> nn.Module:
    return models.create(card["model"], card["num_classes"], **card.get("options", {}))


def _read(card_path: Path, weights: Path) -> Trained:
    card = read_card(card_path)
    return Trained(_model(card), read_weights(weights, card), card)


def _check(card: Mapping[str, Any], where: str) -> None:
    for key, kind in _NEEDED.items():
        if not isinstance(card.get(key), kind):
            raise ValueError(f"{where}: the card needs {key!r} of type {kind.__name__}")
    if not all(isinstance(n, int) and n > 0 for n in card["input_shape"]):
        raise ValueError(f"{where}: 'input_shape' must hold positive whole numbers")
    for key in ("options", "data_options"):
        if not isinstance(card.get(key, {}), dict):
            raise ValueError(f"{where}: {key!r} must be an object")
