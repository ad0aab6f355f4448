"""A page in one file, which asks the network for nothing: what it shows, its style, its data and its own script."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def own_file(name: str) -> str:
    """A style sheet or script that lies beside this module."""
    return (HERE / name).read_text(encoding="utf-8")


def document(title: str, body: Sequence[str], *, style: str, script: str, held: Mapping[str, Any]) -> str:
    """A whole page: `body` is HTML, and so escaped already; `style` and `script` are the package's own.

    `held` is the data that the script reads.  No other script may run, and nothing may be fetched.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return "\n".join(
        [
            "<!doctype html><html lang=en><head><meta charset=utf-8>",
            f'<meta http-equiv=Content-Security-Policy content="{policy}">',
            "<meta name=viewport content='width=device-width, initial-scale=1'>",
            f"<title>streamprobe: {escape(title)}</title><style>{style}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            f"<script type=application/json id=held>{_pack(held)}</script><script>{script}</script></body></html>",
        ]
    )


def _pack(held: Mapping[str, Any]) -> str:
    """JSON in which nothing can end the element that holds it.  Raises ValueError for what no script can read: NaN."""
    text = json.dumps(held, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
