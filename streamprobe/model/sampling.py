"""How the tokens of a response are drawn."""

from dataclasses import dataclass
from typing import Any

from streamprobe.errors import InputError

PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}  # what the model says, and no more


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn.  Raises InputError for what cannot be."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # drawn is among the likeliest tokens that hold so much probability
    seed: int = 0

    def __post_init__(self) -> None:
        for holds, name, expected in (
            (self.max_new_tokens > 0, "max_new_tokens", "at least 1"),
            (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3, "temperature", "0, or 0.001 to 1000"),
            (0 < self.top_p <= 1, "top_p", "above 0, at most 1"),
            (0 <= self.seed < 2**63, "seed", "0 .. 2**63 - 1"),
        ):
            if not holds:
                raise InputError(f"{name} {getattr(self, name)}", expected, f"correct --{name}")

    @property
    def options(self) -> dict[str, Any]:
        """Those of `generate` but for the length: greedy at temperature 0; the model's own defaults are put aside."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **PLAIN}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0, **PLAIN}
