"""The keys of a config that say how a run trains on chains that come without an end."""

from dataclasses import dataclass
from typing import Literal

from streamprobe.config.keys import key, require

LEAST = 1_024  # tokens that a reservoir holds, at least


@dataclass
class StreamConfig:
    """Chains without an end: from data that are read as they come, or written by the model itself."""

    _argument_group_name = "stream"

    streaming: bool = key(
        False,
        "Train on chains as they come, without reading the data first: JSON lines (also `-`, standard input), parquet, "
        "or a data set on the hub.",
    )
    source: Literal["data", "generate"] = key(
        "data",
        "Where chains come from: data, or generate: the model answers the problems of data, and label_rules label what "
        "it writes.  With generate, streaming is on.",
    )
    max_tokens: int | None = key(None, "Tokens of training chains after which a stream ends; none is at its own end.")
    report_tokens: int | None = key(
        None,
        "Tokens of training chains between two reports, each with table, verdict and files as at a run's end; none is "
        "at the end alone.",
    )
    reservoir_tokens: int = key(
        500_000, "Tokens of training chains, a fair sample of the stream, that are kept for more than one pass."
    )
    test_tokens: int = key(
        200_000,
        "Tokens of test chains, a fair sample of those of the stream, that probes are judged by; of validation "
        "chains half as many.",
    )
    round_tokens: int = key(
        65_536,
        "Tokens of training chains that are read in a round: the time between two checkpoints, two points of a curve, "
        "and two chances to stop.",
    )
    wait_seconds: float | None = key(
        None,
        "Seconds to wait for more where a stream has run dry, before the run ends; none: files end at their end, and "
        "standard input when it is closed.",
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "report_tokens"):
            value = getattr(self, name)
            require(value is None or 0 < value < 2**63, f"{name} {value}", "at least 1", f"correct --{name}")
        for name in ("reservoir_tokens", "test_tokens", "round_tokens"):
            value = getattr(self, name)
            require(LEAST <= value < 2**40, f"{name} {value}", f"at least {LEAST:,}", f"raise --{name}")
        wait = self.wait_seconds
        require(wait is None or 0 <= wait < 2**31, f"wait_seconds {wait}", "0 or more", "correct --wait_seconds")
        self.streaming = self.streaming or self.source == "generate"
