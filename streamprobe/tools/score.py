"""What probes say of texts that are there already, at every token: in a library by `score`, at a terminal by
`streamprobe score`.

Shapes: T tokens of a text that are scored, L layers, K columns.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from streamprobe.activations.reading import places_of
from streamprobe.activations.stream import stream_samples
from streamprobe.data.annotations import Annotation
from streamprobe.data.prompts import is_unicode
from streamprobe.data.records import Record, Unusable
from streamprobe.data.tokenize import Chain, TextOptions, render, text_options, tokenize
from streamprobe.errors import InputError
from streamprobe.model import trial
from streamprobe.model.blocks import check_vocabulary, context, decoder_layers
from streamprobe.model.places import main_device
from streamprobe.model.taps import Taps
from streamprobe.model.tokenizer import with_white_space
from streamprobe.probes.base import Probes
from streamprobe.probes.merged import widths_of


class ScoredText(NamedTuple):
    """The tokens of a text that are scored, and each probe's probability at each of them."""

    ids: Tensor  # [T] int64
    tokens: list[str]  # [T] the text that each completes; joined they are the text, but for what no token covers
    offsets: Tensor  # [T, 2] int64: the characters start .. end of the text that each covers, also if not alone
    probabilities: Tensor  # [T, L, K] float32 on the CPU; NaN where activations are infinite or not numbers


class Encoded(NamedTuple):
    """A text as the model will read it, and what is known of the tokens that will be scored."""

    chain: Chain
    ids: Tensor  # [T], as in ScoredText
    tokens: list[str]  # [T]
    offsets: Tensor  # [T, 2]
    read: str  # the text that the offsets count in


def score(
    probes: Probes,
    model: Any,
    tokenizer: Any,
    texts: Any,
    *,
    prompt: str | None = None,
    max_batch_tokens: int = 8192,
) -> Any:
    """Scores texts: a str as it is, a pair (problem, response) with the `prompt` around the problem, or a list of them.

    A text comes back as a ScoredText, a list as a list of them in its order.  Of a pair the response is scored, and
    offsets are characters of it; the problem too, at negative offsets, if the run's `support` was `all`.  Special
    tokens never are.  `prompt` (None: that of the run, as for its `bos` and `chat_date`) is a format string of
    {problem}, or `chat`.  The model, whole or cut off, runs up to the deepest probed layer, on its own device; a
    forward pass has at most `max_batch_tokens` tokens with padding, and a longer text goes through in chunks.

    Raises InputError for a text that is empty, not Unicode or longer than the model's context, before the model runs,
    and for a model or tokenizer that is not the probes'.
    """
    several = isinstance(texts, list)
    own, readable = text_options(probes.about.get("config", {})), with_white_space(tokenizer)
    if prompt is not None:
        own = own._replace(prompt=prompt)
    encoded = []
    for number, text in enumerate(texts if several else [texts]):
        record, options = _record_of(text, own)
        try:
            encoded.append(encode(record, readable, options, context(model.config)))
        except Unusable as why:
            raise InputError(f"text {number}, one {why}", "text that can be scored", "leave it out") from None
    scored = score_encoded(encoded, model, probes, max_batch_tokens)
    return scored if several else scored[0]


def _record_of(text: Any, options: TextOptions) -> tuple[Record, TextOptions]:
    """What a caller gives as one text, and how it is read."""
    if isinstance(text, str):
        return Record(text, Annotation([])), options._replace(prompt="")
    if not (isinstance(text, tuple) and len(text) == 2 and all(isinstance(each, str) for each in text)):
        raise InputError(
            f"a text of type {type(text).__name__}", "a str, or a tuple (problem, response) of two", "give such"
        )
    problem, response = text
    return Record(response, Annotation([]), problem), options


