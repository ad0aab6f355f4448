"""Does a probe's direction cause what it predicts?  Push the model along it while it writes, and count.

The model answers the run's test problems with a vector added to one layer's output, at the last token of the prompt and
at every token that it writes.  Strength 1 is one standard deviation of the layer's activations along the probe's
direction, over the run's training chains; the line above the table says what fraction of a mean activation's length
that is.  A probe that is not linear has the direction of its gradient: see `directions`.  Beside the probe's direction:
the difference of the means of positive and negative tokens, and a random direction for each problem, all of the same
length.  `ablate` takes the direction out instead (its component becomes zero).

Shapes: P problems, B of them in a batch, T tokens of a prompt, N tokens, D hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.finite import check_finite, find_bad_chains
from streamprobe.activations.stream import stream
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.model.blocks import context, decoder_layers
from streamprobe.model.hooks import steer
from streamprobe.model.places import main_device
from streamprobe.model.sampling import Sampling
from streamprobe.probes.base import Probes
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.sites import RESID_POST, layer_sites
from streamprobe.system.console import say
from streamprobe.tools.directions import direction_of
from streamprobe.tools.events import Judge, judge, summarise
from streamprobe.tools.generation import prompt_of
from streamprobe.tools.writing import write

CHAINS = 200  # training chains from which the directions and their scale are taken, at most
TITLES = {"events": "events a response", "any": "with any", "early": "early", "missed": "missed", "solved": "solved"}


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
    *,
    max_new_tokens: int,
    batch_size: int,
    options: Mapping[str, Any],
    add: Tensor | None = None,
    ablate: Tensor | None = None,
) -> list[str]:
    """The model's responses to prompts of token ids [T], steered at `block` by vectors [P, D] or [1, D], if any."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        added, ablated = (v if v is None or len(v) == 1 else v[start : start + batch_size, None] for v in (add, ablate))
        with steer(block, added, ablated, newest=True):
            ids = write(model, tokenizer, batch, max_new_tokens=max_new_tokens, options=options)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def directions(probe: Tensor, difference: Tensor, n: int, seed: int) -> dict[str, Tensor]:
    """Unit vectors: the probe's [1, D], the difference of means [1, D], and a random one for each problem [n, D]."""
    random = torch.randn(n, len(probe), generator=torch.Generator().manual_seed(seed)).to(probe)
    named = {"probe": probe[None], "difference of means": difference[None], "random": random}
    return {name: nn.functional.normalize(v, dim=1) for name, v in named.items()}


class Steered(NamedTuple):
    """The responses under one direction and strength."""

    direction: str
    strength: str
    responses: list[str]


def steer_sweep(
    write: Callable[..., list[str]], vectors: Mapping[str, Tensor], unit: float, strengths: Sequence[float]
) -> Iterator[Steered]:
    """The responses for every strength of every direction, and for every direction ablated.

    write(add=..., ablate=...) gives the responses; `vectors` are unit vectors, `unit` is the length of strength 1.
    Strength 0 is the same for all and comes once, first.
    """
    if 0 in strengths:
        yield Steered("none", "0", write())
    for name, vector in vectors.items():
        for strength in strengths:
            if strength:
                yield Steered(name, f"{strength:+g}", write(add=strength * unit * vector))
        yield Steered(name, "ablate", write(ablate=vector))


def check_site(probes: Probes, number: int) -> None:
    """Raises InputError for a probe that reads another site than the output of a block, which is what is pushed."""
    joined = probes.sites != probes.reads
    for site in probes.reads if joined else [probes.sites[number]]:
        if site.point != RESID_POST:
            expected = "of a block's output (resid_post), which is what is pushed"
            if joined:
                raise InputError(f"a probe of {site.title}, too", f"one {expected}, alone", "give --kind")
            raise InputError(f"a probe of {site.title}", f"one {expected}", "give --site")


def evenly(chains: Sequence[Chain], n: int) -> list[Chain]:
    """At most n of the chains, evenly spaced."""
    return [chains[i] for i in np.linspace(0, len(chains) - 1, min(n, len(chains))).astype(int)]


class Examples(NamedTuple):
    """The chains of a run that a sweep works with."""

    train: list[Chain]  # from which directions and their scale are taken
    test: list[Chain]  # whose problems are answered
    labels: Sequence[str]  # of the columns of their codes


def choose(splits: Mapping[str, Sequence[Chain]], labels: Sequence[str], n: int) -> Examples:
    """Up to CHAINS training chains and n test chains of a run, evenly spaced."""
    return Examples(evenly(splits["train"], CHAINS), evenly(splits["test"], n), labels)


