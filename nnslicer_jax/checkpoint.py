"""Checkpoints of a long run: one orbax folder a step, written whole or not at all."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nnslicer_jax.atomic import replacing

_STEP = re.compile(r"step_(\d{9})")
_RUN = "run.json"


def save(folder: str | Path, step: int, state: Any, *, keep: int = 2) -> None:
    """Writes the state of a step, then drops all but the newest ``keep`` checkpoints.

    Args:
        folder: made if it is missing.
        step: not negative; an older checkpoint of the same step is replaced.
        state: pytree of arrays.
        keep: at least 1.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / f"step_{step:09d}", state, force=True)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step_{old:09d}")


def steps(folder: str | Path) -> list[int]:
    """Lists the steps that have a finished checkpoint, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def restore_latest(folder: str | Path, like: Any) -> tuple[int, Any] | None:
    """Reads the newest checkpoint.

    Args:
        folder: where ``save`` wrote.
        like: pytree of the same structure, shapes and dtypes.

    Returns:
        The step and its state, or None if there is no checkpoint.

    Raises:
        ValueError: the checkpoint is damaged or belongs to something else.
    """
    available = steps(folder)
    if not available:
        return None
    path = Path(folder).absolute() / f"step_{available[-1]:09d}"
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return available[-1], checkpointer.restore(path, target)
    except Exception as error:  # Orbax raises many types for a damaged folder.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: not a readable checkpoint of this run, delete it to go on from an older one "
            f"({reason})"
        ) from None


def digest(tree: Any) -> str:
    """SHA-256 of the bytes of a pytree's arrays, one after the other: 64 hexadecimal digits."""
    mark = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        mark.update(np.ascontiguousarray(leaf).tobytes())
    return mark.hexdigest()


def claim(folder: str | Path, run: dict[str, Any]) -> None:
    """Notes what run a checkpoint folder belongs to, or makes sure it is this one.

    Args:
        folder: where the checkpoints go.
        run: what must not change between a run and its resumption; JSON values.

    Raises:
        ValueError: the folder belongs to a run that differs; names the first difference.
    """
    path = Path(folder) / _RUN
    if path.exists():
        try:
            known = json.loads(path.read_text())
            differing = [k for k in {**known, **run} if known.get(k) != run.get(k)]
        except (ValueError, TypeError):
            raise ValueError(f"{path}: not the JSON file of a run") from None
        if differing:
            k = differing[0]
            raise ValueError(
                f"{folder}: holds checkpoints of another run, {k} was {known.get(k)!r} and is now "
                f"{run.get(k)!r}; delete the folder or name another one"
            )
        return
    with replacing(path) as partial:
        partial.write_text(json.dumps(run, indent=2) + "\n")
