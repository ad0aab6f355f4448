"""At which modules of a model the places are that are to be read: by what its blocks compute for a short text.

What attention and MLP add to the residual stream is the output of a module that has another name in every type of
model: a norm behind them (Gemma 2, OLMo 2), the last matrix (BLOOM, OPT), a mixture of experts.  It is the one for
which
    resid_mid = resid_pre + attn_out    and    resid_post = resid_mid + mlp_out,
or resid_post = resid_pre + attn_out + mlp_out where both read the same (GPT-NeoX, Phi), hold to the last bit or so.
Shapes: B chains, T tokens, D hidden size.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamprobe.errors import InputError
from streamprobe.model.blocks import decoder_layers, text_config
from streamprobe.model.hooks import entering, first_tensor
from streamprobe.model.points import ADDED, RESID_POST, RESID_PRE, Place
from streamprobe.model.taps import Hook, Taps

ATTENTION = re.compile("att(entio)?n", re.I)  # in the names of modules and classes
MLP = re.compile("mlp|moe|ffn|fc2|feed_?forward|expert", re.I)
MLP_CLASS = re.compile("mlp|ffn|feed_?forward|expert|moe(block|layer)?$", re.I)  # many begin with that of the model
HELPERS = re.compile("norm|dropout", re.I)  # of both
ROUNDINGS = 4  # by how many of them a sum may be another, where it is added in another way


class Step(NamedTuple):
    """What a module in a block was given, or returned, while the block ran."""

    path: str
    module: nn.Module
    before: bool
    value: Tensor  # [B, T, D], a copy: some models go on to change it in place

    @property
    def depth(self) -> int:
        """How far below the block."""
        return self.path.count(".")

    @property
    def is_attention(self) -> bool:
        """Whether its name, or that of its class, says so."""
        names = (self.path, type(self.module).__name__)
        return any(ATTENTION.search(name) and not HELPERS.search(name) for name in names)

    @property
    def is_mlp(self) -> bool:
        """The same of an MLP, or of a mixture of them."""
        path, kind = self.path, type(self.module).__name__
        named = MLP.search(path) or (MLP_CLASS.search(kind) and not HELPERS.search(kind))
        return bool(named) and not HELPERS.search(path) and not self.is_attention


class Trace(NamedTuple):
    """What a block did, in the order in which it did it."""

    entered: Tensor  # [B, T, D]
    steps: list[Step]
    returned: Tensor  # [B, T, D]

    def outputs(self, after: int = -1) -> list[tuple[int, Step]]:
        """What modules returned after a step, with the numbers of the steps, those nearest to the block first."""
        found = [(i, step) for i, step in enumerate(self.steps) if i > after and not step.before]
        return sorted(found, key=lambda each: each[1].depth)


class Parts(NamedTuple):
    """What a block adds to the residual stream, as numbers of steps; None for what is not there, or not seen."""

    factor: float = 1.0
    attention: int | None = None
    between: int | None = None  # the first that is given the stream between both
    mlp: int | None = None


def find_taps(model: nn.Module, places: Sequence[Place], read_text: Callable[[], object]) -> Taps:
    """How these places are read; `read_text` lets the model read a short text.

    Raises InputError for a place that the model has not.
    """
    blocks = decoder_layers(model)
    wanted = sorted({place.layer for place in places if place.point in ADDED})
    traces: dict[int, Trace | None] = {}
    if wanted:
        with ExitStack() as stack:
            steps = {layer: stack.enter_context(traced(blocks[layer])) for layer in wanted}
            read_text()
        traces = {layer: trace_of(own) for layer, own in steps.items()}
    parts = {layer: solve(trace, _factors(model, blocks[layer])) for layer, trace in traces.items() if trace}
    hooks = {place: _hook_of(place, blocks[place.layer], traces, parts) for place in places}
    return Taps(hooks, blocks[max(place.layer for place in places)])


def _hook_of(place: Place, block: nn.Module, traces: Mapping[int, Trace | None], parts: Mapping[int, Parts]) -> Hook:
    """How one place is read."""
    if place.point == RESID_POST:
        return Hook(block, is_block=True)
    if place.point == RESID_PRE:
        return Hook(block, before=True)
    if place.point not in ADDED:
        try:
            return Hook(block.get_submodule(place.point))
        except AttributeError:
            raise InputError(str(place), "a module of that block", "load the model of the run") from None
    trace, own = traces[place.layer], parts.get(place.layer, Parts())
    number = dict(zip(ADDED, (own.attention, own.between, own.mlp), strict=True))[place.point]
    if trace is None or number is None:
        raise _not_there(place, block, trace, own)
    step = trace.steps[number]
    return Hook(step.module, step.before, 1.0 if step.before else own.factor)


def _not_there(place: Place, block: nn.Module, trace: Trace | None, parts: Parts) -> InputError:
    """Why a place cannot be read."""
    kind = type(block).__name__
    lacks = trace and place.point == "attn_out" and not any(step.is_attention for step in trace.steps)
    if lacks:
        why, expected = "which has no attention", "layers whose blocks have it"
    elif place.point == "resid_mid" and parts.attention is not None:
        why, expected = "in which nothing reads the stream between attention and MLP", "a model with such a place"
    else:
        why = "in which no module's output is what is added to the residual stream there"
        expected = "a block that computes resid_post = resid_pre + attn_out + mlp_out"
    return InputError(
        f"{place}, a {kind}, {why}", expected, "choose other --sites or --layers, or name a module by --hookpoints"
    )


@contextmanager
def traced(block: nn.Module) -> Iterator[list[Step]]:
    """Yields what the block and the modules down to two below it are given and return, while it runs."""
    steps: list[Step] = []
    running = False

    def keep(path: str, module: nn.Module, before: bool, x: Tensor | None) -> None:
        nonlocal running
        if not path:
            running = before
        if x is not None and (running or not path):  # a module may belong to several blocks
            steps.append(Step(path, module, before, x.clone()))

    def watch(path: str, module: nn.Module) -> list[Any]:
        def before(_module: nn.Module, given: Any, named: Mapping[str, Any]) -> None:
            keep(path, module, True, entering(given, named))

        def behind(_module: nn.Module, _given: Any, output: Any) -> None:
            keep(path, module, False, first_tensor(output))

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(behind)]

    handles: list[Any] = []
    try:
        for path, module in block.named_modules():
            if path.count(".") < 2:
                handles += watch(path, module)
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def trace_of(steps: Sequence[Step]) -> Trace | None:
    """What the block did; None where it did not run once, or has no residual stream."""
    ends = [i for i, step in enumerate(steps) if not step.path]
    if ends != [0, len(steps) - 1]:
        return None
    entered, *inside, returned = steps
    shape, device = returned.value.shape, returned.value.device  # what enters may lie on another
    if entered.value.shape != shape or len(shape) != 3:
        return None
    alike = [each for each in inside if each.value.shape[-1] == shape[-1] and each.value.numel() == shape.numel()]
    steps = [each._replace(value=each.value.view(shape).to(device)) for each in alike]
    return Trace(entered.value.to(device), steps, returned.value)


def _factors(model: Any, block: nn.Module) -> list[float]:
    """By what a block may multiply what it adds: 1, and what it, or the model's config, holds (Granite, MiniCPM)."""
    held = vars(text_config(model.config)) | vars(block)
    return [1.0, *(x for name, x in held.items() if type(x) is float and re.search("resid.*(scal|mult)", name))]


