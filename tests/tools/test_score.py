"""Scoring texts: what a pass by hand gives, what the run itself gave, and characters that come out as they went in."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from builders import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from streamprobe import cli, load_probes, tap
from streamprobe.data.formats import FORMATS, read_row
from streamprobe.data.records import FormatOptions
from streamprobe.data.tokenize import TextOptions
from streamprobe.errors import InputError
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.tokenizer import with_white_space
from streamprobe.probes.linear import ProbeBank
from streamprobe.run import ending
from streamprobe.tools.score import encode, pieces, score, score_encoded

SAME = 1e-6 + 5e-6 / 4  # of a probability: a run puts its test logits on a grid, which moves them by 5e-6 at most
TEXTS = ["wait no .", "okay so puzzle asks given find question begin", "hmm but wrong again rather mistake 😀 你好\n\n"]


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.no_grad()
def by_hand(model, bank, ids):
    """Probabilities [T, L, K] at all tokens of a text, alone."""
    blocks = decoder_layers(model)
    with tap({layer: blocks[layer] for layer in bank.layers}) as taken:
        model(torch.tensor([ids]))
        return bank.probabilities(torch.stack([taken[layer][0] for layer in bank.layers], dim=1))


def test_texts_are_scored_as_by_hand_in_their_order(model, tokenizer, bank):
    scored = bank.score(model, tokenizer, TEXTS, max_batch_tokens=40)
    for text, own in zip(TEXTS, scored, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert own.ids.tolist() == ids[1:] and own.probabilities.shape == (len(ids) - 1, 3, 6)
        expected = by_hand(model, bank, ids)[1:]
        torch.testing.assert_close(own.probabilities, expected, atol=1e-6, rtol=0)
        assert (own.probabilities - by_hand(model, bank, ids[1:])).abs().max() > 1e-3  # negative control: no BOS
        assert (own.probabilities.roll(1, 1) - expected).abs().max() > 1e-3  # and another layer
        alone = score(bank, model, tokenizer, text)
        torch.testing.assert_close(alone.probabilities, own.probabilities, atol=1e-6, rtol=0)
        assert alone.tokens == own.tokens and "".join(own.tokens) == text


def test_a_model_that_is_cut_off_gives_the_same(model, model_dir, tokenizer, bank):
    cut = load_backbone(model_dir, bank.layers, "float32")
    assert len(decoder_layers(cut)) == 3
    for a, b in zip(score(bank, cut, tokenizer, TEXTS), score(bank, model, tokenizer, TEXTS), strict=True):
        assert torch.equal(a.probabilities, b.probabilities)


def test_a_long_text_goes_through_in_chunks(model, tokenizer, bank):
    text = " ".join(TEXTS[:2] * 9)
    whole, chunked = (score(bank, model, tokenizer, text, max_batch_tokens=most) for most in (8192, 16))
    torch.testing.assert_close(whole.probabilities, chunked.probabilities, atol=1e-5, rtol=0)


def test_pairs_have_the_prompt_of_the_run_or_another(model, tokenizer, run_folder):
    probes, (problem, response) = load_probes(run_folder), ("Puzzle 3: which box?", TEXTS[1])
    found = {}
    for prompt, head in ((None, f"{problem}\n\n"), ("Q: {problem} A: ", f"Q: {problem} A: "), ("", "")):
        encoded = tokenizer(head + response, return_offsets_mapping=True)
        at = [t for t, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(head)]
        own = probes.score(model, tokenizer, (problem, response), prompt=prompt)
        expected = by_hand(model, probes, encoded["input_ids"])[at]
        torch.testing.assert_close(own.probabilities, expected, atol=1e-6, rtol=0)
        assert [response[a:b] for a, b in own.offsets.tolist()] == own.tokens
        found[prompt] = own.probabilities
    assert (found[None] - found[""]).abs().max() > 1e-3  # negative control: without the prompt


def test_the_problem_is_scored_too_where_the_run_sampled_it(model, tokenizer, run_folder):
    probes = load_probes(run_folder)
    few = probes.score(model, tokenizer, ("a box", "so ."))
    probes.about = {"config": {"support": "all", "prompt": "{problem}\n\n"}}
    every = probes.score(model, tokenizer, ("a box", "so ."))
    assert "".join(every.tokens) == "a box\n\nso ." and every.offsets[0, 0] == -7
    assert torch.equal(every.probabilities[every.offsets[:, 0] >= 0], few.probabilities)


def test_probes_know_whether_their_texts_begin_with_bos(model, tokenizer, run_folder):
    probes = load_probes(run_folder)
    probes.about = {"config": {"bos": False}}
    own = probes.score(model, tokenizer, TEXTS[0])
    expected = by_hand(model, probes, tokenizer(TEXTS[0])["input_ids"][1:])
    torch.testing.assert_close(own.probabilities, expected, atol=1e-6, rtol=0)


# --- what the run itself gave ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, chains_file):
    """The folder of a run, and the logits that it judged itself by: those of its test tokens."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    keys = {"model": model_dir, "data": str(chains_file), "dtype": "float32", "layers": [0, 2], "lags": [-2, 0, 4]}
    keys |= {
        "targets": ["token", "onset"],
        "max_passes": 2,
        "max_batch_tokens": 512,
        "bootstrap": 0,
        "controls": ["embed"],
    }
    config = folder.parent / "tiny.yaml"
    config.write_text(yaml.safe_dump(keys))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        judge = ending.judge_held_out

        def watched(setup, *rest, **more):
            seen.append((setup, judge(setup, *rest, **more)))
            return seen[-1][1]

        patch.setattr(ending, "judge_held_out", watched)
        assert cli.train([str(config), "--output_dir", str(folder)]) == 0
    ((setup, results),) = seen
    return folder, setup, results.probes[0]


