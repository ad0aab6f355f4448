"""Every type of file gives the text that was written, whatever it looks like; what is damaged is refused by its place."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from builders import compress, make_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprobe.data.file_types import COMPRESSIONS, FILE_TYPES, open_file, parse_name, read_table

ROWS = ["csv", "tsv", "json", "jsonl", "ndjson", "parquet"]  # types that hold more than one text
SQUEEZED = ["", *COMPRESSIONS]
TEXTS = [
    "Ein Satz, mit Komma; é 漢字 🙂 \u2028 \x85 \x1c \x00 nul",
    *("001", "1.0", "NA", "null", "None", "nan", "true", "2024-01-01", "1e5", "-0", "∞", "\ufeffBOM inside"),
    *(' "quoted" ', "it's", '"', '""', "a\tb", "one\ntwo", "one\r\ntwo\rthree\n", " spaces ", "\\n", "=1+1", "#x", ","),
    *("[sic] he said", "[1, 2", "{x}", '["label"]text["end-section"]', "[]", "{}", "[1]", '{"a": 1}'),
]


def read(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a file by the table of types."""
    name = parse_name(str(path))
    with open_file(str(path), name.compression) as file:
        return FILE_TYPES[name.suffix].read(file, name.stem)


def refusal(path: Path, content: bytes) -> str:
    """What is wrong with a file of this content."""
    path.write_bytes(compress(content, path.suffix))
    with pytest.raises((ValueError, OSError)) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("squeezed", SQUEEZED)
@pytest.mark.parametrize("suffix", ROWS)
def test_every_type_gives_the_same_rows(tmp_path, suffix, squeezed):
    rows: list[dict[str, Any]] = [{"id": f"{i:03}", "text": text, "none": None} for i, text in enumerate(TEXTS)]
    rows += [{"id": f"x_{i}", "text": row["annotated_chain"], "none": None} for i, row in enumerate(make_rows(20))]
    found = read(write_rows(tmp_path / f"x.{suffix}{squeezed}", rows))
    assert found == rows and [list(row) for row in found] == [list(row) for row in rows]


@pytest.mark.parametrize("squeezed", SQUEEZED)
@pytest.mark.parametrize("suffix", ROWS)
def test_lists_and_objects_come_back_from_every_type(tmp_path, suffix, squeezed):
    rows = [
        {
            "id": str(i),
            "tokens": ["wait", ",", '"no" 漢'][:i],
            "spans": [{"start": i, "label": 'a "b", c\n'}] * i,
            "meta": {"of": i},
        }
        for i in range(4)
    ]
    assert read(write_rows(tmp_path / f"x.{suffix}{squeezed}", rows)) == rows


def test_same_rows_fail_without_text_kept_as_it_stands(tmp_path):
    """The negative control: what a reader with types of its own makes of it."""
    rows = [{"id": f"{i:03}", "text": text} for i, text in enumerate(("NA", "2", "3"))]
    path = write_rows(tmp_path / "x.csv", rows)
    typed = pandas.read_csv(path).to_dict("records")
    assert typed[1] == {"id": 1, "text": 2.0} and typed[0]["text"] != typed[0]["text"] and read(path) == rows


TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.text('[]{}"\\,:0\r\n\t ', max_size=8)


@settings(max_examples=60)
@given(texts=st.lists(st.tuples(TEXT, TEXT), max_size=6))
@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "jsonl.zst", "json", "parquet"])
def test_any_text_comes_back(tmp_path_factory, suffix, texts):
    """An empty cell of a table is a missing one; the first row is prose, so that no column holds JSON alone."""
    rows: list[dict[str, Any]] = [{"a": "so", "b": "prose"}, *({"a": a, "b": b} for a, b in texts)]
    path = write_rows(tmp_path_factory.getbasetemp() / f"any.{suffix}", rows)
    empty = None if "sv" in suffix else ""
    assert read(path) == [{name: text or empty for name, text in row.items()} for row in rows]


def test_any_text_fails_without_line_ends_kept(tmp_path):
    """The negative control: a file that is opened as text."""
    path = write_rows(tmp_path / "x.csv", [{"a": "one\r\ntwo\r"}])
    with open(path, encoding="utf-8") as opened:
        assert list(csv.reader(opened))[1] == ["one\ntwo\n"]
    assert read(path) == [{"a": "one\r\ntwo\r"}]


