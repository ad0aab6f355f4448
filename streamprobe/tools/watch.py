"""See a model's probes while it writes: in a library by `watch`, at a terminal by `streamprobe watch`.

Each token is coloured by the probability that one probe gives at it, and the alarm is marked: the tokens at which it is
at or above the threshold that validation chose.

Shapes: B chains in a batch, T tokens of the prompt, L layers, K columns.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.model.blocks import context, decoder_layers
from streamprobe.model.hooks import tap
from streamprobe.probes.linear import ProbeBank
from streamprobe.system.console import printable, say, shows_colour, write
from streamprobe.tools import generation

Found = SimpleQueue[tuple[Tensor, Tensor] | None]  # tokens [B] and their probabilities [B, L, K], as they come


def watch(
    model: Any, probes: ProbeBank, input_ids: Tensor, max_new_tokens: int = 256, **options: Any
) -> Iterator[tuple[Any, Tensor]]:
    """Generates with `model.generate` and yields (token, probabilities) as it writes.

    input_ids [T]: the token is an int and its probabilities are [L, K] float32.  input_ids [B, T] (padded on the left,
    with an `attention_mask` among the options): tokens [B] int64 and [B, L, K]; a chain that has ended goes on with the
    pad token, and what is said of that means nothing.  Both are on the model's device, to which the tensors that are
    given are moved.  `options` are those of `generate`: do_sample, temperature, eos_token_id, stop_strings, ...; no
    beams, and one sequence a prompt.

    The tokens are those that `generate` would write.  A token is yielded once the model has read it, which is when it
    writes the next; the one that ends a text before `max_new_tokens` is never read: its probabilities are NaN.  The
    model runs in a thread of its own, a few tokens ahead of the consumer; a consumer that leaves stops it.
    """
    ids = torch.atleast_2d(input_ids).to(model.device)
    options = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    options |= {
        "max_new_tokens": max_new_tokens + 1,
        "return_dict_in_generate": False,
    }  # one more, to read the last one
    bank, found, left = probes.to(model.device), Found(), Event()

    def alone(token: Tensor, given: Tensor) -> tuple[Any, Tensor]:
        return (token, given) if input_ids.dim() == 2 else (int(token), given[0])

    with ThreadPoolExecutor(1) as pool:
        try:
            writing, n = pool.submit(_write, model, bank, ids, found, left=left, options=options), 0
            while (item := found.get()) is not None:
                yield alone(*item)
                n += 1
            new = writing.result()[:, ids.shape[1] :]
            if n < new.shape[1] <= max_new_tokens:
                yield alone(new[:, -1], bank.bias.new_full((len(ids), *bank.bias.shape), math.nan))
        finally:
            left.set()


def _write(model: Any, bank: ProbeBank, ids: Tensor, found: Found, *, left: Event, options: dict[str, Any]) -> Tensor:
    """Generates from ids [B, T] and puts what is found at each token into the queue; None at the end, however it comes.

    Stops once the consumer has `left`.
    """
    blocks = decoder_layers(model)
    try:
        with tap({layer: blocks[layer] for layer in bank.layers}) as taken:

            def read(written: Tensor, _scores: Any, **_rest: Any) -> Tensor:
                """A stopping criterion: asked when a token is chosen, and the one before it has just been read."""
                assert len(written) == len(ids), "beams and several sequences a prompt cannot be watched"
                if written.shape[1] > ids.shape[1] + 1:  # else the last token of the prompt
                    acts = torch.stack([taken[layer][:, -1].to(ids.device) for layer in bank.layers], 1)
                    found.put((written[:, -2], bank.probabilities(acts)))
                return torch.full((len(ids),), left.is_set(), device=ids.device)

            criteria = [*options.pop("stopping_criteria", []), read]
            return model.generate(ids, stopping_criteria=criteria, **options)
    finally:
        found.put(None)


class Mark(NamedTuple):
    """What is shown of one token."""

    text: str
    probability: float
    alarm: bool
    others: str  # the same layer's probabilities at every lag


def alarm_threshold(bank: ProbeBank, place: tuple[int, int]) -> float:
    """The probability from which on a probe raises the alarm."""
    assert bank.threshold is not None
    return bank.threshold[place].sigmoid().item()


def marks(
    steps: Iterator[tuple[int, Tensor]], bank: ProbeBank, place: tuple[int, int], pieces: generation.Pieces
) -> Iterator[Mark]:
    """What is shown of each token: the text that it completes, and the highest probability since the text before."""
    i, k = place
    own = bank.columns[k]
    row = [(j, column.lag) for j, column in enumerate(bank.columns) if column._replace(lag=own.lag) == own]
    threshold = alarm_threshold(bank, place)
    highest, others = 0.0, ""
    for token, probabilities in steps:
        of_layer = probabilities[i].tolist()
        if not math.isnan(of_layer[k]):
            highest = max(highest, of_layer[k])
            others = "  ".join(f"{lag:+d}: {of_layer[j]:.2f}" for j, lag in row)
        text = pieces.push(token)
        if text:
            yield Mark(text, highest, highest >= threshold, others)
            highest, others = 0.0, ""
    if text := pieces.rest():
        yield Mark(text, highest, highest >= threshold, others)


def shade(probability: float) -> tuple[int, int, int]:
    """Red, green and blue of a probability: white at 0, red at 1."""
    return 255, round(255 - 175 * probability), round(255 - 195 * probability)


def for_terminal(mark: Mark, before: bool, colour: bool) -> str:
    """The token with its colour, bold and underlined in an alarm; ▲ where one begins, without colour ▼ where it ends.

    `before`: whether the alarm was on at the token before.
    """
    text = printable(mark.text)
    word = text.lstrip()
    text = text[: len(text) - len(word)] + ("▲" if mark.alarm and not before else "") + word
    if not colour:
        return ("▼" if before and not mark.alarm else "") + text
    red, green, blue = shade(mark.probability)
    style = f"\x1b[{'1;4;' if mark.alarm else ''}38;2;20;20;20;48;2;{red};{green};{blue}m"
    return "\n".join(f"{style}{line}\x1b[0m" if line else "" for line in text.split("\n"))


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<meta http-equiv=Content-Security-Policy
content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>{title}</title><style>
body {{ font: 16px/1.8 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }}
span {{ color: #141414; }} .alarm {{ font-weight: 700; border-bottom: 3px solid #900; }} .prompt {{ opacity: .7; }}
</style><h1>{title}</h1><p>{legend}</p><pre><i class=prompt>{prompt}</i>

{body}</pre></html>
"""


