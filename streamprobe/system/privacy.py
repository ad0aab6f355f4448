"""What of a run's config may be written down, and what of it others may see."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TOKENS = re.compile(  # long enough to be taken for no word of a prompt or a label
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{12,})"
    r"|\b(?:Bearer|Basic) +[\w.~+/=-]{16,}"
)
FILES = ("model", "data", "gguf_file", "output_dir")  # keys that may be paths
ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def clean_url(text: str) -> str:
    """A URL without what may be secret: user, password, query and fragment; other text without tokens."""
    return TOKENS.sub("***", "::".join(_bare(piece) if "://" in piece else piece for piece in text.split("::")))


def clean_text(text: str) -> str:
    """What a library says, with its URLs as `clean_url` gives them."""
    return TOKENS.sub("***", re.sub(r"\w[\w+.-]*://\S+", lambda found: clean_url(found[0]), text))


def _bare(url: str) -> str:
    scheme, _, rest = url.partition("://")
    try:
        found = urlsplit(url)
        place, path = found.netloc, found.path
    except ValueError:  # no URL at all
        place, *_ = re.split(r"[?#]", rest)
        path = ""
    _, _, host = place.rpartition("@")
    return f"{scheme}://{host}{path}"


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config as a run writes it into its own folder: URLs without users and queries, nothing without tokens."""
    return {name: _each(value, clean_url if name in FILES else _tokens_out) for name, value in config.items()}


def for_others(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config as others may see it: no secrets, and of a file or folder of this machine its name alone."""
    clean = without_secrets(config)
    return {name: _each(value, _last_name if name in FILES else _no_home) for name, value in clean.items()}


def _no_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def _tokens_out(text: str) -> str:
    return TOKENS.sub("***", text)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """The value with its texts changed."""
    if isinstance(value, str):
        return change(value)
    return [_each(item, change) for item in value] if isinstance(value, list) else value


def _last_name(text: str) -> str:
    """A URL or an id on the hub as it stands; the last name of any other path."""
    remote = "://" in text and not text.startswith("file:")
    if remote or (ON_HUB.fullmatch(text) and not text.startswith(".") and not os.path.exists(text)):
        return text
    *_, last = re.split(r"[/\\]", text.rstrip("/\\"))
    return last
