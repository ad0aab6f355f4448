"""What a run was asked to do and what that took."""

import time
from datetime import UTC, datetime
from typing import Any

import torch

from streamprobe.run.provenance import peak_memory
from streamprobe.system.distributed import add, least, moved_bytes, world


class Cost:
    """Counted since this process began."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.forwards = self.tokens = self.padded = 0
        self.model_seconds = 0.0
        self.moved = 0  # bytes that ranks have sent

    def count(self, tokens: int, padded: int) -> None:
        """One more forward pass, of so many tokens, and so many with padding."""
        self.forwards, self.tokens, self.padded = self.forwards + 1, self.tokens + tokens, self.padded + padded

    def add_other_ranks(self) -> None:
        """Adds what other ranks have counted; the model's seconds are those of the rank that took most."""
        counted = torch.tensor([self.forwards, self.tokens, self.padded, moved_bytes()])
        add(counted)
        self.forwards, self.tokens, self.padded, self.moved = counted.tolist()
        self.model_seconds = -least(round(-1e6 * self.model_seconds)) / 1e6

    def as_dict(self, device: torch.device) -> dict[str, Any]:
        """When that is, and the numbers up to now, as summary.json holds them."""
        return {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "seconds": round(time.perf_counter() - self.began, 1),
            "model_forwards": self.forwards,
            "model_tokens": self.tokens,
            "padding": f"{1 - self.tokens / max(1, self.padded):.1%}",
            "model_seconds": round(self.model_seconds, 1),
            "tokens_per_second": round(self.tokens / max(self.model_seconds, 1e-9)),
            "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
            **({"processes": world().size, "moved_gb": round(self.moved / 1e9, 3)} if world().size > 1 else {}),
        }
