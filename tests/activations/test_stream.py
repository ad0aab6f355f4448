"""Every token reaches the probes once a pass, beside its own activation and its own labels, however it is batched."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import load_chains, make_rows
from tiny_models import build
from torch import Tensor, nn
from transformers import DynamicCache
from trips import chunks

from streamprobe.activations import stream as module
from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.shards import Trip, deal
from streamprobe.activations.store import ActivationMemory, Sizes
from streamprobe.activations.stream import make_batches, stream
from streamprobe.data.census import count_tokens
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column
from streamprobe.model.backbone import load_backbone
from streamprobe.model.chunks import make_cache

CPU = torch.device("cpu")
LABELS = ["backtracking", "deduction"]
DEMO = str(Path(module.__file__).parents[1] / "demo" / "model")
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
    return load_chains(make_rows(15, seed=2), tokenizer, LABELS, 512)[0]["train"]


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


def run(chains: list[Chain], backbone: nn.Module, max_tokens: int = 128) -> list[TokenBatch]:
    return list(stream(chains, backbone, LAYERS, COLUMNS, labels=LABELS, max_batch_tokens=max_tokens))


def joined(batches: list[TokenBatch]) -> TokenBatch:
    """All batches as one."""
    return TokenBatch(*(torch.cat(column) for column in zip(*batches, strict=True)))


# --- batches ---


@pytest.mark.parametrize("max_tokens", [1, 50, 300, 10_000])
def test_batches_are_a_partition_within_the_budget(max_tokens):
    lengths = np.random.default_rng(3).integers(1, 120, 80).tolist()
    batches = make_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(80))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    if max_tokens == 1:
        assert all(len(batch) == 1 for batch in batches)
    if max_tokens == 10_000:
        assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_batches_waste_little_and_no_room_for_another_chain():
    lengths = np.random.default_rng(4).integers(50, 700, 500).tolist()
    batches = make_batches(lengths, 8192)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sum(lengths) / padded > 0.95
    shuffled = np.random.default_rng(5).permutation(500)  # negative control: chains in any order
    groups = [shuffled[i : i + 16].tolist() for i in range(0, 500, 16)]
    assert sum(lengths) / sum(len(g) * max(lengths[i] for i in g) for g in groups) < 0.7
    for batch, after in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * lengths[after[0]] > 8192


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


def test_the_model_reads_padded_ids_alone_and_both_counts_are_reported(backbone):
    chains = make_chains(7, seed=1)
    counted, seen = [], []

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        assert not torch.is_grad_enabled() and kwargs.keys() == {"input_ids", "use_cache"}
        seen.append(kwargs["input_ids"])

    handle = backbone.register_forward_pre_hook(look, with_kwargs=True)
    try:
        batches = list(
            stream(
                chains,
                backbone,
                LAYERS,
                COLUMNS,
                labels=LABELS,
                max_batch_tokens=100,
                on_forward=lambda real, padded: counted.append((real, padded)),
            )
        )
    finally:
        handle.remove()
    assert len(counted) == len(seen) == len(batches) > 1
    assert sum(real for real, _ in counted) == sum(len(c.ids) for c in chains)
    for (real, padded), ids, batch in zip(counted, seen, make_batches_of(chains, 100), strict=True):
        assert (real, padded) == (sum(len(chains[i].ids) for i in batch), ids.numel())
        for row, i in enumerate(batch):
            assert torch.equal(ids[row, : len(chains[i].ids)], chains[i].ids)


@torch.no_grad()
def with_and_without_a_mask(model: Any) -> tuple[Tensor, Tensor]:
    """The last hidden states of the real tokens [N, D] of a batch that is padded on the right."""
    ids = [c.ids % model.config.vocab_size for c in make_chains(7, seed=1)]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in ids])[:, None]
    masked = model(input_ids=padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return masked[mask], model(input_ids=padded, use_cache=False).last_hidden_state[mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_real_tokens_are_bit_equal_without_a_mask(model_dir, name, attention, dtype):
    from transformers import AutoModel

    folder = {"tiny": model_dir, "demo": DEMO}[name]
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    assert torch.equal(*with_and_without_a_mask(model))


def test_bit_equality_fails_without_causal_attention(model_dir):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model_dir)
    config.is_causal = False
    model = AutoModel.from_pretrained(model_dir, config=config, dtype=torch.float32).eval()
    masked, bare = with_and_without_a_mask(model)
    assert (masked - bare).abs().max() > 1e-3


def make_batches_of(chains: list[Chain], max_tokens: int) -> list[list[int]]:
    return make_batches([len(c.ids) for c in chains], max_tokens)


# --- the stream ---


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_every_valid_token_once_with_its_own_row(backbone, full, real_chains, max_tokens):
    chains = make_chains(9, seed=2) + real_chains[:3]
    batches = run(chains, backbone, max_tokens)
    order = make_batches_of(chains, max_tokens)
    got = joined(batches)
    assert list(dict.fromkeys(got.chain.tolist())) == [i for batch in order for i in batch if expected(chains[i])[0]]
    longest = [max(len(chains[i].ids) for i in batch) for batch in order]
    parts = [
        [t // max_tokens for i in batch for t in expected(chains[i])[0]] for batch in order
    ]  # of long chains, that have tokens
    assert len(batches) == sum(len(set(part)) for part in parts) <= sum(-(-n // max_tokens) for n in longest)
    assert got.acts.dtype == torch.float32 and got.chain.dtype == torch.int64
    assert got.targets.dtype == got.valid.dtype == torch.bool
    for i, chain in enumerate(chains):
        tokens, targets, valid = expected(chain)
        mine = got.rows((got.chain == i).nonzero()[:, 0])
        assert len(mine.chain) == len(tokens)
        assert torch.equal(mine.targets, targets) and torch.equal(mine.valid, valid)
        assert mine.token.tolist() == tokens and mine.side.shape == (len(tokens), 0)
        acts = alone(full, chain.ids)
        torch.testing.assert_close(mine.acts, acts[tokens], rtol=0, atol=2e-5)
        if len(tokens) > 5:  # negative control: the rows of the tokens one further on
            late = [min(t + 1, len(acts) - 1) for t in tokens]
            assert (mine.acts - acts[late]).abs().amax((1, 2)).median() > 1e-2


class Ids:
    """A layer that holds each token's id and its place, as `EmbeddingLayers` hold its embedding."""

    before = 1000  # so that it sees the whole chain

    def rows(self, ids: Tensor, n: int) -> Tensor:
        place = torch.arange(len(ids))
        return torch.stack([ids, place], dim=1).float()[-n:, None].repeat(1, 1, 16)


