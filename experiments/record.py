"""The one schema every study's results are stored in, its checks, and atomic reading and writing.

A results file is JSON: the schema's number, a title, a text, and rows that each say alone which
study, row and metric they are, what was published, what was measured here, and how to repeat it.
"""

import dataclasses
import json
import math
import numbers
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from nnslicer_jax.atomic import replacing

SCHEMA = 1

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_COMMIT = re.compile(r"[0-9a-f]{7,40}(-dirty)?|uncommitted|unknown")
# An absolute path of two or more parts, a home folder or a drive: they name somebody's machine.
_MACHINE_PATH = re.compile(
    r"(?:^|(?<=[\s=:'\"(,]))(?:(?:/[\w.+-]+){2,}|~(?:[a-z_][\w-]*)?/|[A-Za-z]:\\)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number beside the published one.

    Attributes:
        study: module of the study below ``experiments``, such as ``bench_slicing``.
        row: what was measured on: a network, an attack, a ratio.
        metric: what was measured.
        ours: the measurement; None where it is undefined, which the note then explains.
        published: the paper's number, or its words (``below 10 %``); None where it has none.
        spread: half-width about ``ours``, or the interval's (low, high); the study's text says
            which (standard deviation over seeds, 95 % interval).
        unit: of published, ours and spread alike.
        n: how many samples stand behind ``ours``.
        note: anything a reader has to know about this row.
        command: what repeats it, ``python -m experiments.<study> ...``.
        data: data set and split, in words.
        seeds: random seeds used.
        commit: revision of the code, hexadecimal; ``-dirty`` appended where files had changed.
        hardware: processor, cores, memory, accelerator, versions.
    """

    study: str
    row: str
    metric: str
    ours: int | float | None
    published: int | float | str | None = None
    spread: int | float | tuple[float, float] | None = None
    unit: str = ""
    n: int | None = None
    note: str = ""
    command: str
    data: str
    seeds: tuple[int, ...]
    commit: str
    hardware: str

    def __post_init__(self):
        set_ = object.__setattr__
        for name in ("study", "row", "metric", "command", "data", "commit", "hardware"):
            _check_text(name, getattr(self, name), may_be_empty=False)
        for name in ("unit", "note"):
            _check_text(name, getattr(self, name), may_be_empty=True)
        if not _NAME.fullmatch(self.study):
            raise ValueError(f"study is {self.study!r}; a module name such as bench_slicing is due")
        if not _COMMIT.fullmatch(self.commit):
            raise ValueError(
                f"commit is {self.commit!r}; accepted: 7 to 40 hexadecimal digits, with -dirty "
                "after them or not, uncommitted, unknown"
            )
        if isinstance(self.published, str):
            _check_text("published", self.published, may_be_empty=False)
        else:
            set_(self, "published", _number("published", self.published))
        set_(self, "ours", _number("ours", self.ours))
        if self.ours is None and not self.note:
            raise ValueError(f"ours is None for {self.row} / {self.metric}; a note must say why")
        set_(self, "spread", _spread(self.spread))
        if self.n is not None:
            set_(self, "n", _count("n", self.n))
        if isinstance(self.seeds, str) or not isinstance(self.seeds, Sequence):
            raise ValueError(f"seeds is {self.seeds!r}; a list of integers is due")
        set_(self, "seeds", tuple(_count("seeds", seed) for seed in self.seeds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One results file: rows of one study under a title.

    Attributes:
        title: the study's heading in the rendered page.
        text: what a reader needs beside the table (Markdown, one paragraph), or "".
        rows: at least one, all of the same study, no (row, metric) twice under one origin.
    """

    title: str
    rows: tuple[Row, ...]
    text: str = ""

    def __post_init__(self):
        _check_text("title", self.title, may_be_empty=False)
        _check_text("text", self.text, may_be_empty=True)
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise ValueError("rows is empty; a results file holds at least one row")
        studies = sorted({row.study for row in self.rows})
        if len(studies) > 1:
            raise ValueError(f"rows name the studies {', '.join(studies)}; a file holds one")
        seen = set()
        for row in self.rows:
            key = (row.row, row.metric, *origin_of(row))
            if key in seen:
                raise ValueError(f"rows holds {row.row} / {row.metric} twice for one command")
            seen.add(key)

    @property
    def study(self) -> str:
        """The study all rows belong to."""
        return self.rows[0].study

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse and check a results file's text.

        Raises:
            ValueError: the text is not JSON or not of this schema; one line says where.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {str(error).splitlines()[0]}") from None
        _check_keys("the file", content, {"schema", "title", "text", "rows"})
        if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
            raise ValueError(f"schema is {content['schema']!r}; this code reads {SCHEMA}")
        if not isinstance(content["rows"], list):
            raise ValueError(f"rows is a {type(content['rows']).__name__}; a list is due")
        fields = {field.name for field in dataclasses.fields(Row)}
        rows = []
        for index, row in enumerate(content["rows"]):
            _check_keys(f"row {index}", row, fields)
            try:
                rows.append(Row(**row))
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from None
        return cls(title=content["title"], text=content["text"], rows=tuple(rows))

    def to_json(self) -> str:
        """The file's text: the same rows give the same bytes."""
        content = {
            "schema": SCHEMA,
            "title": self.title,
            "text": self.text,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def origin_of(row: Row) -> tuple[str, str, tuple[int, ...], str, str]:
    """What repeats the row: command, data, seeds, commit, hardware."""
    return row.command, row.data, row.seeds, row.commit, row.hardware


def read(path: str | os.PathLike[str]) -> Record:
    """Read and check one results file.

    Raises:
        ValueError: the file is not of this schema; one line names the file and the fault.
    """
    path = Path(path)
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def write(path: str | os.PathLike[str], record: Record) -> None:
    """Write one results file, atomically; its folder is made where it is missing."""
    write_text(path, record.to_json())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file so that it is there whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_keys(where: str, content: Any, keys: set[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__}; an object is due")
    missing, unknown = sorted(keys - content.keys()), sorted(content.keys() - keys)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown:
        raise ValueError(f"{where} holds {', '.join(unknown)}; accepted: {', '.join(sorted(keys))}")


def _check_text(name: str, value: Any, *, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; text is due")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{name} is empty; text is due")
    if "\n" in value or "\r" in value:
        raise ValueError(f"{name} has a line break; one line is due")
    if found := _MACHINE_PATH.search(value):
        raise ValueError(
            f"{name} names a path of one machine, {value[found.start() :]!r}; leave it out"
        )


def _number(name: str, value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {value!r}; a number or None is due")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; a finite number is due, or None with a note")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name} holds {value!r}; integers of 0 or more are due")
    return int(value)


def _spread(value: Any) -> int | float | tuple[float, float] | None:
    if isinstance(value, list | tuple):
        low, high = (
            (_number("spread", bound) for bound in value) if len(value) == 2 else (None,) * 2
        )
        if low is None or high is None or low > high:
            raise ValueError(f"spread is {value!r}; an interval is (low, high)")
        return low, high
    half = _number("spread", value)
    if half is not None and half < 0:
        raise ValueError(f"spread is {half}; a half-width is 0 or more")
    return half
