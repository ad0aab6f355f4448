"""Streams of records: what whole files give, once and in order, across interruptions, faults, droughts and changes."""

import io
import json
import os
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import compress, make_rows, write_rows

from streamprobe.data import stream_rows
from streamprobe.data.detect import FormatQuery
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.sources import Stream, open_source, read_records
from streamprobe.data.streams import SAMPLE, RecordStream, open_stream
from streamprobe.errors import InputError

ASKED = FormatQuery()
PLAIN = FormatQuery(labelled=False)
N = 150  # rows, of which more than SAMPLE are not read ahead
ROWS = make_rows(N, seed=3)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream_rows, "LOOK", 0.02)


def opened(data: str, asked: FormatQuery = ASKED, **keys: Any) -> RecordStream:
    """The stream of these data."""
    return open_stream(data, asked, FormatOptions(), **keys)


def texts(stream: Iterable[Record | Refused]) -> list[str]:
    """What the records that are still to come say, or why they are none."""
    return [each.reason if isinstance(each, Refused) else each.response for each in stream]


def numbered(first: int, last: int) -> list[dict[str, Any]]:
    """Rows without an id."""
    return [{"text": f"text {i}"} for i in range(first, last)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pipe_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Standard input is these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@contextmanager
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a pipe; yields the end that is written to, which stays open unless it is closed inside."""
    there, here = os.pipe()
    with monkeypatch.context() as patch, open(there) as opened_pipe:
        patch.setattr(sys, "stdin", opened_pipe)
        try:
            yield here
        finally:
            try:
                os.close(here)
            except OSError:
                pass


def small_groups(path: str, rows: list[dict[str, Any]], size: int = 20) -> None:
    """A parquet file with `size` rows in a row group."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=size, compression="none", use_dictionary=False)


# What a data set on the hub is: a folder of files that `datasets` reads


@pytest.fixture
def hub(monkeypatch) -> None:
    """`some/name` on the hub: two files of parquet, read by `datasets` itself."""
    import datasets

    Path("hub").mkdir()
    small_groups("hub/train-0.parquet", ROWS[:70])
    small_groups("hub/train-1.parquet", ROWS[70:])
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **options: load("hub", *args, **options))


# What is streamed: from a name, how the data are laid down, and what is opened


def lay_file(name: str) -> Callable[[pytest.MonkeyPatch], str]:
    def lay(_patch: pytest.MonkeyPatch) -> str:
        return write_rows(Path(name), ROWS)

    return lay


def lay_folder(data: str) -> Callable[[pytest.MonkeyPatch], str]:
    def lay(_patch: pytest.MonkeyPatch) -> str:
        Path("shards/below").mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(["a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.jsonl", "e.jsonl.gz"]):
            write_rows(Path("shards", name), ROWS[30 * number : 30 * number + 30])
        Path("shards/README.md").write_text("hello")
        return data

    return lay


def lay_groups(_patch: pytest.MonkeyPatch) -> str:
    small_groups("groups.parquet", ROWS)
    return "groups.parquet"


def lay_pipe(patch: pytest.MonkeyPatch) -> str:
    pipe_in(patch, b"\n" + lines(ROWS))
    return "-"


KINDS: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    **{name: lay_file(name) for name in ("x.jsonl", "x.ndjson", "x.jsonl.gz", "x.ndjson.zst", "x.parquet")},
    **{data: lay_folder(data) for data in ("shards", "shards/*.*son*", "./shards/**/*.*s*n*")},
    "row groups": lay_groups,
    "standard input": lay_pipe,
    "hub": lambda _patch: "some/name",
}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_what_the_whole_files_hold(kind, monkeypatch):
    data = KINDS[kind](monkeypatch)
    whole = write_rows(Path("whole.jsonl"), ROWS) if data == "-" else data
    expected = read_records(open_source(whole, ASKED, FormatOptions()))
    stream: Stream = opened(data)
    assert list(stream) == expected and len(expected) == N and list(stream) == []
    assert [record.row for record in expected] == list(range(N))


