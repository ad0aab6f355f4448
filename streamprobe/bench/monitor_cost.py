"""What watching costs beside plain generation, measured in one process.

python -m streamprobe.bench.monitor_cost        # SmolLM2-135M's shape on a CPU, else Llama-3.1-8B's
python -m streamprobe.bench.monitor_cost --shape llama-3.1-8b     # no download: weights, prompt and probes are random

Each round times `model.generate` and `watch` of the same prompt, in turns which goes first; what counts is the median
of the ratios of the rounds.  `watch` reads the last token too, one forward pass more than `generate`: that is counted.
On a machine that others use, --cpu_time with OMP_NUM_THREADS=1 counts this process's own work, not the time of day.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from streamprobe.bench.synthetic import LAGS, SEED, SHAPES, Shape
from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.model.backbone import pick_dtype
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.run.provenance import device_name
from streamprobe.system.console import guard, say
from streamprobe.tools.watch import watch

PROMPT = 64  # tokens


def make_generator(shape: Shape, device: torch.device) -> Any:
    """A whole Llama with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=pick_dtype(shape.dtype))
    return model.eval().requires_grad_(False)


def make_probes(shape: Shape) -> ProbeBank:
    """A random probe for each of the shape's layers and of LAGS: 70."""
    columns = make_columns(["label"], ["token"], LAGS)
    size = (len(shape.layers), len(columns))
    return ProbeBank(
        layer_sites(shape.layers), columns, torch.randn(*size, shape.hidden) / shape.hidden, torch.zeros(size)
    )


def time_rounds(ways: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of every way in each round, after one round that does not count: [rounds][ways]."""
    result = []
    for number in range(rounds + 1):
        seconds = [0.0] * len(ways)
        for i in range(len(ways)) if number % 2 else reversed(range(len(ways))):
            start = clock()
            ways[i]()
            seconds[i] = clock() - start
        result.append(seconds)
    return result[1:]


def run(argv: Sequence[str] | None) -> None:
    """The command line; raises InputError for what the user can mend."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "llama-3.1-8b" if device.type == "cuda" else "smollm2-135m"
    parser = argparse.ArgumentParser(
        prog="python -m streamprobe.bench.monitor_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shape", choices=list(SHAPES), default=default, help="size of the model (%(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to write (%(default)s)")
    parser.add_argument(
        "--cpu_time", action="store_true", help="seconds of this process on the CPU, of all its threads"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")

    def refuse(message: str) -> None:
        raise InputError(message, "options that --help lists", "mend the command line")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    given = parser.parse_args(argv)
    for name in ("tokens", "rounds"):
        if getattr(given, name) < 1:
            raise InputError(f"{name} {getattr(given, name)}", "at least 1", f"mend --{name}")
    shape = SHAPES[given.shape]
    model, bank = make_generator(shape, device), make_probes(shape).to(device)
    ids = torch.randint(shape.vocabulary, (PROMPT,), device=device)
    options: dict[str, Any] = {"max_new_tokens": given.tokens, "do_sample": False}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if given.cpu_time else time.perf_counter()

    ways = [lambda: model.generate(ids[None], **options), lambda: list(watch(model, bank, ids, **options))]
    rounds = time_rounds(ways, given.rounds, clock)
    ratios = sorted(watched / plain for plain, watched in rounds)
    plain, watched = (median(column) / given.tokens * 1e3 for column in zip(*rounds, strict=True))
    say(
        f"{given.shape}, {model.dtype}, on {device_name(device)}: {given.tokens} tokens, {bank.bias.numel()} probes\n"
        f"plain {plain:.2f} ms{' of CPU time' * given.cpu_time} a token, watched {watched:.2f} ms; "
        f"ratio {median(ratios):.3f} (median of {given.rounds} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    return guard(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
