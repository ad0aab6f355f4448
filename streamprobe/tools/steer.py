"""Does a probe's direction cause what it predicts?  Push the model along it while it writes, and count.

python -m streamprobe.tools.steer runs/demo --layer 3 --lag 8 --strengths -8 -4 0 4 8
python -m streamprobe.tools.steer RUN --layer 12 --lag 8 --problems 50 --marker '\\bwait\\b' --json steering.json

The model answers the run's test problems with a vector added to one layer's output, at the last token of the prompt and
at every token that it writes.  Strength 1 is one standard deviation of the layer's activations along the probe's
direction, over the run's training chains; the line above the table says what share of a mean activation's length that
is.  Beside the probe's direction: the difference of the means of positive and negative tokens, and a random direction
for each problem, all of the same length.  `ablate` takes the direction out instead (its component becomes zero).

Counted are matches of --marker in the response; for the embedded demo model, returns of the search, read exactly:
whether the first wrong step is a return that is not due (early) or something else where one is (missed), and whether
the problem is solved.  Every interval is a 95% one, over problems.

Shapes: P problems, B of them in a batch, T tokens of a prompt, N tokens, D hidden size.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex
import torch
from torch import Tensor, nn

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.finite import check_finite, find_bad_chains
from streamprobe.activations.stream import stream
from streamprobe.data.tokenize import Chain
from streamprobe.demo import behaviour
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.model.blocks import context, decoder_layers
from streamprobe.model.hooks import steer
from streamprobe.probes.sites import layer_sites
from streamprobe.probes.storage import find_probes, read_about
from streamprobe.run.inputs import chains_of, read_texts
from streamprobe.system.console import guard, say
from streamprobe.tools import generation
from streamprobe.tools import watch as monitor

MARKER = r"\b(?:wait|hmm|actually|no(?=,))\b"  # `no` counts where a comma follows
PATIENCE = 1.0  # seconds in which a marker must be through with one response
CHAINS = 200  # training chains from which the directions and their scale are taken, at most
RESAMPLES = 1000
MOST_REPEATS = 10_000  # that a marker may count: compiling more takes seconds and more
TITLES = {"events": "events a response", "any": "with any", "early": "early", "missed": "missed", "solved": "solved"}
Judge = Callable[[str, str], dict[str, int]]  # prompt and response -> counts, `events` among them


class Scale(NamedTuple):
    """What the training tokens say of a direction and its layer."""

    std: float  # standard deviation of the activations along the direction
    norm: float  # mean length of an activation
    difference: Tensor  # [D] float32: mean of the positive tokens less that of the negative ones


def measure_scale(batches: Iterable[TokenBatch], direction: Tensor) -> Scale:
    """The scale of a unit vector [D] over tokens of one layer and one column: acts [N, 1, D], targets and valid [N, 1].

    Sums are float64.  Raises InputError if a class is absent.
    """
    unit = direction.double()
    sums = torch.zeros(2, len(unit), dtype=torch.float64, device=unit.device)  # of the negative and positive tokens
    counts, along, squares, lengths = [0, 0], 0.0, 0.0, 0.0
    for batch in batches:
        x, positive = batch.acts[:, 0].double(), batch.targets[:, 0].to(unit.device)
        for side, chosen in enumerate((~positive, positive)):
            sums[side] += x[chosen].sum(0)
            counts[side] += int(chosen.sum())
        projected = x @ unit
        along, squares = along + projected.sum().item(), squares + projected.square().sum().item()
        lengths += x.norm(dim=1).sum().item()
    if not all(counts):
        raise InputError("training tokens of one class only", "tokens of both classes", "choose another column")
    n = sum(counts)
    difference = sums[1] / counts[1] - sums[0] / counts[0]
    return Scale(math.sqrt(max(0.0, squares / n - (along / n) ** 2)), lengths / n, difference.float())


def respond(
    model: Any,
    tokenizer: Any,
    block: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    batch_size: int,
    options: Mapping[str, Any],
    add: Tensor | None = None,
    ablate: Tensor | None = None,
) -> list[str]:
    """The model's responses to prompts of token ids [T], steered at `block` by vectors [P, D] or [1, D], if any."""
    texts: list[str] = []
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.stack([nn.functional.pad(p, (longest - len(p), 0), value=pad) for p in batch])
        mask = torch.arange(longest) >= longest - torch.tensor([[len(p)] for p in batch])
        own = [v if v is None or len(v) == 1 else v[start : start + batch_size, None] for v in (add, ablate)]
        with steer(block, own[0], own[1], newest=True):
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device),
                max_new_tokens=max_new_tokens, pad_token_id=pad, **options,
            )  # fmt: skip
        texts += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts


