"""Every tool takes every kind of probe: one that reads a token alone, one that reads all layers, one that looks back."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kind_banks import NAMES, add_kinds, add_probes
from test_conversation import make_style
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from streamprobe import load_probes
from streamprobe.cli import main
from streamprobe.data.tokenize import TextOptions, tokenize
from streamprobe.errors import InputError
from streamprobe.model.sampling import Sampling
from streamprobe.probes import kinds
from streamprobe.probes.kind_bank import KindBank
from streamprobe.tools import hub
from streamprobe.tools.choice import choose_all, choose_probe, narrow
from streamprobe.tools.conversation import Monitor, converse
from streamprobe.tools.directions import Spread, direction_of, gradient
from streamprobe.tools.score import score
from streamprobe.tools.watch import watch

TEXT = "wait no . okay so puzzle asks given find question begin hmm but wrong again rather mistake"
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kinds(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_folder: Path, bank: Any) -> Path:
    """A run with probes of all kinds."""
    copy = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("kinds") / "run"))
    add_probes(copy, bank)
    return copy


@pytest.fixture(scope="module")
def model(model_dir: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def activations(model: Any, ids: Tensor, layers: list[int]) -> Tensor:
    """[T, L, D] of one text, from a plain pass."""
    states = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([states[layer + 1][0] for layer in layers], 1)


# --- score ---


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("most", [8192, 7])
def test_scores_of_texts_are_those_of_their_activations(model, tokenizer, folder, kind, most) -> None:
    """Whole and in chunks, alone and among others."""
    probes = load_probes(folder, kind=kind)
    texts = [TEXT, "so .", TEXT[20:]]
    for text, own in zip(texts, score(probes, model, tokenizer, texts, max_batch_tokens=most), strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        expected = probes.probabilities(activations(model, ids, probes.layers)[1:])  # BOS is none of the samples
        torch.testing.assert_close(own.probabilities, expected, atol=1e-5, rtol=0)
        assert own.probabilities.shape[1:] == probes.bias.shape


def test_scores_in_chunks_fail_without_the_state(model, tokenizer, folder, monkeypatch) -> None:
    probes = load_probes(folder, kind="fading")
    whole = score(probes, model, tokenizer, TEXT)
    monkeypatch.setattr(KindBank, "scorer", lambda self: lambda acts, chain: self.form.scorer(self.parts)(acts, chain))
    chunked = score(probes, model, tokenizer, TEXT, max_batch_tokens=7)
    torch.testing.assert_close(whole.probabilities[:6], chunked.probabilities[:6], atol=1e-5, rtol=0)
    assert (whole.probabilities[6:] - chunked.probabilities[6:]).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "place"), [("squares", "squares/layer01"), ("concat", "concat/layers")])
def test_the_command_scores_by_a_kind(folder, tmp_path, capsys, kind, place) -> None:
    data, out = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    data.write_text(json.dumps({"response": TEXT}) + "\n")
    argv = ["score", str(folder), str(data), "--kind", kind, "--lag", "4", "--layer", "1", "--out", str(out)]
    assert main(argv) == 0
    row = json.loads(out.read_text().splitlines()[0])
    assert f"backtracking/token/{place}/lag+04" in row and "alarm" in row
    assert main([*argv[:3], "--kind", kind, "--target", "onset"]) == 0
    assert f"backtracking/onset/{place.split('/')[0]}/" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["score", "watch", "steer"])
def test_a_kind_that_the_run_has_not_is_one_line(folder, tmp_path, capsys, command) -> None:
    given = [str(tmp_path / "gone.jsonl")] if command == "score" else []
    assert main([command, str(folder), *given, "--kind", "mlp65"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("streamprobe: kind 'mlp65'; expected one whose probes ") and error.count("\n") == 1
    assert "holds: linear squares concat fading; fix: choose another" in error


# --- which probe ---


def test_probes_of_all_layers_are_chosen_by_any_of_these(folder) -> None:
    probes = load_probes(folder, kind="concat")
    place = choose_probe(folder, probes, lag=4, target="onset")
    assert place == (0, 5) == choose_probe(folder, probes, layer=2, lag=4, target="onset")
    assert choose_probe(folder, probes, layer=1)[0] == 0 == choose_probe(folder, probes)[0]
    with pytest.raises(InputError, match="layer 9; expected one of 0 1 2, as in the run"):
        choose_probe(folder, probes, layer=9, lag=4)
    acts = torch.randn(4, 3, 32)
    one = narrow(probes, [0], [5])
    torch.testing.assert_close(one.scores(acts)[:, 0, 0], probes.scores(acts)[:, 0, 5])
    assert one.layers == [0, 1, 2] and choose_all(probes, layer=1, lag=4).bias.shape == (1, 2)
    with pytest.raises(InputError, match="which no probe has"):
        choose_all(probes, layer=9)


def test_the_verdict_of_a_kind_is_read_from_its_own_rows(folder) -> None:
    assert choose_probe(folder, load_probes(folder, kind="squares"))[0] == 1  # the layer of the highest AUROC
    rows = (folder / "results.csv").read_text().splitlines(keepends=True)
    assert any(",concat,,," in row for row in rows)


# --- watch ---


def written(model: Any, probes: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens that are written [T] and what the probes say [T, L, K]."""
    steps = list(watch(model, probes, ids, 10, **GREEDY, **options))
    return torch.tensor([token for token, _ in steps]), torch.stack([said for _, said in steps])


