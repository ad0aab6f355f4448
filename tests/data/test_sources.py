"""From rows to records: the columns that must be there, and the rows that are refused one by one."""

from typing import Any

import numpy as np
import pytest
from builders import load_chains, make_rows, write_rows

from streamprobe.data.detect import FormatQuery
from streamprobe.data.files import read_rows
from streamprobe.data.records import FormatOptions
from streamprobe.data.sources import open_source
from streamprobe.errors import InputError

ASKED = FormatQuery("annotated", "task_id", "problem", "reasoning_chain", "annotated_chain")
FIELDS = ("task_id", "problem", "reasoning_chain", "annotated_chain")


@pytest.mark.parametrize("missing", FIELDS)
@pytest.mark.parametrize("suffix", ["json", "parquet", "csv"])
def test_missing_column(tmp_path, missing, suffix):
    rows = [{name: value for name, value in row.items() if name != missing} for row in make_rows(3)]
    with pytest.raises(InputError, match=f"without the column '{missing}'"):
        open_source(write_rows(tmp_path / f"x.{suffix}", rows), ASKED, FormatOptions())
    whole = write_rows(tmp_path / f"whole.{suffix}", make_rows(3))  # negative control
    assert len(open_source(whole, ASKED, FormatOptions())) == 3


def test_a_column_may_be_empty_in_some_rows_of_a_table(tmp_path):
    rows = [row | {"kind": "" if number else "a"} for number, row in enumerate(make_rows(3))]
    path = write_rows(tmp_path / "x.csv", rows)
    assert len(list(open_source(path, ASKED._replace(category="kind"), FormatOptions()))) == 3


def test_row_without_a_field_is_refused_and_not_the_file(tmp_path, tokenizer):
    rows: list[dict[str, Any]] = [dict(r) for r in make_rows(20)]
    order = np.random.RandomState(42).permutation(20)
    del rows[order[10]]["annotated_chain"]
    read = read_rows(write_rows(tmp_path / "x.json", rows), split="train")
    counts = load_chains(read, tokenizer, ["backtracking", "deduction"], 512)[1]
    name = rows[order[10]]["task_id"]
    assert counts.refused == {"with a field that is missing or not text": [name]} and counts.used == 19
