"""Labels as cells of data sets hold them: text, yes or no, or the number of a class."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from streamprobe.data.records import FormatOptions, Unusable

YES, NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
NOTHING = (None, "", "O", "o", "0", 0)


class Named(NamedTuple):
    """The labels that a cell gives, and what it said."""

    labels: Sequence[str]  # none where it says no
    given: Sequence[str]


def outside(label: Any) -> bool:
    """Whether the label of a token says that it is in no section."""
    return label in NOTHING


def label_names_of(value: Any, column: str, options: FormatOptions) -> Named:
    """What the label of a whole text is called.

    Yes (true, 1) is the label of the column's name, no (false, 0) is none, unless they are numbers of classes; what
    `options.label_names` maps has that name.  Raises Unusable for a cell that holds no label.
    """
    if isinstance(value, list):
        found = [label_names_of(each, column, options) for each in value]
        return Named(
            [label for each in found for label in each.labels], [given for each in found for given in each.given]
        )
    if not isinstance(value, str | bool | int | float) or not str(value).strip():
        raise Unusable("without a label")
    said, names = str(value).strip(), options.label_names
    given = str(int(value)) if isinstance(value, float) and value.is_integer() else said
    if given in names:
        return Named([names[given]], [given])
    if said.lower() in (*YES, *NO) and (options.yes_or_no or not given.isdigit()):
        return Named([names.get(column, column)] if said.lower() in YES else [], [given, column])
    if isinstance(value, float) and not value.is_integer():
        raise Unusable(f"with a label that is a fraction, such as {value}")
    return Named([given], [given])


def say_yes_or_no(values: Iterable[Any]) -> bool:
    """Whether no label of a column is the number of a class other than 0 and 1."""
    flat = (each for value in values for each in (value if isinstance(value, list) else [value]))
    numbers = {str(each).strip() for each in flat if isinstance(each, str | int | float) and not isinstance(each, bool)}
    return not any(number.isdigit() and number not in ("0", "1") for number in numbers)
