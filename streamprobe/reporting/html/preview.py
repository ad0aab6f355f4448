"""The page of `streamprobe preview`: what a few chains are to the model and to the probes, token by token.

Shapes: T tokens of a chain that are shown, C labels, K columns.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import chain as joined
from typing import Any

from streamprobe.lags import INSIDE, ONSET, UNKNOWN, Column
from streamprobe.reporting.fed_tokens import FedChain, Word
from streamprobe.reporting.html.document import document, own_file
from streamprobe.system.console import printable

MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
KINDS = {  # class of a token of no section: what it is
    "out": "no sample: prompt or special token",
    "unknown": "a sample without a label: neither positive nor negative",
    "negative": "labelled, in no section: negative",
}
HOW = (
    "What the model will read, in boxes of a token each, and the labels as the probes will get them. Point at a token "
    "for its number, its id, its labels, and what every column asks of it: ● positive, ○ negative, · not asked. Lag k: "
    "the activation at token t predicts the label at token t + k."
)


def render(
    name: str,
    chains: Sequence[FedChain],
    columns: Sequence[Column],
    *,
    labels: Sequence[str],
    preflight: str,
    settings: Mapping[str, Any],
) -> str:
    """The page of a run's data, given C `labels` and K `columns`; `settings` are keys of its config to show."""
    looks = _looks(chains)
    links = " ".join(f"<a href='#fed{i}'>{escape(c.split)} {_name(c.id)}</a>" for i, c in enumerate(chains))
    facts = "\n".join(f"{key}: {value!r}" for key, value in settings.items())
    body = [
        f"<p class=note>{HOW}</p>",
        f"<details open><summary>All chains, in numbers</summary><pre>{escape(printable(preflight))}</pre></details>",
        f"<details><summary>How they are read</summary><pre>{escape(facts)}</pre></details>",
        f"<nav class=note>{links}</nav>",
        _legend(chains, labels),
        "<fieldset id=chooser></fieldset><p class=note id=said></p>",
        *(_chain(i, chain, looks) for i, chain in enumerate(chains)),
        "<aside id=token aria-live=polite></aside>",
    ]
    style = own_file("page.css") + own_file("preview.css") + _style(looks, len(labels))
    return document(name, body, style=style, script=own_file("preview.js"), held=_held(chains, columns, labels))


def _held(chains: Sequence[FedChain], columns: Sequence[Column], labels: Sequence[str]) -> dict[str, Any]:
    """What the script reads: the number of each token's pattern, and the patterns."""
    patterns = [_patterns(chain) for chain in chains]
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(joined.from_iterable(patterns)))}
    return {
        "labels": list(labels),
        "columns": [[labels.index(c.label), c.target, c.lag] for c in columns],
        "patterns": list(numbers),
        "chains": [
            {
                "first": chain.first,
                "length": chain.length,
                "ids": chain.ids,
                "patterns": [numbers[pattern] for pattern in own],
            }
            for chain, own in zip(chains, patterns, strict=True)
        ],
    }


def _patterns(chain: FedChain) -> list[str]:
    """Of each token [T] its C codes (`-` for none) and what its K columns ask of it: `.`, `0` or `1`."""
    codes = ("".join("-012"[code + 1] for code in row) for row in chain.codes.tolist())
    asked = ("".join(".01"[state + 1] for state in row) for row in chain.asked.tolist())
    return [f"{a}{b}" for a, b in zip(codes, asked, strict=True)]


def _states(chain: FedChain) -> list[str | tuple[int, ...]]:
    """Of each token [T] the name of its kind, or its codes where it is in a section."""
    found: list[str | tuple[int, ...]] = []
    for codes, sample in zip(chain.codes.tolist(), chain.support.tolist(), strict=True):
        if max(codes) >= INSIDE:
            found.append(tuple(codes))
        elif sample:
            found.append("unknown" if min(codes) == UNKNOWN else "negative")
        else:
            found.append("out")
    return found


def _looks(chains: Sequence[FedChain]) -> dict[tuple[int, ...], str]:
    """The class of a token for each way in which tokens are in sections."""
    found = dict.fromkeys(state for chain in chains for state in _states(chain) if not isinstance(state, str))
    return {codes: f"in k{number}" for number, codes in enumerate(found)}


