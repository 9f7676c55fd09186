"""Where a result comes from: the command, the revision of the code and the hardware.

Nothing collected here names a machine, a user or a folder outside the clone.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from nnslicer_jax.cores import cores

ROOT = Path(__file__).resolve().parents[1]


def origin(*, data: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The fields of `record.Row` that say how to repeat a run.

    Args:
        data: data set and split, in words.
        seeds: random seeds used.

    Returns:
        A dictionary of command, data, seeds, commit and hardware, to pass on as keywords.
    """
    return {
        "command": command(sys.argv),
        "data": data,
        "seeds": tuple(seeds),
        "commit": commit(),
        "hardware": hardware(),
    }


def command(argv: Sequence[str]) -> str:
    """The command line as a reader types it in the clone, from `sys.argv`.

    Absolute paths inside the clone become relative to it; others keep their last part.
    """
    program = Path(argv[0])
    if program.suffix == ".py" and program.parent.name == "experiments":
        words = ["python", "-m", f"experiments.{program.stem}"]
    else:
        words = [program.name]
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        if word.startswith("-") and equals:
            words.append(f"{flag}={_shorten(value)}")
        else:
            words.append(_shorten(word))
    return shlex.join(words)


def _shorten(word: str) -> str:
    path = Path(word).expanduser() if word.startswith("~") else Path(word)
    if not path.is_absolute():
        return word
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return path.name


def commit() -> str:
    """The revision of this clone, ``-dirty`` appended where code has changed since.

    Results and the pages rendered from them are no code: a study that has just been written does
    not make the next one dirty. ``uncommitted`` before the first revision, ``unknown`` outside a
    clone.
    """
    if (top := _git("rev-parse", "--show-toplevel")) is None or Path(top).resolve() != ROOT:
        return "unknown"
    if (revision := _git("rev-parse", "--verify", "--quiet", "HEAD")) is None:
        return "uncommitted"
    rendered = (":!experiments/results", ":!RESULTS.md", ":!BENCHMARKS.md")
    changed = _git("--no-optional-locks", "status", "--porcelain", "--", ".", *rendered)
    return f"{revision[:12]}-dirty" if changed else revision[:12]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> str:
    """Processor, cores, memory, accelerator, JAX and Python versions, as one line."""
    parts = [_processor(), f"{cores()} cores"]
    if (memory := _memory_gib()) is not None:
        parts.append(f"{memory} GiB")
    devices = jax.devices()
    if devices[0].platform != "cpu":
        kinds = [device.device_kind for device in devices]
        parts += [f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))]
    parts.append(f"jax {jax.__version__} on {devices[0].platform}")
    parts.append(f"Python {platform.python_version()}")
    return ", ".join(parts)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(size / 2**30)
