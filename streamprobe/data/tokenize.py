"""One record as token ids and label codes.

Shapes: T tokens in a chain, C labels that are probed, A labels whose sections are known beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamprobe.data.chat import Placed, place_chat
from streamprobe.data.prompts import encode, encode_head, open_response, special_ids
from streamprobe.data.records import Record, Written
from streamprobe.data.regions import KNOWN, Markers, own_markers, thinking
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN


class TextOptions(NamedTuple):
    """How a record becomes the text that the model reads, and which of its tokens count: keys of the config."""

    prompt: str = "{problem}\n\n"  # see `prompts.format_prompt`
    support: str = "assistant"  # see `tokenize`, as for the next two
    unlabelled: str = "auto"
    bos: bool = True  # whether a chain begins with the BOS token
    day: str | None = None  # that a chat template writes, YYYY-MM-DD; none is today
    region: str = "all"  # see `tokenize`
    markers: Sequence[Markers] = KNOWN  # of the regions


AS_TEXT = TextOptions()
STOPS = frozenset(".!?。．｡！？﹒﹗﹖")  # letters that end a sentence
LINE_ENDS = frozenset("\n\r\u2028\u2029")
NOTHING = torch.empty(0)


def text_options(keys: Mapping[str, Any]) -> TextOptions:
    """The options of a run, given the keys of its config; those that are not among them are the usual ones."""
    names = {"prompt": "prompt", "support": "support", "unlabelled": "unlabelled", "bos": "bos", "chat_date": "day"}
    known = {name: keys[key] for key, name in {**names, "region": "region"}.items() if key in keys}
    return TextOptions(**known, markers=own_markers(keys.get("region_markers")))


@dataclass(frozen=True)
class Chain:
    """One annotated chain as the model sees it."""

    id: str
    ids: Tensor  # [T] int64
    codes: Tensor  # [T, C] int8, see `lags`
    support: Tensor  # [T] bool: may this token be a sample?
    start: int = 0  # the first token of the response
    category: str = ""  # the kind of problem, to which results can be split
    row: int = 0  # which of the data
    fold: int = 0  # whose probes are not trained on it, in a run of several folds: see `splits`
    marker: str = ""  # with which the prompt ends and the response begins; it was left out of the prompt
    sections: Tensor = NOTHING  # [T, A] int8: codes of the labels that the control `joint` is given; none: A is 0
    sentence_end: Tensor = NOTHING  # [T] bool: does a sentence or a line end in this token?  None: in no token

    def __post_init__(self) -> None:
        if len(self.sections) != len(self.ids):
            object.__setattr__(self, "sections", torch.empty(len(self.ids), 0, dtype=torch.int8))
        if len(self.sentence_end) != len(self.ids):
            object.__setattr__(self, "sentence_end", torch.zeros(len(self.ids), dtype=torch.bool))


class Characters(NamedTuple):
    """What is known of every character of a text."""

    support: np.ndarray  # [characters] bool: whether a token that ends there may be a sample
    response: np.ndarray  # [characters] bool: whether the model wrote it
    known: np.ndarray  # [characters, C] bool: whether a label is known there
    section: np.ndarray  # [characters, C] int64: the number of each label's section, or -1


class Rendered(NamedTuple):
    """A record as the model reads it: the text, and its tokens with the characters start .. end that each covers."""

    text: str
    ids: list[int]  # [T]
    offsets: list[tuple[int, int]]  # [T] into `text`; (0, 0) for a token that stands for none of it
    head: int  # characters before the response; 0 in a chat
    marker: str  # with which the prompt ends and the response begins; it was left out of the prompt
    place: np.ndarray  # [len(response)] int64: where in `text` each character of the response is, or -1
    pieces: Sequence[Placed]  # of `text` that the model wrote: one, or in a chat one for each turn of the assistant's


def render(record: Record, tokenizer: Any, options: TextOptions = AS_TEXT) -> Rendered:
    """The text of a record with its prompt, its tokens, and where in it is what the model wrote, as far as it counts.

    A response that the model wrote for this run has its own tokens, behind those of what it read.
    Raises InputError as `prompts.open_response` does, and Unusable for turns that a chat template does not take.
    """
    if record.written:
        return _render_written(record, record.written, tokenizer, options)
    if record.chat:
        text, place, pieces = place_chat(record.chat, record.response, tokenizer, options.day)
        if options.support == "last_assistant" and pieces:  # what comes before is its prompt
            pieces = [piece for piece in pieces if piece.turn == pieces[-1].turn]
            place = np.where(place >= pieces[0].start, place, -1)
        return Rendered(text, *encode(text, "chat", tokenizer, options.bos), 0, "", place, pieces)
    head, marker = open_response(record.problem, record.response, options.prompt, tokenizer, day=options.day)
    tokens = encode(head + record.response, options.prompt, tokenizer, options.bos)
    return _behind_head(record, head, marker, tokens)


def _behind_head(record: Record, head: str, marker: str, tokens: tuple[list[int], list[tuple[int, int]]]) -> Rendered:
    """The response of a record behind the text `head`, with the ids and offsets of all tokens."""
    text = head + record.response
    front = head.rfind(record.problem) + len(record.problem) if record.problem and record.problem in head else 0
    place = np.arange(len(head), len(text))
    return Rendered(text, *tokens, len(head), marker, place, [Placed(0, front, len(head), len(text))])


def _render_written(record: Record, written: Written, tokenizer: Any, options: TextOptions) -> Rendered:
    """A record whose response is the tokens that a model wrote behind a text that it read."""
    ids, offsets = encode_head(written.head, options.prompt, tokenizer, options.bos)
    n = len(written.head)
    own = [(start + n, end + n) if start < end else (0, 0) for start, end in written.spans]
    return _behind_head(record, written.head, "", ([*ids, *written.ids], [*offsets, *own]))


def tokenize(
    record: Record,
    tokenizer: Any,
    labels: Sequence[str],
    options: TextOptions = AS_TEXT,
    *,
    section_labels: Sequence[str] = (),
) -> Chain:
    """One record as token ids, label codes for each of `labels`, and `sections` for each of `section_labels`.

    A token takes the labels of the sections that hold its last character that is not white space (its last character,
    where all are), so a token that straddles a border belongs to the later section.  Text in no section is UNKNOWN
    (`unlabelled: ignore`) or OUTSIDE (`negative`), or which of them the format says (`auto`).  Tokens that the model
    did not write are neither samples nor labelled, nor are those outside of the `region`, and of a chat those of the
    assistant's earlier turns (`support: last_assistant`); with `all`, those that the model did not write are samples
    labelled OUTSIDE.  Special tokens are never either.
    """
    rendered, named = render(record, tokenizer, options), list(dict.fromkeys([*labels, *section_labels]))
    characters = _label_characters(record, rendered, named, options)
    ids, offsets = np.array(rendered.ids, dtype=np.int64), np.array(rendered.offsets, dtype=np.int64).reshape(-1, 2)
    special = np.isin(ids, list(special_ids(tokenizer)))
    read = np.flatnonzero(~special & (offsets[:, 0] < offsets[:, 1]))  # the tokens that stand for text
    last = _last_letters(rendered.text, offsets[read])
    sample = _marked(len(ids), read[characters.support[last]])
    found = np.where(characters.known[last], _codes_along(characters.section[last]), UNKNOWN)
    codes = np.full((len(ids), len(named)), UNKNOWN, dtype=np.int8)
    codes[sample] = found[characters.support[last]]
    ends = _marked(len(ids), read[_sentence_ends(rendered.text, offsets[read], last)])
    return Chain(
        record.id,
        torch.from_numpy(ids),
        _chosen(codes, named, labels),
        torch.from_numpy(sample),
        start=next(iter(read[characters.response[last]].tolist()), len(ids)),
        category=record.category,
        row=record.row,
        marker=rendered.marker,
        sections=_chosen(codes, named, section_labels),
        sentence_end=torch.from_numpy(ends),
    )


def _marked(n: int, tokens: np.ndarray) -> np.ndarray:
    """Which of n tokens are among these: bool [n]."""
    marked = np.zeros(n, dtype=bool)
    marked[tokens] = True
    return marked


def _chosen(codes: np.ndarray, named: Sequence[str], names: Sequence[str]) -> Tensor:
    """Those of the codes [T, n] of the n labels `named` that are of `names`, in their order."""
    return torch.from_numpy(np.ascontiguousarray(codes[:, [named.index(name) for name in names]]))


def _last_letters(text: str, offsets: np.ndarray) -> np.ndarray:
    """Which character of a text is the last of each token that is not white space (the last one, where all are).

    offsets: [T, 2] int64; returns [T] int64.
    """
    blank = np.fromiter(map(str.isspace, text), bool, len(text))
    letter = np.maximum.accumulate(np.where(blank, -1, np.arange(len(text))))  # the last one up to each character
    start, end = offsets.T
    found = letter[end - 1]
    return np.where(found < start, end - 1, found)


def _sentence_ends(text: str, offsets: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Whether a sentence or a line ends in each token: bool [T].

    One ends in a token whose last letter, `last` [T], is one of STOPS, or that holds one of LINE_ENDS.  Of the tokens
    that a letter is divided among only the last counts, since none before it knows which letter that is.
    offsets: [T, 2] int64.
    """
    start, end = offsets.T
    after = np.append(start[1:], len(text))[: len(start)]  # where the next token begins
    stops = np.fromiter((text[place] in STOPS for place in last), bool, len(last))
    lines = np.append(0, np.cumsum(np.fromiter(map(LINE_ENDS.__contains__, text), bool, len(text))))  # up to each place
    return (stops & (last < after)) | (lines[np.clip(after, start, end)] > lines[start])