def side(chain: Chain) -> Tensor:
    """Each token's id and its negative."""
    return torch.stack([chain.ids, -chain.ids], dim=1).float()


@pytest.mark.parametrize("max_tokens", [7, 10_000])
def test_surface_and_side_stand_beside_the_activations_of_their_own_token(backbone, max_tokens):
    chains = make_chains(9, seed=2)
    plain = joined(list(stream(chains, backbone, LAYERS, COLUMNS, labels=LABELS, max_batch_tokens=max_tokens)))
    got = joined(
        list(
            stream(
                chains,
                backbone,
                LAYERS,
                COLUMNS,
                labels=LABELS,
                max_batch_tokens=max_tokens,
                embedded=Ids(),
                side=side,
            )
        )
    )
    ids = torch.stack([chains[c].ids[t] for c, t in zip(got.chain.tolist(), got.token.tolist(), strict=True)]).float()
    assert got.acts.shape[1] == len(LAYERS) + 1 and torch.equal(got.acts[:, :-1], plain.acts)
    assert torch.equal(got.acts[:, -1, 0], ids) and torch.equal(got.acts[:, -1, 1], got.token.float())
    assert torch.equal(got.side, torch.stack([ids, -ids], dim=1))
    assert not torch.equal(got.side[:, 0], ids.roll(1))  # negative control


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


@pytest.mark.parametrize("max_tokens", [7, 10_000])
def test_every_sample_comes_where_it_is_asked_for_and_the_others_as_they_were(backbone, max_tokens):
    chains = make_chains(9, seed=2)
    options: dict[str, Any] = {"labels": LABELS, "max_batch_tokens": max_tokens, "side": side}
    few = joined(list(stream(chains, backbone, LAYERS, COLUMNS, **options)))
    every = joined(list(stream(chains, backbone, LAYERS, COLUMNS, every=True, **options)))
    for i, chain in enumerate(chains):
        assert every.token[every.chain == i].tolist() == chain.support.nonzero()[:, 0].tolist()
    assert len(every.chain) > len(few.chain)
    for a, b in zip(every.rows(every.valid.any(1).nonzero()[:, 0]), few, strict=True):
        assert torch.equal(a, b)


