"""ScoredRecord tokens as rows of a file: the same rows in every format, in whatever pieces they come."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
import torch
from builders import make_record
from pyarrow.parquet import ParquetFile, read_table

from streamprobe.errors import InputError
from streamprobe.system.csv_files import text_of
from streamprobe.tools.score import ScoredText
from streamprobe.tools.score_tables import Layout, ScoredRecord, layout_of, table_of

TEXTS = {"=evil": ["wait", "\n", "+1"], "#2": ["你", ', \r"so"'], "c": ["x"]}
ENDINGS = [".csv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz"]


def scored(id, tokens, probes=1):
    ends = torch.tensor([len("".join(tokens[: i + 1])) for i in range(len(tokens))])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    random = torch.Generator().manual_seed(len(id))
    given = torch.rand(len(tokens), 1, probes, generator=random)
    record = make_record("p", "".join(tokens), id=id)
    return ScoredRecord(
        record, ScoredText(torch.zeros(len(tokens)), tokens, torch.stack([starts, ends], 1), given), record.response
    )


def written(path, layout, windows):
    """The file of these windows, as the command writes it."""
    table = table_of(path)
    content = table.head(layout) + b"".join(table.rows(layout, window) for window in windows)
    if table.convert:
        part = path.with_name("part")
        part.write_bytes(content)
        table.convert(part, path)
    else:
        path.write_bytes(content)
    return path


def rows_of(path):
    """Every row of a file, as text of its cells but for a token."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data, path = gzip.decompress(data), path.with_suffix("")
    if path.suffix == ".parquet":
        return read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in data.decode().split("\n")[:-1]]
    cells = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    return [
        {name: text_of(v) if name in ("token", "id") else json.loads(v) for name, v in row.items()} for row in cells
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_row_a_token(tmp_path, ending):
    layout, window = Layout(["a/b"], 0.5), [scored(*each) for each in TEXTS.items()]
    rows = rows_of(written(tmp_path / f"s{ending}", layout, [window]))
    assert [list(row) for row in rows] == [["row", "id", "token", "start", "end", "a/b", "alarm"]] * 6
    assert [(row["id"], row["token"]) for row in rows] == [(id, token) for id, own in TEXTS.items() for token in own]
    expected = torch.cat([each.text.probabilities.flatten() for each in window])
    torch.testing.assert_close(torch.tensor([row["a/b"] for row in rows]), expected, atol=1e-6, rtol=0)
    assert [bool(row["alarm"]) for row in rows] == (expected >= 0.5).tolist()
    assert {bool(row["alarm"]) for row in rows} == {True, False}
    for row in rows:
        assert "".join(TEXTS[row["id"]])[row["start"] : row["end"]] == row["token"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_pieces_make_one_file_and_nothing_else(tmp_path, ending):
    layout, texts = Layout(["a"], None), [scored(*each) for each in TEXTS.items()]
    whole = rows_of(written(tmp_path / f"whole{ending}", layout, [texts]))
    pieces = rows_of(written(tmp_path / f"pieces{ending}", layout, [texts[:1], [], texts[1:]]))
    assert whole == pieces and "alarm" not in whole[0]
    again = written(tmp_path / f"again{ending}", layout, [texts[:1], [], texts[1:]])
    assert again.read_bytes() == (tmp_path / f"pieces{ending}").read_bytes()  # no time or name in it
    assert rows_of(written(tmp_path / f"other{ending}", layout, [texts[1:], texts[:1]])) != whole  # negative control


def test_row_groups_of_a_parquet_file_come_as_the_pieces(tmp_path):
    texts = [scored(*each) for each in TEXTS.items()]
    path = written(tmp_path / "s.parquet", Layout(["a"], None), [texts[:1], [], texts[1:]])
    assert ParquetFile(path).num_row_groups == 2


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_file_without_a_row_has_columns(tmp_path, ending):
    path = written(tmp_path / f"s{ending}", Layout(["a"], 0.5), [[]])
    names = read_table(path).column_names if ending == ".parquet" else path.read_text().strip().split(",")
    assert names == ["row", "id", "token", "start", "end", "a", "alarm"]


def test_columns_are_named_by_their_probes_in_the_order_of_the_numbers(bank):
    names = layout_of(bank, None).probes
    assert names[0] == "backtracking/token/layer00/lag-02" and names[-1] == "backtracking/onset/layer02/lag+04"
    assert len(names) == 18 and names[7] == "backtracking/token/layer01/lag+00"
    layout, one = layout_of(bank, None), scored("a", ["x"])
    grid = torch.rand(1, 3, 6)
    one = one._replace(text=one.text._replace(probabilities=grid))
    row = json.loads(table_of(Path("s.jsonl")).rows(layout, [one]))
    assert row["backtracking/token/layer01/lag+00"] == pytest.approx(grid[0, 1, 1].item(), abs=1e-6)


@pytest.mark.parametrize("name", ["s.txt", "s", "s.parquet.gz", "s.gz", ".csv", "s.csv.zst"])
def test_another_ending_is_refused(name):
    with pytest.raises(InputError, match="expected a file that ends in .csv, .jsonl, .parquet, .csv.gz, .jsonl.gz"):
        table_of(Path(name))


def test_endings_are_known_in_capitals_too():
    assert table_of(Path("S.CSV")) == table_of(Path("s.csv"))
