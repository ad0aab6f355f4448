"""Cells of CSV files: text that no spreadsheet takes for a formula, and its way back."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamprobe.errors import InputError

FORMULA = re.compile("'*[=+@\t\r\n-]")  # what begins so is quoted by one more '


def cell(value: Any) -> Any:
    """A value as it is written: text that begins like a formula behind a ', floats with six significant digits."""
    if isinstance(value, str):
        return f"'{value}" if FORMULA.match(value) else value
    return f"{value:.6g}" if isinstance(value, float) else value


def text_of(written: str) -> str:
    """The text that `cell` wrote."""
    return written[1:] if written.startswith("'") and FORMULA.match(written) else written


def read_csv(path: Path, columns: Sequence[str], fix: str = "give the folder of such a run") -> list[dict[str, str]]:
    """The rows of a CSV file with these columns, other columns left out.

    Raises InputError, which ends in `fix`, where it cannot be read, a column is missing, or a row has too few or too
    many cells.
    """
    rows: list[dict[str, str]] = []
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8"), newline=""), strict=True)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise broken_file(path, f"no column {missing[0]} in it", fix)
        for row in reader:
            if None in row or None in row.values():
                raise broken_file(path, f"line {reader.line_num}: not {len(reader.fieldnames or ())} cells", fix)
            rows.append({name: text_of(row[name]) for name in columns})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise broken_file(path, str(error), fix) from error
    if not rows:
        raise broken_file(path, "no row in it", fix)
    return rows


def broken_file(path: Path, why: str, fix: str) -> InputError:
    """What is reported of a file of a run that is not as a run writes it."""
    return InputError(f"{path}, which cannot be read ({why})", "the file that a finished run writes", fix)
