"""A model that writes its own chains: what it writes, how it is labelled, and where its stream goes on."""

import csv
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_tokenizer, write_rows
from on_ranks import on_ranks

from streamprobe import cli
from streamprobe.activations.stream import stream
from streamprobe.config.load import load_config
from streamprobe.data.annotations import annotate
from streamprobe.data.label_rules import apply_rules, parse_rule
from streamprobe.data.records import Record, Refused
from streamprobe.data.tokenize import tokenize
from streamprobe.demo import CHAINS
from streamprobe.errors import InputError
from streamprobe.lags import make_columns
from streamprobe.model.backbone import load_backbone
from streamprobe.model.blocks import decoder_layers
from streamprobe.model.hooks import read, tap
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.probes.storage import load_probes
from streamprobe.run.generated import open_generated, open_steering, read_problems
from streamprobe.run.opened import chains_of_run
from streamprobe.tools.answers import Answers

RETURNS = r"backtracking=sentence:drop \d+|is wrong|back to"  # what the demo's returns say behind their first words
STEERED = ["--steer_layer", "1", "--steer"]
WRITES = ["--source", "generate", "--dtype", "float32", "--label_rules", RETURNS]


class Opened:
    """A model with its tokenizer, and ways to let it write."""

    def __init__(self, *argv: str):
        self.argv = argv
        config = load_config(argv)
        self.tokenizer = load_tokenizer(config.model.model, **config.model.source)
        self.model: Any = load_backbone(config.model.model, None, **config.model.loading)

    def answers(self, *more: str, **options: Any) -> Answers:
        """The stream of a config with more keys."""
        problems, config = read_problems(load_config([*self.argv, *more]), self.tokenizer)
        return open_generated(config, problems, self.tokenizer, self.model, **options)


@pytest.fixture(scope="module")
def demo() -> Opened:
    """The demo's model and 20 of its problems."""
    return Opened("demo", *WRITES, "--max_chains", "20", "--generate_batch", "8")


@pytest.fixture(scope="module")
def tiny(model_dir, chains_file) -> Opened:
    """A tiny model without any knowledge, which writes bytes as they come."""
    argv = ["--model", model_dir, "--data", str(chains_file), "--layers", "1", *WRITES, "--max_chains", "7"]
    return Opened(*argv, "--generate_batch", "3", "--max_new_tokens", "12")


def traits(records: Sequence[Record | Refused]) -> list[Any]:
    """What tells records apart."""
    return [(r.id, r.row, r.written and r.written.ids) if isinstance(r, Record) else (r.id, r.row, r.reason) for r in records]  # fmt: skip


# --- what is written


def test_a_model_that_knows_the_task_writes_it_and_rules_label_it_as_its_author_would(demo):
    records = list(demo.answers("--temperature", "0"))
    rows = json.loads(CHAINS.read_text())
    by_id = {row["task_id"]: row for row in rows}
    assert len(records) == 20 and [record.row for record in records] == list(range(20))
    right = 0
    for record in records:
        name, number = record.id.split("/")
        row = by_id[name]
        assert (record.problem, record.category, number) == (row["problem"], "subset-sum", "0")
        if record.response.strip() == row["reasoning_chain"]:
            right += 1
            own = [s for s in sections_of(row) if s[0] == "backtracking"]
            shift = len(record.response) - len(row["reasoning_chain"])
            assert [(s.label, s.start - shift, s.end - shift) for s in record.sections] == own
    assert right >= 18  # it solves nearly all of them


def sections_of(row: dict[str, str]) -> list[tuple[str, int, int]]:
    """The sections that the author of a row gave it."""
    return [tuple(section) for section in annotate(row["annotated_chain"], row["reasoning_chain"]).sections]


def test_its_chain_is_that_of_the_same_text_read_afterwards(demo):
    for record in demo.answers():
        plain = replace(record, written=None)
        chain, read_later = (tokenize(each, demo.tokenizer, ["backtracking"]) for each in (record, plain))
        for name in ("ids", "codes", "support", "sentence_end"):
            assert torch.equal(getattr(chain, name), getattr(read_later, name))
        assert chain.start == read_later.start


