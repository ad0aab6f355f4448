"""ScoredRecord tokens as rows of a file, in pieces of any number of texts: CSV, JSON lines or parquet by its ending.

Every format holds the same columns: see `columns`.  Shapes: T tokens of a text, P probes.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from streamprobe.data.records import Record
from streamprobe.errors import InputError
from streamprobe.probes.base import Probes
from streamprobe.probes.linear import LINEAR
from streamprobe.system.csv_files import cell
from streamprobe.tools.score import ScoredText


class ScoredRecord(NamedTuple):
    """A record and what is said of its tokens."""

    record: Record
    text: ScoredText
    read: str  # the text that its offsets count in


class Layout(NamedTuple):
    """What stands in the columns behind those that name a token."""

    probes: list[str]  # P names
    alarm: float | None  # the probability from which on the single probe raises the alarm; None: no such column

    @property
    def columns(self) -> list[str]:
        """The names of all columns: row of the data (from 0), its id, token, its characters, probabilities, alarm."""
        return ["row", "id", "token", "start", "end", *self.probes, *(["alarm"] if self.alarm is not None else [])]


def layout_of(probes: Probes, alarm: float | None) -> Layout:
    """The layout of these probes: column names such as backtracking/onset/layer03/lag+08, layer by layer.

    Of another kind than linear that stands before the layer: backtracking/onset/mlp64/layer03/lag+08.
    """
    kind = "" if probes.kind == LINEAR else f"{probes.kind}/"
    names = [f"{c.array}/{c.target}/{kind}{site}/lag{c.lag:+03d}" for site in probes.sites for c in probes.columns]
    return Layout(names, alarm)


class Table(NamedTuple):
    """A format, as functions that give the bytes of its pieces."""

    head: Callable[[Layout], bytes]
    rows: Callable[[Layout, Sequence[ScoredRecord]], bytes]
    convert: Callable[[Path, Path], None] | None = None  # makes the file of all pieces, where they are not it already


def table_of(path: Path) -> Table:
    """The format that the ending of a path names.  Raises InputError for another."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    ending = Path(name.removesuffix(".gz")).suffix
    if ending not in TABLES or (packed and ending == ".parquet"):
        known = ", ".join([*TABLES, *(f"{each}.gz" for each in TABLES if each != ".parquet")])
        raise InputError(f"out {path}", f"a file that ends in {known}", "give --out another ending")
    return _packed(TABLES[ending]) if packed else TABLES[ending]


def _packed(table: Table) -> Table:
    """Each piece a member of a gzip file, which is one again when they stand one behind the other."""
    return Table(
        lambda layout: gzip.compress(table.head(layout), mtime=0),
        lambda layout, texts: gzip.compress(table.rows(layout, texts), mtime=0),
    )


def _values(layout: Layout, scored: ScoredRecord) -> Iterator[tuple[Any, ...]]:
    """Of each token: its text, start, end, probabilities [P] and, with a single probe, whether it raises the alarm."""
    found: Tensor = scored.text.probabilities.flatten(1)
    alarm = [[]] * len(found) if layout.alarm is None else (found >= layout.alarm).int().tolist()
    rows = zip(scored.text.tokens, scored.text.offsets.tolist(), found.tolist(), alarm, strict=True)
    return ((token, *place, *probabilities, *rest) for token, place, probabilities, rest in rows)


def _csv(rows: Iterator[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _csv_head(layout: Layout) -> bytes:
    return _csv(iter([layout.columns]))


def _csv_rows(layout: Layout, texts: Sequence[ScoredRecord]) -> bytes:
    """Cells as in every CSV file of this package: see `csv_files.cell`."""
    return b"".join(
        _csv((each.record.row, each.record.id, *values) for values in _values(layout, each)) for each in texts
    )


def _json_rows(layout: Layout, texts: Sequence[ScoredRecord]) -> bytes:
    """An object a line; numbers with six significant digits."""
    names, piece = layout.columns, io.BytesIO()
    for each in texts:
        for values in _values(layout, each):
            short = [float(f"{value:.6g}") if isinstance(value, float) else value for value in values]
            row = dict(zip(names, (each.record.row, each.record.id, *short), strict=True))
            piece.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
    return piece.getvalue()


def _schema(layout: Layout) -> Any:
    import pyarrow as pa

    kinds = {"row": pa.int64(), "id": pa.string(), "token": pa.string(), "start": pa.int32(), "end": pa.int32()}
    kinds |= dict.fromkeys(layout.probes, pa.float32()) | ({} if layout.alarm is None else {"alarm": pa.bool_()})
    return pa.schema(list(kinds.items()))


def _arrow_head(layout: Layout) -> bytes:
    return _schema(layout).serialize().to_pybytes()


def _arrow_rows(layout: Layout, texts: Sequence[ScoredRecord]) -> bytes:
    """A message of an Arrow stream, which can be cut off behind any of them; nothing where there is no token."""
    import pyarrow as pa
    import torch

    if not texts:
        return b""
    counts = [len(each.text.tokens) for each in texts]
    found = torch.cat([each.text.probabilities.flatten(1) for each in texts])
    offsets = torch.cat([each.text.offsets for each in texts]).int().numpy()
    data = [
        [each.record.row for each, n in zip(texts, counts, strict=True) for _ in range(n)],
        [each.record.id for each, n in zip(texts, counts, strict=True) for _ in range(n)],
        [token for each in texts for token in each.text.tokens],
        *offsets.T,
        *found.T.numpy(),
    ]
    if layout.alarm is not None:
        data.append((found[:, 0] >= layout.alarm).numpy())
    schema = _schema(layout)
    arrays = [pa.array(values, field.type) for values, field in zip(data, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema).serialize().to_pybytes()


def _to_parquet(stream: Path, path: Path) -> None:
    """A row group for each message of the stream."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    with pa.OSFile(str(stream)) as f, pa.ipc.open_stream(f) as reader, ParquetWriter(path, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


TABLES = {
    ".csv": Table(_csv_head, _csv_rows),
    ".jsonl": Table(lambda _: b"", _json_rows),
    ".parquet": Table(_arrow_head, _arrow_rows, _to_parquet),
}
