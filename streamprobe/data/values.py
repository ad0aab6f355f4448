"""Labels as cells of data sets hold them: text, yes or no, or the number of a class."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamprobe.data.records import Unusable

YES, NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
NOTHING = (None, "", "O", "o", 0)


class Named(NamedTuple):
    """The labels that a cell gives, and what it said."""

    labels: Sequence[str]  # none where it says no
    given: Sequence[str]


def outside(label: Any) -> bool:
    """Whether the label of a token says that it is in no section."""
    return label in NOTHING


def label_names_of(value: Any, column: str, names: Mapping[str, str]) -> Named:
    """What the label of a whole text is called.

    Yes (true, 1) is the label of the column's name, no (false, 0) is none of it; what `names` maps has that name.
    Raises Unusable for a cell that holds no label.
    """
    if isinstance(value, list):
        found = [label_names_of(each, column, names) for each in value]
        return Named(
            [label for each in found for label in each.labels], [given for each in found for given in each.given]
        )
    if not isinstance(value, str | bool | int | float) or not str(value).strip():
        raise Unusable("without a label")
    said = str(value).strip()
    given = str(int(value)) if isinstance(value, float) and value.is_integer() else said
    if given in names:
        return Named([names[given]], [given])
    if said.lower() in (*YES, *NO):
        return Named([names.get(column, column)] if said.lower() in YES else [], [given, column])
    if isinstance(value, float) and not value.is_integer():
        raise Unusable(f"with a label that is a fraction, such as {value}")
    return Named([given], [given])