def _label_characters(record: Record, rendered: Rendered, labels: Sequence[str], options: TextOptions) -> Characters:
    """The labels of the characters of a text, and which of them count."""
    size = len(rendered.text)
    response = np.zeros(size, dtype=bool)
    response[rendered.place[rendered.place >= 0]] = True
    support = response & _in_region(rendered, options)
    complete = options.unlabelled == "negative" or (options.unlabelled == "auto" and record.complete)
    known = support[:, None] & np.array([complete or label in record.everywhere for label in labels], dtype=bool)
    section = np.full((size, len(labels)), -1, dtype=np.int64)
    for _, begin, stop in record.annotation.sections:
        inside = rendered.place[begin:stop]
        known[inside[inside >= 0]] = True
    for number, (label, begin, stop) in enumerate(record.sections):
        if label in labels:
            inside = rendered.place[begin:stop]
            section[inside[inside >= 0], labels.index(label)] = number
    if options.support == "all":
        support |= ~response
        known |= ~response[:, None]
    return Characters(support, response, known, section)


def _in_region(rendered: Rendered, options: TextOptions) -> np.ndarray:
    """For each character of a text whether it is in the region that counts: bool [characters]."""
    inside = np.zeros(len(rendered.text), dtype=bool)
    for _, front, start, end in rendered.pieces:
        if options.region == "all":
            inside[start:end] = True
        else:
            thought, answered = thinking(rendered.text[front:end], options.markers)
            inside[start:end] = (thought if options.region == "think" else answered)[start - front :]
    return inside


def _codes_along(section: np.ndarray) -> np.ndarray:
    """The code of each label at each token of a text: [T, C] int8.

    section: the number of each label's section, or -1, [T, C] int64.  A section begins at a token that is in another
    one than the last token that was in any.
    """
    inside = section >= 0
    t = np.arange(1, len(section) + 1)[:, None]
    upto = np.maximum.accumulate(np.where(inside, t, 0), axis=0)  # the last token that was in any, from 1; 0: none yet
    before = np.concatenate([np.zeros_like(upto[:1]), upto[:-1]])
    number = np.concatenate([np.full_like(section[:1], -1), section])
    begun = section != np.take_along_axis(number, before, axis=0)
    return np.where(inside, np.where(begun, ONSET, INSIDE), OUTSIDE).astype(np.int8)