def test_bytes_that_are_no_letters_are_written_as_the_tokenizer_decodes_them(tiny):
    records = [record for record in tiny.answers() if isinstance(record, Record)]
    assert any("\ufffd" in record.response for record in records)
    special = set(tiny.tokenizer.all_special_ids)
    others = 0
    for record in records:
        ids = [id for id in record.written.ids if id not in special]
        assert record.response == tiny.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        chain = tokenize(record, tiny.tokenizer, ["backtracking"])
        own = chain.ids[-len(record.written.ids) :]
        assert own.tolist() == list(record.written.ids)  # whatever its tokenizer would have made of the text
        others += len(tokenize(replace(record, written=None), tiny.tokenizer, ["backtracking"]).ids) != len(chain.ids)
        assert not chain.support[torch.isin(chain.ids, torch.tensor(sorted(special)))].any()
        whole = tiny.tokenizer(record.written.head)["input_ids"]
        assert chain.ids[: len(whole)].tolist() == whole and not chain.support[: len(whole)].any()
    assert others  # negative control: the text alone does not say which tokens were written


def test_answers_are_drawn_from_the_seed_the_trip_and_the_batch_alone(tiny):
    first = traits(list(tiny.answers("--responses", "2")))
    torch.rand(7)
    assert traits(list(tiny.answers("--responses", "2"))) == first and len(first) == 14
    assert [name for name, _, _ in first[:3]] == ["alpha_0/0", "alpha_0/1", "beta_2/0"]
    other = traits(list(tiny.answers("--responses", "2", "--generate_seed", "1")))
    assert all(a != b for a, b in zip(first, other, strict=True))
    later = tiny.answers("--responses", "2")
    later.load(later.state() | {"batch": 2, "given": 6})  # without writing what comes before
    assert traits(list(later)) == first[6:]
    with_random = torch.random.get_rng_state()
    list(tiny.answers())
    assert torch.equal(torch.random.get_rng_state(), with_random)


def test_answers_are_not_the_same_without_a_seed(tiny, monkeypatch):
    monkeypatch.setattr("streamprobe.run.generated.seeded", lambda _: nullcontext())
    assert traits(list(tiny.answers())) != traits(list(tiny.answers()))


def test_with_max_tokens_it_goes_over_the_problems_again_with_other_answers(tiny):
    stream = tiny.answers("--max_tokens", "1000")
    records = [record for _, record in zip(range(25), stream, strict=False)]
    first, second = records[:7], records[7:14]
    assert [r.problem for r in first] == [r.problem for r in second]
    assert all(a.written.ids != b.written.ids for a, b in zip(first, second, strict=True))
    assert len({r.id for r in records}) == 25 and records[7].id == "alpha_0/1"
    assert stream.state()["trip"] == 3


# --- where it stands


def test_a_stream_goes_on_where_another_stood(tiny):
    whole = [record for _, record in zip(range(30), tiny.answers("--max_tokens", "9"), strict=False)]
    for step in (1, 2, 3, 5, 8):
        stream, found = tiny.answers("--max_tokens", "9"), []
        while len(found) < 30:
            found += [record for _, record in zip(range(step), iter(stream), strict=False)]
            state = json.loads(json.dumps(stream.state()))
            stream = tiny.answers("--max_tokens", "9")
            stream.load(state)
        assert traits(found[:30]) == traits(whole)


def test_it_does_not_go_on_with_other_problems(tiny):
    state = tiny.answers().state()
    with pytest.raises(InputError, match="other problems"):
        tiny.answers("--max_chains", "6").load(state)
    with pytest.raises(InputError, match="other problems"):
        tiny.answers("--prompt", "{problem} Well.").load(state)


def test_it_is_stopped_between_two_tokens_and_gives_no_half_answer(tiny):
    asked = [0]

    def stopped() -> bool:
        asked[0] += 1
        return asked[0] > 20

    stream = tiny.answers(stopped=stopped)
    found, whole = list(stream), list(tiny.answers())
    assert 0 < len(found) < len(whole) and traits(found) == traits(whole[: len(found)])
    later = tiny.answers()
    later.load(stream.state())
    assert traits(found + list(later)) == traits(whole)


