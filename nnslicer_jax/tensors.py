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


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], Any]:
    """Reads a safetensors file and the JSON its header holds under `kind`.

    Raises:
      ValueError: If the file is missing, truncated, or of another kind.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected a {kind} saved as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            about = (file.metadata() or {}).get(kind)
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if about is None:
        raise ValueError(f"{path} is a safetensors file, but not of a {kind}")
    try:
        return arrays, json.loads(about)
    except json.JSONDecodeError:
        raise ValueError(f"{path} is not a {kind}: its header is damaged") from None
