"""Data of every format go from a file to results, and what is wrong with them ends in one line."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import inputs_of, make_rows, make_tokenizer

from streamprobe.cli import train as main
from streamprobe.data.annotations import annotate
from streamprobe.lags import INSIDE

pytestmark = pytest.mark.usefixtures("undrawn")
KEYS = ["--layers", "0", "2", "--lags", "0", "4", "--bootstrap", "20", "--max_passes", "2", "--dtype", "float32"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def in_formats() -> dict[str, list[dict[str, Any]]]:
    """The same made-up chains in several formats."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("annotated", "spans", "messages", "pooled", "text")}
    for number, row in enumerate(make_rows(60, seed=7)):
        text, problem = row["reasoning_chain"], row["problem"]
        own = [section._asdict() for section in annotate(row["annotated_chain"], text).sections]
        rows["annotated"].append(row)
        rows["spans"].append({"id": row["task_id"], "question": problem, "response": text, "spans": own})
        first = [{"role": "user", "content": problem}, {"role": "assistant", "content": "<think>then</think>so"}]
        second = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": text, "spans": own}]
        rows["messages"].append({"id": row["task_id"], "messages": first + second})
        lie = {"question": problem, "answer": text + " lie" * (number % 2) * 5, "deceptive": bool(number % 2)}
        rows["pooled"].append(lie)
        rows["text"].append({"question": problem, "answer": f"<think>{text}</think>so four. wait no."})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_dir) -> Path:
    """A file of each format, and a model with a chat template."""
    made = tmp_path_factory.mktemp("own")
    for name, rows in in_formats().items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copytree(model_dir, made / "chat")
    make_tokenizer(chat_template=TEMPLATE).save_pretrained(made / "chat")
    return made


