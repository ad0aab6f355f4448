"""A run whose model writes its own chains: the problems of its data become a stream of labelled answers.

The model that writes is whole, with its LM head.  It may be the one whose activations are read, too: hooks on its
blocks see the same as in a model that is cut off above them, and no second copy is held.  What steers it while it
writes is gone when it reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprobe.config.data_keys import DataConfig
from streamprobe.config.load import RunConfig
from streamprobe.data.files import read_rows
from streamprobe.data.problems import Problems, find_problems
from streamprobe.data.records import Refused
from streamprobe.data.tokenize import text_options
from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.model import trial
from streamprobe.model.blocks import check_layers, context, decoder_layers
from streamprobe.model.hooks import steer
from streamprobe.model.places import main_device
from streamprobe.model.points import Place
from streamprobe.model.sampling import Sampling
from streamprobe.probes.merged import widths_of
from streamprobe.run.inputs import settle_prompt
from streamprobe.run.opened import OpenedRun, chains_of_run, open_run
from streamprobe.system.console import say
from streamprobe.system.distributed import share
from streamprobe.system.privacy import clean_url
from streamprobe.tools.answers import Answers, Asked, Author, ask, read_answer
from streamprobe.tools.choice import choose_probe
from streamprobe.tools.directions import Direction, direction_of
from streamprobe.tools.steer import Scale, check_site, choose, leave_out_bad, measure_scale, read_training
from streamprobe.tools.writing import seeded, write

Steered = Callable[[], AbstractContextManager[None]]  # in which the model is steered


def read_problems(config: RunConfig, tokenizer: Any) -> tuple[Problems, RunConfig]:
    """The problems of a run's data; and its config, with what they settle: columns, `prompt` and `chat_date`.

    Raises InputError for data that cannot be read, or hold no problems.
    """
    problems = problems_of(config.data)
    known = settle_prompt(config.data, tokenizer, is_chat=problems.is_chat)
    return problems, replace(config, data=replace(known, **problems.keys))


def problems_of(data: DataConfig) -> Problems:
    """The problems of a run's data.  Raises InputError for data that cannot be read, or hold no problems."""
    rows = read_rows(data.data, split=data.data_split, config=data.data_config, sha256=data.data_sha256)
    columns = {"problem": data.problem_column, "id": data.id_column, "category": data.category_column}
    return find_problems(rows, clean_url(data.data), most=data.max_chains, **columns)