def encode(record: Record, tokenizer: Any, options: TextOptions, most: int) -> Encoded:
    """A record as the model reads it, with the samples of a run of these options.

    Offsets are characters of the response (of a chat those of the text that its template writes); those of the problem,
    where that is sampled too, are negative.  Raises Unusable for a text that cannot be scored, such as one of more than
    `most` tokens, and InputError as `render` does.
    """
    if not is_unicode(record.problem + record.response):
        raise Unusable("with text that is not Unicode")
    if not record.response.strip():
        raise Unusable("without any text")
    rendered = render(record, tokenizer, options)
    text, ids, covered, head = rendered.text, rendered.ids, rendered.offsets, rendered.head
    if len(ids) > most:
        raise Unusable(f"longer than the model's context of {most:,} tokens")
    chain = tokenize(record, tokenizer, [], options)
    samples = chain.support.nonzero()[:, 0].tolist()
    if not samples:
        raise Unusable("without a token that is scored")
    first = 0 if options.support == "all" else head  # a token may straddle the border
    places = [(max(first, start), end) for start, end in (covered[t] for t in samples)]
    offsets = torch.tensor(places) - head
    return Encoded(chain, chain.ids[samples], pieces(text, places), offsets, text[head:])


def pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The text that each token completes, of tokens that cover the characters start .. end: [T].

    A character of several tokens stands at the last of them, so that no character stands twice.
    """
    found, done = list[str](), offsets[0][0]
    for (start, end), (following, _) in pairwise([*offsets, (len(text), len(text))]):
        stop = max(done, min(end, following))
        found.append(text[max(start, done) : stop])
        done = stop
    return found


def score_encoded(
    texts: Sequence[Encoded],
    model: Any,
    probes: Probes,
    max_batch_tokens: int,
    *,
    on_text: Callable[[], object] = lambda: None,
) -> list[ScoredText]:
    """Runs the model over texts, batches of like length at a time; returns them in their order.

    `on_text` is called whenever a text is done.  Raises InputError for a model that is not the probes', and for a
    text of more than `max_batch_tokens` tokens and a model that cannot read it in chunks.
    """
    if not texts:
        return []
    chains = [text.chain for text in texts]
    taps, widest = _check_model(model, probes, chains, max_batch_tokens), max(widths_of(probes))
    device = main_device(model)
    scorer = probes.to(device).scorer()
    parts: list[list[Tensor]] = [[] for _ in texts]
    left = [len(text.tokens) for text in texts]
    for batch in stream_samples(chains, model, taps, max_batch_tokens):
        if batch.acts.shape[2] != widest:
            raise _other_model(f"a model of hidden size {batch.acts.shape[2]}", f"{widest}")
        logits = scorer(nn.functional.pad(batch.acts, (0, probes.n_features - widest)), batch.chain.to(device))
        found = logits.sigmoid().where(logits.isfinite(), torch.nan).cpu()
        numbers, counts = batch.chain.unique_consecutive(return_counts=True)
        for i, own in zip(numbers.tolist(), found.split(counts.tolist()), strict=True):
            parts[i].append(own)
            left[i] -= len(own)
            if not left[i]:
                on_text()
    assert not any(left), "tokens that the model did not read"
    return [
        ScoredText(text.ids, text.tokens, text.offsets, torch.cat(own)) for text, own in zip(texts, parts, strict=True)
    ]


def _check_model(model: Any, probes: Probes, chains: Sequence[Chain], max_batch_tokens: int) -> Taps:
    """Where the model is read; raises InputError for one that cannot read the chains, or has not what is read."""
    n = len(decoder_layers(model))
    if max(probes.layers) >= n:
        raise _other_model(f"a model of {n} decoder blocks", f"more than {max(probes.layers)}")
    check_vocabulary(model.config, max(int(chain.ids.max()) for chain in chains))
    known = torch.cat([chain.ids for chain in chains]).unique().tolist()
    taps = trial.find_places(model, places_of(probes.reads), known)
    if any(len(chain.ids) > max_batch_tokens for chain in chains):
        trial.check_places(model, taps, known, chunked=True)
    return taps


def _other_model(got: str, expected: str) -> InputError:
    return InputError(got, f"{expected}, as in the model that was probed", "load the model of the run")