def trained(folder: Path, name: str, *keys: str, model: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The results and the config of a run on the data of a format."""
    run = folder / f"run-{name}-{len(keys)}"
    argv = ["--model", model, "--data", str(folder / f"{name}.jsonl"), "--output_dir", str(run), *KEYS, *keys]
    assert main(argv) == 0
    return list(csv.DictReader((run / "results.csv").open())), yaml.safe_load((run / "config.yaml").read_text())


def test_spans_give_the_results_of_the_annotated_copy(folder, model_dir):
    spans, config = trained(folder, "spans", model=model_dir)
    copies, _ = trained(folder, "annotated", "--unlabelled", "negative", model=model_dir)
    assert spans == copies and len(spans) > 10
    assert (config["format"], config["response_column"], config["id_column"]) == ("spans", "response", "id")
    other, _ = trained(folder, "spans", "--labels", "deduction", model=model_dir)
    assert other != copies  # as another label has others


def test_a_chat_is_trained_and_resumed(folder, capsys):
    model, run = str(folder / "chat"), folder / "resumed"
    _, config = trained(folder, "messages", model=model)
    assert "is not used" not in capsys.readouterr().out
    prompt = ["--model", model, "--data", str(folder / "messages.jsonl"), *KEYS, "--prompt", "Q: {problem}"]
    assert inputs_of(prompt) and "'Q: {problem}' is not used" in capsys.readouterr().out
    assert (config["format"], config["prompt"]) == ("messages", "chat")
    argv = ["--model", model, "--data", str(folder / "messages.jsonl"), "--output_dir", str(run), *KEYS]
    assert main([*argv, "--max_passes", "1"]) == 0 and main([*argv, "--resume"]) == 0
    assert (run / "results.csv").read_bytes() == (folder / "run-messages-0" / "results.csv").read_bytes()
    assert main([*argv, "--resume", "--support", "last_assistant"]) == 2
    assert "--resume with support last_assistant; expected assistant" in capsys.readouterr().err


def test_one_label_a_text_gives_rows_of_texts_and_leaves_out_controls_that_know_it(folder, model_dir, capsys):
    rows, _ = trained(folder, "pooled", "--labels", "deceptive", model=model_dir)
    assert {row["control"] for row in rows} == {"", "embed", "text", "position"}
    assert "persistence, permuted, joint, joint+chain left out" in capsys.readouterr().out
    texts = list(csv.DictReader((folder / "run-pooled-2" / "texts.csv").open()))
    assert {row["pooling"] for row in texts} == {"mean", "max", "last"} and float(texts[0]["auroc"]) > 0.5
    argv = ["--model", model_dir, "--data", str(folder / "pooled.jsonl"), "--labels", "deceptive", *KEYS]
    assert main([*argv, "--targets", "onset"]) == 2
    assert "targets onset with one label a text; expected token alone" in capsys.readouterr().err


def test_rules_from_a_file_and_from_the_command_line_are_the_same_and_a_region_cuts(folder, model_dir):
    config = folder / "rules.yaml"
    keys = {
        "model": model_dir,
        "data": str(folder / "text.jsonl"),
        "layers": [0],
        "labels": ["wait", "no"],
        "lags": [0],
    }
    rules = {"wait": {"pattern": "wait", "scope": "sentence"}, "no": r"\bno\b"}
    config.write_text(yaml.safe_dump(keys | {"label_rules": rules}))
    given = ["--label_rules", "wait=sentence:wait", r"no=\bno\b"]
    config_keys = [word for name, value in keys.items() if isinstance(value, str) for word in (f"--{name}", value)]
    by_file, by_hand = (
        inputs_of([str(config)]),
        inputs_of([*config_keys, "--layers", "0", "--lags", "0", "--labels", "wait", "no", *given]),
    )
    assert by_file.fingerprint == by_hand.fingerprint
    thought, answer = (inputs_of([str(config), "--region", region]).dataset for region in ("think", "answer"))
    whole = by_file.dataset
    for chain, t, a in zip(whole.splits["train"], thought.splits["train"], answer.splits["train"], strict=True):
        assert not (t.support & a.support).any() and ((t.support | a.support) <= chain.support).all()
        assert 0 < a.support.sum() < t.support.sum() and (a.codes[:, 0] >= INSIDE).sum() > 0
    assert by_file.fingerprint != inputs_of([str(config), "--region", "think"]).fingerprint


def test_text_of_a_span_that_is_nowhere_is_named(folder, model_dir, capsys):
    rows = in_formats()["spans"]
    rows[3]["spans"].append({"text": "no such words", "label": "backtracking"})
    path = folder / "missing.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = inputs_of(["--model", model_dir, "--data", str(path), *KEYS])
    assert "spans     1 not found in their text: 'no such words'" in made.preflight
    assert made.dataset.counts.lost_sections == 1


SPAN_ROW = {"text": "so wait", "spans": [{"start": 3, "end": 7, "label": "backtracking"}]}
BAD: dict[str, tuple[Any, list[str], str]] = {
    "no known column": ([{"a": 1}], [], "with the columns 'a'"),
    "no label": ([{"text": "so wait"}], [], "the nearest: it lacks"),
    "a column that is not there": ([SPAN_ROW], ["--response_column", "body"], "without the column 'body'"),
    "an unknown format": ([SPAN_ROW], ["--format", "span"], "format span; expected one of auto, annotated, spans"),
    "the wrong format": ([SPAN_ROW], ["--format", "tokens"], "those of format tokens, which lacks"),
    "a rule without a pattern": ([SPAN_ROW], ["--label_rules", "a="], "label_rules 'a='"),
    "a rule without a label": ([SPAN_ROW], ["--label_rules", "=x"], "label_rules '=x'"),
    "a rule without =": ([SPAN_ROW], ["--label_rules", "wait"], "LABEL=REGEX"),
    "a rule that is no pattern": ([SPAN_ROW], ["--label_rules", "a=("], "a regular expression of Python"),
    "a rule that never ends": (
        [{"text": "a" * 60 + "!"}] * 3,
        ["--label_rules", r"a=(a|aa)+(a|aa)+(a|aa)+$"],
        "takes more than 1 s",
    ),
    "a rule that counts too far": ([SPAN_ROW], ["--label_rules", "a=x{100000}"], "at most 10,000 repetitions"),
    "two rules for a label": ([SPAN_ROW], ["--label_rules", "a=x", "a=y"], "one rule a label"),
    "a scope that is nearly one": (
        [SPAN_ROW],
        ["--label_rules", "a=sentance:x"],
        "the scope sentence, which is the nearest",
    ),
    "a rule of 5,000 digits": ([SPAN_ROW], ["--label_rules", "a=x{" + "9" * 5000 + "}"], "repetitions"),
    "a rule of flags that do not go together": ([SPAN_ROW], ["--label_rules", "a=(?a)(?u)x"], "a regular expression"),
    "a rule where no text has its label": (
        [{"text": f"so {n}"} for n in range(20)],
        ["--label_rules", "b=x"],
        "give none",
    ),
    "one marker": ([SPAN_ROW], ["--region", "think", "--region_markers", "<t>"], "two texts that differ"),
    "equal markers": ([SPAN_ROW], ["--region", "think", "--region_markers", "x", "x"], "two texts that differ"),
    "markers without a region": ([SPAN_ROW], ["--region_markers", "x", "y"], "region think or answer"),
    "an unknown region": ([SPAN_ROW], ["--region", "middle"], "region"),
    "no token in the region": ([SPAN_ROW] * 20, ["--region", "think"], "without a token in the region think"),
    "an unknown support": ([SPAN_ROW], ["--support", "user"], "support"),
    "spans outside of all texts": ([SPAN_ROW | {"text": "so"}] * 9, [], "9 with a span outside of its text"),
    "a chat without a template": (
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "label": "a"}]}] * 9,
        [],
        "has no chat template",
    ),
    "a label that never occurs": (
        [SPAN_ROW | {"text": f"so wait {n}"} for n in range(20)],
        ["--labels", "joy"],
        "label 'joy', which never occurs",
    ),
    "one label for all texts": (
        [{"text": f"so {n}", "label": "backtracking"} for n in range(20)],
        [],
        "tokens of both classes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_one_line(name, tmp_path, model_dir, capsys):
    rows, keys, message = BAD[name]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    assert main(["--model", model_dir, "--data", str(path), *KEYS, "--output_dir", str(tmp_path / "run"), *keys]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "; expected " in error and "; fix: " in error, error
    assert not (tmp_path / "run").exists()


def test_good_data_fail_without_a_mistake(tmp_path, model_dir):
    """The rows of these tests are right but for the mistake."""
    rows = [SPAN_ROW | {"text": f"so wait {n} then", "id": f"a_{n}"} for n in range(30)]
    (tmp_path / "good.json").write_text(json.dumps(rows))
    assert inputs_of(["--model", model_dir, "--data", str(tmp_path / "good.json"), "--layers", "0", "--lags", "0"])


@pytest.mark.parametrize(
    "rule", [["wait", "hmm"], {"pattern": ["wait"]}, {"pattern": "x", "scope": "sentense"}, {"x": "y"}]
)
def test_a_rule_of_another_shape_in_a_file_is_refused(rule, folder, model_dir, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    keys = {"model": model_dir, "data": str(folder / "text.jsonl"), "layers": [0], "labels": ["wait"], "lags": [0]}
    config.write_text(yaml.safe_dump(keys | {"label_rules": {"wait": rule}}))
    assert main([str(config)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a config with 'wait'" in error and "a scope of match, sentence" in error


def test_a_chat_of_which_the_template_leaves_the_answer_out_is_refused(folder, tmp_path, capsys):
    model = tmp_path / "chat"
    shutil.copytree(folder / "chat", model)
    silent = "{% for m in messages %}{% if m.role == 'user' or loop.index > 2 %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    make_tokenizer(chat_template=silent).save_pretrained(model)
    rows = [json.loads(line) for line in (folder / "messages.jsonl").read_text().splitlines()]
    for row in rows[:20]:
        row["messages"] = row["messages"][:2]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = inputs_of(["--model", str(model), "--data", str(path), *KEYS])
    assert made.dataset.counts.n_refused == 20 and "20 without a token that counts" in made.preflight


def test_names_of_labels_are_one_line(tmp_path, model_dir):
    rows = [
        {"text": f"so wait {n}", "id": f"a_{n}", "spans": [[3, 7, "backtracking"], [0, 2, "x\nchains    9 read"]]}
        for n in range(30)
    ]
    (tmp_path / "names.json").write_text(json.dumps(rows))
    made = inputs_of(["--model", model_dir, "--data", str(tmp_path / "names.json"), "--layers", "0", "--lags", "0"])
    assert "x chains 9 read 30" in made.preflight and made.preflight.count("\nchains ") == 1
