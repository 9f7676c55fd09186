"""Render RESULTS.md and BENCHMARKS.md from experiments/results/*.json.

``python -m experiments.report`` writes both pages; ``--check`` writes nothing and fails where a
page differs from what the results say.
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import app, flags

from experiments.record import Record, Row, origin_of, read, write_text

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "RESULTS.md": ("Results", "Each study's measurements beside the published ones."),
    "BENCHMARKS.md": ("Benchmarks", "Time and memory, beside the published figures."),
}


def load(folder: Path) -> list[Record]:
    """Read every results file of a folder, in the order of their names.

    Raises:
        ValueError: a file is faulty, or two files of one study differ in title or text.
    """
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    headings: dict[str, tuple[str, str]] = {}
    for record in found:
        heading = (record.title, record.text)
        if headings.setdefault(record.study, heading) != heading:
            raise ValueError(f"two files of {record.study} differ in title or text")
    return found


def pages(found: Sequence[Record]) -> dict[str, str]:
    """The text of each page: benchmarks are the studies named ``bench_*``."""
    texts = {}
    for name, (title, about) in PAGES.items():
        chosen = [
            record
            for record in found
            if record.study.startswith("bench_") == (name == "BENCHMARKS.md")
        ]
        chosen.sort(key=lambda record: record.study)
        parts = [
            f"# {title}",
            f"{about} Rendered by `python -m experiments.report` from `experiments/results/*.json`;"
            " do not edit.",
        ]
        for _, group in itertools.groupby(chosen, key=lambda record: record.study):
            parts += _section(list(group))
        if not chosen:
            parts.append("Nothing has been recorded yet.")
        texts[name] = "\n\n".join(parts) + "\n"
    return texts


def _section(files: Sequence[Record]) -> Iterable[str]:
    yield f"## {_escape(files[0].title)}"
    if files[0].text:
        yield files[0].text
    rows = [row for record in files for row in record.rows]
    # One table for all rows of one run; runs in the order in which they first appear.
    for origin in dict.fromkeys(map(origin_of, rows)):
        yield _table([row for row in rows if origin_of(row) == origin])
        yield _origin(origin)


def _table(rows: Sequence[Row]) -> str:
    columns = {
        "row": [row.row for row in rows],
        "metric": [row.metric for row in rows],
        "published": [_value(row.published) for row in rows],
        "ours": [_measured(row) for row in rows],
        "unit": [row.unit for row in rows],
        "n": ["" if row.n is None else str(row.n) for row in rows],
        "note": [row.note for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    right = {"published", "ours", "n"}
    lines = [
        "| " + " | ".join(kept) + " |",
        "|" + "|".join(" ---: " if name in right else " --- " for name in kept) + "|",
    ]
    for cells in zip(*kept.values(), strict=True):
        lines.append("| " + " | ".join(map(_escape, cells)) + " |")
    return "\n".join(lines)


def _origin(origin: tuple[str, str, tuple[int, ...], str, str]) -> str:
    command, data, seeds, commit, hardware = origin
    return "\n".join(
        [
            f"- command: `{command}`",
            f"- data: {data}",
            f"- seeds: {', '.join(map(str, seeds)) or 'none drawn'}",
            f"- commit: {commit}",
            f"- hardware: {hardware}",
        ]
    )


def _value(value: int | float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _measured(row: Row) -> str:
    if row.ours is None:
        return "undefined"
    if row.spread is None:
        return _value(row.ours)
    if isinstance(row.spread, tuple):
        return f"{_value(row.ours)} ({_value(row.spread[0])} to {_value(row.spread[1])})"
    return f"{_value(row.ours)} ± {_value(row.spread)}"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def outdated(texts: dict[str, str], folder: Path) -> list[str]:
    """Names of the pages that are missing from the folder or differ from the texts given."""
    return [
        name
        for name, text in texts.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def render(results: Path, out: Path, *, check: bool = False) -> str:
    """Write both pages, or check them.

    Args:
        results: folder of results files.
        out: folder of the pages.
        check: write nothing.

    Returns:
        One line that says what was done.

    Raises:
        ValueError: a results file is faulty, or, checking, a page is out of date.
    """
    found = load(results)
    texts = pages(found)
    rows = sum(len(record.rows) for record in found)
    done = f"{' and '.join(texts)}: {rows} rows from {len(found)} results files"
    if check:
        if stale := outdated(texts, out):
            raise ValueError(f"{' and '.join(stale)} out of date; run python -m experiments.report")
        return f"up to date, {done}"
    for name, text in texts.items():
        write_text(out / name, text)
    return f"wrote {done}"


def main(argv: Sequence[str]) -> None:
    """Run `render` as the command line says."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    options = flags.FLAGS
    try:
        print(render(Path(options.results), Path(options.out), check=options.check))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("results", str(ROOT / "experiments" / "results"), "results folder")
    flags.DEFINE_string("out", str(ROOT), "folder the pages are written to")
    flags.DEFINE_bool("check", False, "write nothing; fail where a page is out of date")
    app.run(main)