def page(title: str, legend: str, prompt: str, shown: Sequence[Mark]) -> str:
    """A self-contained page of the marked text; a token's probabilities at every lag show when it is pointed at."""
    body = "".join(
        f"<span{' class=alarm' if m.alarm else ''} style='background:rgb{shade(m.probability)}' "
        f"title='{escape(f'{m.probability:.3f}   {m.others}')}'>{escape(printable(m.text))}</span>"
        for m in shown
    )
    return PAGE.format(
        title=escape(printable(title)), legend=escape(printable(legend)), prompt=escape(printable(prompt)), body=body
    )


def legend(bank: ProbeBank, place: tuple[int, int]) -> str:
    """Which probe is watched, and when it raises the alarm."""
    i, k = place
    threshold = alarm_threshold(bank, place)
    return (
        f"layer {bank.layers[i]}, {bank.columns[k]}, {bank.solver}; alarm (▲) from a probability of {threshold:.3f} on"
    )


def show(
    model: Any,
    tokenizer: Any,
    bank: ProbeBank,
    place: tuple[int, int],
    *,
    prompt: str,
    ids: Tensor,
    sampling: generation.Sampling,
) -> list[Mark]:
    """Lets the model go on from a prompt and prints each token as the probe at `place` marks it.

    `prompt` is what is printed of the prompt, `ids` [T] what the model reads.  Returns what was shown.  Raises
    InputError for a prompt that leaves no room for a response.
    """
    room = context(model.config) - len(ids)
    if room <= 0:
        most = f"fewer than the model's {room + len(ids):,}"
        raise InputError(f"a prompt of {len(ids):,} tokens", most, "shorten it")
    say(f"{legend(bank, place)}\n\n{prompt}")
    torch.manual_seed(sampling.seed)
    steps = watch(model, bank, ids, min(sampling.max_new_tokens, room), **sampling.options)
    colour, shown = shows_colour(), list[Mark]()
    for mark in marks(steps, bank, place, generation.Pieces(tokenizer, ids.tolist())):
        write(for_terminal(mark, bool(shown) and shown[-1].alarm, colour))
        shown.append(mark)
    say()
    return shown
