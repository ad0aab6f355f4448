"""The kinds of probes: what each is called in a config, in a line what it is, and how it makes logits.

To add one, write a file with a `base.Form` and a row in KINDS.  Configs and help read the table: what needs torch is
imported when a form is made.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from streamprobe.probes.sites import LINEAR, MIXED

if TYPE_CHECKING:
    from streamprobe.probes.base import Form

MEANS = "ema"  # those that read running means


def _running_means(half_life: int) -> "Form":
    from streamprobe.probes.ema import RunningMeans

    return RunningMeans(half_life)


def _stack(_: int) -> "Form":
    from streamprobe.probes.joined import Joined

    return Joined("stack")


def _concat(_: int) -> "Form":
    from streamprobe.probes.joined import Joined

    return Joined("concat")


def _quadratics(rank: int) -> "Form":
    from streamprobe.probes.quadratic import quadratics

    return quadratics(rank)


def _networks(width: int) -> "Form":
    from streamprobe.probes.network import networks

    return networks(width)


def _attention(heads: int) -> "Form":
    from streamprobe.probes.attention import Attention

    return Attention(heads)


class Kind(NamedTuple):
    """A row of the table."""

    about: str
    number: int | None = None  # that a name ends in, such as 64 of mlp64: this or any other one; None: no name does
    form: "Callable[[int], Form] | None" = None  # of that number; None: its logits are those of linear probes
    in_epochs: bool = False  # whether it is trained behind the linear probes, in epochs over a sample of tokens


KINDS = {
    LINEAR: Kind("w.x + b"),
    "meandiff": Kind("the difference of both classes' means"),
    MEANS: Kind("linear on the running mean of the response, half-life 16 tokens", 16, _running_means),
    "stack": Kind("a weighted mean of the layers' logits", form=_stack),
    "concat": Kind("linear on all layers side by side", form=_concat),
    "quad": Kind("linear, with 16 squares beside", 16, _quadratics, in_epochs=True),
    "mlp": Kind("linear, with 64 rectified units beside", 64, _networks, in_epochs=True),
    "attn": Kind("linear, with 4 heads of attention to earlier tokens beside", 4, _attention, in_epochs=True),
    "top_k": Kind("linear on the 16 features that matter most", 16),
}


class Name(NamedTuple):
    """The name of a kind, taken apart."""

    family: str  # its row in KINDS
    number: int  # 0 where it has none


def split_name(name: str) -> Name:
    """The row of a kind and the number in its name.  Raises ValueError for what is no kind."""
    found = re.fullmatch(r"(.*?)([1-9][0-9]{0,4})?", name)
    assert found is not None
    family, number = found[1], int(found[2] or 0)
    if family not in KINDS or (KINDS[family].number is None) != (number == 0):
        raise ValueError(f"a kind that is not known ({name}, not {', '.join(kind_names())})")
    return Name(family, number)


def about(name: str) -> str:
    """A kind in a line, with the number in its name.  Raises ValueError for what is no kind."""
    family, number = split_name(name)
    kind = KINDS[family]
    return kind.about if kind.number is None else kind.about.replace(str(kind.number), str(number))


def is_kind(name: str) -> bool:
    """Whether that is the name of a kind."""
    try:
        split_name(name)
    except ValueError:
        return False
    return True


def kind_names() -> list[str]:
    """Every kind, those with a number with the usual one."""
    return [name if kind.number is None else f"{name}{kind.number}" for name, kind in KINDS.items()]


def form_of(name: str) -> "Form":
    """How probes of a kind that is not linear make logits.  Raises ValueError for another kind."""
    if name == MIXED:
        from streamprobe.probes.mixed import Mixed

        return Mixed()
    family, number = split_name(name)
    make = KINDS[family].form
    if make is None:
        raise ValueError(f"a kind of linear probes ({name})")
    return make(number)


def half_lives_of(names: Sequence[str]) -> list[int]:
    """The half-lives of those of the kinds that read running means, in their order."""
    return [number for family, number in map(split_name, names) if family == MEANS]


def trained_in_epochs(names: Sequence[str]) -> list[str]:
    """Those of the kinds that are trained in epochs over a sample of tokens, in their order."""
    return [name for name in names if KINDS[split_name(name).family].in_epochs]


def form_if_any(name: str) -> "Form | None":
    """How probes of a kind make logits; None of those that are linear in form."""
    return form_of(name) if name == MIXED or KINDS[split_name(name).family].form else None


def looks_back(name: str) -> bool:
    """Whether probes of a kind need all tokens of a chain, in their order."""
    form = form_if_any(name)
    return form is not None and form.looks_back
