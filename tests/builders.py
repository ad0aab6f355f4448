"""What tests are made of: made-up annotated chains, a tiny tokenizer, and short ways to a run's first values."""

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CATEGORIES = ("alpha", "beta", "gamma", "delta")
COMMON = "the a of to is in and each one two three four five six box stone door card number side row".split()
WORDS = {
    "initializing": "okay so puzzle asks given find question begin goal need told start".split(),
    "deduction": "then therefore since follows hence must equals gives total leaves adds means".split(),
    "backtracking": "wait no actually hmm but wrong again rather mistake instead undo reconsider".split(),
}


def make_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` annotated chains of 40 to 90 made-up words, each with at least one backtracking section at a random place.

    The first section is initializing and the others deduction, where they are not backtracking.  Words of the label
    and words that all labels share alternate at random, so that a label can be read off its tokens.  White space
    between sections is inside the tags of the second one or outside of all tags, at random.  The annotated text is an
    exact copy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        n_words = int(rng.integers(40, 91))
        n_sections = n_words // 10
        sizes = 4 + rng.multinomial(n_words - 4 * n_sections, np.ones(n_sections) / n_sections)
        labels = ["initializing", *["deduction"] * (n_sections - 1)]
        for place in rng.choice(n_sections, rng.integers(1, n_sections // 3 + 1), replace=False):
            labels[place] = "backtracking"
        plain = tagged = ""
        for number, (label, size) in enumerate(zip(labels, sizes, strict=True)):
            own = rng.random(size) < 0.6
            text = " ".join(str(rng.choice(WORDS[label] if mine else COMMON)) for mine in own) + "."
            space = "" if number == 0 else str(rng.choice([" ", "\n\n"]))
            inside = bool(rng.random() < 0.5)
            plain += space + text
            tagged += f'{"" if inside else space}["{label}"]{space if inside else ""}{text}["end-section"]'
        problem = f"Puzzle {i}: which {' '.join(map(str, rng.choice(COMMON, 8)))}?"
        task_id = f"{CATEGORIES[i % 4]}_{i // 4}"
        rows.append({"task_id": task_id, "problem": problem, "reasoning_chain": plain, "annotated_chain": tagged})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in a file of the type and the compression that its name says; returns the path."""
    import pyarrow
    from pyarrow.parquet import write_table

    *_, suffix = path.name.removesuffix(".gz").removesuffix(".zst").split(".")
    file = io.BytesIO()
    if suffix == "parquet":
        write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix in ("csv", "tsv"):
        text = io.StringIO(newline="")
        table = csv.writer(text, delimiter={"csv": ",", "tsv": "\t"}[suffix])
        table.writerow(rows[0])
        table.writerows([json.dumps(v) if isinstance(v, list | dict) else v for v in row.values()] for row in rows)
        file.write(text.getvalue().encode())
    elif suffix in ("jsonl", "ndjson"):
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    elif suffix == "json":
        file.write(json.dumps(rows, indent=1, ensure_ascii=False).encode())
    else:
        file.write(rows[0]["text"].encode())
    path.write_bytes(compress(file.getvalue(), path.suffix))
    return str(path)


def compress(content: bytes, suffix: str) -> bytes:
    """The content as a file that ends in `suffix` holds it: .gz, .zst, or any other as it is."""
    if suffix == ".zst":
        import pyarrow

        return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return gzip.compress(content) if suffix == ".gz" else content


def sites_of(names: Sequence[int | str]) -> list[Any]:
    """The sites of layers, by number, and of controls, by name."""
    from streamprobe.probes.sites import control_sites, layer_sites

    return [site for name in names for site in (layer_sites if isinstance(name, int) else control_sites)([name])]


def inputs_of(argv: Sequence[str]) -> Any:
    """What a run of this command line works with before any weight is read."""
    from streamprobe.config.load import load_config
    from streamprobe.run.inputs import make_inputs, read_texts

    texts, config = read_texts(load_config(argv))
    return make_inputs(config, texts)


def setup_of(argv: Sequence[str]) -> Any:
    """What stands before the first pass of a run of this command line."""
    from streamprobe.config.load import load_config
    from streamprobe.run.cost import Cost
    from streamprobe.run.pipeline import NOTHING, set_up

    return set_up(load_config(argv), NOTHING, Cost())


def make_record(problem: str, response: str, sections: Sequence[Any] = (), id: str = "x") -> Any:
    """A record with these sections, (label, start, end) each."""
    from streamprobe.data.annotations import Annotation, Section
    from streamprobe.data.records import Record

    return Record(response, Annotation([Section(*section) for section in sections]), problem, id)


def load_chains(
    rows: list[dict[str, Any]],
    tokenizer: Any,
    labels: list[str],
    context: int = 512,
    *,
    fields: Any = None,
    most: int | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The splits and the counts of rows in the format `annotated`: `fields` are its FormatOptions."""
    from streamprobe.data.dataset import make_dataset
    from streamprobe.data.detect import Found
    from streamprobe.data.records import FormatOptions
    from streamprobe.data.sources import RowSource, read_records

    fields = fields or FormatOptions()
    records = read_records(RowSource(rows, Found("annotated", fields), most=most))
    partial = most is not None and most < len(rows)
    names = {} if partial else fields.label_names
    dataset = make_dataset(records, tokenizer, labels, context=context, label_names=names, **options)
    return dataset.splits, dataset.counts


def fingerprint(splits: Any) -> str:
    """The fingerprint of a data set with these splits."""
    from streamprobe.data.counts import Counts
    from streamprobe.data.dataset import Dataset

    return Dataset(splits, [], Counts()).fingerprint()


def make_tokenizer(adds: str = "<s> $A", bos: bool = True, chat_template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of 400 entries; `adds` says which special tokens it puts around a text ($A)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    texts = [row[name] for row in make_rows(40, seed=1) for name in ("problem", "reasoning_chain")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 0), ("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_letters_core(model: str = "bpe") -> Any:
    """A tokenizer like SentencePiece's, of single letters, that writes the bytes of unknown ones.

    It writes `▁` for a blank, and before a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,:>()#SW"]
    entries = ["<unk>", "<s>", "</s>", *letters, *(f"<0x{b:02X}>" for b in range(256))]
    if model == "bpe":
        vocab = {entry: i for i, entry in enumerate(entries)}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    else:
        scored = [(entry, -1.0 if entry in letters else -9.0) for entry in entries]
        core = Tokenizer(models.Unigram(scored, 0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=model == "unigram")
    core.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def make_letters(model: str = "bpe", chat_template: str | None = None) -> Any:
    """The tokenizer of `make_letters_core`, as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    core = make_letters_core(model)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


class Parsed(NamedTuple):
    """An annotated text taken apart: the text without its tags, its sections, and the tags without their partner."""

    text: str
    sections: list[Any]
    unbalanced: int


def parse_annotations(annotated: str) -> Parsed:
    """What an annotated text says by itself, where no original is at hand."""
    from itertools import compress

    from streamprobe.data.annotations import Section, find_marks, read_tags, visible

    tags = [mark for mark in find_marks(annotated) if mark.names]
    sections, unbalanced = read_tags(annotated, tags)
    shown = visible(annotated, tags)
    place = np.append(0, np.cumsum(shown)).tolist()
    moved = [Section(label, place[start], place[end]) for label, start, end in sections]
    return Parsed("".join(compress(annotated, shown)), moved, unbalanced)