def test_every_rank_gets_every_record_whatever_their_number(tiny, tmp_path):
    alone = traits(list(tiny.answers("--responses", "2")))

    def work() -> Any:
        first = tiny.answers("--responses", "2")
        begun = [record for _, record in zip(range(4), first, strict=False)]
        later = tiny.answers("--responses", "2")
        later.load(first.state())
        return traits(begun), traits(list(later)), first.state()

    found = on_ranks(work, 2, tmp_path / "ranks")
    for begun, rest, _ in found:
        assert begun + rest == alone
    later = tiny.answers("--responses", "2")
    later.load(found[0][2])  # one rank goes on where two stood
    assert traits(list(later)) == alone[4:]


# --- problems


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet", "p.jsonl.gz"])
@pytest.mark.parametrize("column", ["problem", "question", "prompt", "riddle"])
def test_rows_need_hold_nothing_but_a_problem(tiny, tmp_path, name, column):
    path = write_rows(tmp_path / name, [{column: f"which {word}?"} for word in ("box", "door")])
    problems, config = read_problems(load_config([*tiny.argv, "--data", path]), tiny.tokenizer)
    assert [(each.id, each.text) for each in problems.found] == [("#1", "which box?"), ("#2", "which door?")]
    assert (config.data.problem_column, config.data.id_column) == (column, None)


def test_turns_of_a_chat_are_problems_too(tiny, tmp_path, monkeypatch):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    monkeypatch.setattr(tiny, "tokenizer", make_tokenizer(chat_template=template))
    turns = [{"role": "system", "content": "be short"}, {"role": "user", "content": "why?"}]
    again = [*turns, {"role": "assistant", "content": "so"}, {"role": "user", "content": "no"}]
    rows = [{"messages": each} for each in (turns, [*turns, {"role": "assistant", "content": "old"}], again, turns[:1])]
    path = write_rows(tmp_path / "p.jsonl", rows)
    problems, config = read_problems(load_config([*tiny.argv, "--data", path]), tiny.tokenizer)
    assert config.data.prompt == "chat" and problems.is_chat
    refused, *records = open_generated(config, problems, tiny.tokenizer, tiny.model)
    assert refused == Refused("without a turn of the user", turns[:1], "#4", "", 0)
    heads = [record.written.head for record in records]
    assert heads[0] == heads[1] == "[system] be short\n[user] why?\n[assistant] "
    assert heads[2] == "[system] be short\n[user] why?\n[assistant] so\n[user] no\n[assistant] "
    assert [record.problem for record in records] == ["why?", "why?", "why?\n\nso\n\nno"]
    chain = tokenize(records[2], tiny.tokenizer, ["backtracking"])
    assert chain.support.sum() == sum(end > start for start, end in records[2].written.spans)


def test_problems_that_cannot_be_asked_are_refused_by_name_once(tiny, tmp_path):
    rows = [{"id": "a", "problem": "why?"}, {"id": "b", "problem": None}, {"id": "c", "problem": "why " * 600}]
    path = write_rows(tmp_path / "p.jsonl", rows)
    stream = tiny.answers("--data", path, "--max_tokens", "100")
    found = [record for _, record in zip(range(6), stream, strict=False)]
    assert [(r.id, r.row) for r in found] == [("b", 0), ("c", 1), *((f"a/{n}", n + 2) for n in range(4))]
    assert found[0].reason == "without a problem" and "more than 500 tokens" in found[1].reason
    only = write_rows(tmp_path / "q.jsonl", rows[1:])
    with pytest.raises(InputError, match=r"no problem that can be answered \(with a prompt .* without a problem"):
        tiny.answers("--data", only)


