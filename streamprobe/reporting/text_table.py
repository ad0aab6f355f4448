"""Tables of rows for a terminal, of columns that matter more or less: the least important ones give way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from streamprobe.reporting.grids import interval, number


class Shown(NamedTuple):
    """A column of a table: its head, how wide it is, the cell of a row, and how much it matters (0 the most)."""

    head: str
    width: int  # below 0: from the left
    text: Callable[[Any], str]
    matters: int

    def holding(self, rows: Sequence[Any]) -> "Shown":
        """The same, as wide as its widest cell at least."""
        wide = max(abs(self.width), *(len(self.text(row)) for row in rows))
        return self._replace(width=wide if self.width > 0 else -wide)


def number_column(head: str, width: int, matters: int, name: str, *, sign: str = "") -> Shown:
    """The column of one number of a row."""
    return Shown(head, width, lambda row: number(row, name, sign), matters)


def interval_column(width: int, matters: int, name: str, sign: str = "") -> Shown:
    """The column of an interval."""
    return Shown("  95% interval", -width, lambda row: f"  {interval(row, name, sign)}".rstrip(), matters)


def columns_that_fit(columns: Sequence[Shown], rows: Sequence[Any], width: int) -> list[Shown]:
    """The columns that have something to show, each as wide as that, without those that matter least where `width` is
    too little for all.
    """
    kept = [column.holding(rows) for column in columns if any(column.text(row) for row in rows)]
    while sum(abs(column.width) for column in kept) > width and len(kept) > 1:
        kept.remove(max(reversed(kept), key=lambda column: column.matters))
    return kept


def draw_table(columns: Sequence[Shown], rows: Sequence[Any], width: int) -> list[str]:
    """A line of heads, and one for each row."""
    kept = columns_that_fit(columns, rows, width)

    def line(cells: Iterable[str]) -> str:
        placed = (f"{cell:{'<' if c.width < 0 else '>'}{abs(c.width)}}" for c, cell in zip(kept, cells, strict=True))
        return "".join(placed).rstrip()

    return [line(column.head for column in kept), *(line(column.text(row) for column in kept) for row in rows)]
