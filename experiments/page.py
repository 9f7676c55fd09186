"""One self-contained HTML page made of sections: text, tables, and figures drawn by matplotlib.

Nothing is loaded from elsewhere, scripts are not used, and the same content gives the same bytes.
"""

import base64
import io
import struct
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; yellow left out, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# What sets curves apart beside their colour.
MARKERS = "osD^vPX"
# Where a picture shows nothing.
ABSENT = "#d0d0d0"
# Pixels an inch: of the drawings, so that they stay sharp when enlarged, and of a page.
_DPI, _CSS_DPI = 160, 96

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #5b6470;
  --line: #d5dae0; --shade: #f4f6f8; --link: #0b5394; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #16181b; --faint: #a3abb5; --line: #3a4048; --shade: #22262b;
    --link: #8ab8ef; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, ul, dl { max-width: 46rem; }
a { color: var(--link); }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
nav ul { padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: minmax(7rem, auto) 1fr; gap: .3rem 1.25rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
figure { margin: 1rem 0; max-width: 100%; }
.figures figure { margin: 0; flex: 0 1 33rem; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line);
  border-radius: .4rem; background: #ffffff; }
figcaption, caption { color: var(--faint); font-size: .92rem; text-align: left; }
figcaption { margin-top: .4rem; max-width: 44rem; }
caption { padding-bottom: .5rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { background: var(--shade); vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; font-weight: 600; }
"""


class Section(NamedTuple):
    """One part of the page.

    Attributes:
      title: Its heading.
      html: What stands below it, made by the functions of this module.
      summary: What the terminal and the page's head say of it: label and value, in words.
    """

    title: str
    html: str
    summary: tuple[tuple[str, str], ...] = ()


def paragraph(text: str) -> str:
    """Plain text as one paragraph."""
    return f"<p>{escape(text)}</p>\n"


def heading(text: str) -> str:
    """A heading below the section's own."""
    return f"<h3>{escape(text)}</h3>\n"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first cell of a row is its heading.

    Raises:
      ValueError: If a row is not as long as the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row has {len(row)} cells, the table's head {len(head)}: {row}")
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    ]
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Labels with their values."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>\n" for k, v in pairs)
    return f"<dl>\n{items}</dl>\n"


def drawing(height: float) -> Figure:
    """An empty figure, `height` inches high and as wide as a telephone shows readably."""
    return Figure(figsize=(5.6, height), layout="constrained")


def grouped_bars(ax: Axes, values: np.ndarray, names: Sequence[str]) -> None:
    """Bars in groups.

    Args:
      ax: Where to draw.
      values: `[R, G]`, one row a colour and one column a group.
      names: Of the rows, at most as many as colours.
    """
    places = np.arange(values.shape[1])
    width = 0.8 / len(values)
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        ax.bar(
            places + (row - (len(values) - 1) / 2) * width, values[row], width, label=name,
            color=colour, hatch="///" * row, edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    ax.set_xticks(places)
    ax.legend(frameon=False)


def figure(drawn: Figure, alt: str, caption: str) -> str:
    """A drawing, inlined as PNG.

    Args:
      drawn: The figure, from `drawing`.
      alt: What it shows, for those who do not see it.
      caption: How to read it.
    """
    buffer = io.BytesIO()
    # The program's version would make equal pictures differ.
    drawn.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    # The picture's size stands behind the 16 bytes of signature and chunk header.
    size = struct.unpack(">II", buffer.getvalue()[16:24])
    width, height = (round(pixels * _CSS_DPI / _DPI) for pixels in size)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>\n'
    )


def beside(figures: Sequence[str]) -> str:
    """Figures next to each other where the window is wide enough."""
    return f'<div class="figures">\n{"".join(figures)}</div>\n'


def render(
    title: str, lead: str, sections: Sequence[Section], origin: Sequence[tuple[str, str]]
) -> str:
    """The whole page.

    Args:
      title: Its heading.
      lead: What the page is, one paragraph of plain text.
      sections: In order.
      origin: What repeats the page: command, data, seed, versions.
    """
    names = [f"section-{number}" for number, _ in enumerate(sections, 1)]
    links = "".join(
        f'<li><a href="#{name}">{escape(section.title)}</a></li>\n'
        for name, section in zip(names, sections, strict=True)
    )
    bodies = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(section.title)}</h2>\n{section.html}</section>\n'
        for name, section in zip(names, sections, strict=True)
    )
    summary = facts([row for section in sections for row in section.summary])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{paragraph(lead)}</header>\n"
        f'<nav aria-label="Sections"><ul>\n{links}</ul></nav>\n<main>\n'
        f'<section id="summary" aria-labelledby="summary-title">\n'
        f'<h2 id="summary-title">In short</h2>\n{summary}</section>\n{bodies}</main>\n'
        f"<footer>\n<h2>How this page was made</h2>\n{facts(origin)}</footer>\n</body>\n</html>\n"
    )


def summary_lines(sections: Sequence[Section]) -> str:
    """The sections' summaries as text for a terminal."""
    rows = [row for section in sections for row in section.summary]
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)