def open_generated(
    config: RunConfig,
    problems: Problems,
    tokenizer: Any,
    model: Any,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Answers:
    """The answers of a model to problems, as a stream of records that are labelled by the run's rules.

    `config` and `problems` are what `read_problems` gave; `model` is whole, with its LM head (`load_backbone` with the
    layers None).  Without `max_tokens`, or at temperature 0, the stream is one trip over the problems.  `stopped`: see
    `Answers`.  Raises InputError where no problem can be asked, and for a run to steer by that this model cannot take.
    """
    generation, text = config.generation, text_options(vars(config.data))
    room = context(model.config)
    most = room - min(generation.max_new_tokens, room // 2)
    asked = [ask(each, tokenizer, text, most=most) for each in problems.found]
    steered = open_steering(config, tokenizer, model) if generation.steer else nullcontext
    author = Author(
        write=Writer(model, tokenizer, generation.sampling, steered, stopped),
        read=partial(read_answer, tokenizer=tokenizer, rules=config.data.rules),
        batch_size=generation.generate_batch,
        responses=generation.responses,
        seed=generation.generate_seed,
    )
    again = bool(config.stream.max_tokens) and generation.temperature > 0  # else each answer would come again
    trips = None if again else 1
    answers = Answers(asked, author, trips=trips, stopped=stopped)
    say(_describe(config, asked))
    return answers


def _describe(config: RunConfig, asked: Sequence[Asked | Refused]) -> str:
    """What is written, as a line for the terminal."""
    generation = config.generation
    n, refused = len(asked), sum(isinstance(each, Refused) for each in asked)
    drawn = f"temperature {generation.temperature:g}" + f", top_p {generation.top_p:g}" * (generation.top_p < 1)
    until = "again and again" if config.stream.max_tokens and generation.temperature > 0 else "once"
    return (
        f"generate  {n - refused:,} problems {until}, answers to each: {generation.responses}, written at once: "
        f"{generation.generate_batch}, {drawn}" + f"; problems that cannot be asked: {refused}" * bool(refused)
    )


@dataclass(frozen=True)
class Writer:
    """A model that writes answers."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    steered: Steered
    stopped: Callable[[], bool]

    def __call__(self, asked: Sequence[Asked], seed: int) -> list[list[int]]:
        """The ids of the answers to these, drawn from a seed."""
        prompts = [torch.tensor(each.ids) for each in asked]
        most = min(self.sampling.max_new_tokens, context(self.model.config) - max(map(len, prompts)))
        settings: dict[str, Any] = {"options": self.sampling.options, "stopped": self.stopped}
        with seeded(seed), self.steered():
            return write(self.model, self.tokenizer, prompts, max_new_tokens=most, **settings)


# What steers the model while it writes


@dataclass(frozen=True)
class Steering:
    """What is done to the output of a block while the model writes; one of the two."""

    block: torch.nn.Module
    add: Tensor | None = None  # [D]
    ablate: Tensor | None = None  # [D]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Steers in this context, at the prompt's last token and every one that is written."""
        with steer(self.block, self.add, self.ablate, newest=True):
            yield


def open_steering(config: RunConfig, tokenizer: Any, model: Any) -> Steering:
    """What a finished run's probe does to the model, as the keys `steer`, `steer_layer` and `steer_strength` say.

    The probe is that of the run's verdict, or of its layer, as `streamprobe steer` chooses it.  Raises InputError for a
    folder without a run, and for a probe that the run has not, or that this model cannot be steered by.
    """
    generation = config.generation
    assert generation.steer is not None
    try:
        run = open_run(Path(generation.steer), trusted=config.model.trust_remote_code)
        place = choose_probe(run.folder, run.probes, layer=generation.steer_layer)
        check_site(run.probes, place[0])
        layer = run.probes.reads[place[0]].layer
        _check_model(run, place[0], tokenizer, model)
    except InputError as error:
        got = f"steer {generation.steer}: {error.got}"
        raise InputError(got, error.expected, "correct --steer or --steer_layer") from error
    own = run.probes.columns[place[1]]
    found, scale = _direction(config, run, place, model)
    how = "ablated" if scale is None else f"{generation.strength:+g} standard deviations of {scale.std:.4g}"
    say(f"steer     layer {layer}, along {own} of {run.folder}, {how}")
    unit = share(found.unit.float().cpu().contiguous())
    block = decoder_layers(model)[found.layer]
    if scale is None or generation.strength is None:
        return Steering(block, ablate=unit)
    return Steering(block, add=share(generation.strength * scale.std * unit))


def _check_model(run: OpenedRun, number: int, tokenizer: Any, model: Any) -> None:
    """Raises InputError where the model has no such layer as a probe reads, or one of another width."""
    layer = run.probes.reads[number].layer
    assert layer is not None
    check_layers(model.config, [layer])
    tokens = trial.some_tokens(tokenizer, model.config)
    taps = trial.find_places(model, [Place(layer)], tokens)
    (width,), needed = trial.check_places(model, taps, tokens), widths_of(run.probes)[number]
    if width != needed:
        raise InputError(f"probes of {needed} features and a model of hidden size {width}", "the same", "")


def _direction(config: RunConfig, run: OpenedRun, place: tuple[int, int], model: Any) -> tuple[Direction, Scale | None]:
    """The direction of a probe; and the scale of its layer, over the training chains of its run, if that is asked for.

    Raises InputError where chains are needed and came without an end.
    """
    strength, most = config.generation.strength, config.model.max_batch_tokens
    probes = run.probes.to(main_device(model))
    if strength is None:
        return direction_of(probes, place, None, lambda _: ()), None
    if run.config.stream.streaming:
        raise InputError(
            f"steer_strength {strength:g} with a run on chains without an end, which are not kept to measure by",
            "a run on chains of a file, or ablate",
            "give another --steer, or --steer_strength ablate",
        )
    chains, own = chains_of_run(run.config), run.probes.columns[place[1]]
    examples = choose(chains.splits, run.config.probes.labels, 1)
    if run.config.data.bad_chains == "skip":
        examples = leave_out_bad(examples, model, run.probes.layers, most)
    column = Column(own.label, own.target, own.lag)
    read = partial(read_training, examples, model.base_model, column=column, max_batch_tokens=most)
    found = direction_of(probes, place, None, read)
    return found, measure_scale(read([found.layer]), found.unit)
