"""See a model's probes while it writes: in a library by `watch`; `streamprobe watch` shows what one of them says.

The alarm of a probe is on at the tokens whose probability is at or above the threshold that validation chose.

Probes that look back begin with the first token that the model writes, as they did with a response in training, and
look back on all that it has written since.  Where a prompt holds tokens that they would have read there, such as
earlier answers in a chat or the beginning of this one, `samples` says which: they are read first.

Shapes: B chains in a batch, T tokens of the prompt, L layers, K columns.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamprobe.activations.reading import places_of, side_by_side
from streamprobe.model.hooks import tap
from streamprobe.model.places import main_device
from streamprobe.model.points import Place
from streamprobe.model.trial import find_places
from streamprobe.probes.base import Probes
from streamprobe.tools.generation import Pieces

Found = SimpleQueue[tuple[Tensor, Tensor] | None]  # tokens [B] and their probabilities [B, L, K], as they come


def watch(
    model: Any,
    probes: Probes,
    input_ids: Tensor,
    max_new_tokens: int = 256,
    *,
    samples: Tensor | None = None,
    **options: Any,
) -> Generator[tuple[Any, Tensor], None, None]:
    """Generates with `model.generate` and yields (token, probabilities) as it writes.

    input_ids [T]: the token is an int and its probabilities are [L, K] float32.  input_ids [B, T] (padded on the left,
    with an `attention_mask` among the options): tokens [B] int64 and [B, L, K]; a chain that has ended goes on with the
    pad token, and what is said of that means nothing.  Both are on the model's device, to which the tensors that are
    given are moved.  `options` are those of `generate`: do_sample, temperature, eos_token_id, stop_strings, ...; no
    beams, and one sequence a prompt.  `samples`, bool in the shape of input_ids: see above; other probes need none.

    The tokens are those that `generate` would write.  A token is yielded once the model has read it, which is when it
    writes the next; the one that ends a text before `max_new_tokens` is never read: its probabilities are NaN.  The
    model runs in a thread of its own, a few tokens ahead of the consumer; a consumer that leaves stops it.
    """
    device = main_device(model)
    ids = torch.atleast_2d(input_ids).to(device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    options |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": False}
    before = None if samples is None else torch.atleast_2d(samples).to(device)
    steps = _watch(model, _Reader(probes.to(device), len(ids), before), ids, options)
    return steps if input_ids.dim() == 2 else _alone(steps)


def _watch(
    model: Any, reader: "_Reader", ids: Tensor, options: dict[str, Any]
) -> Generator[tuple[Any, Tensor], None, None]:
    """What `watch` yields of ids [B, T]; it begins when the first token is asked for."""
    found, left, most = Found(), Event(), options["max_new_tokens"]
    options |= {"max_new_tokens": most + 1}  # to read the last one
    with ThreadPoolExecutor(1) as pool:
        try:
            writing, n = pool.submit(_write, model, reader, ids, found, left=left, options=options), 0
            while (item := found.get()) is not None:
                yield item
                n += 1
            new = writing.result()[:, ids.shape[1] :]
            if n < new.shape[1] <= most:
                yield new[:, -1], reader.nothing()
        finally:
            left.set()


def _alone(steps: Generator[tuple[Any, Tensor], None, None]) -> Generator[tuple[Any, Tensor], None, None]:
    """The steps of the only chain there is."""
    with closing(steps):
        for token, given in steps:
            yield int(token), given[0]


class _Reader:
    """Probes on their way over what a model reads and writes in B chains; they know what came before."""

    def __init__(self, probes: Probes, n_chains: int, samples: Tensor | None):
        """`samples` [B, T]: which tokens of the prompts they read."""
        self.places, self.bias, self.samples = places_of(probes.reads), probes.bias, samples
        self.n_features = probes.n_features
        self.scorer, self.chain = probes.scorer(), torch.arange(n_chains, device=probes.bias.device)

    def read_prompts(self, taken: Mapping[Place, Tensor]) -> None:
        """Reads the samples of the prompts, whose places are taken [B, T, W], or [B T, W]."""
        if self.samples is None or not self.samples.any():
            return
        found, (chain, token) = self._of(taken), self.samples.nonzero(as_tuple=True)
        assert all(acts.shape[:2] == self.samples.shape for acts in found), "prompts read in one piece"
        own = [acts[chain.to(acts.device), token.to(acts.device)] for acts in found]
        self.scorer(self._gather(own), chain)

    def read_newest(self, taken: Mapping[Place, Tensor]) -> Tensor:
        """Probabilities [B, L, K] at the last token of each chain."""
        return self.scorer(self._gather([acts[:, -1] for acts in self._of(taken)]), self.chain).sigmoid()

    def nothing(self) -> Tensor:
        """NaN [B, L, K], of tokens that are never read."""
        return self.bias.new_full((len(self.chain), *self.bias.shape), math.nan)

    def _of(self, taken: Mapping[Place, Tensor]) -> list[Tensor]:
        """What was taken at each of the places, [B, T, W]."""
        return [taken[place].view(len(self.chain), -1, taken[place].shape[-1]) for place in self.places]

    def _gather(self, acts: Sequence[Tensor]) -> Tensor:
        """Activations [n, L, D] of n tokens, of [n, W] of each place."""
        return side_by_side([own.to(self.bias.device) for own in acts], self.n_features)


def _write(model: Any, reader: _Reader, ids: Tensor, found: Found, *, left: Event, options: dict[str, Any]) -> Tensor:
    """Generates from ids [B, T] and puts what is found at each token into the queue; None at the end, however it comes.

    Stops once the consumer has `left`.
    """
    hooks = find_places(model, reader.places, ids.unique().tolist()).hooks
    try:
        with tap(hooks) as taken:

            def read(written: Tensor, _scores: Any, **_rest: Any) -> Tensor:
                """A stopping criterion: asked when a token is chosen, and the one before it has just been read."""
                assert len(written) == len(ids), "beams and several sequences a prompt cannot be watched"
                if written.shape[1] > ids.shape[1] + 1:
                    found.put((written[:, -2], reader.read_newest(taken)))
                else:
                    reader.read_prompts(taken)
                return torch.full((len(ids),), left.is_set(), device=ids.device)

            criteria = [*options.pop("stopping_criteria", []), read]
            return model.generate(ids, stopping_criteria=criteria, **options)
    finally:
        found.put(None)


class Step(NamedTuple):
    """A token that the model wrote, and what one probe says of it."""

    token: int
    text: str  # that it completes: nothing for a token that ends inside of a character
    probability: float  # nan for the token that ends a text, which is never read
    alarm: bool
    lags: Mapping[int, float]  # probability at every lag, of the same layer, label and target


class Mark(NamedTuple):
    """What is shown of a piece of text, most often one token."""

    text: str
    probability: float
    alarm: bool
    level: float  # see `level_of`
    lags: Mapping[int, float]  # as in `Step`


def alarm_threshold(bank: Probes, place: tuple[int, int]) -> float:
    """The probability from which on a probe raises the alarm."""
    assert bank.threshold is not None
    return bank.threshold[place].sigmoid().item()


def level_of(probability: float, threshold: float) -> float:
    """Where a probability lies on a scale from 0 to 1 in which its probe's threshold is always at 0.5.

    It is r / (1 + r), where r is how many times the odds of the probability are those of the threshold.
    """
    above, below = probability * (1 - threshold), threshold * (1 - probability)
    return above / (above + below) if above + below else 0.5


def read_steps(
    written: Iterable[tuple[int, Tensor]], bank: Probes, place: tuple[int, int], pieces: Pieces
) -> Iterator[Step]:
    """What the probe at `place` says of each token that `watch` gives: an int and its probabilities [L, K]."""
    i, k = place
    own, threshold = bank.columns[k], alarm_threshold(bank, place)
    row = [(column.lag, j) for j, column in enumerate(bank.columns) if column._replace(lag=own.lag) == own]
    for token, probabilities in written:
        of_layer = probabilities[i].tolist()
        lags = {lag: of_layer[j] for lag, j in row}
        yield Step(token, pieces.push(token), of_layer[k], of_layer[k] >= threshold, lags)


def marks(steps: Iterable[Step], threshold: float, pieces: Pieces) -> Iterator[Mark]:
    """What is shown of each piece of text, as it comes: the highest probability since the piece before.

    `pieces` is where the text of the steps comes from; what is left in it at the end is the last piece.
    """
    highest, lags = 0.0, dict[int, float]()

    def mark(text: str) -> Mark:
        return Mark(text, highest, highest >= threshold, level_of(highest, threshold), lags)

    for step in steps:
        if not math.isnan(step.probability):
            highest, lags = max(highest, step.probability), dict(step.lags)
        if step.text:
            yield mark(step.text)
            highest, lags = 0.0, {}
    if text := pieces.rest():
        yield mark(text)