@pytest.mark.parametrize(
    ("cells", "parsed"),
    [
        (["[1]", "[]", ""], [[1], [], None]),
        (['[{"a": 1}]', '{"a": [2]}'], [[{"a": 1}], {"a": [2]}]),
        (["[sic]", "[1]"], None),
        (["[1]", "so [2]"], None),
        (["[1]", " [2]"], None),
        (["{1}", "[1]"], None),
        (["['a']", "[1]"], None),
        (['"a"', '"b"'], None),
        (["1", "2"], None),
        (["true", "[1]"], None),
        (["[1] and more", "[1]"], None),
        (["[1]", "[" * 100_000 + "]" * 100_000], None),
        (["", ""], [None, None]),
    ],
)
def test_a_column_of_a_table_is_read_as_json_where_every_cell_is(tmp_path, cells, parsed):
    path = write_rows(tmp_path / "x.csv", [{"id": "a", "cell": cell} for cell in cells])
    assert [row["cell"] for row in read(path)] == (parsed or cells)


@pytest.mark.parametrize("squeezed", SQUEEZED)
@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_a_text_file_is_one_text(tmp_path, suffix, squeezed):
    text = "\n# Wait\r\n\r\tno: 漢🙂 \ufeff\n\n"
    assert read(write_rows(tmp_path / f"a.b 1.{suffix}{squeezed}", [{"text": text}])) == [{"id": "a.b 1", "text": text}]
    assert read(write_rows(tmp_path / f"x.{suffix}{squeezed}", [{"text": "\ufeff" + text}]))[0]["text"] == text
    assert read(write_rows(tmp_path / f"x.{suffix}{squeezed}", [{"text": ""}]))[0]["text"] == ""


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    rows = [{"id": "1", "text": "\ufeffa"}]
    for suffix in ("csv", "tsv", "json", "jsonl"):
        path = Path(write_rows(tmp_path / f"x.{suffix}", rows))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read(path) == rows


def test_json_lines_with_line_separators_in_strings(tmp_path):
    rows = [row | {"problem": "one\u2028two\u0085three"} for row in make_rows(3)]
    assert read(write_rows(tmp_path / "x.jsonl", rows)) == rows
    assert len(Path(tmp_path / "x.jsonl").read_text("utf-8").splitlines()) > 3  # negative control


def test_json_may_be_lines_or_hold_its_list_under_a_name(tmp_path):
    rows = make_rows(3)
    path = tmp_path / "x.json"
    for content in (
        "\n\n".join(map(json.dumps, rows)),
        json.dumps({"data": rows}),
        json.dumps({"version": 1, "names": ["a"], "none": [], "data": rows}, indent=2),
    ):
        path.write_text(content)
        assert read(path) == rows
    assert "no list of objects" in refusal(path, b'{"problem": "p"}')
    assert "2 lists of objects" in refusal(path, json.dumps({"train": rows, "test": rows}).encode())
    assert refusal(path, b"[1]") == "row 1 is no object" and refusal(path, b"7") == "no list of objects"


def test_a_long_cell_and_many_lines_in_one(tmp_path):
    rows = [{"id": "a", "text": "wait, \n" * 300_000}, {"id": "b", "text": "no"}]
    path = write_rows(tmp_path / "x.csv", rows)
    limit = csv.field_size_limit()
    assert read(path) == rows and csv.field_size_limit() == limit
    with pytest.raises(csv.Error, match="limit"):  # negative control
        list(csv.reader(open(path, encoding="utf-8", newline="")))


BROKEN_TABLES = {
    "too few cells": ("id,text\na,b\n\nc\n", "line 4: 1 cell under a header of 2"),
    "too many cells": ('id,text\na,"b\nb"\nc,d,e\n', "line 4: 3 cells under a header of 2"),
    "a name twice": ("id,text,id\na,b,c\n", "line 1: two columns with the name 'id'"),
    "two columns without a name": (",,text\n1,2,a\n", "line 1: two columns with the name ''"),
    "no header": (f"a_1,{'wait no.. ' * 50!r}\n".replace("'", '"'), "line 1: no header, but a cell of 500 letters"),
    "a quote that is left open": (
        'id,text\na,"b\nc,d\ne,f\n',
        "line 2: a quote that opens in this row is never closed",
    ),
    "letters behind a quote": ('id,text\na,b\na,"b"c\n', "line 3: a cell of this row goes on behind its closing quote"),
    "old line ends": ("id,text\ra,b\r", "line 1: new-line character"),
}