def differences(finished, given):
    """How far scores [T, L, K] of each test chain, by its row in the data, are from what the run judged itself by."""
    _, setup, own = finished
    far = []
    for number, chain in enumerate(setup.inputs.dataset.splits["test"]):
        here = own.scored.chain == number
        rank = {t: i for i, t in enumerate(chain.support.nonzero()[:, 0].tolist())}
        at = [rank[t] for t in own.scored.token[here].tolist()]
        expected = own.scored.scores[here][:, : len(own.sites), : given[chain.row].shape[2]].sigmoid()
        assert len(given[chain.row]) == len(rank) >= len(at) > 10
        far.append((given[chain.row][at] - expected).abs().max().item())
    return far


def rows_of(finished):
    return [
        (row["problem"], row["reasoning_chain"]) for row in json.loads(Path(finished[1].config.data.data).read_text())
    ]


def test_scores_are_those_of_the_run_itself(finished, model, tokenizer, tmp_path):
    folder, *_ = finished
    probes, pairs = load_probes(folder), rows_of(finished)
    given = [text.probabilities for text in probes.score(model, tokenizer, pairs)]
    assert max(differences(finished, given)) < SAME
    bare = [text.probabilities for text in probes.score(model, tokenizer, [response for _, response in pairs])]
    assert min(differences(finished, bare)) > 1e-3  # negative control: without the prompt
    assert min(differences(finished, [each.flip(1) for each in given])) > 1e-3  # and with the other layer's probes


def test_the_command_gives_the_scores_of_the_run_itself(finished, tmp_path, monkeypatch):
    from pyarrow.parquet import read_table

    monkeypatch.chdir(tmp_path)
    folder, setup, _ = finished
    data = setup.config.data.data
    assert cli.main(["score", str(folder), data, "--out", "s.parquet", "--probes", "all"]) == 0
    table, probes = read_table("s.parquet"), load_probes(folder)
    names = [name for name in table.column_names if "/" in name]
    values = torch.tensor([table[name].to_pylist() for name in names]).T.unflatten(1, probes.bias.shape)
    rows = torch.tensor(table["row"].to_pylist())
    given = [values[rows == row] for row in range(60)]
    assert max(differences(finished, given)) < SAME
    assert min(differences(finished, [each.flip(2) for each in given])) > 1e-3  # negative control: other lags
    for row, (_, response) in enumerate(rows_of(finished)):
        assert "".join(table["token"].filter((rows == row).numpy()).to_pylist()) == response


# --- characters ---