def test_grad_mode_does_not_leak(backbone):
    for batch in stream(make_chains(5), backbone, LAYERS, COLUMNS, labels=LABELS, max_batch_tokens=64):
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
    batches = stream(make_chains(5), backbone, LAYERS, COLUMNS, labels=LABELS, max_batch_tokens=32)
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
    whole, got = (by_chain(run(chains, any_backbone, n)) for n in (LONG, max_tokens))
    assert torch.equal(got.targets, whole.targets) and torch.equal(got.valid, whole.valid)
    assert torch.equal(got.chain, whole.chain)
    largest = float(whole.acts.abs().max())
    torch.testing.assert_close(got.acts, whole.acts, rtol=0, atol=3e-6 * largest)


def test_chunks_without_what_came_before_are_seen(any_backbone, monkeypatch):
    """Negative control of the test above."""
    chains = long_chains(any_backbone)[-2:]
    whole = by_chain(run(chains, any_backbone, LONG))
    monkeypatch.setattr(module, "make_cache", lambda config: None)
    cut = by_chain(run(chains, any_backbone, 16))
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
    batches = list(stream(chains, backbone, LAYERS, COLUMNS, labels=LABELS, max_batch_tokens=8, on_forward=count))
    assert len(caches) == sum(len(c.ids) > 8 for c in chains) > 2
    assert max(alive) == 1 and all(ref() is None for ref in caches)
    assert len(told) >= len(batches) > 0 and sum(tokens for tokens, _ in told) == sum(len(c.ids) for c in chains)
    assert max(padded for _, padded in told) == 8
    assert max(len(b.chain) for b in batches) <= 8 + max(c.lag for c in COLUMNS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ],
    ids=lambda rope: rope["rope_type"],
)
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


def test_a_short_chain_keeps_its_frequencies_beside_a_long_one(tmp_path, monkeypatch):
    """longrope has others above a length: transformers chooses by the longest chain of a batch."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10_000.0}
    build("Llama", tmp_path, rope_parameters=rope | {"original_max_position_embeddings": 16})
    model = load_backbone(str(tmp_path), LAYERS, "float32", device_map="cpu")
    chains = [replace(c, ids=c.ids % 300) for c in make_chains(12, 3, LONG)]
    assert {len(c.ids) > 16 for c in chains} == {False, True}
    got = by_chain(run(chains, model, 10_000))
    each = [by_chain(run([c], model, 10_000)) for c in chains if expected(c)[0]]
    torch.testing.assert_close(got.acts, torch.cat([b.acts for b in each]), rtol=0, atol=1e-5)
    monkeypatch.setattr(module, "frequencies_change", lambda config: 10_000)
    together = by_chain(run(chains, model, 10_000)).acts
    assert (together - got.acts).abs().max() > 1e-2  # negative control


def test_a_running_state():
    from transformers import FalconH1Config, LlamaConfig

    make_cache(LlamaConfig())
    with pytest.raises(InputError, match="falcon_h1"):
        make_cache(FalconH1Config())


def test_the_model_runs_once_if_the_split_is_kept(backbone, real_chains):
    """Stream and memory together: all passes hold the rows that the model gave, and only the first one runs it."""
    n = count_tokens(real_chains, COLUMNS, LABELS)[0]
    store = ActivationMemory(n, True, Sizes(len(LAYERS), 32, len(COLUMNS), 0, torch.float32), CPU, n_shards=3)
    forwards = []

    def read(batches: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
        return stream(
            real_chains,
            backbone,
            LAYERS,
            COLUMNS,
            labels=LABELS,
            max_batch_tokens=256,
            batches=batches,
            on_forward=lambda *size: forwards.append(size),
        )

    def trip() -> Trip:
        return Trip(deal([len(chain.ids) for chain in real_chains], 3, 256), read)

    reference = torch.cat([b.acts for _, batches in trip().own() for b in batches]).flatten(1)
    once = len(forwards)
    for seed in range(3):
        rows = torch.cat([b.acts for b in chunks(store.shuffled(trip, 64, seed))]).flatten(1)
        assert torch.equal(*(x[np.lexsort(x.T.numpy())] for x in (rows, reference)))
    assert len(forwards) == 2 * once > 2