def solve(trace: Trace, factors: Sequence[float]) -> Parts:
    """What a block adds to the residual stream, times one of these factors: what adds up to the last bit, or nearly."""
    found = (
        parts
        for roundings in (0, ROUNDINGS)
        for look in (_in_turn, _one_alone, _side_by_side)
        for factor in factors
        if (parts := look(trace, factor, roundings)) is not None
    )
    return next(found, Parts())


def _in_turn(trace: Trace, factor: float, roundings: int) -> Parts | None:
    """Of a block whose MLP reads the stream to which attention was added."""
    givens = [(i, step) for i, step in enumerate(trace.steps) if step.before]
    for a, added in trace.outputs():
        term = added.value * factor
        for between, given in givens:
            known = any(torch.equal(given.value, each) for each in (trace.entered, term))
            if between > a and not known and _is_sum(given.value, [trace.entered, term], roundings):
                mlp = _mlp_after(trace, between, factor, roundings)
                return Parts(factor, a if _is_attention(trace, a) else None, between, mlp)
    return None


def _mlp_after(trace: Trace, between: int, factor: float, roundings: int) -> int | None:
    """The step whose output is added to the stream that the step `between` was given."""
    stream = trace.steps[between].value
    rest = trace.outputs(between)
    return next((m for m, each in rest if _is_sum(trace.returned, [stream, each.value * factor], roundings)), None)


def _one_alone(trace: Trace, factor: float, roundings: int) -> Parts | None:
    """Of a block that adds the output of one module."""
    for a, added in trace.outputs():
        if _is_sum(trace.returned, [trace.entered, added.value * factor], roundings):
            if _is_attention(trace, a):
                return Parts(factor, attention=a)
            return Parts(factor, mlp=a if any(step.is_mlp for step in trace.steps[: a + 1]) else None)
    return None


def _side_by_side(trace: Trace, factor: float, roundings: int) -> Parts | None:
    """Of a block whose attention and MLP read the same."""
    outputs = trace.outputs()
    for a, first in outputs:
        for m, second in outputs:
            terms = [trace.entered, first.value * factor, second.value * factor]
            if m > a and _is_sum(trace.returned, terms, roundings):
                return Parts(factor, attention=a, mlp=m) if _is_attention(trace, a) else Parts(factor)
    return None


def _is_attention(trace: Trace, number: int) -> bool:
    """Whether the output of a step is that of attention, or was made of it and of no MLP."""
    before = trace.steps[: number + 1]
    return any(step.is_attention for step in before) and not any(step.is_mlp for step in before)


def _is_sum(x: Tensor, terms: Sequence[Tensor], roundings: int) -> bool:
    """Whether x [B, T, D] is the sum of these, up to so many roundings; a token of it is looked at first."""
    return all(_adds_up(part(x), [part(each) for each in terms], roundings) for part in (_last_token, _every_token))


def _last_token(x: Tensor) -> Tensor:
    return x[0, -1]


def _every_token(x: Tensor) -> Tensor:
    return x


def _adds_up(x: Tensor, terms: Sequence[Tensor], roundings: int) -> bool:
    """Whether x is the sum of these tensors, up to so many roundings; to the last bit in any order of them."""
    if not roundings:
        return any(torch.equal(x, sum(own[1:], own[0]).to(x.dtype)) for own in permutations(terms))
    eps = max(torch.finfo(each.dtype).eps for each in (x, *terms))
    wide = torch.stack([each.float() for each in terms])
    return bool(((x.float() - wide.sum(0)).abs() <= roundings * eps * wide.abs().sum(0)).all())
