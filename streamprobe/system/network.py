"""Whether the hub can be reached, asked once and quickly."""

import os
import re
from functools import cache
from threading import Thread

SECONDS = 3.0


def look_for_hub(name: str) -> None:
    """Where `name` may be an id on the hub and the hub does not answer: the cache alone from now on, in this process.

    Else each file is asked for six times, with a line of warning each, which takes half a minute.
    """
    from huggingface_hub import constants

    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not os.path.exists(name) and not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = not _answers()  # type: ignore[misc]  # typed as final, but read at each request


def hub_is_given_up() -> bool:
    """Whether `look_for_hub` found that the hub does not answer; other servers may."""
    return bool(_answers.cache_info().currsize) and not _answers()


@cache
def _answers() -> bool:
    """Whether the hub says anything within SECONDS; in a thread, since looking up a name cannot be given a limit."""
    said: list[bool] = []

    def ask() -> None:
        from huggingface_hub import constants, get_session
        from huggingface_hub.errors import HTTPError

        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except (OSError, HTTPError):
            return
        said.append(True)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS + 0.5)
    return bool(said)
