"""Which format a data set has, and which of its columns hold what."""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from streamprobe.data.columns import Role, Table, listed, never
from streamprobe.data.formats import FORMATS, ID, LABEL, PROBLEM, TEXT, Format
from streamprobe.data.records import FormatOptions, Row
from streamprobe.data.values import say_yes_or_no
from streamprobe.errors import InputError

AUTO = "auto"
COLUMNS = ("id", "problem", "response", "annotation")  # that are found: fields of FormatOptions, and keys in _column
OTHER = 0.95  # of the likeness of names is left where the values are not what is looked for
LIKE = 0.6  # likeness of names, from 0 to 1, from which on one is taken for a slip of the other


class FormatQuery(NamedTuple):
    """What the user says of a data set: None is what is to be found."""

    format: str = AUTO
    id: str | None = None
    problem: str | None = None
    response: str | None = None
    annotation: str | None = None
    category: str | None = None
    labelled: bool = True  # whether labels are needed; else a text alone will do


class Found(NamedTuple):
    """The format of a data set, with the columns that hold what."""

    name: str
    options: FormatOptions

    def __str__(self) -> str:
        o = self.options
        columns = {"text": o.response, "labels": o.annotation, "problem": o.problem, "id": o.id}
        return f"{self.name}: " + ", ".join(f"{what} in {name!r}" for what, name in columns.items() if name)

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a config that say so."""
        return {"format": self.name, **{f"{name}_column": getattr(self.options, name) for name in COLUMNS}}


class _Fit(NamedTuple):
    """How far a format fits a table."""

    text: str | None
    labels: str | None
    missing: list[Role]

    def distance(self, table: Table) -> tuple[float, ...]:
        """How far off it is, the roles that are missing first; a text alone lacks label rules."""
        nothing = self.text is None and self.labels is None
        return len(self.missing) or 1, nothing, -_likeness(table, self.missing)


def find_format(rows: Sequence[Row], shown: str, asked: FormatQuery, options: FormatOptions) -> Found:
    """The first format of FORMATS whose columns the rows have, or the one that is asked for, and the columns.

    `shown` names the data in errors.  Raises InputError where a column that is named is not there, and where no format
    fits; it says which columns there are and which format is the nearest.
    """
    table = Table(rows)
    _check_columns(table, shown, asked)
    id = table.find(ID, asked.id, [asked.problem, asked.response, asked.annotation])
    usable = [name for name in FORMATS if asked.format in (AUTO, name)]
    needed = asked.labelled and not options.rules
    named = table.find(PROBLEM, asked.problem, (id, asked.response, asked.annotation))
    for problem in (named, asked.problem):  # where there is no other, what is called the problem may be the text
        names = ID.names if problem is None and named else (*ID.names, *PROBLEM.names)
        taken = (id, problem, asked.category, *(column for column in table.values if column.lower() in names))
        trials = {name: _fit(FORMATS[name], table, asked, taken, ruled=bool(options.rules)) for name in usable}
        ok = [name for name, fit in trials.items() if not fit.missing and (FORMATS[name].labelled or not needed)]
        if ok:
            break
    else:
        raise _no_format(table, shown, trials, asked)
    fit = trials[ok[0]]
    assert fit.text is not None
    bare = FORMATS[ok[0]].text is TEXT and not (asked.labelled or options.rejoined)  # where labels might refuse a text
    labels = None if bare else fit.labels
    found = options._replace(
        id=id,
        problem=problem,
        response=fit.text,
        annotation=labels,
        category=asked.category,
        yes_or_no=labels is None or say_yes_or_no(row.get(labels) for row in rows),
        labelled=asked.labelled,
    )
    return Found("text" if bare else ok[0], found)


def _check_columns(table: Table, shown: str, asked: FormatQuery) -> None:
    """Raises InputError where a column that is named is not there."""
    for key in (*COLUMNS, "category"):
        name = getattr(asked, key)
        if name is not None and name not in table:
            raise InputError(
                f"data {shown} without the column {name!r}",
                f"one of {listed(map(repr, table.values))}",
                f"correct --{key}_column",
            )


def _fit(format: Format, table: Table, asked: FormatQuery, taken: Sequence[str | None], *, ruled: bool) -> _Fit:
    """The columns of a format in a table; those that are `taken` hold something else.

    Where texts are `ruled`, any column that says yes or no is not taken for their label.
    """
    role = format.labels._replace(certain=never) if ruled and format.labels is LABEL else format.labels
    labels = role and table.find(role, asked.annotation, (*taken, asked.response))
    text = table.find(format.text, asked.response, (*taken, asked.annotation, labels))
    missing = [format.text] if text is None else []
    if format.labels and format.labels.required and labels is None:
        missing.append(format.labels)
    return _Fit(text, labels, missing)


def _no_format(table: Table, shown: str, trials: Mapping[str, _Fit], asked: FormatQuery) -> InputError:
    """What is reported where no format fits: the columns, and the format that lacks least."""
    name = min(trials, key=lambda name: trials[name].distance(table))
    missing = trials[name].missing
    lacks = " and ".join(f"{role.about} (a column such as {role.names[0]!r})" for role in missing) or "label_rules"
    return InputError(
        f"data {shown} with the columns {listed(map(repr, table.values))}",
        f"those of format {name}, which lacks {lacks}"
        if asked.format != AUTO
        else f"those of one of the formats {', '.join(FORMATS)}, of which {name} is the nearest: it lacks {lacks}",
        "name the columns with --response_column and --annotation_column, or give --label_rules",
    )


def _likeness(table: Table, missing: Sequence[Role]) -> float:
    """How like a name that is looked for the names of the columns are, from 0 to 1: more where the values may be it."""
    found = [
        SequenceMatcher(None, name.lower(), other).ratio() * (1 if table.holds(name, role.possible) else OTHER)
        for role in missing
        for other in role.names
        for name in table.values
    ]
    return max(found, default=LIKE)