def prompt(seed: int = 0, length: int = 9) -> Tensor:
    return torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_watched_is_what_is_scored_afterwards(model, folder, kind) -> None:
    """Of a response: what stands in the prompt is no sample, and probes that look back begin behind it."""
    probes, ids = load_probes(folder, kind=kind), prompt()
    tokens, said = written(model, probes, ids)
    acts = activations(model, torch.cat([ids, tokens]), probes.layers)
    torch.testing.assert_close(said, probes.probabilities(acts[len(ids) :]), atol=1e-4, rtol=0)
    late = probes.probabilities(acts)[len(ids) :]  # negative control: as if the prompt were a part of the response
    assert (kind == "fading") == bool((said - late).abs().max() > 1e-2)


def test_what_of_the_prompt_is_a_response_is_read_first(model, folder) -> None:
    probes, ids = load_probes(folder, kind="fading"), prompt()
    samples = torch.arange(9) >= 5
    tokens, said = written(model, probes, ids, samples=samples)
    acts = activations(model, torch.cat([ids, tokens]), probes.layers)
    torch.testing.assert_close(said, probes.probabilities(acts[5:])[4:], atol=1e-4, rtol=0)
    _, without = written(model, probes, ids)
    assert (said - without).abs().max() > 1e-2


def test_every_chain_of_a_batch_has_a_state_of_its_own(model, folder) -> None:
    probes, prompts = load_probes(folder, kind="fading"), [prompt(1, 5), prompt(2, 9), prompt(3, 7)]
    padded = torch.stack([nn.functional.pad(p, (9 - len(p), 0)) for p in prompts])
    mask = torch.arange(9) >= 9 - torch.tensor([[5], [9], [7]])
    samples = mask & (torch.arange(9) >= 6)
    steps = list(watch(model, probes, padded, 10, attention_mask=mask.long(), samples=samples, **GREEDY))
    for b, ids in enumerate(prompts):
        _, alone = written(model, probes, ids, samples=torch.arange(len(ids)) >= len(ids) - 3)
        torch.testing.assert_close(torch.stack([said[b] for _, said in steps]), alone, atol=1e-4, rtol=0)
    assert (steps[-1][1][0] - steps[-1][1][1]).abs().max() > 1e-2  # negative control: rows differ


