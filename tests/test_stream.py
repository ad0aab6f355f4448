"""Every token reaches the probes once a pass, beside its own activation and its own labels, however it is batched."""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import make_rows
from test_backbone import build
from torch import Tensor, nn
from transformers import DynamicCache

from streamprobe import stream as module
from streamprobe.backbone import load_backbone, make_cache
from streamprobe.chains import Chain, load_chains
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column
from streamprobe.stream import (
    ActivationMemory,
    Plan,
    TokenBatch,
    count_tokens,
    free_bytes,
    make_batches,
    plan_memory,
    stream,
)

CPU = torch.device("cpu")
LABELS = ["backtracking", "deduction"]
LAYERS = [2, 0]  # not in the order of the model
COLUMNS = [
    *(Column(label, "token", lag) for label in LABELS for lag in (-3, 0, 5)),
    Column("backtracking", "onset", 2),
    Column("deduction", "within", 4),
]


@pytest.fixture(scope="module")
def backbone(model_dir: str) -> nn.Module:
    return load_backbone(model_dir, LAYERS, "float32", device_map="cpu")


@pytest.fixture(scope="module")
def full(model_dir: str) -> Any:
    """The whole model, untouched by the package."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()


def make_chains(n: int, seed: int = 0, longest: int = 40) -> list[Chain]:
    """Random token ids, labels and support; chain 0 has one token."""
    rng = np.random.default_rng(seed)
    chains = []
    for i, length in enumerate([1, *rng.integers(2, longest + 1, n - 1)]):
        codes = rng.choice([UNKNOWN, OUTSIDE, OUTSIDE, INSIDE, ONSET], (length, len(LABELS)))
        codes[rng.random(length) < 0.1] = UNKNOWN  # a token without a label has none at all
        codes[(codes == UNKNOWN).any(1)] = UNKNOWN
        ids = torch.from_numpy(rng.integers(3, 400, length))
        ids[0] = 0
        support = torch.from_numpy(rng.random(length) < 0.8)
        chains.append(Chain(f"x_{i}", ids, torch.from_numpy(codes.astype(np.int8)), support))
    return chains


@pytest.fixture(scope="module")
def real_chains(tokenizer: Any) -> list[Chain]:
    """Chains as `load_chains` makes them."""
    fields = ("task_id", "problem", "reasoning_chain", "annotated_chain")
    return load_chains(make_rows(15, seed=2), fields, tokenizer, LABELS, 512)[0]["train"]


@torch.no_grad()
def alone(full: Any, ids: Tensor) -> Tensor:
    """Activations [T, L, D] of one chain by itself, without padding or mask."""
    states = full(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([states[layer + 1][0] for layer in LAYERS], dim=1)


def pair(chain: Chain, t: int, column: Column) -> tuple[bool, bool]:
    """(valid, target) of one token and column, straight from the definitions."""
    codes = chain.codes[:, LABELS.index(column.label)].tolist()
    there = t + column.lag
    if not chain.support[t] or not 0 <= there < len(codes):
        return False, False
    if column.target == "within":
        between = codes[t + 1 : there + 1]
        return UNKNOWN not in between, UNKNOWN not in between and ONSET in between
    if codes[there] == UNKNOWN or (column.target == "onset" and column.lag > 0 and codes[t] != OUTSIDE):
        return False, False
    return True, codes[there] == ONSET if column.target == "onset" else codes[there] >= INSIDE


def expected(chain: Chain) -> tuple[list[int], Tensor, Tensor]:
    """The tokens of a chain that are valid for some column, and their targets and validity [N, K]."""
    pairs = torch.tensor([[pair(chain, t, c) for c in COLUMNS] for t in range(len(chain.ids))])  # [T, K, 2]
    tokens = pairs[..., 0].any(1).nonzero()[:, 0].tolist()
    return tokens, pairs[tokens][..., 1], pairs[tokens][..., 0]


def run(chains: list[Chain], backbone: nn.Module, max_tokens: int = 128, seed: int | None = 0) -> list[TokenBatch]:
    return list(stream(chains, backbone, LAYERS, COLUMNS, LABELS, max_tokens, seed))


def joined(batches: list[TokenBatch]) -> TokenBatch:
    """All batches as one."""
    return TokenBatch(*(torch.cat(column) for column in zip(*batches, strict=True)))


# --- batches ---


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("max_tokens", [1, 50, 300, 10_000])
def test_batches_are_a_partition_within_the_budget(seed, max_tokens):
    lengths = np.random.default_rng(3).integers(1, 120, 80).tolist()
    batches = make_batches(lengths, max_tokens, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(80))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    if max_tokens == 1:
        assert all(len(batch) == 1 for batch in batches)
    if max_tokens == 10_000 and seed is None:
        assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_batches_waste_little_and_no_room_for_another_chain():
    lengths = np.random.default_rng(4).integers(50, 700, 500).tolist()
    batches = make_batches(lengths, 8192, 0)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sum(lengths) / padded > 0.95
    shuffled = np.random.default_rng(5).permutation(500)  # negative control: chains in any order
    groups = [shuffled[i : i + 16].tolist() for i in range(0, 500, 16)]
    assert sum(lengths) / sum(len(g) * max(lengths[i] for i in g) for g in groups) < 0.7
    ordered = make_batches(lengths, 8192, None)
    for batch, after in zip(ordered, ordered[1:], strict=False):
        assert (len(batch) + 1) * lengths[after[0]] > 8192


def test_each_seed_has_its_own_batches_in_its_own_order():
    lengths = np.random.default_rng(3).integers(1, 120, 80).tolist()
    first, again, other = (make_batches(lengths, 300, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other}
    longest = [max(lengths[i] for i in batch) for batch in first]
    assert longest != sorted(longest)


# --- the forward pass ---


@pytest.mark.parametrize("seed", range(3))
def test_padding_is_invisible(backbone, full, seed):
    chains = make_chains(6, seed)
    batches = run(chains, backbone, max_tokens=10_000)
    assert len(batches) == 1 and set(batches[0].chain.tolist()) == {i for i, c in enumerate(chains) if expected(c)[0]}
    for i, chain in enumerate(chains):
        reference = alone(full, chain.ids)[expected(chain)[0]]
        torch.testing.assert_close(batches[0].acts[batches[0].chain == i], reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_without_a_mask_is_visible(backbone, full):
    """Negative control of the test above."""
    ids = make_chains(2, seed=5)[1].ids
    padded = torch.cat([torch.full((7,), 5), ids])
    distance = (alone(full, padded)[7:] - alone(full, ids)).abs().amax((1, 2))
    assert distance.min() > 1e-3


def test_tokens_hear_of_earlier_ones_only(full, backbone):
    """Negative control: the context of a token is in its activation, so a wrong one would show."""
    chain = make_chains(2, seed=6)[1]
    place = len(chain.ids) // 2
    changed = chain.ids.clone()
    changed[place] = (changed[place] + 1) % 400
    a, b = alone(full, chain.ids), alone(full, changed)
    assert torch.equal(a[:place], b[:place])
    assert (a[place:] - b[place:]).abs().amax((1, 2)).min() > 1e-3


def test_the_mask_and_the_padded_tokens_are_told(backbone):
    chains = make_chains(7, seed=1)
    told, seen = [], []

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        assert not torch.is_grad_enabled()
        seen.append((kwargs["input_ids"], kwargs["attention_mask"]))

    handle = backbone.register_forward_pre_hook(look, with_kwargs=True)
    try:
        batches = list(
            stream(chains, backbone, LAYERS, COLUMNS, LABELS, 100, 0, lambda real, padded: told.append((real, padded)))
        )
    finally:
        handle.remove()
    assert len(told) == len(seen) == len(batches) > 1
    assert sum(real for real, _ in told) == sum(len(c.ids) for c in chains)
    for (real, padded), (ids, mask), batch in zip(told, seen, make_batches_of(chains, 100), strict=True):
        assert (real, padded) == (mask.sum(), mask.numel())
        for row, (i, line) in enumerate(zip(batch, mask, strict=True)):
            n = len(chains[i].ids)
            assert line.tolist() == [1] * n + [0] * (len(line) - n)
            assert torch.equal(ids[row, :n], chains[i].ids)


def make_batches_of(chains: list[Chain], max_tokens: int, seed: int | None = 0) -> list[list[int]]:
    return make_batches([len(c.ids) for c in chains], max_tokens, seed)


# --- the stream ---


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_valid_token_once_with_its_own_row(backbone, full, real_chains, max_tokens, seed):
    chains = make_chains(9, seed=2) + real_chains[:3]
    batches = run(chains, backbone, max_tokens, seed)
    order = make_batches_of(chains, max_tokens, seed)
    got = joined(batches)
    assert list(dict.fromkeys(got.chain.tolist())) == [i for batch in order for i in batch if expected(chains[i])[0]]
    longest = [max(len(chains[i].ids) for i in batch) for batch in order]
    assert len(batches) == sum(-(-n // max_tokens) for n in longest)
    assert got.acts.dtype == torch.float32 and got.chain.dtype == torch.int64
    assert got.targets.dtype == got.valid.dtype == torch.bool
    for i, chain in enumerate(chains):
        tokens, targets, valid = expected(chain)
        mine = got.rows((got.chain == i).nonzero()[:, 0])
        assert len(mine.chain) == len(tokens)
        assert torch.equal(mine.targets, targets) and torch.equal(mine.valid, valid)
        acts = alone(full, chain.ids)
        torch.testing.assert_close(mine.acts, acts[tokens], rtol=0, atol=2e-5)
        if len(tokens) > 5:  # negative control: the rows of the tokens one further on
            late = [min(t + 1, len(acts) - 1) for t in tokens]
            assert (mine.acts - acts[late]).abs().amax((1, 2)).median() > 1e-2


def test_real_chains_have_something_to_find(real_chains):
    """Negative control of the test above: no column is empty."""
    _, valid, positive = count_tokens(real_chains, COLUMNS, LABELS)
    assert (positive > 0).all() and (positive < valid).all()


@pytest.mark.parametrize("seed", range(3))
def test_count_tokens_is_what_the_stream_yields(backbone, real_chains, seed):
    chains = make_chains(12, seed) + real_chains
    tokens, valid, positive = count_tokens(chains, COLUMNS, LABELS)
    batches = run(chains, backbone)
    assert tokens == sum(len(b.chain) for b in batches)
    assert torch.equal(valid, sum(b.valid.sum(0) for b in batches))
    assert torch.equal(positive, sum(b.targets.sum(0) for b in batches))
    assert tokens < sum(int(c.support.sum()) for c in chains) < sum(len(c.ids) for c in chains)


def test_grad_mode_does_not_leak(backbone):
    for batch in stream(make_chains(5), backbone, LAYERS, COLUMNS, LABELS, 64):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not batch.acts.requires_grad and not batch.acts.is_inference()
        weight = torch.zeros(batch.acts.shape[-1], requires_grad=True)
        (batch.acts @ weight).sum().backward()  # what a probe does
        assert weight.grad is not None
    assert torch.is_grad_enabled()

    def leaks() -> Iterator[None]:
        with torch.no_grad():
            yield

    assert [torch.is_grad_enabled() for _ in leaks()] == [False]  # negative control


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_hooks_are_there_only_while_it_streams(backbone):
    batches = stream(make_chains(5), backbone, LAYERS, COLUMNS, LABELS, 32)
    assert n_hooks(backbone) == 0
    next(batches)
    assert n_hooks(backbone) == len(LAYERS)
    batches.close()
    assert n_hooks(backbone) == 0
    run(make_chains(5), backbone)
    assert n_hooks(backbone) == 0


def test_empty_stream(backbone):
    with pytest.raises(InputError, match="an empty stream"):
        run([], backbone)


# --- chains longer than a forward pass ---

DEMO = str(Path(module.__file__).parent / "demo" / "model")
LONG = 40  # tokens of the longest chains; ten times the window of Gemma3


@pytest.fixture(scope="module", params=["tiny", "Llama", "Qwen3", "Gemma3", "demo"])
def any_backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> nn.Module:
    """Models with and without a sliding window, in float32."""
    folder = {"tiny": model_dir, "demo": DEMO}.get(request.param)
    if not folder:
        folder = str(tmp_path_factory.mktemp(request.param))
        build(request.param, folder)
    return load_backbone(folder, LAYERS, "float32", device_map="cpu")


def long_chains(backbone: nn.Module, seed: int = 0) -> list[Chain]:
    """Chains of 1 to LONG tokens, two of them of LONG, with ids that the model has."""
    chains = make_chains(5, seed, LONG) + [c for c in make_chains(60, seed, LONG) if len(c.ids) == LONG][:2]
    return [replace(c, ids=c.ids % backbone.config.vocab_size) for c in chains]


def by_chain(batches: list[TokenBatch]) -> TokenBatch:
    """The tokens in order of the chains."""
    got = joined(batches)
    return got.rows(got.chain.argsort(stable=True))


@pytest.mark.parametrize("max_tokens", [1, 3, 7, 39])  # below and above the window and the longest lag
def test_chunks_change_nothing(any_backbone, max_tokens):
    chains = long_chains(any_backbone)
    whole, got = (by_chain(run(chains, any_backbone, n, None)) for n in (LONG, max_tokens))
    assert torch.equal(got.targets, whole.targets) and torch.equal(got.valid, whole.valid)
    assert torch.equal(got.chain, whole.chain)
    largest = float(whole.acts.abs().max())
    torch.testing.assert_close(got.acts, whole.acts, rtol=0, atol=3e-6 * largest)


def test_chunks_without_what_came_before_are_seen(any_backbone, monkeypatch):
    """Negative control of the test above."""
    chains = long_chains(any_backbone)[-2:]
    whole = by_chain(run(chains, any_backbone, LONG, None))
    monkeypatch.setattr(module, "make_cache", lambda config: None)
    cut = by_chain(run(chains, any_backbone, 16, None))
    assert torch.equal(cut.targets, whole.targets)
    tokens = torch.tensor(expected(chains[0])[0])
    distance = (cut.acts - whole.acts)[whole.chain == 0].abs().amax((1, 2)) / whole.acts.abs().max()
    assert distance[tokens < 16].max() < 3e-6
    assert distance[tokens >= 16].median() > 1e-2


def test_no_chain_sets_the_memory(backbone, monkeypatch):
    """Each forward pass and each batch is bounded, and there is at most one cache, of the chain at hand."""
    caches: list[weakref.ref[Any]] = []
    alive, told = [], []

    def make(config: Any) -> Any:
        cache = make_cache(config)
        caches.append(weakref.ref(cache))
        return cache

    def count(tokens: int, padded: int) -> None:
        alive.append(sum(ref() is not None for ref in caches))
        told.append((tokens, padded))

    monkeypatch.setattr(module, "make_cache", make)
    chains = long_chains(backbone)
    batches = list(stream(chains, backbone, LAYERS, COLUMNS, LABELS, 8, 0, count))
    assert len(caches) == sum(len(c.ids) > 8 for c in chains) > 2
    assert max(alive) == 1 and all(ref() is None for ref in caches)
    assert len(told) == len(batches) and sum(tokens for tokens, _ in told) == sum(len(c.ids) for c in chains)
    assert max(padded for _, padded in told) == 8
    assert max(len(b.chain) for b in batches) <= 8 + max(c.lag for c in COLUMNS)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_that_depend_on_the_length(tmp_path, rope, monkeypatch):
    """Chunks would be computed with the frequencies of a shorter text."""
    sizes = {"max_position_embeddings": 16} if rope["rope_type"] == "dynamic" else {}
    rope = rope | {"rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    build("Llama", tmp_path, rope_parameters=rope, **sizes)
    model = load_backbone(str(tmp_path), LAYERS, "float32", device_map="cpu")
    chains = long_chains(model)[-1:]
    with pytest.raises(
        InputError, match="a llama model, which cannot read them in chunks; .* raise --max_batch_tokens"
    ):
        run(chains, model, 8)
    whole = run(chains, model, LONG)[0].acts
    monkeypatch.setattr(module, "make_cache", lambda config: DynamicCache(config=config))
    distance = (joined(run(chains, model, 8)).acts - whole).abs().max() / whole.abs().max()
    assert distance > 1e-2  # negative control: what is refused would be wrong


def test_a_running_state():
    from transformers import FalconH1Config, LlamaConfig

    make_cache(LlamaConfig())
    with pytest.raises(InputError, match="falcon_h1"):
        make_cache(FalconH1Config())


# --- the activation memory ---

SHAPE = (2, 3, 2)  # L, D, K
N_CHAINS = 40


def source(seed: int = 0) -> list[TokenBatch]:
    """One trip over 40 chains of 5 to 30 tokens, in batches of a few chains; every token has a number of its own."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 31, N_CHAINS)
    firsts = np.cumsum(lengths) - lengths
    batches = []
    for part in np.array_split(np.random.default_rng(seed).permutation(N_CHAINS), 11):
        number = torch.from_numpy(np.concatenate([np.arange(firsts[i], firsts[i] + lengths[i]) for i in part]))
        chain = torch.from_numpy(np.repeat(part, lengths[part]))
        batches.append(token_batch(number, chain))
    return batches