def wilson(hits: int, n: int) -> tuple[float, float, float]:
    """A share and its 95% interval (Wilson 1927)."""
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap_mean(values: Sequence[int], seed: int) -> tuple[float, float, float]:
    """A mean and its 95% interval over resampled problems."""
    x = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.percentile(x[drawn].mean(1), [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


def summarise(counts: Sequence[Mapping[str, int]], seed: int) -> dict[str, tuple[float, float, float]]:
    """Mean events a response, and the shares of responses with any, an early or a missed one, and a solution."""
    result = {"events": bootstrap_mean([c["events"] for c in counts], seed)}
    shares = {"any": "events", "early": "early", "missed": "missed", "solved": "solved"}
    for name, of in shares.items():
        if of in counts[0]:
            result[name] = wilson(sum(c[of] > 0 for c in counts), len(counts))
    return result


def directions(probe: Tensor, difference: Tensor, n: int, seed: int) -> dict[str, Tensor]:
    """Unit vectors: the probe's [1, D], the difference of means [1, D], and a random one for each problem [n, D]."""
    random = torch.randn(n, len(probe), generator=torch.Generator().manual_seed(seed)).to(probe)
    named = {"probe": probe[None], "difference of means": difference[None], "random": random}
    return {name: nn.functional.normalize(v, dim=1) for name, v in named.items()}


def steer_sweep(
    write: Callable[..., list[str]], vectors: Mapping[str, Tensor], unit: float, strengths: Sequence[float]
) -> Iterable[tuple[str, str, list[str]]]:
    """(direction, strength, responses) for every strength of every direction, and for every direction ablated.

    write(add=..., ablate=...) gives the responses; `vectors` are unit vectors, `unit` is the length of strength 1.
    Strength 0 is the same for all and comes once, first.
    """
    if 0 in strengths:
        yield "none", "0", write()
    for name, vector in vectors.items():
        for strength in strengths:
            if strength:
                yield name, f"{strength:+g}", write(add=strength * unit * vector)
        yield name, "ablate", write(ablate=vector)


def judge(marker: str | None, texts: Sequence[str]) -> Judge:
    """What is counted in the responses to prompts `texts`: matches of `marker`.

    Without one: the demo's returns, where all prompts are problems of the demo, else matches of MARKER.
    """
    if marker is None and all(map(behaviour.is_problem, texts)):
        return lambda prompt, text: behaviour.read_response(behaviour.read_problem(prompt), text)
    wanted = MARKER if marker is None else marker
    repeated = math.prod(int(n) for n in re.findall(r"\{,?(\d+)", wanted))
    if repeated > MOST_REPEATS:
        raise InputError(f"marker {wanted!r}", f"at most {MOST_REPEATS:,} repetitions in all", "correct --marker")
    try:
        pattern = regex.compile(wanted, regex.IGNORECASE)
    except (regex.error, RecursionError) as error:
        raise InputError(f"marker {marker!r} ({error})", "a regular expression of Python", "correct --marker") from None

    def count(text: str) -> int:
        try:
            return sum(1 for _ in pattern.finditer(text, timeout=PATIENCE))
        except (TimeoutError, MemoryError):
            raise InputError(
                f"marker {wanted!r}, which takes more than {PATIENCE:g} s or all memory on a response of "
                f"{len(text):,} characters",
                "a regular expression without repetitions of repetitions, such as (a+)+",
                "correct --marker",
            ) from None

    if count(""):
        raise InputError(
            f"marker {marker!r}, which matches no text at all", "a marker of some letters", "correct --marker"
        )
    return lambda _prompt, text: {"events": count(text)}


def parse(argv: Sequence[str] | None) -> Any:
    """The command line's options; raises InputError for what the user can mend."""
    parser = generation.make_parser(__doc__ or "", "streamprobe.tools.steer")
    add = parser.add_argument
    add("--data", help="the run's data, if they are no longer where it found them, or its URL had a query")
    add("--strengths", type=float, nargs="+", default=[-8.0, -4.0, 0.0, 4.0, 8.0], help="in standard deviations")
    add("--problems", type=int, default=100, help="test problems to answer, at most (%(default)s)")
    add("--batch", type=int, default=50, help="problems answered at once (%(default)s)")
    add("--marker", metavar="REGEX", help=f"what counts, whatever its case (default: {MARKER}; the demo's returns)")
    add("--json", type=Path, metavar="FILE", help="where to write every number and every response")
    given = parser.parse_args(argv)
    generation.check(given)
    for name in ("problems", "batch"):
        if getattr(given, name) < 1:
            raise InputError(f"{name} {getattr(given, name)}", "at least 1", f"mend --{name}")
    if not all(abs(strength) <= 1e6 for strength in given.strengths):  # nan neither
        raise InputError(f"strengths {given.strengths}", "finite numbers of at most 1,000,000", "mend --strengths")
    generation.check_file(given.json, "json")
    return given


def evenly(chains: Sequence[Chain], n: int) -> list[Chain]:
    """At most n of the chains, evenly spaced."""
    return [chains[i] for i in np.linspace(0, len(chains) - 1, min(n, len(chains))).astype(int)]


def check_data(folder: Path, fingerprint: str) -> None:
    """Raises InputError for other chains than those of the run in `folder`, as far as its probes tell."""
    known = read_about(find_probes(folder)).get("data_fingerprint", fingerprint)
    if known != fingerprint:
        raise InputError(
            f"data whose chains have the fingerprint {fingerprint[:12]}",
            f"{str(known)[:12]}, that of the chains of {folder}",
            "give the run's own data by --data",
        )


def run(argv: Sequence[str] | None) -> None:
    """The command line; raises InputError for what the user can mend."""
    given = parse(argv)
    config, bank = generation.open_run(given.run, given)
    place = monitor.pick(given.run, bank, given)
    layer, column = bank.layers[place[0]], bank.columns[place[1]]
    data, config = read_texts(config)
    dataset = chains_of(config, data)
    check_data(given.run, dataset.fingerprint())
    model, tokenizer = generation.load_whole(config, bank)
    block = decoder_layers(model)[layer]
    head, most = model.base_model, config.model.max_batch_tokens  # no logits are needed here
    chosen, fed = evenly(dataset.splits["test"], given.problems), evenly(dataset.splits["train"], CHAINS)
    if config.data.bad_chains == "skip":
        bad = set(map(id, find_bad_chains(chosen + fed, head, bank.layers, most)))
        chosen, fed = ([chain for chain in own if id(chain) not in bad] for own in (chosen, fed))
    prompts = [generation.prompt_of(chain, tokenizer) for chain in chosen]
    room = context(model.config) - max(map(len, prompts))

    probe = nn.functional.normalize(bank.weight[place].to(model.device), dim=0)
    column = Column(column.label, column.target, column.lag)
    batches = stream(fed, head, [layer], [column], labels=config.probes.labels, max_batch_tokens=most)
    scale = measure_scale(check_finite(batches, fed, layer_sites([layer])), probe)
    vectors = directions(probe, scale.difference, len(prompts), given.seed)
    cosine = float(vectors["probe"][0] @ vectors["difference of means"][0])
    say(
        f"layer {layer}, {column}, {bank.solver}; {len(prompts)} test problems\n"
        f"strength 1 is {scale.std:.4g}, {scale.std / scale.norm:.1%} of the mean length of an activation "
        f"({scale.norm:.4g}); cosine of the probe's direction with the difference of means {cosine:.2f}\n"
    )
    options = generation.decoding(given.temperature, given.top_p)
    texts = [tokenizer.decode(p, skip_special_tokens=True) for p in prompts]
    count = judge(given.marker, texts)

    def write(**vectors: Tensor) -> list[str]:
        torch.manual_seed(given.seed)
        most = min(given.max_new_tokens, room)
        return respond(model, tokenizer, block, prompts, most, given.batch, options, **vectors)

    rows: list[dict[str, Any]] = []
    for name, strength, responses in steer_sweep(write, vectors, scale.std, given.strengths):
        found = summarise([count(p, r) for p, r in zip(texts, responses, strict=True)], given.seed)
        if not rows:
            say(f"{'direction':<22}{'strength':>8}" + "".join(f"  {TITLES[key]:>20}" for key in found))
        say(f"{name:<22}{strength:>8}" + "".join(f"  {cell(*value):>20}" for value in found.values()))
        rows.append({"direction": name, "strength": strength, **found, "responses": responses})
    if given.json:
        about = {"layer": layer, "column": str(column), "std": scale.std, "norm": scale.norm, "cosine": cosine}
        content = {**about, "problems": [c.id for c in chosen], "rows": rows}
        generation.write_file(given.json, "json", json.dumps(content, indent=1) + "\n")


def cell(value: float, low: float, high: float) -> str:
    """A number and its interval."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 where the user can mend what went wrong."""
    return guard(lambda: run(argv), smaller="lower --batch, or use --device_map cpu")


if __name__ == "__main__":
    sys.exit(main())