@pytest.mark.parametrize("kind", NAMES)
def test_the_command_watches_by_a_kind_what_score_says_of_the_text(model, tokenizer, folder, capsys, kind) -> None:
    argv = ["--prompt", "which box?", "--kind", kind, "--layer", "1", "--lag", "4", "--max_new_tokens", "8", "--json"]
    assert main(["watch", str(folder), *argv]) == 0
    shown = capsys.readouterr()
    assert ("all layers, " if kind == "concat" else "layer 1, ") in shown.err and f"newton, {kind};" in shown.err
    said = [json.loads(line)["probability"] for line in shown.out.splitlines()]
    probes = load_probes(folder, kind=kind)
    ids = torch.tensor(tokenizer("which box?\n\n")["input_ids"])
    new = model.generate(ids[None], max_new_tokens=8, do_sample=False)[0, len(ids) :]
    acts = activations(model, torch.cat([ids, new]), probes.layers)[len(ids) :]
    expected = probes.probabilities(acts)[(slice(None), *probes.place(1, 4))].tolist()
    pairs = [(a, b) for a, b in zip(said, expected, strict=False) if a is not None and not math.isnan(a)]
    assert len(pairs) >= 7 and all(a == pytest.approx(b, abs=1e-4) for a, b in pairs)


CHAT = [
    {"role": "user", "content": "which box?"},
    {"role": "assistant", "content": "the red one."},
    {"role": "user", "content": "why?"},
]


def samples_in(support: str, turns: list[dict[str, str]]) -> str | None:
    """The text of the samples of a prompt."""
    style = make_style()
    style = replace(style, read=TextOptions("chat", support))
    ids = style.encode(turns)
    found = style.samples(turns, ids)
    assert found is not None and found.shape == ids.shape
    return style.tokenizer.decode(ids[found])


def test_what_probes_have_read_of_a_chat_is_what_they_would_have_in_training() -> None:
    assert samples_in("assistant", CHAT) == "the red one."
    assert samples_in("assistant", CHAT[:1]) == samples_in("last_assistant", CHAT) == ""
    assert samples_in("all", CHAT) == "[user]which box?[assistant]the red one.[user]why?[assistant]"
    assert make_style().samples(CHAT, torch.arange(5)) is None  # where no probe looks back


