"""Lines and tables on a stream: to the width and in the colours of a terminal, else plain text."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO, TypeAlias

from sage_hub.errors import printable
from sage_hub.record.tables import Cell, Table, as_cell

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Part: TypeAlias = str | Cell | Table  # of what is shown: a line or a table

LONG = 24  # a column that is wider may be wrapped
STYLES = {
    "better": "green",
    "worse": "red",
    "within noise": "dim",
    "passed": "green",
    "failed": "red",
}


def print_text(parts: Iterable[Part], file: TextIO) -> None:
    """Print `parts` as `file` can show them; where it is no terminal, a line stays a line."""
    if not file.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        print(plain(parts), file=file, flush=True)
        return
    from rich.console import Console  # here, as its import takes its time

    console = Console(file=file)
    for part in parts:
        for renderable in _rendered(part, console.width):
            # Whatever is too long even so, as a URL may be, can be copied only if it is not cut.
            console.print(renderable, overflow="ignore", crop=False)


def plain(parts: Iterable[Part]) -> str:
    """`parts` as text, however wide it gets."""
    return "\n".join(line for part in parts for line in _plain_lines(part))


def _plain_lines(part: Part) -> Iterator[str]:
    if not isinstance(part, Table):
        yield printable(as_cell(part).text)
        return
    rows = [[printable(cell.text) for cell in row] for row in part.cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if part.header:
        rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield (" " * part.gap).join(cells).rstrip()


def _rendered(part: Part, room: int) -> Iterator[RenderableType]:
    """`part` for rich; a table that is too wide is several, with fewer columns each."""
    from rich import box, table

    if not isinstance(part, Table):
        yield _styled(part, room)
        return
    header = part.header or [""] * len(part.rows[0])
    columns = list(zip(*([_styled(c) for c in row] for row in (header, *part.rows)), strict=True))
    widths = [max(cell.cell_len for cell in cells) for _, *cells in columns]
    words = [max(map(len, name.plain.split()), default=0) for name, *_ in columns]
    least = [min(max(both), LONG) for both in zip(words, widths, strict=True)]
    whole = sum(max(cell.cell_len for cell in cells) + part.gap for cells in columns) - part.gap
    for number, chosen in enumerate(_that_fit(least, part.keys, part.gap, room)):
        if number:
            yield ""
        grid = table.Table(
            box=box.SIMPLE_HEAD if part.header else None,
            show_header=bool(part.header),
            show_edge=False,
            pad_edge=False,
            padding=(0, part.gap - bool(part.header), 0, 0),
        )
        for place in chosen:
            fixed = least[place] if whole > room and widths[place] <= LONG else None
            grid.add_column(columns[place][0], width=fixed, overflow="fold")
        for row in zip(*(columns[place][1:] for place in chosen), strict=True):
            grid.add_row(*row)
        yield grid


def _styled(cell: str | Cell, room: int | None = None) -> Text:
    """For rich, but never read as its markup; wrapped between words if there is a `room`.

    A line that is indented is a command, to be copied whole.
    """
    from rich.text import Text

    text = printable(as_cell(cell).text)
    if room is not None and not text.startswith("  "):
        text = textwrap.fill(text, room, break_long_words=False, break_on_hyphens=False)
    return Text(text, STYLES.get(as_cell(cell).verdict, ""))


def _that_fit(widths: Sequence[int], keys: int, gap: int, room: int) -> Iterator[list[int]]:
    """The columns of each table that fits into the `room`; all begin with the `keys`."""
    columns = list(range(keys))
    for column in range(keys, len(widths)):
        if len(columns) > keys and sum(widths[c] + gap for c in columns) + widths[column] > room:
            yield columns
            columns = list(range(keys))
        columns.append(column)
    yield columns
