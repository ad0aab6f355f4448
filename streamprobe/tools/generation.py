"""What a finished run needs to write text: its probes, the whole model, prompts as the probes know them.

Shapes: T tokens.
"""

import argparse
import os
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprobe.config.load import RunConfig, load_config
from streamprobe.data import prompts
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.model import backbone, blocks, trial
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.storage import load_probes
from streamprobe.system.console import say
from streamprobe.system.files import check_output, write_output


def make_parser(doc: str, prog: str) -> ArgumentParser:
    """A command line that begins with RUN and has the options of every one that writes; its first line is `doc`'s."""
    parser = ArgumentParser(prog=f"python -m {prog}", description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    add = parser.add_argument
    add("--solver", help="whose probes: newton or adam (default: the run's first)")
    add("--layer", type=int, help="layer of the probe")
    add("--lag", type=int, default=0, help="tokens that the probe looks ahead (%(default)s)")
    add("--label", help="label of the probe (default: the run's first)")
    add("--target", help="target of the probe: token, onset or within (default: the run's first)")
    add("--model", help="folder or hub id of the model, if it is no longer where the run found it")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the run's model")
    add("--device_map", help="where the model lies: auto, cpu, cuda, ... (default: as in the run)")
    add("--max_new_tokens", type=int, default=256, help="most tokens of a response (%(default)s)")
    add("--temperature", type=float, default=0.0, help="of the sampling; 0 takes the likeliest token (%(default)s)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of so much mass (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")

    def refuse(message: str) -> None:
        raise InputError(message, "options that --help lists", "mend the command line")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    return parser


def check(given: argparse.Namespace) -> None:
    """Raises InputError for a value of `make_parser`'s options that cannot be."""
    for holds, name, expected in (
        (given.max_new_tokens > 0, "max_new_tokens", "at least 1"),
        (given.temperature == 0 or 1e-3 <= given.temperature <= 1e3, "temperature", "0, or 0.001 to 1000"),
        (0 < given.top_p <= 1, "top_p", "above 0, at most 1"),
        (0 <= given.seed < 2**63, "seed", "0 .. 2**63 - 1"),
    ):
        if not holds:
            raise InputError(f"{name} {getattr(given, name)}", expected, f"mend --{name}")


def check_file(path: Path | None, name: str) -> None:
    """Raises InputError for a file to write that cannot be one, before the work is done."""
    if path:
        check_output(path, name)


def write_file(path: Path, name: str, content: str) -> None:
    """Writes what --`name` asked for; raises InputError where that cannot be."""
    write_output(path, content.encode(errors="backslashreplace"), name)
    say(f"wrote {path}")


def open_run(folder: Path, given: argparse.Namespace) -> tuple[RunConfig, ProbeBank]:
    """A run's config, with --model, --device_map and --data of `given` put in, and its probes.

    Raises InputError for a config that trusts a model's code where `given` does not: the folder may be a stranger's.
    """
    if not os.path.isdir(folder):  # which is no error for a name that is too long
        raise InputError(f"{folder}, which is no folder", "the folder of a finished run", "check the path")
    if not os.path.isfile(folder / "config.yaml"):
        raise InputError(f"{folder}, a folder without config.yaml", "the folder of a finished run", "check the path")
    bank = load_probes(folder, given.solver)
    changed = {"--model": given.model, "--device_map": given.device_map, "--data": getattr(given, "data", None)}
    argv = [word for name, value in changed.items() if value is not None for word in (name, value)]
    config = load_config([str(folder / "config.yaml"), *argv])
    if config.model.trust_remote_code and not given.trust_remote_code:
        raise InputError(
            f"{folder}, whose config runs Python code that comes with {config.model.model}",
            "your word that you trust it",
            "give --trust_remote_code, too",
        )
    return config, bank


def load_whole(config: RunConfig, bank: ProbeBank) -> tuple[Any, Any]:
    """The run's whole model, frozen, and its tokenizer; raises InputError if the probes do not fit its size."""
    c = config.model
    where = {"revision": c.revision, "gguf_file": c.gguf_file, "trust_remote_code": c.trust_remote_code}
    tokenizer = load_tokenizer(c.model, **where)
    model_config = backbone.read_config(c.model, **where)
    blocks.check_layers(model_config, bank.layers)
    model = backbone.load_backbone(
        c.model,
        None,
        c.dtype,
        attn_implementation=c.attn_implementation,
        quantization=c.quantization,
        device_map=c.device_map,
        **where,
    )
    width = trial.check_reading(model, bank.layers, trial.some_tokens(tokenizer, model_config))
    if bank.weight.shape[2] != width:
        raise InputError(
            f"probes of {bank.weight.shape[2]} features and a model of hidden size {width}",
            "the model that was probed",
            "mend --model",
        )
    return model, tokenizer


def encode(problem: str, prompt: str, tokenizer: Any, with_bos: bool, day: str | None = None) -> Tensor:
    """The token ids [T] of a problem before a response in a run of this `prompt`, `bos` and `chat_date` (`day`)."""
    ids, _ = prompts.encode(prompts.format_prompt(problem, prompt, tokenizer, day), prompt, tokenizer, with_bos)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if prompt != "chat" and eos not in (None, bos):  # some tokenizers end every text with it
        while ids and ids[-1] == eos:
            ids = ids[:-1]
    return torch.tensor(ids, dtype=torch.int64)


def prompt_of(chain: Chain, tokenizer: Any) -> Tensor:
    """The token ids [T] of a chain up to where the model began to write: with the marker that its prompt left to it."""
    ends = range(chain.start, len(chain.ids))
    end = next((e for e in ends if chain.marker in tokenizer.decode(chain.ids[chain.start : e])), chain.start)
    return chain.ids[:end]


def decoding(temperature: float, top_p: float) -> dict[str, Any]:
    """Options of `generate`: greedy at temperature 0, else sampling; what the model's own defaults say is put aside."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "num_beams": 1}


class Pieces:
    """The text that each new token adds; tokens that end inside of a character add nothing until it is whole.

    Only the last few tokens are decoded each time, so a long text costs no more a token than a short one.
    """

    def __init__(self, tokenizer: Any, before: Iterable[int]):
        """`before`: the prompt's tokens, since a tokenizer may leave out the space of a text's first token."""
        self.tokenizer = tokenizer
        self.ids = list(before)[-8:]
        self.read = len(self.ids)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self.ids.append(token)
        return self._text(partial=False)

    def rest(self) -> str:
        """What is left at the end."""
        return self._text(partial=True)

    def _text(self, partial: bool) -> str:
        old, new = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self.ids[: self.read], self.ids)
        )
        if new.endswith("\ufffd") and not partial:
            return ""
        self.ids = self.ids[self.read :] or self.ids
        self.read = len(self.ids)
        return new[len(old) :]