@pytest.mark.parametrize("wait", [None, 0, 0.01])
def test_order_of_a_folder_is_that_of_its_names(wait, monkeypatch):
    lay_folder("shards")(monkeypatch)
    assert [each.id for each in opened("shards", wait_seconds=wait)] == [row["task_id"] for row in ROWS]


# Interruptions


def in_pieces(open_again: Callable[[], RecordStream], seed: int, most: int = 40) -> list[Record | Refused]:
    """The records of a stream that is cut off at random places and goes on in a new one each time."""
    draw, found = random.Random(seed), list[Record | Refused]()
    state, cuts = None, 0
    while True:
        stream = open_again()
        if state is not None:
            stream.load(json.loads(json.dumps(state)))
        wanted = draw.choice([0, 1, draw.randrange(most)])
        got = list(islice(stream, wanted))
        found += got
        state, cuts = stream.state(), cuts + 1
        if len(got) < wanted:
            assert cuts > 2
            return found


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "./shards/**/*.*s*n*"])
def test_records_come_once_and_in_order_over_50_random_interruptions(kind, monkeypatch):
    data = KINDS[kind](monkeypatch)

    cuts = []

    def open_again() -> RecordStream:
        if data == "-":
            KINDS[kind](monkeypatch)
        cuts.append(0)
        return opened(data)

    straight = list(open_again())
    for seed in range(3):
        assert in_pieces(open_again, seed, most=12) == straight
    assert len(cuts) > 50
    assert len({each.id for each in straight}) == len(straight) == N


def test_records_come_twice_without_the_state(monkeypatch):
    """The negative control: a new stream begins with the first record."""
    data = lay_folder("shards")(monkeypatch)
    first, second = opened(data), opened(data)
    got = list(islice(first, 5)) + list(second)
    assert len(got) == N + 5 and [each.id for each in got[:5]] == [each.id for each in got[5:10]]