def test_a_second_answer_goes_on_from_the_first(model, tokenizer, folder) -> None:
    """What is watched in a conversation is what a text of both answers would score."""
    style = replace(make_style(), read=TextOptions("chat"))
    probes = load_probes(folder, kind="fading")
    monitor = Monitor(model, style.tokenizer, probes, (1, 4), Sampling(max_new_tokens=6), lines=True)
    asked = []

    def answer(question: Any) -> Any:
        asked.append(question)
        return monitor.answer(question)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprobe.tools.conversation.write", lambda text: None)
        _, second = converse(["which box?", "why?"], style, answer)
    ids, samples = asked[1].ids, asked[1].samples
    assert samples.any() and not asked[0].samples.any()
    whole = {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    tokens, said = written(model, probes, ids, samples=samples, **whole)
    acts = activations(model, torch.cat([ids, tokens]), probes.layers)
    read = torch.cat([acts[: len(ids)][samples], acts[len(ids) :]])
    torch.testing.assert_close(said, probes.probabilities(read)[int(samples.sum()) :], atol=1e-4, rtol=0)
    shown = [mark.probability for mark in second.marks]
    own, alone = (each[:, 1, 4].tolist() for each in (said, written(model, probes, ids, **whole)[1]))
    assert all(any(p == pytest.approx(q, abs=1e-6) for q in own) for p in shown if p)
    assert max(abs(p - q) for p, q in zip(own, alone, strict=True)) > 1e-3  # negative control: as a first answer


# --- steer ---


def spread_of(n_layers: int, seed: int = 0) -> Spread:
    random = torch.Generator().manual_seed(seed)
    mean = torch.randn(n_layers, 32, generator=random)
    return Spread(mean, torch.rand(n_layers, 32, generator=random) * 0.2 + 0.05)


@pytest.mark.parametrize("kind", NAMES)
def test_a_gradient_is_that_of_autograd(folder, kind) -> None:
    probes = load_probes(folder, kind=kind)
    i, k = probes.place(1, 4)
    one = narrow(probes, [i], [k])
    spread = spread_of(len(one.layers))
    x = spread.mean.double().requires_grad_()
    weight, bias = one.parts["weight"][0, 0].double(), one.parts["bias"][0, 0].double()
    said = (weight * (x if kind == "concat" else x[0])).sum()
    {"concat": said, "squares": (said + bias).square() / 4 + said, "fading": said.tanh()}[kind].backward()
    assert x.grad is not None
    found = gradient(one, spread).double()
    torch.testing.assert_close(found, x.grad, atol=2e-3 * float(x.grad.abs().max()), rtol=5e-3)
    other = spread_of(len(one.layers), seed=1)  # negative control: elsewhere it is another, but for what is linear
    assert (kind == "concat") == torch.allclose(gradient(one, other).double(), x.grad, rtol=5e-2, atol=1e-3)


def batches_at(mean: Tensor) -> Any:
    """Two tokens on both sides of a mean [L, D], of the layers that are asked."""

    class Batch:
        def __init__(self, layers: list[int]) -> None:
            self.acts = torch.stack([mean[layers] - 0.1, mean[layers] + 0.1])

    return lambda layers: [Batch(layers)]


def test_one_that_looks_back_is_pushed_as_all_tokens_together_would_move_it(folder) -> None:
    """Against a difference of a chain of tokens at the mean that are all pushed, such as steering does."""
    probes, mean = load_probes(folder, kind="fading"), spread_of(3).mean * 0.2  # where no tanh is at its end
    i, k = probes.place(1, 4)
    found = direction_of(probes, (i, k), None, batches_at(mean))
    one, random = narrow(probes, [i], [k]), torch.randn(50, 32, generator=torch.Generator().manual_seed(3))

    def moved(v: Tensor) -> float:
        """The logit at the last of 20 tokens that are all pushed."""
        return float(one.scores((mean[1] + 0.05 * v).expand(20, 1, -1))[-1])

    assert found.layer == 1
    assert moved(found.unit) > max(map(moved, nn.functional.normalize(random, dim=1)))
    assert moved(-found.unit) < min(map(moved, nn.functional.normalize(random, dim=1)))


def test_of_all_layers_the_one_that_is_named_is_pushed_or_that_which_moves_most(folder) -> None:
    probes, mean = load_probes(folder, kind="concat"), spread_of(3).mean
    probes.parts["weight"][0, :, 2] *= 5
    place = probes.place(None, 4)
    for asked, layer in ((None, 2), (0, 0), (1, 1)):
        found = direction_of(probes, place, asked, batches_at(mean))
        own = nn.functional.normalize(probes.parts["weight"][0, place[1], layer], dim=0)
        assert found.layer == layer and float(found.unit @ own) > 0.9999
        other = nn.functional.normalize(probes.parts["weight"][0, place[1], (layer + 1) % 3], dim=0)
        assert abs(float(found.unit @ other)) < 0.9  # negative control


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_a_probe_without_a_gradient_is_refused(folder, value) -> None:
    probes = load_probes(folder, kind="squares")
    probes.parts["weight"][1] = value
    with pytest.raises(InputError, match="kind squares whose logit has no gradient at the mean of layer 1"):
        direction_of(probes, probes.place(1, 4), None, batches_at(spread_of(3).mean))
    assert direction_of(probes, probes.place(2, 4), None, batches_at(spread_of(3).mean)).layer == 2


@pytest.mark.parametrize("kind", NAMES)
def test_the_command_steers_by_a_kind(folder, tmp_path, capsys, kind) -> None:
    path = tmp_path / "sweep.json"
    options = "--layer 1 --lag 4 --strengths 0 4 --problems 2 --max_new_tokens 4 --marker [aeiou]".split()
    assert main(["steer", str(folder), "--kind", kind, *options, "--json", str(path)]) == 0
    assert f"layer 1, backtracking/token/lag+04, newton, {kind}; 2 test problems" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["layer"] == 1 and [row["direction"] for row in found["rows"]][:2] == ["none", "probe"]


def test_steering_by_a_linear_kind_needs_no_gradient(bank) -> None:
    found = direction_of(bank, (2, 3), None, lambda layers: pytest.fail("read"))
    assert found.layer == 2 and torch.equal(found.unit, nn.functional.normalize(bank.weight[2, 3], dim=0))


# --- what others are told ---


def card_of(folder: Path) -> str:
    from streamprobe.probes.storage import read_about
    from streamprobe.system.csv_files import read_csv

    about = read_about(folder / "probes.safetensors")
    return hub.make_card(about, read_csv(folder / "results.csv", hub.COLUMNS), "someone/probes")


def test_the_card_says_how_to_load_each_kind_and_what_it_is_worth(folder, run_folder) -> None:
    card, plain = card_of(folder), card_of(run_folder)
    assert "# Linear and other probes: backtracking" in card and "# Linear probes: backtracking" in plain
    start, others = card.split("## Other kinds")
    assert start.split("## Results")[1].strip() == plain.split("## Results")[1].strip()  # linear as without them
    assert "Other kinds" not in plain  # negative control
    for kind, about in (("squares", "for tests"), ("concat", "linear on all layers side by side")):
        assert f'    load_probes("someone/probes", kind="{kind}")  # {about}\n' in others
    cell = "0.900 (0.500&ndash;1.000), layer 1"
    assert f"| fading | {cell} | {cell} | {cell} |" in others and "| concat | 0.600" in others
    assert "all layers" in others and "layer 0" not in others.replace("layer 0.", "") and "layer00" not in others


def test_all_kinds_are_uploaded(folder, tmp_path) -> None:
    from streamprobe.probes.storage import load_probes, read_about

    path = folder / "probes.safetensors"
    about = read_about(path) | {"secret": "x"}
    content = hub.for_upload(path, about)
    assert isinstance(content, bytes)
    (tmp_path / "probes.safetensors").write_bytes(content)
    acts = torch.randn(5, 3, 32)
    for kind in NAMES:
        assert torch.equal(load_probes(tmp_path, kind=kind).scores(acts), load_probes(path, kind=kind).scores(acts))


def test_a_card_of_an_unknown_kind_is_refused(folder, monkeypatch) -> None:
    monkeypatch.delitem(kinds.KINDS, "squares")
    with pytest.raises(InputError, match="a kind that is not known .squares"):
        card_of(folder)


@pytest.mark.parametrize("kind", NAMES)
def test_probes_say_their_kind_and_how_to_use_them(folder, kind) -> None:
    probes = load_probes(folder, kind=kind)
    said = str(probes)
    joined = kind == "concat"
    assert said.startswith(f"{6 if joined else 18} {kind} probes from ")
    assert ("layers    0 1 2, all read by each probe" in said and "all layers x 6" in said) == joined
    (line,) = [line for line in said.splitlines() if "probes.place(" in line]
    assert ".weight" not in said and ".weight[l, k]" in str(load_probes(folder))
    assert eval(line.split("l, k = ")[1], {"probes": probes}) == (0 if joined else 2, 2)


def test_texts_of_these_tests_are_long_enough(tokenizer) -> None:
    """Negative control: of what is read in chunks of 7 tokens there are several."""
    from builders import make_record

    assert len(tokenize(make_record("", TEXT), tokenizer, [], TextOptions("")).ids) > 21