def unigram(byte_fallback=True):
    """A tokenizer of SentencePiece's kind: ▁ for a space, one in front, bytes for letters that it does not know."""
    words = ["▁", "▁wait", "▁no", "▁so", ".", "n", "o", "é", "你"]
    scored = [("<unk>", 0.0), ("<s>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256)), *((w, -1.0) for w in words)]
    core = Tokenizer(models.Unigram(scored, 0, byte_fallback=byte_fallback))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def trimming():
    """A byte-level tokenizer that leaves white space out of its offsets, as those of GPT-2's kind may."""
    own = make_tokenizer(bos=False)
    own.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return own


HARD = ["wait 😀 no 你好é .", "👩‍👩‍👧 so\n\n  wait", "no", "e\u0301 wait. ", "안녕 so 🇩🇪."]


@pytest.mark.parametrize("make", [make_tokenizer, unigram, trimming], ids=["byte level", "unigram", "trimming"])
def test_offsets_and_tokens_give_the_text_back(make):
    tokenizer = with_white_space(make())
    several = 0
    for text in HARD:
        own = encode(read(text), tokenizer, TextOptions(prompt="Q {problem} "), 512)
        places = own.offsets.tolist()
        several += len(places) - len({tuple(place) for place in places})
        assert "".join(own.tokens) == text
        covered = {i for start, end in places for i in range(start, end)}
        assert covered == set(range(len(text)))
        assert places == sorted(places) and own.ids.tolist() == own.chain.ids[own.chain.support].tolist()
    assert several  # characters of several tokens were among them


def read(text):
    row = {"task_id": "a_1", "problem": "p", "reasoning_chain": text, "annotated_chain": text}
    return read_row(row, 0, FORMATS["annotated"], FormatOptions())


def test_a_tokenizer_that_trims_is_not_changed(model, bank):
    tokenizer = trimming()
    before = tokenizer.backend_tokenizer.to_str()
    own = score(bank, model, tokenizer, "wait  \n\n  no")
    assert "".join(own.tokens) == "wait  \n\n  no" and tokenizer.backend_tokenizer.to_str() == before
    trimmed = encode(read("wait  \n\n  no"), tokenizer, TextOptions(prompt=""), 512)
    assert "".join(trimmed.tokens) != "wait  \n\n  no"  # negative control


def test_a_character_of_several_tokens_stands_at_the_last():
    assert pieces("a你好b", [(0, 1), (1, 2), (1, 3), (2, 3), (3, 4)]) == ["a", "", "你", "好", "b"]
    assert pieces("a 😀", [(0, 1), (2, 3), (2, 3), (2, 3)]) == ["a", "", "", "😀"]
    assert pieces("head so", [(5, 7)]) == ["so"]


# --- what is wrong ---


@pytest.mark.parametrize(
    "texts, said",
    [
        ([TEXTS[0], " \n"], "text 1, one without any text"),
        ("a\ud800", "text 0, one with text that is not Unicode"),
        ("wait " * 600, "text 0, one longer than the model's context of 512 tokens"),
        ("</s>", "text 0, one without a token that is scored"),
        ([5], "a text of type int"),
        (("a", "b", "c"), "a text of type tuple"),
        (("a", ""), "text 0, one without any text"),
    ],
)
def test_a_text_that_cannot_be_scored_is_named(model, tokenizer, bank, texts, said):
    with pytest.raises(InputError, match=said):
        score(bank, model, tokenizer, texts)


def test_no_text_is_no_error(model, tokenizer, bank):
    assert score(bank, model, tokenizer, []) == []


def test_another_model_or_tokenizer_is_refused(model, model_dir, tokenizer, bank):
    narrow = ProbeBank(bank.sites, bank.columns, bank.weight[..., :8], bank.bias)
    with pytest.raises(InputError, match="a model of hidden size 32; expected 8"):
        score(narrow, model, tokenizer, TEXTS)
    with pytest.raises(InputError, match="a model of 1 decoder blocks; expected more than 2"):
        score(bank, load_backbone(model_dir, [0], "float32"), tokenizer, TEXTS)
    with pytest.raises(InputError, match="which the model's vocabulary of 400 has not"):
        larger = unigram()
        larger.add_tokens([f"extra{i}" for i in range(200)])
        score(bank, model, larger, "extra199")


def test_activations_that_are_no_numbers_are_nan(model, tokenizer, bank):
    record = read(TEXTS[0])
    good = encode(record, tokenizer, TextOptions(), 512)
    with torch.no_grad():
        kept = model.model.embed_tokens.weight[good.ids[0]].clone()
        model.model.embed_tokens.weight[good.ids[0]] = torch.inf
        (bad,) = score_encoded([good], model, bank, 512)
        model.model.embed_tokens.weight[good.ids[0]] = kept
    assert bad.probabilities.isnan().any()
    assert score_encoded([good], model, bank, 512)[0].probabilities.isfinite().all()  # negative control