def test_interruptions_amid_faults(monkeypatch):
    Path("d").mkdir()
    bad = b'{"text": "caf\xe9"}\nno JSON\n[1]\n\n'
    Path("d/a.jsonl").write_bytes(lines(numbered(0, 30)) + bad + lines(numbered(30, 60)) + b'{"text": "hal')
    packed = compress(bad + lines(numbered(60, 4000)), ".gz")
    Path("d/b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    Path("d/c.jsonl").write_bytes(lines(numbered(4000, 4030)) + bad)
    straight = list(opened("d", PLAIN))
    for seed in range(5):
        assert in_pieces(lambda: opened("d", PLAIN), seed, most=900) == straight
    reasons = [(each.reason, each.id) for each in straight if isinstance(each, Refused)]
    assert [reason for reason, id in reasons if id.startswith("b")][3:] == ["where a file cannot be read"]
    assert ("that is no JSON", "a.jsonl:65") in reasons and ("that is no UTF-8", "c.jsonl:31") in reasons
    assert len({each.id for each in straight}) == len(straight)


def test_a_state_is_behind_the_last_record_given_and_not_behind_what_was_read_ahead(monkeypatch):
    lay_file("x.jsonl")(monkeypatch)
    stream = opened("x.jsonl")
    assert stream.state()["places"] == {} and stream.state()["given"] == 0
    next(iter(stream))
    state = stream.state()
    first_line = Path("x.jsonl").read_bytes().split(b"\n")[0]
    assert state["places"]["x.jsonl"]["line"] == 1 and state["places"]["x.jsonl"]["byte"] == len(first_line) + 1
    next(iter(stream))
    assert stream.state()["given"] == 2 and state["given"] == 1  # a state is a copy


def test_plain_lines_go_on_by_a_seek(monkeypatch):
    """What lies before the place is not read again: it may even be garbage, but for its ends."""
    Path("x.jsonl").write_bytes(lines(numbered(0, 1000)))
    stream = opened("x.jsonl", PLAIN)
    assert len(list(islice(stream, 500))) == 500
    state = stream.state()
    content = bytearray(Path("x.jsonl").read_bytes())
    content[4000:5000] = b"?" * 1000
    Path("x.jsonl").write_bytes(content)
    again = opened("x.jsonl", PLAIN)
    again.load(state)
    assert texts(again) == [row["text"] for row in numbered(500, 1000)]
    assert texts(opened("x.jsonl", PLAIN)).count("that is no JSON") > 0  # negative control


def test_a_resumed_stream_keeps_the_columns_that_were_found():
    Path("x.jsonl").write_bytes(lines([{"text": "a", "label": 1}, {"text": "b", "label": 0}]))
    stream = opened("x.jsonl")
    next(iter(stream))
    state = stream.state()
    Path("x.jsonl").write_bytes(
        lines([{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 7}])
    )
    again = opened("x.jsonl")
    assert not again.found.options.yes_or_no  # negative control: what is found now is another meaning
    again.load(state)
    assert again.found == stream.found


def test_a_folder_that_has_moved_goes_on(monkeypatch):
    lay_folder("shards")(monkeypatch)
    stream = opened("shards")
    got = list(islice(stream, 70))
    os.rename("shards", "elsewhere")
    again = opened("elsewhere")
    again.load(stream.state())
    assert [each.id for each in [*got, *again]] == [row["task_id"] for row in ROWS]


def test_files_that_are_new_come_when_it_is_their_turn():
    Path("d").mkdir()
    for number, name in enumerate("bdf"):
        Path("d", f"{name}.jsonl.gz").write_bytes(compress(lines(numbered(10 * number, 10 * number + 10)), ".gz"))
    stream = opened("d", PLAIN)
    got = list(islice(stream, 15))
    for number, name in enumerate("ace"):
        Path("d", f"{name}.jsonl.gz").write_bytes(compress(lines(numbered(100 * number, 100 * number + 3)), ".gz"))
    states = [stream.state()]
    while True:  # also across further interruptions
        again = opened("d", PLAIN)
        again.load(states[-1])
        more = list(islice(again, 2))
        got += more
        states.append(again.state())
        if len(more) < 2:
            break
    assert len(got) == 39 == len({each.id for each in got})
    assert [each.id.split(":")[0] for each in got[20:]] == ["a.jsonl.gz"] * 3 + ["c.jsonl.gz"] * 3 + [
        "e.jsonl.gz"
    ] * 3 + ["f.jsonl.gz"] * 10


# Names


def test_rows_without_an_id_are_named_by_file_and_line():
    Path("d/s").mkdir(parents=True)
    write_rows(Path("d/a.jsonl"), numbered(0, 2))
    write_rows(Path("d/s/a.jsonl"), numbered(0, 2))
    Path("d/b.jsonl").write_bytes(b"\r\n\n" + lines(numbered(0, 1)) + b"\n")
    found = list(opened("d/**/*.jsonl", PLAIN))
    assert [each.id for each in found] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:3", "s/a.jsonl:1", "s/a.jsonl:2"]
    assert {each.category for each in found} == {""}
    assert [each.id for each in opened("d/s/a.jsonl", PLAIN)] == ["a.jsonl:1", "a.jsonl:2"]
    write_rows(Path("x.jsonl"), [{"id": "some_7", **row} for row in numbered(0, 2)])
    assert {(each.id, each.category) for each in opened("x.jsonl", PLAIN)} == {("some_7", "some")}  # negative control


# Faults


def test_a_corrupt_line_is_no_end(monkeypatch):
    content = (
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"\n7\n{"text": "\xff"}\n' + b"[" * 100_000 + b'\n{"text": "c"}'
    )
    expected = ["a", "that is no JSON", "that is no object", "that is no UTF-8", "that is nested too deeply", "c"]
    for name in ("x.jsonl", "x.jsonl.gz", "x.ndjson.zst"):
        Path(name).write_bytes(compress(content, Path(name).suffix))
        found = list(opened(name, PLAIN))
        assert texts(found) == expected
        assert [each.id for each in found] == [f"{name}:{number}" for number in (1, 3, 4, 5, 6, 7)]
        assert [each.row for each in found] == list(range(6))
    pipe_in(monkeypatch, content)
    assert [each.id for each in opened("-", PLAIN)] == [f"stdin:{number}" for number in (1, 3, 4, 5, 6, 7)]
    with pytest.raises(InputError):  # negative control
        open_source("x.jsonl", PLAIN, FormatOptions())


def test_a_row_group_that_cannot_be_read_is_named_once():
    small_groups("x.parquet", numbered(0, 200))
    content = bytearray(Path("x.parquet").read_bytes())
    place = content.index(b"text 50")
    content[place - 160 : place - 120] = b"\xff" * 40
    Path("x.parquet").write_bytes(content)
    found = list(opened("x.parquet", PLAIN))
    refused = [each for each in found if isinstance(each, Refused)]
    assert [(each.reason, each.id) for each in refused] == [("in a row group that cannot be read", "x.parquet:41-60")]
    assert len(found) == 181 and found[41].id == "x.parquet:61"
    for seed in range(10):
        assert in_pieces(lambda: opened("x.parquet", PLAIN), seed) == found


def test_a_parquet_file_that_cannot_be_read_is_named_once():
    Path("d").mkdir()
    for number, name in enumerate("abc"):
        small_groups(f"d/{name}.parquet", numbered(10 * number, 10 * number + 10))
    Path("d/b.parquet").write_bytes(Path("d/b.parquet").read_bytes()[:-9])
    found = list(opened("d", PLAIN))
    refused = [each for each in found if isinstance(each, Refused)]
    assert [(each.reason, each.id) for each in refused] == [("where a file cannot be read", "b.parquet")]
    assert len(found) == 21
    for seed in range(5):
        assert in_pieces(lambda: opened("d", PLAIN), seed, most=8) == found
    assert list(opened("d", PLAIN, wait_seconds=0.05)) == found


def test_data_of_which_nothing_can_be_read_are_refused(monkeypatch):
    def refused(data: str, *said: str, **keys: Any) -> None:
        with pytest.raises(InputError) as caught:
            opened(data, PLAIN, **keys)
        text = str(caught.value)
        assert "\n" not in text and "; expected " in text and "; fix: " in text
        assert all(part in text for part in said), text

    Path("x.jsonl").write_bytes("\n".join(["no"] * 100).encode("utf-16"))
    refused("x.jsonl", "whose first rows cannot be read (x.jsonl:1, that is no UTF-8)")
    Path("x.parquet").write_bytes(b"no")
    refused("x.parquet", "x.parquet, where a file cannot be read")
    for content in (b"", b"\n\n"):
        Path("x.jsonl").write_bytes(content)
        refused("x.jsonl", "data x.jsonl with no rows")
        pipe_in(monkeypatch, content)
        refused("-", "data - with no rows")
    for name in ("x.json", "x.csv.gz", "x.txt", "x.parquet.gz"):
        Path(name).write_bytes(b"")
        refused(
            name, f"which ends in {name[1:]}", ".jsonl (also with .gz or .zst behind it), .ndjson", ".parquet, a folder"
        )
    Path("d").mkdir()
    refused("d", "without a file that can be read")
    for name in ("d/x.csv", "d/y.csv"):
        Path(name).write_text("text\na\n")
    refused("d", "d/x.csv, which ends in .csv, as a stream")
    refused("gone.jsonl", "which does not exist")
    refused("./x.zip", "which does not exist", "or - for standard input")
    Path("x.zip").write_bytes(b"PK")
    refused("x.zip", "which ends in .zip", "or - for standard input")
    refused("https://user:secret@host/x.jsonl", "https://host/x.jsonl, a URL", "curl URL")
    for data in ("-", "d/*.jsonl", "x.jsonl"):
        refused(data, "data_config main with", config="main")
    monkeypatch.setattr(sys, "stdin", None)
    refused("-", "standard input is closed")
    Path("x.jsonl").write_bytes(lines([{"colour": 1}]))
    refused("x.jsonl", "columns 'colour'")


@pytest.mark.usefixtures("hub")
def test_a_data_set_on_the_hub_that_fails_on_the_way_ends_in_one_line(monkeypatch):
    stream = opened("some/name")
    content = bytearray(Path("hub/train-1.parquet").read_bytes())
    content[:-8] = b"\xff" * (len(content) - 8)
    with pytest.raises(InputError, match="some/name, which cannot be read"):
        Path("hub/train-1.parquet").write_bytes(content)
        list(stream)
    with pytest.raises(InputError, match="some/name, which cannot be read"):
        opened("some/name", split="nothing")


# Droughts


def test_a_file_that_grows_is_waited_for_and_then_ends(capsys):
    Path("x.jsonl").write_bytes(lines(numbered(0, 3)))

    def write() -> None:
        for number in range(3, 8):
            time.sleep(0.05)
            with open("x.jsonl", "ab") as file:
                file.write(lines(numbered(number, number + 1)))

    writer = threading.Thread(target=write)
    writer.start()
    begun = time.monotonic()
    stream = opened("x.jsonl", PLAIN, wait_seconds=2)
    assert texts(stream) == [row["text"] for row in numbered(0, 8)]
    assert 2 < time.monotonic() - begun < 30
    writer.join()
    assert capsys.readouterr().out == "data      waiting for more of x.jsonl, 2 s at most\n"  # once a drought


def test_a_drought_begins_anew_with_each_row(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(stream_rows, "time", SimpleNamespace(monotonic=lambda: now[0]))
    waiting = stream_rows.Waiting("it", 10, lambda: False)
    for begin in (0, 100):
        for after, on in ((0, True), (4.9, True), (5, True), (9.9, True), (10, False)):
            now[0] = begin + after
            assert waiting.goes_on() is on
            assert capsys.readouterr().out == "data      waiting for more of it, 10 s at most\n" * (after == 5)
        waiting.came()
    waiting = stream_rows.Waiting("it", None, lambda: False)
    for now[0] in (0, 4, 1e6):
        assert waiting.goes_on()
    assert capsys.readouterr().out == "data      waiting for more of it\n"


def test_a_file_ends_at_its_end_without_a_wait(capsys):
    """The negative control of waiting."""
    Path("x.jsonl").write_bytes(lines(numbered(0, 3)))
    for wait in (None, 0):
        stream = opened("x.jsonl", PLAIN, wait_seconds=wait)
        begun = time.monotonic()
        assert len(list(stream)) == 3 and time.monotonic() - begun < 1
    assert capsys.readouterr().out == ""


def test_new_files_of_a_folder_are_waited_for():
    Path("d").mkdir()
    write_rows(Path("d/b.jsonl"), numbered(0, SAMPLE))

    def write() -> None:
        time.sleep(0.15)
        Path("d/below.tmp").write_bytes(lines(numbered(100, 102)))
        os.rename("d/below.tmp", "d/a.jsonl")
        Path("d/notes.csv").write_text("text\na\n")
        time.sleep(0.15)
        Path("d/c.part").write_bytes(compress(lines(numbered(200, 203)), ".gz"))
        os.rename("d/c.part", "d/c.jsonl.gz")

    writer = threading.Thread(target=write)
    stream = opened("d", PLAIN, wait_seconds=1.5)
    writer.start()
    found = texts(stream)
    writer.join()
    assert found[SAMPLE:] == ["text 100", "text 101", "text 200", "text 201", "text 202"]


def test_a_half_written_line_waits_for_its_end():
    rows = numbered(0, SAMPLE)
    Path("x.jsonl").write_bytes(lines(rows) + b'{"text": "ha')

    def write() -> None:
        time.sleep(0.3)
        with open("x.jsonl", "ab") as file:
            file.write(b'lf"}\n{"text": "an end"}')

    writer = threading.Thread(target=write)
    stream = opened("x.jsonl", PLAIN, wait_seconds=1.5)
    writer.start()
    assert texts(stream)[SAMPLE:] == ["half", "an end"]
    writer.join()


def test_a_half_written_line_is_no_json_without_a_wait():
    """The negative control; what follows later is passed over up to the line's end, since its first half was given."""
    Path("x.jsonl").write_bytes(lines(numbered(0, 2)) + b'{"text": "ha')
    stream = opened("x.jsonl", PLAIN)
    assert texts(stream) == ["text 0", "text 1", "that is no JSON"]
    with open("x.jsonl", "ab") as file:
        file.write(b'lf"}\n{"text": "an end"}\n')
    again = opened("x.jsonl", PLAIN)
    again.load(stream.state())
    (last,) = list(again)
    assert isinstance(last, Record) and (last.response, last.id, last.row) == ("an end", "x.jsonl:4", 3)


def test_a_last_line_without_an_end_may_get_one_later():
    Path("x.jsonl").write_bytes(lines(numbered(0, 2))[:-1])
    stream = opened("x.jsonl", PLAIN)
    assert len(list(stream)) == 2
    with open("x.jsonl", "ab") as file:
        file.write(b"\n" + lines(numbered(2, 3)))
    again = opened("x.jsonl", PLAIN)
    again.load(stream.state())
    assert [each.id for each in again] == ["x.jsonl:3"]


def test_stopped_ends_a_wait_at_once(monkeypatch):
    Path("x.jsonl").write_bytes(lines(numbered(0, SAMPLE)) + b'{"text": "half"}')
    asked: list[float] = []

    def stopped() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 5

    stream = opened("x.jsonl", PLAIN, wait_seconds=1000, stopped=stopped)
    begun = time.monotonic()
    assert len(list(stream)) == SAMPLE and time.monotonic() - begun < 5  # and no half line
    assert max(b - a for a, b in zip(asked, asked[1:], strict=False)) < 1
    with pipe(monkeypatch) as there:
        os.write(there, lines(numbered(0, SAMPLE)) + b'{"text": "half"}')
        asked.clear()
        stream = opened("-", PLAIN, stopped=stopped)
        assert len(list(stream)) == SAMPLE
    with pipe(monkeypatch), pytest.raises(InputError, match="stopped before its first row"):
        opened("-", PLAIN, stopped=lambda: True)


def test_a_silent_pipe_ends_after_its_time(monkeypatch, capsys):
    with pipe(monkeypatch) as there:
        os.write(there, lines(numbered(0, 3)) + b'{"text": "no end"}')
        begun = time.monotonic()
        assert texts(opened("-", PLAIN, wait_seconds=0.4))[3:] == ["no end"]
        assert 0.4 <= time.monotonic() - begun < 3
    assert capsys.readouterr().out == "data      waiting for more of standard input, 0.4 s at most\n"


def test_a_silent_pipe_is_waited_for_until_it_is_closed(monkeypatch, capsys):
    """With a word after some seconds, and without losing what came in odd pieces."""
    monkeypatch.setattr(stream_rows, "QUIET", 0.5)
    content = lines([{"text": "é漢🙂 " * 5000}, *numbered(1, 100)])
    with pipe(monkeypatch) as there:

        def write() -> None:
            for start in range(0, len(content), 20_001):
                os.write(there, content[start : start + 20_001])
            time.sleep(1)
            os.write(there, lines(numbered(100, 101)))
            os.close(there)

        writer = threading.Thread(target=write)
        writer.start()
        found = texts(opened("-", PLAIN))
        writer.join()
    assert len(found) == 101 and found[0] == "é漢🙂 " * 5000 and found[-1] == "text 100"
    assert capsys.readouterr().out == "data      waiting for more of standard input\n"


def test_standard_input_may_be_a_file(monkeypatch):
    Path("x.jsonl").write_bytes(lines(numbered(0, 100)))
    with open("x.jsonl") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert len(list(opened("-", PLAIN, wait_seconds=0.1))) == 100


# Data that have changed


def half_read(data: str, n: int = 100) -> dict[str, Any]:
    """The state of a stream that has given n records."""
    stream = opened(data, PLAIN)
    assert len(list(islice(stream, n))) == n
    return stream.state()


def refused(data: str, state: dict[str, Any], said: str) -> None:
    """Checks that a new stream of the data does not go on from the state."""
    stream = opened(data, PLAIN)
    with pytest.raises(InputError, match=said) as caught:
        stream.load(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("given", [40, 100])
def test_a_file_that_is_gone_shorter_or_another_is_refused(name, given):
    """Both the file that the stream stands in, and one that it has given all of."""
    Path("d").mkdir()
    last = Path("d", name.replace("a.", "b."))
    write_rows(Path("d", name), numbered(0, 60))
    write_rows(last, numbered(60, 120))
    state, content = half_read("d", given), Path("d", name).read_bytes()
    refused_name = f"d/{name}"
    Path("d", name).unlink()
    refused("d", state, f"{refused_name}, which is gone")
    Path("d", name).write_bytes(content)
    opened("d", PLAIN).load(state)  # negative control: put back
    write_rows(Path("d", name), numbered(0, 2))
    refused("d", state, "of [0-9,]+ bytes, of which [0-9,]+ have been read")
    write_rows(Path("d", name), [{"text": f"Text {i}"} for i in range(90)])
    refused("d", state, "which is another file than before|bytes, of which")
    Path("d", name).write_bytes(content)
    last.unlink()
    if given == 100:
        refused("d", state, "b.* which is gone")
    else:
        opened("d", PLAIN).load(state)  # negative control: nothing was given of it


def test_standard_input_that_is_shorter_or_another_is_refused(monkeypatch):
    rows = numbered(0, 200)
    pipe_in(monkeypatch, lines(rows))
    state = half_read("-")
    for content, said in (
        (lines(rows[:99]), "standard input of 99 lines; expected the 100 that were read before"),
        (lines(rows[:50] + rows[51:]), "whose first 100 lines are others than before"),
        (lines(rows[:50]) + b"\n" + lines(rows[50:]), "whose first 100 lines are others than before"),
    ):
        pipe_in(monkeypatch, content)
        refused("-", state, said)
    pipe_in(monkeypatch, lines(rows[:100]))  # negative control: all that was read, and no more
    stream = opened("-", PLAIN)
    stream.load(state)
    assert list(stream) == [] and stream.state() == state


@pytest.mark.usefixtures("hub")
def test_another_data_set_on_the_hub_is_refused():
    state = half_read("some/name")
    small_groups("hub/train-0.parquet", make_rows(70, seed=9))
    refused("some/name", state, "begins with another row than before")
    write_rows(Path("x.jsonl"), numbered(0, 3))
    refused("x.jsonl", state, "data from files for a run whose data came from hub")


# Memory


def peak_of(n: int) -> int:
    """Bytes of Python's that a stream of n small rows takes at most, above what is taken before."""
    with open("many.jsonl", "wb") as file:
        for start in range(0, n, 1000):
            file.write(lines(numbered(start, start + 1000)))
    stream = opened("many.jsonl", PLAIN)
    tracemalloc.start()
    given = sum(1 for _ in stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert given == n and len(json.dumps(stream.state())) < 1000
    return peak


def test_memory_does_not_grow_with_what_was_given():
    few, many = peak_of(2_000), peak_of(20_000)
    assert many < few + 100_000
    with open("many.jsonl", "rb") as file:  # negative control: the rows themselves
        tracemalloc.start()
        kept = [json.loads(line) for line in file]
        assert tracemalloc.get_traced_memory()[1] > 10 * many and len(kept) == 20_000
        tracemalloc.stop()


def test_resident_memory_does_not_grow_with_a_large_parquet_file():
    import psutil
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([("text", pyarrow.string())])
    with ParquetWriter("many.parquet", schema) as writer:
        for start in range(0, 200_000, 50_000):
            table = pyarrow.table({"text": [f"{i} " * 40 for i in range(start, start + 50_000)]}, schema)
            writer.write_table(table)
    stream = opened("many.parquet", PLAIN)
    process, seen = psutil.Process(), list[int]()
    for number, _ in enumerate(stream):
        if number % 20_000 == 0:
            seen.append(process.memory_info().rss)
    assert number == 199_999 and max(seen[2:]) - seen[1] < 40e6
