"""Which column of a data set holds what: by the names that people give them, else by what is in them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from streamprobe.data.records import Row

SAMPLE = 50  # values by which a column is judged
LABEL_LENGTH = 60  # characters of the label of a whole text, at most


class Role(NamedTuple):
    """What a format reads in one column."""

    about: str  # what it is, for errors
    names: Sequence[str]  # under which it is looked for, the commonest first
    possible: Callable[[Any], bool]  # whether a value can be one
    certain: Callable[[Any], bool]  # whether a value is certainly one, so that its column needs no known name
    required: bool = True


class Table:
    """The columns of some rows, and the first values of each."""

    def __init__(self, rows: Sequence[Row]):
        self.values: dict[str, list[Any]] = {name: [] for row in rows for name in row}
        for row in rows[: 20 * SAMPLE]:
            for name, value in row.items():
                if value is not None and len(self.values[name]) < SAMPLE:
                    self.values[name].append(value)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def find(self, role: Role, given: str | None, taken: Collection[str | None]) -> str | None:
        """The column that holds this: the one that is `given`, one of a known name, or the only one that surely does.

        None where there is none, or the one given holds something else, as do the columns that are `taken`.
        """
        if given is not None:
            return given if self.holds(given, role.possible) else None
        free = [name for name in self.values if name not in taken]
        by_name = {name.lower(): name for name in reversed(free)}
        named = [by_name[name] for name in role.names if name in by_name]
        for name in sorted(named, key=lambda name: not self.values[name]):  # of columns without a value the last
            if not self.values[name] or self.holds(name, role.possible):
                return name
        sure = [name for name in free if self.holds(name, role.certain)]
        return sure[0] if len(sure) == 1 else None

    def holds(self, name: str, what: Callable[[Any], bool]) -> bool:
        """Whether most values of a column are so; not of one without any."""
        values = self.values[name]
        return 2 * sum(map(what, values)) > len(values)


# What values are


def is_text(value: Any) -> bool:
    """Text."""
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    """What can name a row: text or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def never(_value: Any) -> bool:
    """For what cannot be told by its values."""
    return False


def has_tags(value: Any) -> bool:
    """Text with the tags of an annotator."""
    return isinstance(value, str) and "end-section" in value


def is_label(value: Any) -> bool:
    """The label of a whole text: text, yes or no, or a list of labels."""
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    return isinstance(value, bool | int | float) or (isinstance(value, str) and 0 < len(value) <= LABEL_LENGTH)


def is_yes_or_no(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_list_of_texts(value: Any) -> bool:
    """A list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def is_list_of_labels(value: Any) -> bool:
    """A list of labels: text, numbers, or nothing."""
    return isinstance(value, list) and all(each is None or isinstance(each, str | int) for each in value)


def has_keys(value: Any, *choices: Collection[str]) -> bool:
    """A mapping that has one of the keys of each choice."""
    return isinstance(value, Mapping) and all(any(key in value for key in keys) for keys in choices)


def all_of(items: Any, what: Callable[[Any], bool]) -> bool:
    """A list of such items alone; it may be empty."""
    return isinstance(items, list) and all(map(what, items))


def some_of(items: Any, what: Callable[[Any], bool]) -> bool:
    """A list of such items alone, at least one."""
    return bool(items) and all_of(items, what)


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in a row, the first of them where there are many."""
    names = list(names)
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])