def test_answers_without_text_are_refused_and_a_model_that_writes_none_is_named(tiny, monkeypatch):
    monkeypatch.setattr("streamprobe.run.generated.write", lambda _m, _t, prompts, **_: [[] for _ in prompts])
    stream = iter(tiny.answers("--max_tokens", "100"))
    found = [next(stream) for _ in range(7)]
    assert {record.reason for record in found} == {"with an empty response"} and found[0].id == "alpha_0/0"
    with pytest.raises(InputError, match="a model that answers none of 7 problems with text"):
        next(stream)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["--source", "generate"], "source generate without label_rules"),
        (
            [*WRITES, "--labels", "hope"],
            "labels hope with source generate; expected of backtracking, which label_rules",
        ),
        ([*WRITES, "--tp_size", "2"], "tp_size 2 with source generate"),
        ([*WRITES, "--temperature", "-1"], "temperature -1"),
        ([*WRITES, "--top_p", "0"], "top_p 0"),
        ([*WRITES, "--steer", "x", "--steer_strength", "much"], "steer_strength much; expected ablate, or a number"),
        ([*WRITES, "--steer", "x", "--steer_strength", "nan"], "steer_strength nan"),
        ([*WRITES, "--steer_layer", "2"], "steer_layer 2 without steer"),
        (["--steer", "x"], "steer with chains that the model does not write"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_a_line(keys, said, capsys):
    assert cli.main(["train", "demo", *keys]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_data_without_problems_are_refused(tiny, tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"id": 1, "answer_key": 3, "score": 2}])
    with pytest.raises(InputError, match="a column with a problem to answer"):
        tiny.answers("--data", path)
    with pytest.raises(InputError, match="without the column 'riddle'"):
        tiny.answers("--data", path, "--problem_column", "riddle")


# --- a model that is steered while it writes


def activations(tiny: Opened, ids: Sequence[int], layer: int) -> torch.Tensor:
    """What block `layer` gives when it reads these tokens: [T, D]."""
    block = decoder_layers(tiny.model)[layer]
    with tap({layer: block}) as taken:
        read(tiny.model, torch.tensor([list(ids)]), last=block)
        return taken[layer][0].clone()


@pytest.mark.parametrize("strength", ["ablate", "40", "-40"])
def test_the_model_is_steered_while_it_writes_and_only_then(tiny, run_folder, strength, capsys):
    steering = ["--steer", str(run_folder), "--steer_layer", "1"]
    plain = list(tiny.answers("--max_new_tokens", "40"))
    before = activations(tiny, range(5, 25), 2)
    seen: list[torch.Tensor] = []
    block = decoder_layers(tiny.model)[1]
    handle = block.register_forward_hook(lambda _m, _i, out: seen.append(out[:, -1].clone()))
    try:
        steered = list(tiny.answers("--max_new_tokens", "40", *steering, "--steer_strength", strength))
    finally:
        handle.remove()
    assert "steer     layer 1, along backtracking/" in capsys.readouterr().out
    assert traits(steered) != traits(plain)
    assert torch.equal(activations(tiny, range(5, 25), 2), before)
    probes = load_probes(run_folder)
    directions = torch.nn.functional.normalize(probes.weight[1], dim=1)  # [K, D], of which one is taken out
    if strength == "ablate":
        seen = seen[-30:]  # behind those with which directions and widths were seen
        along = (torch.cat(seen) @ directions.T).abs().amax(0)
        assert along.min() < 1e-4 < along.median()
    assert not block._forward_hooks


def test_an_ablated_direction_would_be_there_without_steering(tiny, run_folder):
    seen: list[torch.Tensor] = []
    block = decoder_layers(tiny.model)[1]
    handle = block.register_forward_hook(lambda _m, _i, out: seen.append(out[:, -1].clone()))
    list(tiny.answers())
    handle.remove()
    directions = torch.nn.functional.normalize(load_probes(run_folder).weight[1], dim=1)
    assert (torch.cat(seen) @ directions.T).abs().amax(0).min() > 0.1


def test_what_cannot_steer_the_model_is_refused_in_a_line(tiny, demo, run_folder, tmp_path):
    def refused(opened: Opened, *keys: str) -> str:
        with pytest.raises(InputError) as caught:
            opened.answers(*keys)
        assert "\n" not in str(caught.value) and "fix: correct --steer or --steer_layer" in str(caught.value)
        return str(caught.value)

    assert "which is no folder" in refused(tiny, "--steer", str(tmp_path / "none"))
    assert "layer 3" in refused(tiny, "--steer", str(run_folder), "--steer_layer", "3")
    assert "probes of 32 features and a model of hidden size 128" in refused(demo, "--steer", str(run_folder))


