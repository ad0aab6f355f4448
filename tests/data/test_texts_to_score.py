"""Texts that are only scored: which column they are in, and what becomes of rows that are none."""

import json

import pytest
from builders import make_rows

from streamprobe.data.detect import FormatQuery
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.texts import fingerprint, read_texts_to_score

OPTIONS = FormatOptions()
NOTHING = FormatQuery()
ORIGINAL = FormatQuery("annotated", "task_id", "problem", "reasoning_chain", "annotated_chain")
OWN = FormatQuery(response="own")


@pytest.fixture
def read(tmp_path):
    """What is read of rows that lie in a file."""

    def of(rows, options=OPTIONS, usual=ORIGINAL, asked=NOTHING):
        path = tmp_path / "texts.json"
        path.write_text(json.dumps(rows))
        return read_texts_to_score(str(path), asked, options, usual=usual)

    return of


def test_texts_need_no_labels(read):
    rows = make_rows(5)
    plain = [{k: v for k, v in row.items() if k != "annotated_chain"} for row in rows]
    for given in (rows, plain):
        records = read(given)
        assert [record.row for record in records] == list(range(5))
        for record, row in zip(records, rows, strict=True):
            assert (record.id, record.problem, record.response) == (
                row["task_id"],
                row["problem"],
                row["reasoning_chain"],
            )
            assert record.sections == []


@pytest.mark.parametrize("column", ["text", "response", "reasoning_chain", "content", "own"])
def test_the_column_of_the_text(read, column):
    (record,) = read([{column: "so .", "id": 7}], usual=OWN)
    assert (record.response, record.problem, record.id) == ("so .", "", "7")


def test_the_column_of_the_run_comes_first(read):
    assert read([{"text": "a", "own": "b"}], usual=OWN)[0].response == "b"
    assert read([{"text": "a", "other": "b"}], OPTIONS)[0].response == "a"


def test_sections_alone_where_the_run_read_these(read):
    row = {"text": "left out . so it is .", "annotated_chain": '["deduction"]so it is .["end-section"]'}
    assert read([row], OPTIONS._replace(rejoined=True))[0].response == "so it is ."
    assert read([row])[0].response == row["text"]  # negative control
    assert read([{"text": "so ."}], OPTIONS._replace(rejoined=True))[0].response == "so ."


def test_every_row_that_is_no_text_keeps_its_place_and_has_a_reason(read):
    rows = [
        {"text": "a"},
        {"text": " \n"},
        {"text": 5},
        {"other": "x"},
        {"text": "\ud800"},
        {"text": "b", "problem": 3},
        {"text": "b", "problem": "why?"},
        {"text": "b", "problem": "why?"},
    ]
    records = read(rows)
    assert isinstance(records[0], Record) and [record.row for record in records] == list(range(8))
    assert [record.reason for record in records if isinstance(record, Refused)] == [
        "with an empty response",
        "with a field that is missing or not text",
        "with a field that is missing or not text",
        "with text that is not Unicode",
        "with a field that is missing or not text",
    ]


@pytest.mark.parametrize(
    "rows, said",
    [([{"body": 5}], "with the columns 'body'; expected those of one of"), ([{"text": ""}], "none can be read")],
)
def test_a_file_without_a_text_is_refused(read, rows, said):
    with pytest.raises(ValueError, match=said):
        read(rows)


def test_the_fingerprint_is_that_of_ids_problems_and_texts(read):
    rows = [{"text": "a", "problem": "p", "id": "1"}, {"text": "b", "problem": "", "id": "2"}]
    same = fingerprint(read(rows))
    assert fingerprint(read([row | {"other": 1} for row in rows])) == same
    for changed in ({"text": "c"}, {"problem": "q"}, {"id": "3"}, {"text": ""}):
        assert fingerprint(read([rows[0] | changed, rows[1]])) != same
    assert fingerprint(read(rows[::-1])) != same


def test_the_fingerprint_of_a_chat_is_of_all_its_turns(read):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    same = fingerprint(read([{"messages": chat}]))
    assert same == fingerprint(read([{"messages": chat, "tools": []}]))
    assert same != fingerprint(read([{"messages": [chat[0] | {"content": "other"}, *chat[1:]]}]))
    assert same != fingerprint(read([{"messages": chat, "tools": [{"name": "add"}]}]))


def test_labels_that_would_refuse_a_row_are_passed_over(read):
    rows = [{"text": "so wait", "label": "a"}, {"text": "no", "label": None}, {"text": "go", "label": 0.3}]
    assert all(isinstance(record, Record) for record in read(rows))
    spans = [{"text": "so", "spans": [[0, 900, "a"]]}, {"text": "so wait", "spans": [[0, 2, "a"]]}]
    assert all(isinstance(record, Record) for record in read(spans))
