"""What watching costs beside plain generation, measured in one process.

Each round times `model.generate` and `watch` of the same prompt, in turns which goes first; what counts is the median
of the ratios of the rounds.  `watch` reads the last token too, one forward pass more than `generate`: that is counted.
On a machine that others use, CPU time with OMP_NUM_THREADS=1 counts this process's own work, not the time of day.
Weights, prompt and probes are random, so there is nothing to download.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from streamprobe.bench.shapes import SHAPES, Shape
from streamprobe.bench.synthetic import LAGS, SEED, make_config
from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.model.backbone import pick_dtype
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.run.provenance import device_name
from streamprobe.tools.watch import watch

PROMPT = 64  # tokens


def make_generator(shape: Shape, device: torch.device) -> Any:
    """A whole Llama with random weights."""
    from transformers import AutoModelForCausalLM

    config = make_config(shape, shape.blocks)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0  # no response ends by itself
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


def measure_watching(shape: str, device: torch.device, *, tokens: int, rounds: int, cpu_time: bool = False) -> str:
    """Writes `tokens` tokens in each of `rounds` timed rounds, plain and watched; returns what came out, to print.

    `cpu_time`: counted are the seconds of this process on the CPU, of all its threads.  Raises InputError for fewer
    than one token or round.
    """
    for name, value in (("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name} {value}", "at least 1", f"correct --{name}")
    model, bank = make_generator(SHAPES[shape], device), make_probes(SHAPES[shape]).to(device)
    ids = torch.randint(SHAPES[shape].vocabulary, (PROMPT,), device=device)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if cpu_time else time.perf_counter()

    ways = [lambda: model.generate(ids[None], **options), lambda: list(watch(model, bank, ids, **options))]
    timed = time_rounds(ways, rounds, clock)
    ratios = sorted(watched / plain for plain, watched in timed)
    plain, watched = (median(column) / tokens * 1e3 for column in zip(*timed, strict=True))
    return (
        f"{shape}, {model.dtype}, on {device_name(device)}: {tokens} tokens, {bank.bias.numel()} probes\n"
        f"plain {plain:.2f} ms{' of CPU time' * cpu_time} a token, watched {watched:.2f} ms; "
        f"ratio {median(ratios):.3f} (median of {rounds} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