def _style(looks: Mapping[tuple[int, ...], str], n_labels: int) -> str:
    """A stripe for each label that a token has, with a bar at its left where a section of it begins."""
    rules = [f".c{c} {{ --colour: {_hue(c)}; }}" for c in range(n_labels)]
    for codes, look in looks.items():
        own = [c for c, code in enumerate(codes) if code >= INSIDE]
        layers = []
        for i, c in enumerate(own):
            at = f"0 {100 * i / (len(own) - 1) if len(own) > 1 else 0:.4g}%"
            height = f"{100 / len(own):.4g}%"
            if codes[c] == ONSET:
                layers.append(f"linear-gradient(hsl({_hue(c)} var(--line)) 0 0) {at} / 4px {height} no-repeat")
            layers.append(f"linear-gradient(hsl({_hue(c)} var(--tint)) 0 0) {at} / 100% {height} no-repeat")
        bar = " padding-left: 6px;" * (ONSET in codes)
        rules.append(f".fed .{look.split()[1]} {{ background: {', '.join(layers)};{bar} }}")
    return "\n".join(rules)


def _hue(label: int) -> str:
    """Degrees on the colour wheel, as far from those of all labels before as can be: steps of the golden angle."""
    return f"{(210 + 137.5 * label) % 360:g}"


def _legend(chains: Sequence[FedChain], labels: Sequence[str]) -> str:
    """What each look means, and how many of the tokens shown have it."""
    found = Counter(state for chain in chains for state in _states(chain) if isinstance(state, str))
    found["out"] = sum(int((~chain.support).sum()) for chain in chains)  # also those in a section
    items = [f"<b class={kind}>token</b> {about}: {found[kind]:,}" for kind, about in KINDS.items()]
    for c, label in enumerate(labels):
        inside = sum(int((chain.codes[:, c] >= INSIDE).sum()) for chain in chains)
        begun = sum(int((chain.codes[:, c] == ONSET).sum()) for chain in chains)
        items.append(
            f"<b class='in c{c} begins'>first</b><b class='in c{c}'>token</b> {_name(label)}: {inside:,}, "
            f"{begun:,} of them the first of a section"
        )
    marks = "␣ space, ⏎ line end, ⇥ tab, \\xNN a byte of a character that has others in other tokens"
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul class='fed legend'>{listed}<li>{marks}</li></ul>"


def _chain(number: int, chain: FedChain, looks: Mapping[tuple[int, ...], str]) -> str:
    """A chain's tokens, and what they are in numbers."""
    states = _states(chain)
    found = Counter(state if isinstance(state, str) else "in" for state in states)
    n, last = len(chain.ids), chain.first + len(chain.ids) - 1
    shown = f"{n:,} tokens" if n == chain.length else f"tokens {chain.first:,} to {last:,} of {chain.length:,}"
    return (
        f"<h2 id=fed{number}>{escape(chain.split)}: {_name(chain.id)}</h2>"
        f"<p class=note>{shown}: {int((~chain.support).sum()):,} are no samples, {found['unknown']:,} have no label, "
        f"{found['negative']:,} are negative, {found['in']:,} in a section</p>"
        f"<div class=fed data-chain={number} tabindex=0>{''.join(_tokens(chain, states, looks))}</div>"
    )


def _tokens(
    chain: FedChain, states: Sequence[str | tuple[int, ...]], looks: Mapping[tuple[int, ...], str]
) -> Iterator[str]:
    """An element for each token, a new line behind a line end, and a sign where the response begins."""
    samples = chain.support.tolist()
    for t, (word, state, sample) in enumerate(zip(chain.words, states, samples, strict=True)):
        if chain.first + t == chain.start:
            yield "<i>response</i>"
        look = state if isinstance(state, str) else looks[state] + " out" * (not sample)
        kind = "" if word.kind == "text" else f" {word.kind}"
        yield f"<b class='{look}{kind}'>{escape(visible(word))}</b>"
        if word.kind == "text" and "\n" in word.text:
            yield "<br>"


def _name(text: str) -> str:
    """A name from the data, such that nothing in it is invisible but a space."""
    return escape(visible(Word(text, "text")).replace("␣", " "))


def visible(word: Word) -> str:
    """The text of a token with signs for white space, and escapes for what else cannot be seen."""
    shown = "".join(MARKS.get(c) or (ascii(c)[1:-1] if _is_hidden(c) else c) for c in word.text)
    return f"◌{shown}" if word.text and unicodedata.combining(word.text[0]) else shown or "∅"


def _is_hidden(c: str) -> bool:
    return unicodedata.category(c)[0] in "CZ"