def leave_out_bad(examples: Examples, model: Any, layers: Sequence[int], max_batch_tokens: int) -> Examples:
    """The examples without chains that have an activation that is infinite or not a number, as a run skips them."""
    every = examples.test + examples.train
    bad = set(map(id, find_bad_chains(every, model.base_model, layers, max_batch_tokens)))
    train, test = ([chain for chain in own if id(chain) not in bad] for own in (examples.train, examples.test))
    return Examples(train, test, examples.labels)


def experiment(
    model: Any,
    tokenizer: Any,
    bank: Probes,
    place: tuple[int, int],
    *,
    layer: int | None = None,
    examples: Examples,
    strengths: Sequence[float],
    marker: str | None,
    sampling: Sampling,
    batch_size: int,
    max_batch_tokens: int,
) -> dict[str, Any]:
    """Steers the answers to the test problems along the probe at `place`, counts, and prints a row for each strength.

    `layer`: which is steered, of a probe that reads all layers (none: see `direction_of`);
    `batch_size`: problems answered at once; `max_batch_tokens`: most tokens in a forward pass over the training chains;
    `marker`: see `judge`.  Returns every number and response.
    """
    _, k = place
    plain = Column(bank.columns[k].label, bank.columns[k].target, bank.columns[k].lag)
    prompts = [prompt_of(chain, tokenizer) for chain in examples.test]
    read = partial(read_training, examples, model.base_model, column=plain, max_batch_tokens=max_batch_tokens)
    layer, unit = direction_of(bank.to(main_device(model)), place, layer, read)
    scale = measure_scale(read([layer]), unit)
    vectors = directions(unit, scale.difference, len(prompts), sampling.seed)
    cosine = vectors["probe"].flatten().dot(vectors["difference of means"].flatten()).item()
    said = f"layer {layer}, {plain}, {bank.solver}" + (f", {bank.kind}" if bank.kind != LINEAR else "")
    say(
        f"{said}; {len(prompts)} test problems\n"
        f"strength 1 is {scale.std:.4g}, {scale.std / scale.norm:.1%} of the mean length of an activation "
        f"({scale.norm:.4g}); cosine of the probe's direction with the difference of means {cosine:.2f}\n"
    )
    texts = [tokenizer.decode(p, skip_special_tokens=True) for p in prompts]
    count = judge(marker, texts)
    write = _writer(model, tokenizer, layer, prompts, sampling=sampling, batch_size=batch_size)
    rows = _tabulate(steer_sweep(write, vectors, scale.std, strengths), texts, count, sampling.seed)
    about = {"layer": layer, "column": str(plain), "std": scale.std, "norm": scale.norm, "cosine": cosine}
    return {**about, "problems": [chain.id for chain in examples.test], "rows": rows}


def read_training(
    examples: Examples, backbone: Any, layers: Sequence[int], *, column: Column, max_batch_tokens: int
) -> Iterator[TokenBatch]:
    """One trip over the training tokens that the column asks, of these layers."""
    options: dict[str, Any] = {"labels": examples.labels, "max_batch_tokens": max_batch_tokens}
    batches = stream(examples.train, backbone, layers, [column], **options)
    return check_finite(batches, examples.train, layer_sites(layers))


def _writer(
    model: Any, tokenizer: Any, layer: int, prompts: Sequence[Tensor], *, sampling: Sampling, batch_size: int
) -> Callable[..., list[str]]:
    """`respond` to the prompts, steered at `layer`, with the same seed for every direction and strength."""
    most = min(sampling.max_new_tokens, context(model.config) - max(map(len, prompts)))
    block = decoder_layers(model)[layer]
    settings: dict[str, Any] = {"max_new_tokens": most, "batch_size": batch_size, "options": sampling.options}
    answer = partial(respond, model, tokenizer, block, prompts, **settings)

    def write(**vectors: Any) -> list[str]:
        torch.manual_seed(sampling.seed)
        return answer(**vectors)

    return write


def _tabulate(sweep: Iterable[Steered], texts: Sequence[str], count: Judge, seed: int) -> list[dict[str, Any]]:
    """A row for each direction and strength, printed as it comes; `texts` are the prompts."""
    rows: list[dict[str, Any]] = []
    for name, strength, responses in sweep:
        found = summarise([count(p, r) for p, r in zip(texts, responses, strict=True)], seed)
        if not rows:
            say(f"{'direction':<22}{'strength':>8}" + "".join(f"  {TITLES[key]:>20}" for key in found))
        say(f"{name:<22}{strength:>8}" + "".join(f"  {value!s:>20}" for value in found.values()))
        rows.append({"direction": name, "strength": strength, **found, "responses": responses})
    return rows