@pytest.mark.parametrize(("content", "told"), BROKEN_TABLES.values(), ids=BROKEN_TABLES.keys())
def test_a_broken_table_is_reported_by_its_line(tmp_path, content, told):
    assert told in refusal(tmp_path / "x.csv", content.encode())
    assert told in refusal(tmp_path / "x.tsv.gz", content.replace(",", "\t").encode())


def test_an_open_quote_is_not_found_without_strictness():
    """The negative control: by default one cell takes all that follows."""
    content = BROKEN_TABLES["a quote that is left open"][0]
    assert list(csv.reader(io.StringIO(content)))[1:] == [["a", "b\nc,d\ne,f\n"]]


def test_tables_without_a_row(tmp_path):
    for content in ("", "\n\n", "id,text\n", "\ufeffid,text"):
        assert read_table(io.BytesIO(content.encode()), "x", delimiter=",") == []
    assert read_table(io.BytesIO(b",text\r\n0,a\r\n\r\n1,\r\n"), "x", delimiter=",") == [
        {"": "0", "text": "a"},
        {"": "1", "text": None},
    ]


@pytest.mark.parametrize("squeezed", SQUEEZED)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "txt", "md"])
def test_bytes_that_are_no_utf_8_are_reported_by_their_place(tmp_path, suffix, squeezed):
    content = b'{"a": "\xc3\xa9"}\n{"a": "caf\xe9"}\n'
    assert refusal(tmp_path / f"x.{suffix}{squeezed}", content) == "line 2: byte 22 (0xe9) is no UTF-8"
    assert content[22] == 0xE9
    assert "byte 0 (0xff)" in refusal(tmp_path / f"x.{suffix}{squeezed}", "﻿é".encode("utf-16"))


def test_a_broken_line_of_json_is_reported_by_its_line(tmp_path):
    good = json.dumps({"a": "b"})
    for suffix in ("jsonl", "json", "ndjson.zst"):
        told = refusal(tmp_path / f"x.{suffix}", f"{good}\n\n\n{good}\n{good[:-2]}\n{good}\n".encode())
        assert "line 5" in told and "column" in told
        assert refusal(tmp_path / f"x.{suffix}", f"{good}\r\n\r\n[1]\r\n".encode()) == "line 3 is no object"
    told = refusal(tmp_path / "x.json", f"[{good},\n{good},\n{good[:-3]}]".encode())
    assert "line 3" in told and "column" in told


@pytest.mark.parametrize("squeezed", list(COMPRESSIONS))
def test_an_archive_that_is_cut_or_none_is_refused(tmp_path, squeezed):
    whole = compress(b"".join(json.dumps(row).encode() + b"\n" for row in make_rows(30)), squeezed)
    path = tmp_path / f"x.jsonl{squeezed}"
    path.write_bytes(whole)
    assert read(path) == make_rows(30)
    path.write_bytes(whole * 2)
    assert len(read(path)) == 60  # archives that follow each other are one
    for content in (
        b"",
        *(whole[:n] for n in (1, 20, len(whole) // 2, len(whole) - 1)),
        whole + b"more",
        b'{"a": 1}\n',
    ):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            read(path)


def test_parquet_with_two_columns_of_a_name(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table([["a"], ["b"]], names=["x", "x"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="two columns with the name 'x'"):
        read(tmp_path / "x.parquet")
    assert "magic" in refusal(tmp_path / "y.parquet", b"PAR1" + b"x" * 50).lower()


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a/b.c.JSONL.GZ", ("b.c", ".jsonl", ".gz")),
        ("x.json", ("x", ".json", "")),
        ("x.tar.zst", ("x", ".tar", ".zst")),
        ("x.gz", ("x", "", ".gz")),
        (".csv", (".csv", "", "")),
        ("x", ("x", "", "")),
    ],
)
def test_the_parts_of_a_name(path, parts):
    assert parse_name(path) == parts


def test_every_type_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = "".join(line for line in page.split("## Files")[1].split("\n## ")[0].split("\n") if line.startswith("| `."))
    assert {suffix for suffix in FILE_TYPES if f"`{suffix}`" not in table} == set()
    assert "`.xlsx`" not in table  # negative control
