"""Named arrays in a safetensors file, with a header that says what they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nnslicer_jax.atomic import replacing


def write_tensors(
    path: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]
) -> None:
    """Writes a safetensors file that appears whole or not at all."""
    with replacing(path) as part:
        save_file(dict(arrays), part, dict(about))


def read_tensors(
    path: str | Path, kind: str, fields: Mapping[str, type | tuple[type, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a safetensors file and the JSON its header holds under `kind`.

    Args:
      path: The file.
      kind: What it should hold, in a word.
      fields: What the JSON must have, and of which types.

    Raises:
      ValueError: If the file is missing, truncated, or of another kind.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected a {kind} saved as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(kind)
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if header is None:
        raise ValueError(f"{path} is a safetensors file, but not of a {kind}")
    try:
        about = json.loads(header)
    except json.JSONDecodeError:
        about = None
    if not isinstance(about, dict) or set(about) != set(fields):
        raise ValueError(f"{path} is not a {kind}: its header is damaged")
    for name, types in fields.items():
        # A bool is an int to Python, not here.
        if not isinstance(about[name], types) or (types is int and isinstance(about[name], bool)):
            raise ValueError(f"{path} is not a {kind}: its {name} is {about[name]!r}")
    return arrays, about
