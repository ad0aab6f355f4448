"""The keys of a config that say how a model writes the chains on which its probes are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from streamprobe.config.keys import key, require
from streamprobe.data.label_rules import LabelRule
from streamprobe.model.sampling import Sampling

ABLATE = "ablate"
STRONGEST = 1e6  # standard deviations


@dataclass
class GenerationConfig:
    """With source generate: how the model answers the problems of the data."""

    _argument_group_name = "generation"

    responses: int = key(
        1, "Answers to each problem on a trip over the problems; all are on the same side of the split."
    )
    max_new_tokens: int = key(512, "Most tokens of an answer; fewer where the model's context ends.")
    temperature: float = key(1.0, "Of sampling; 0 is the likeliest token.")
    top_p: float = key(1.0, "Drawn is among the likeliest tokens that hold so much probability.")
    generate_batch: int = key(16, "Answers that are written at once.")
    generate_seed: int = key(0, "Seed of sampling; of one seed all answers are the same.")
    steer: str | None = key(
        None, "Folder of a finished run, with whose probe the model is steered while it writes; none is as it is."
    )
    steer_layer: int | None = key(None, "Layer of that probe; none is that of the run's verdict.")
    steer_strength: str = key(
        ABLATE,
        "How the model is steered: ablate takes the probe's direction out; a number adds so many standard deviations "
        "of the activations along it.",
    )

    def __post_init__(self) -> None:
        for name in ("responses", "max_new_tokens", "generate_batch"):
            value = getattr(self, name)
            require(0 < value < 2**31, f"{name} {value}", "at least 1", f"correct --{name}")
        seed = self.generate_seed
        require(0 <= seed < 2**31, f"generate_seed {seed}", "0 .. 2**31 - 1", "correct --generate_seed")
        assert self.sampling  # raises InputError for what cannot be
        try:
            holds = self.strength is None or (isfinite(self.strength) and abs(self.strength) <= STRONGEST)
        except ValueError:
            holds = False
        expected = f"{ABLATE}, or a number of at most {STRONGEST:,.0f}"
        require(holds, f"steer_strength {self.steer_strength}", expected, "correct --steer_strength")
        require(
            self.temperature > 0 or self.responses == 1,
            f"responses {self.responses} at temperature 0",
            "1, since all would be the same",
            "raise --temperature, or drop --responses",
        )
        if self.steer is None:
            for name in ("steer_layer", "steer_strength"):
                value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
                require(value == usual, f"{name} {value} without steer", "both", f"give --steer, or drop --{name}")

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; the seed is that of the first batch alone."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def strength(self) -> float | None:
        """The number of standard deviations that is added; None where the direction is taken out instead."""
        return None if self.steer_strength == ABLATE else float(self.steer_strength)


def check_written(
    generation: GenerationConfig, *, written: bool, rules: Sequence[LabelRule], labels: Sequence[str], tp_size: int
) -> None:
    """Raises InputError for a config whose chains are `written` by the model, or not, and that does not allow it.

    What a model writes has the labels that `rules` give it, and no others: `labels` are those that are probed.
    """
    if not written:
        require(
            generation.steer is None,
            "steer with chains that the model does not write",
            "source generate, in which it does",
            "give --source generate, or drop --steer",
        )
        return
    require(
        bool(rules),
        "source generate without label_rules",
        "rules that label what the model writes",
        "give --label_rules, such as 'backtracking=sentence:\\bwait\\b'",
    )
    known = list(dict.fromkeys(rule.label for rule in rules))
    strange = [label for label in labels if label not in known]
    require(
        not strange,
        f"labels {' '.join(strange)} with source generate",
        f"of {', '.join(known)}, which label_rules give",
        "correct --labels, or add a rule to --label_rules",
    )
    require(
        tp_size == 1,
        f"tp_size {tp_size} with source generate",
        "1: a model that writes lies whole in each process",
        "drop --tp_size, or let --device_map auto spread it over devices",
    )