def test_a_number_needs_chains_that_are_kept(tiny, run_folder, tmp_path):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "streaming: true\n")
    tiny.answers("--steer", str(folder))
    with pytest.raises(InputError, match="chains without an end, which are not kept to measure by"):
        tiny.answers("--steer", str(folder), "--steer_strength", "2")


# --- what probes learn from it


def test_probes_of_what_the_demo_writes_are_those_of_its_written_traces(tmp_path, monkeypatch, undrawn):
    """AUROCs agree within their intervals; as a negative control, those of other labels do not."""
    opened = Opened("demo", *WRITES, "--max_chains", "160", "--generate_batch", "80", "--max_new_tokens", "110")
    records = [record for record in opened.answers() if isinstance(record, Record)]
    keys = "--layers 2 --lags 0 8 --targets token onset --controls none --report_to none --bootstrap 100".split()

    def train(name: str, given: list[Any] | None = None) -> list[dict[str, Any]]:
        if given:
            numbered = [replace(record, row=row) for row, record in enumerate(given)]
            monkeypatch.setattr("streamprobe.run.inputs.read_records", lambda _: numbered)
        folder = tmp_path / name
        assert cli.main(["train", "demo", "--max_chains", "160", *keys, "--output_dir", str(folder)]) == 0
        rows = list(csv.DictReader((folder / "results.csv").open()))
        return [{k: float(row[k]) for k in ("auroc", "auroc_low", "auroc_high")} for row in rows]

    def agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a["auroc_low"] <= b["auroc_high"] and b["auroc_low"] <= a["auroc_high"]

    traces, own = train("traces"), train("own", records)
    assert len(traces) == 4 and all(map(agree, traces, own))
    assert max(abs(a["auroc"] - b["auroc"]) for a, b in zip(traces, own, strict=True)) < 0.04
    skips = [apply_rules(record, [parse_rule("backtracking=sentence:too big")]) for record in records]
    assert not all(map(agree, traces, train("others", skips)))


def test_a_number_adds_so_many_standard_deviations_of_the_runs_training_tokens(tiny, run_folder):
    """The deviation is that of a plain loop over the chains of the run, one by one."""
    chains = chains_of_run(load_config([str(run_folder / "config.yaml")])).splits["train"]
    _, config = read_problems(load_config([*tiny.argv, *STEERED, str(run_folder)]), tiny.tokenizer)

    def added(strength: str) -> torch.Tensor:
        how = replace(config.generation, steer_strength=strength)
        return open_steering(replace(config, generation=how), tiny.tokenizer, tiny.model).add

    two, less = added("2"), added("-1")
    torch.testing.assert_close(two, -2 * less)
    unit = torch.nn.functional.normalize(two, dim=0)
    numbers = [
        (activations(tiny, chain.ids.tolist(), 1)[chain.support & (chain.codes[:, 0] >= 0)] @ unit) for chain in chains
    ]
    assert two.norm() == pytest.approx(2 * torch.cat(numbers).double().std(unbiased=False).item(), rel=0.05)


def test_a_whole_model_that_reads_gives_what_one_that_is_cut_off_gives(tiny):
    """So that one copy of the weights can write and be read, also while hooks are on it."""
    c = load_config(tiny.argv).model
    cut: Any = load_backbone(c.model, [1], **c.loading)
    chains = [tokenize(record, tiny.tokenizer, ["backtracking"]) for record in tiny.answers()]
    columns = make_columns(["backtracking"], ["token"], [0])
    read_by = [list(stream(chains, model, [0, 1], columns, labels=["backtracking"])) for model in (tiny.model, cut)]
    for a, b in zip(*read_by, strict=True):
        assert torch.equal(a.acts, b.acts) and len(a.acts) > 20
    batches = stream(chains, tiny.model, [0, 1], columns, labels=["backtracking"], max_batch_tokens=1)
    plain = list(stream(chains, tiny.model, [0, 1], columns, labels=["backtracking"], max_batch_tokens=1))
    between = [(batch.acts, list(tiny.answers("--max_chains", "2")))[0] for batch in batches]
    assert all(torch.equal(a, b.acts) for a, b in zip(between, plain, strict=True))