def token_batch(number: Tensor, chain: Tensor) -> TokenBatch:
    """Tokens whose activations, targets and validity all tell their number."""
    acts = number[:, None, None] + torch.tensor([[0, 0.25, 0.5], [0.125, 0.375, 0.625]])
    bits = torch.stack([number % 2 == 0, number % 3 == 0], dim=1)
    return TokenBatch(acts, bits, ~bits, chain)


CHAIN_OF = {int(n): int(c) for b in source() for n, c in zip(b.acts[:, 0, 0], b.chain, strict=True)}
N_TOKENS = len(CHAIN_OF)


def numbers(batches: list[TokenBatch]) -> list[int]:
    """The tokens' numbers, in order; asserts that each one still has its own labels and chain."""
    got = joined(batches)
    number = got.acts[:, 0, 0].long()
    whole = token_batch(number, torch.tensor([CHAIN_OF[n] for n in number.tolist()]))
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    return number.tolist()


def memory(keep: bool, rows: int | None = None) -> ActivationMemory:
    return ActivationMemory(rows or (N_TOKENS if keep else 100), keep, SHAPE, torch.float32, CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is mixed and handed on at once, so that few tokens do."""
    monkeypatch.setattr(module, "MIXING_TOKENS", 128)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 32)


@pytest.mark.parametrize("multiple", [1, 7, 16, 50])
@pytest.mark.parametrize(("keep", "rows"), [(True, None), (False, 100), (False, 128), (False, 300), (False, 5000)])
@pytest.mark.usefixtures("small")
def test_each_pass_yields_each_token_once(keep, rows, multiple):
    store, calls, passes = memory(keep, rows), [], []
    for seed in range(4):

        def trip(seed: int = seed) -> list[TokenBatch]:
            calls.append(seed)
            return source(seed)

        chunks = list(store.shuffled(trip, multiple, seed))
        sizes = [len(chunk.chain) for chunk in chunks]
        assert all(size % multiple == 0 for size in sizes[:-1])
        assert max(sizes) <= max(32, multiple)
        passes.append(numbers(chunks))
        assert sorted(passes[-1]) == list(range(N_TOKENS))
    assert calls == ([0] if keep else [0, 1, 2, 3])
    assert len({tuple(p) for p in passes}) == 4


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.usefixtures("small")
def test_a_pass_depends_on_its_seed_only(keep):
    def order(seed: int) -> list[int]:
        store = memory(keep)
        list(store.shuffled(source, 8, 99))
        return numbers(list(store.shuffled(source, 8, seed)))

    assert order(3) == order(3) != order(4)


@pytest.mark.parametrize("rows", [64, 100, 128, 500])
@pytest.mark.usefixtures("small")
def test_the_pool_never_holds_more_than_its_rows(rows):
    """What was read and not yet handed out is in the pool, bar the batch at hand; nothing is ever larger than it."""
    store = memory(False, rows)
    read = handed = most = 0

    def trip() -> Iterator[TokenBatch]:
        nonlocal read
        for batch in source():
            read += len(batch.chain)
            yield batch

    largest = max(len(batch.chain) for batch in source())
    for chunk in store.shuffled(trip, 8, 0):
        most = max(most, read - handed)
        handed += len(chunk.chain)
        assert {len(x) for x in store.pool} == {rows}
    assert handed == N_TOKENS
    assert most <= min(rows, module.MIXING_TOKENS) + largest
    assert most > min(rows, module.MIXING_TOKENS) // 2  # and it is made use of


@pytest.mark.usefixtures("small")
def test_no_chunk_is_empty():
    """Two pools full of tokens, each handed out at once, leave nothing for the end of the pass."""
    batch = token_batch(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    store = ActivationMemory(32, False, SHAPE, torch.float32, CPU)
    assert [len(c.chain) for c in store.shuffled(lambda: [batch], 32, 0)] == [32, 32]
    assert list(store.shuffled(list, 32, 0)) == []


@pytest.mark.usefixtures("small")
def test_chunks_are_copies():
    """What was handed out is not overwritten by later tokens of the pool."""
    store, kept, now = memory(False), [], []
    for chunk in store.shuffled(source, 8, 0):
        kept.append(chunk)
        now.append(TokenBatch(*(x.clone() for x in chunk)))
    assert numbers(kept) == numbers(now)


def runs(order: list[int]) -> float:
    """The share of tokens that follow one of the same chain."""
    chain = [CHAIN_OF[n] for n in order]
    return sum(a == b for a, b in zip(chain, chain[1:], strict=False)) / (len(chain) - 1)


@pytest.mark.usefixtures("small")
def test_tokens_of_many_chains_are_mixed():
    assert runs(numbers(source())) > 0.9  # negative control
    pool, kept = memory(False), memory(True)
    assert runs(numbers(list(pool.shuffled(source, 8, 0)))) < 0.25  # 100 tokens are about 6 chains
    list(kept.shuffled(source, 8, 0))
    chunks = list(kept.shuffled(source, 8, 1))
    order = numbers(chunks)
    assert runs(order) < 0.08  # of 40 chains
    shares = np.array(list(Counter(CHAIN_OF.values()).values())) / N_TOKENS
    independent = sum(1 - (1 - shares) ** 32)  # expected number of chains among 32 independent tokens
    assert np.mean([len(set(c.chain.tolist())) for c in chunks[:-1]]) == pytest.approx(independent, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small")
def test_filled_memory_goes_on_like_one_that_trained_from_the_start(seed):
    """What a resumed run relies on: after `fill`, every pass is bit-identical to those of a run that never stopped."""
    straight, resumed, other = memory(True), memory(True), memory(True)
    list(straight.shuffled(lambda: source(1), 8, seed + 1))
    resumed.fill(lambda: source(1))
    other.fill(lambda: source(2))
    assert straight.used == resumed.used == N_TOKENS
    differs = False
    for n in (2, 3):
        passes = [list(store.shuffled(no_trip, 8, seed + n)) for store in (straight, resumed, other)]
        for a, b, c in zip(*passes, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            differs |= not torch.equal(a.acts, c.acts)
    assert differs  # negative control: a split that was read in another order


def no_trip() -> Iterator[TokenBatch]:
    raise AssertionError("the model ran again")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.usefixtures("small")
def test_in_order(keep):
    store, calls = memory(keep), []

    def trip() -> list[TokenBatch]:
        calls.append(1)
        return source()

    for _ in range(3):
        assert numbers(list(store.in_order(trip))) == numbers(source())
    assert len(calls) == (1 if keep else 3)


@pytest.mark.usefixtures("small")
def test_a_pass_that_was_broken_off_does_not_count_as_filled():
    store = memory(True)
    next(iter(store.shuffled(source, 8, 0)))
    assert not store.filled
    assert sorted(numbers(list(store.shuffled(source, 8, 0)))) == list(range(N_TOKENS))
    assert store.filled


@pytest.mark.usefixtures("small")
def test_more_tokens_than_were_counted():
    with pytest.raises(AssertionError, match="more tokens than were counted"):
        list(memory(True, N_TOKENS - 1).shuffled(source, 8, 0))


def test_stored_in_the_dtype_asked_for():
    store = ActivationMemory(N_TOKENS, True, SHAPE, torch.float64, CPU)
    chunks = list(store.shuffled(source, 8, 0))
    assert {c.acts.dtype for c in chunks} == {torch.float64}


def test_the_model_runs_once_if_the_split_is_kept(backbone, real_chains):
    """Stream and memory together: all passes hold the rows that the model gave, and only the first one runs it."""
    n = count_tokens(real_chains, COLUMNS, LABELS)[0]
    store = ActivationMemory(n, True, (len(LAYERS), 32, len(COLUMNS)), torch.float32, CPU)
    forwards = []

    def trip() -> Iterator[TokenBatch]:
        return stream(real_chains, backbone, LAYERS, COLUMNS, LABELS, 256, 0, lambda *size: forwards.append(size))

    reference = torch.cat([b.acts for b in trip()]).flatten(1)
    once = len(forwards)
    for seed in range(3):
        rows = torch.cat([b.acts for b in store.shuffled(trip, 64, seed)]).flatten(1)
        assert torch.equal(*(x[np.lexsort(x.T.numpy())] for x in (rows, reference)))
    assert len(forwards) == 2 * once > 2


# --- the plan ---

GPU = torch.device("cuda")
GB = 10**9


def plan(monkeypatch: pytest.MonkeyPatch, cap: float | None, device: torch.device, free: dict[str, float], **n: int):
    """`plan_memory` for tokens of 1,000 bytes, with this many GB free."""
    monkeypatch.setattr(module, "free_bytes", lambda where: int(free[where.type] * GB))
    return plan_memory(cap, 1000, n.get("train", 800_000), n.get("validation", 100_000), n.get("batch", 64), device)


PLANS = {  # memory_gb, device, GB free, tokens -> plan; all tokens are 0.9 GB; without a cap 3.22 GB and a tenth stay free
    "fits": (None, CPU, {"cpu": 5}, {}, Plan(800_000, True, True, CPU)),
    "fits to the byte": (0.9, CPU, {"cpu": 2}, {}, Plan(800_000, True, True, CPU)),
    "fits on the device": (None, GPU, {"cuda": 4.6, "cpu": 9}, {}, Plan(800_000, True, True, GPU)),
    "fits in RAM only": (None, GPU, {"cuda": 4.5, "cpu": 9}, {}, Plan(800_000, True, True, CPU)),
    "fits nowhere": (None, GPU, {"cuda": 4.5, "cpu": 4.5}, {}, Plan(65_536, False, True, GPU)),
    "capped": (0.5, CPU, {"cpu": 9}, {}, Plan(65_536, False, True, CPU)),
    "capped on the device": (0.5, GPU, {"cuda": 9, "cpu": 9}, {}, Plan(65_536, False, True, GPU)),
    "pool beside validation": (0.13, CPU, {"cpu": 9}, {"validation": 65_000}, Plan(65_000, False, True, CPU)),
    "validation is over half": (0.13, CPU, {"cpu": 9}, {"validation": 65_001}, Plan(65_536, False, False, CPU)),
    "free memory counts, too": (5, CPU, {"cpu": 0.02}, {}, Plan(20_000, False, False, CPU)),
    "a large mini-batch": (0.5, CPU, {"cpu": 9}, {"batch": 90_000}, Plan(90_000, False, True, CPU)),
    "no pool beside validation": (0.002, CPU, {"cpu": 9}, {"validation": 1_000}, Plan(2_000, False, False, CPU)),
    "the least": (0.001024, CPU, {"cpu": 9}, {}, Plan(1_024, False, False, CPU)),
    "a short train split": (
        0.007,
        CPU,
        {"cpu": 9},
        {"train": 5_000, "validation": 9_000},
        Plan(5_000, False, False, CPU),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(monkeypatch, name):
    cap, device, free, tokens, expected_plan = PLANS[name]
    assert plan(monkeypatch, cap, device, free, **tokens) == expected_plan


@pytest.mark.parametrize("name", PLANS)
def test_plan_keeps_to_the_budget(monkeypatch, name):
    cap, device, free, tokens, _ = PLANS[name]
    got = plan(monkeypatch, cap, device, free, **tokens)
    kept = tokens.get("validation", 100_000) * got.keep_validation
    assert (got.rows + kept) * 1000 <= min(free[got.home.type], cap or 1e9) * GB


@pytest.mark.parametrize(("cap", "free"), [(0.001023, {"cpu": 9}), (None, {"cpu": 3.5})], ids=["capped", "full"])
def test_too_little_memory(monkeypatch, cap, free):
    with pytest.raises(InputError, match="MB for activations; expected at least 1.02 MB, .* raise --memory_gb"):
        plan(monkeypatch, cap, CPU, free)


def test_free_bytes(monkeypatch):
    class Memory:
        available = 10 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    assert free_bytes(CPU) == 10 * 2**30
    assert free_bytes(GPU) == 20 * 2**30


@pytest.mark.usefixtures("small")
def test_chunks_of_a_multiple_that_is_larger_than_the_mixing_window():
    sizes = [len(c.chain) for c in memory(True, None).shuffled(source, 150, 0)]
    assert sum(sizes) == N_TOKENS and all(size % 150 == 0 for size in sizes[:-1])
