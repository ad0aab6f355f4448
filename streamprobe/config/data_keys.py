"""The keys of a config that say what the data are, and how their text is read."""

from dataclasses import dataclass
from typing import Literal

from streamprobe.config.keys import is_day, key, require
from streamprobe.data.detect import AUTO, COLUMNS, FormatQuery
from streamprobe.data.formats import FORMATS
from streamprobe.data.label_rules import LabelRule, parse_rule

MOST_FOLDS = 20  # each has probes of its own


@dataclass
class DataConfig:
    """The data: where they lie, how labels lie in them, and how their text is read."""

    _argument_group_name = "data"

    data: str = key(
        "",
        "CSV, TSV, JSON, JSON-lines, parquet or text file (also .gz, .zst), a folder or glob of these, the URL of a "
        "file, or the id of a data set on the hub.",
    )
    data_sha256: str | None = key(None, "SHA-256 that the data file must have.")
    format: str = key("auto", "How labels lie in the data; auto looks at the columns: <formats>.")
    data_split: str = key("train", "Split of a data set on the hub.")
    data_config: str | None = key(None, "Configuration (subset) of a data set on the hub.")
    problem_column: str | None = key(None, "Column with the problem; none is found by its name, as for the next ones.")
    response_column: str | None = key(None, "Column with what is read: the text that the model wrote, turns, tokens.")
    annotation_column: str | None = key(
        None, "Column with its labels: an annotated copy, spans, a label for each token."
    )
    id_column: str | None = key(None, "Column with the chain's name.")
    label_rules: list[str] | None = key(
        None,
        "Labels that the text itself gives, each as LABEL=REGEX or LABEL=SCOPE:REGEX, with a scope of <scopes>; "
        "beside those of the data.",
    )
    prompt: str = key(
        r"{problem}\n\n",
        r"Text before the response: a string that holds {problem} (\n is a line end), or chat for the chat template.",
    )
    chat_date: str | None = key(
        None, "Day that a chat template writes, YYYY-MM-DD; none is the day on which the run begins."
    )
    support: Literal["assistant", "last_assistant", "all", "response"] = key(
        "assistant",
        "Tokens that count: the response's, which in a chat are those of the assistant's turns; of its last turn; or "
        "all, with what the model did not write as negatives.  (response: assistant, as it was called.)",
    )
    unlabelled: Literal["auto", "ignore", "negative"] = key(
        "auto",
        "Response text in no section: left out (a text without any is refused), or negative; auto is left out in an "
        "annotated copy, and negative in other formats.",
    )
    region: Literal["all", "think", "answer"] = key(
        "all", "The part of the response that counts: all, what is thought, or what is answered behind that."
    )
    region_markers: list[str] | None = key(
        None, "Two texts between which is thought; none are <think> and others that are known."
    )
    response: Literal["original", "rejoined"] = key(
        "original", "The response as it was written, or the annotated sections alone, joined by spaces."
    )
    bad_chains: Literal["refuse", "skip"] = key(
        "refuse",
        "A chain with an activation that is infinite or not a number: end in a line that names it, or read all chains "
        "once more at the start and leave such chains out.",
    )
    label_names: list[str] | None = key(
        None, "Labels to call otherwise, each as NAME=LABEL, such as '5. backtracking=backtracking'."
    )
    bos: bool = key(True, "Begin every chain with the beginning-of-sequence (BOS) token, where the tokenizer has one.")
    category_column: str | None = key(None, "Column with the kind of problem; none is the id without its number.")
    max_chains: int | None = key(None, "Use only so many chains, evenly spaced over the data; none is all.")
    test_share: float = key(0.2, "Share of all problems held out for results.csv.")
    validation_share: float = key(0.1, "Share of the other problems that stops training and picks thresholds.")
    split_seed: int = key(42, "Seed of the split.")
    split_by: Literal["problem", "chain"] = key(
        "problem",
        "What is drawn: problems, each with all of its chains; or chains, as in the original experiment, where another "
        "chain of a test problem is left out.",
    )
    split: Literal["random", "category"] = key(
        "random", "Test chains are a random test_share, or those of test_categories: does a probe transfer?"
    )
    test_categories: list[str] | None = key(None, "With split category: the kinds of problem that are held out.")
    validation: Literal["own", "test"] = key(
        "own", "Chains that stop training and pick thresholds: a validation_share, or the test chains (which flatters)."
    )
    folds: int = key(
        1,
        "More than 1, such as 5: cross-fitting.  Every chain is a test chain, judged by probes that the other folds "
        "trained, each with all chains of its problem; test_share and split_by are not used.",
    )

    def __post_init__(self) -> None:
        self.support = "assistant" if self.support == "response" else self.support
        self.prompt = self.prompt.replace(r"\n", "\n")
        known = (AUTO, *FORMATS)
        require(self.format in known, f"format {self.format}", f"one of {', '.join(known)}", "correct --format")
        require(
            self.max_chains is None or self.max_chains > 0, f"max_chains {self.max_chains}", "at least 1", "drop it"
        )
        self._check_labels()
        self._check_regions()
        self._check_prompt()
        self._check_split()

    def _check_labels(self) -> None:
        for pair in self.label_names or []:
            name, _, label = pair.rpartition("=")
            require(
                bool(name.strip() and label.strip()) and pair.isprintable(),
                f"label_names {pair!r}",
                "a name and what to call it, as in Backtracking=backtracking",
                "correct --label_names",
            )
        names = [pair.rpartition("=")[0] for pair in self.label_names or []]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"label_names with {twice} twice", "each name once", "drop one in --label_names")
        labels = [rule.label for rule in self.rules]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        require(not twice, f"label_rules with {twice} twice", "one rule a label", "join its patterns by |")

    def _check_regions(self) -> None:
        if self.region_markers is None:
            return
        begin_and_end = {marker for marker in self.region_markers if marker.strip()}
        require(
            len(self.region_markers) == len(begin_and_end) == 2,
            f"region_markers {' '.join(self.region_markers)}",
            "two texts that differ: where thinking begins, and where it ends",
            "try --region_markers '<think>' '</think>'",
        )
        require(
            self.region != "all",
            "region_markers with region all",
            "region think or answer",
            "give --region, or drop --region_markers",
        )

    def _check_prompt(self) -> None:
        require(
            self.prompt == "chat" or "{problem}" in self.prompt,
            f"prompt {self.prompt!r}",
            "chat or a string that holds {problem}",
            "write {problem} where the problem goes",
        )
        require(
            self.chat_date is None or is_day(self.chat_date),
            f"chat_date {self.chat_date}",
            "a day of the form YYYY-MM-DD",
            "try 2026-01-31",
        )

    def _check_split(self) -> None:
        require(0 <= self.split_seed < 2**32, f"split_seed {self.split_seed}", "0 .. 2**32 - 1", "correct --split_seed")
        for name in ("test_share", "validation_share"):
            share = getattr(self, name)
            require(0 < share < 1, f"{name} {share}", "a share between 0 and 1", "try 0.2")
        require(
            (self.split == "category") == bool(self.test_categories),
            f"split {self.split} with test_categories {' '.join(self.test_categories or ['none'])}",
            "split category with test_categories, or neither",
            "give both --split category and --test_categories, or drop both",
        )
        self._check_folds()

    def _check_folds(self) -> None:
        require(1 <= self.folds <= MOST_FOLDS, f"folds {self.folds}", f"1 .. {MOST_FOLDS}", "try --folds 5")
        plain = DataConfig.__dataclass_fields__
        for name in ("split", "validation"):
            value = getattr(self, name)
            require(
                self.folds == 1 or value == plain[name].default,
                f"folds {self.folds} with {name} {value}",
                f"{name} {plain[name].default}: with folds every chain is tested, once",
                f"drop --folds or --{name}",
            )

    @property
    def rules(self) -> list[LabelRule]:
        """`label_rules`, each taken apart."""
        return [parse_rule(text) for text in self.label_rules or []]

    @property
    def asked(self) -> FormatQuery:
        """What the keys say of the format and the columns."""
        columns = {name: getattr(self, f"{name}_column") for name in (*COLUMNS, "category")}
        return FormatQuery(self.format, **columns)

    @property
    def open_keys(self) -> set[str]:
        """Keys that the data themselves settle: the format and the columns that are not given; the prompt of a chat."""
        columns = {f"{name}_column" for name in COLUMNS}
        given = {name for name in columns if getattr(self, name) is not None}
        return {"prompt", *columns - given} | ({"format"} if self.format == AUTO else set())

    @property
    def names(self) -> dict[str, str]:
        """`label_names` as name -> label."""
        return {name: label for name, _, label in (pair.rpartition("=") for pair in self.label_names or [])}
