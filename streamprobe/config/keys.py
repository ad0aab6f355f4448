"""What a key of a config is made of, and how a wrong value is refused."""

from dataclasses import field
from datetime import date
from typing import Any

from streamprobe.errors import InputError


def key(default: Any, help: str) -> Any:
    """A config field with its help text."""
    text = help.replace("%", "%%")
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(holds: bool, got: str, expected: str, fix: str) -> None:
    """Raises InputError unless `holds`."""
    if not holds:
        raise InputError(got, expected, fix)


def is_day(text: str) -> bool:
    """Whether text is a day of the form YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except (TypeError, ValueError):  # a file of keys may hold a date of YAML
        return False
