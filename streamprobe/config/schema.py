"""The keys of a config, in groups, each with its unit, its default and its meaning."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal

from streamprobe.config.keys import key, require
from streamprobe.config.site_keys import Asked, sort_sites
from streamprobe.controls.table import CONTROLS
from streamprobe.probes.kinds import is_kind, kind_names
from streamprobe.probes.sites import LINEAR
from streamprobe.solvers.table import SOLVERS

# Keys that may differ between two launches of the same run.
LAUNCH_KEYS = tuple(
    "output_dir resume dry_run report_to log_probes max_passes memory_gb bootstrap bad_chains tp_size max_tokens "
    "report_tokens wait_seconds".split()
)
TRACKERS = ("tensorboard", "wandb")  # opened by reporting/tracking/opened.py


@dataclass
class ModelConfig:
    """The frozen language model."""

    _argument_group_name = "model"

    model: str = key("", "Folder of a Hugging Face decoder model, or its id on the hub.")
    gguf_file: str | None = key(None, "Name of a GGUF file in that folder; needs the extra `gguf`.")
    revision: str | None = key(None, "Branch, tag or commit of the model on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "Number format of the model; auto is bfloat16 where the hardware multiplies it natively, else float32."
    )
    attn_implementation: str | None = key(
        None, "Attention of transformers: sdpa, eager, flash_attention_2, ...; none is the library's choice."
    )
    quantization: Literal["none", "8bit", "4bit"] = key(
        "none", "Weights in 8 or 4 bits (bitsandbytes), for small cards."
    )
    device_map: str = key("auto", "Where the blocks lie (accelerate): auto, cpu, cuda, cuda:1, balanced, ...")
    tp_size: int = key(1, "Processes that share one copy of the model, by transformers' own plan (tensor parallelism).")
    trust_remote_code: bool = key(False, "Run Python code that comes with the model.")
    max_batch_tokens: int = key(
        8192, "Most tokens in one forward pass, padding included; a longer chain goes through in chunks of so many."
    )

    def __post_init__(self) -> None:
        require(
            0 < self.max_batch_tokens < 2**31,
            f"max_batch_tokens {self.max_batch_tokens}",
            "at least 1, less than 2**31",
            "try 8192",
        )
        require(0 < self.tp_size < 2**16, f"tp_size {self.tp_size}", "at least 1", "try the number of GPUs")
        self._check_sharding()

    def _check_sharding(self) -> None:
        """Raises InputError for what transformers cannot shard, or cannot place."""
        usual = {"device_map": "auto", "quantization": "none", "gguf_file": None}
        other = [name for name, value in usual.items() if getattr(self, name) != value]
        require(
            self.tp_size == 1 or not other,
            f"tp_size {self.tp_size} with {' and '.join(f'{name} {getattr(self, name)}' for name in other)}",
            "one of them: each process holds its shard of plain weights on a device of its own",
            f"drop --tp_size, or {' and '.join(f'--{name}' for name in other)}",
        )

    @property
    def source(self) -> dict[str, Any]:
        """What says, beside its name, which model it is."""
        return {"revision": self.revision, "gguf_file": self.gguf_file, "trust_remote_code": self.trust_remote_code}

    @property
    def loading(self) -> dict[str, Any]:
        """What says, beside its name and its layers, how it is loaded."""
        names = ("dtype", "attn_implementation", "quantization", "device_map")
        return {name: getattr(self, name) for name in names} | self.source

    @property
    def code(self) -> dict[str, Any]:
        """What says which code builds it."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class ProbeConfig:
    """The grid of probes: layers x (labels x targets x lags)."""

    _argument_group_name = "probes"

    labels: list[str] = key(["backtracking"], "Labels to probe, all at once.")
    targets: list[str] = key(
        ["token"],
        "What is predicted at token t: token (is t + lag inside a section?), onset (is it the first of one?), "
        "within (does one begin in t + 1 .. t + lag?).",
    )
    layers: list[str] = key(
        [],
        "Decoder blocks whose output is probed, counted from 0: numbers, ranges such as 8-16, percentages of the depth "
        "such as 25%, or all.",
    )
    sites: list[str] = key(
        ["resid_post"],
        "What of these blocks is read: resid_post (the output), resid_pre (what enters), attn_out and mlp_out (what "
        "attention and MLP add), resid_mid (the stream between both); or none.",
    )
    hookpoints: list[str] = key(
        ["none"],
        "Other modules of blocks whose output is read, by patterns over their names such as "
        "model.layers.*.self_attn.q_proj or *.layers.{8,12}.mlp.down_proj; or hooks as TransformerLens names them: "
        "blocks.12.hook_mlp_out.",
    )
    lags: list[int] = key(
        [-16, -12, -8, -4, 0, 4, 8, 12, 16, 20, 24, 32, 40, 48],
        "Tokens between activation and label; positive looks ahead.",
    )
    kinds: list[str] = key(
        [LINEAR],
        "Kinds of probes, trained from one stream and judged beside each other: <kinds>; a number in a name may be any "
        "other one.",
    )
    controls: list[str] = key(
        list(CONTROLS), "What every probe is compared with, trained in the same passes: <controls>; or none."
    )

    def __post_init__(self) -> None:
        layers: list[Any] = [
            int(each) if re.fullmatch(r"\d{1,9}", str(each), re.ASCII) else each for each in self.layers
        ]
        self.layers = sorted(layers) if all(isinstance(layer, int) for layer in layers) else layers
        self.lags = sorted(self.lags)
        self.sites, self.hookpoints = sort_sites(self.sites, self.hookpoints)
        for name in ("labels", "targets", "layers", "lags", "kinds", "controls"):
            values = getattr(self, name)
            needed = name != "layers" or bool(self.read.of_layers)
            require(len(values) > 0 or not needed, f"no {name}", "at least one", f"give --{name}")
            require(
                len(set(values)) == len(values), f"{name} {values} with a repetition", "each once", f"correct --{name}"
            )
        for target in self.targets:
            require(
                target in ("token", "onset", "within"),
                f"targets {target}",
                "token, onset or within",
                "correct --targets",
            )
        require(
            self.targets != ["within"] or max(self.lags) > 0,
            f"targets within with lags {self.lags}",
            "a positive lag, since `within` looks ahead",
            "add one to --lags",
        )
        self._check_kinds()
        require(max(map(abs, self.lags)) < 10**6, f"lags {self.lags}", "less than 1,000,000 tokens", "correct --lags")
        known = (*CONTROLS, "none")
        for control in self.controls:
            require(control in known, f"controls {control}", f"one of {', '.join(known)}", "correct --controls")
        require(
            self.controls == ["none"] or "none" not in self.controls,
            f"controls {' '.join(self.controls)}",
            "none alone, or none of it",
            "correct --controls",
        )

    def _check_kinds(self) -> None:
        """Raises InputError for a kind that is not known, and without the linear one, on which others build."""
        for kind in self.kinds:
            near = get_close_matches(kind, kind_names(), n=1, cutoff=0.6)
            expected = f"{near[0]}, the nearest one" if near else f"of {', '.join(kind_names())}"
            require(is_kind(kind), f"kinds {kind}", expected, "correct --kinds")
        require(
            LINEAR in self.kinds,
            f"kinds {' '.join(self.kinds)}",
            f"{LINEAR} among them: others are compared with it",
            f"give --kinds {LINEAR} {' '.join(self.kinds)}",
        )
        self.kinds = [LINEAR, *(kind for kind in self.kinds if kind != LINEAR)]

    @property
    def read(self) -> Asked:
        """What of blocks is read."""
        return Asked(self.sites, self.hookpoints)

    @property
    def layer_numbers(self) -> list[int]:
        """The layers, where they are numbers, as in the config of a run that knows its model."""
        return [int(layer) for layer in self.layers]


@dataclass
class TrainingConfig:
    """How the probes are fitted; Adam's defaults are the original experiment's, with features standardised."""

    _argument_group_name = "training"

    solvers: list[str] = key(["newton"], "How probes are fitted, all by the same passes, one or more of: <solvers>.")
    l2: float = key(0.01, "Penalty on the sum of squared weights.")
    tolerance: float = key(
        1e-3, "Norm of a probe's gradient at which Newton calls it converged; of joint+chain, a tenth of it."
    )
    learning_rate: float = key(1e-3, "Adam's learning rate.")
    batch_size: int = key(64, "Tokens per Adam step.")
    standardize: bool = key(
        True,
        "Train on (x - mean) / std, without which Newton may not converge; saved probes take raw ones either way.",
    )
    max_passes: int = key(50, "Most trips over the training tokens.")
    patience: int = key(3, "Passes without a better validation F1 after which a probe of Adam's is stopped.")
    memory_gb: str = key(
        "auto",
        "Most GB (10^9 bytes) of activations and of Newton's matrices, in each process; auto is what is free, less a "
        "reserve.",
    )
    bootstrap: int = key(1000, "Resamples of the test chains behind each 95% interval; 0 for no intervals.")
    seed: int = key(0, "Seed of weights, of the order of tokens, of those that Newton draws, and of permuted labels.")
    shards: int = key(
        16,
        "Parts of the chains that processes share, as many as there may be processes at work; results do not depend on "
        "how many there are.",
    )
    seeds: int = key(1, "Starts of every Adam probe, and permutations of every label, whose spread is reported.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_passes", "patience"):
            require(
                getattr(self, name) < 2**31, f"{name} {getattr(self, name)}", "less than 2**31", f"correct --{name}"
            )
        require(
            self.bootstrap <= 10**4,
            f"bootstrap {self.bootstrap}",
            "at most 10,000, which place an end of an interval to 0.2% of the resamples",
            "try 1000",
        )
        for solver in self.solvers:
            require(solver in SOLVERS, f"solvers {solver}", f"of {', '.join(SOLVERS)}", "correct --solvers")
        require(
            0 < len(self.solvers) == len(set(self.solvers)), f"solvers {self.solvers}", "each once", "correct --solvers"
        )
        require(1 <= self.shards <= 4096, f"shards {self.shards}", "1 .. 4,096", "try 16")
        require(self.seeds <= 1000, f"seeds {self.seeds}", "at most 1,000", "try 5")
        for name in ("learning_rate", "batch_size", "max_passes", "patience", "tolerance", "seeds"):
            require(getattr(self, name) > 0, f"{name} {getattr(self, name)}", "more than 0", f"correct --{name}")
        require(0 <= self.seed < 2**31, f"seed {self.seed}", "0 .. 2**31 - 1", "correct --seed")
        for name in ("learning_rate", "l2", "tolerance"):
            require(
                isfinite(getattr(self, name)), f"{name} {getattr(self, name)}", "a finite number", f"correct --{name}"
            )
        for name in ("l2", "bootstrap"):
            require(getattr(self, name) >= 0, f"{name} {getattr(self, name)}", "0 or more", f"correct --{name}")
        try:
            holds = self.memory_gb == "auto" or 0 < float(self.memory_gb) < float("inf")
        except ValueError:
            holds = False
        require(holds, f"memory_gb {self.memory_gb}", "auto or a number of GB above 0", "correct --memory_gb")

    @property
    def memory_cap(self) -> float | None:
        """memory_gb as a number, None for auto."""
        return None if self.memory_gb == "auto" else float(self.memory_gb)


@dataclass
class OutputConfig:
    """Where the run writes, and where its curves go."""

    _argument_group_name = "output"

    output_dir: str | None = key(
        None, "Folder of this run; none is runs/<config name>, with -2, -3, ... where that one is taken."
    )
    resume: bool = key(False, "Go on with the run in output_dir (by default the newest of this config).")
    dry_run: bool = key(False, "Print what the run would need, train nothing.")
    report_to: list[str] = key(
        ["tensorboard"],
        "Where curves go: tensorboard (an event file in output_dir), wandb (Weights & Biases; needs the extra "
        "`wandb`), or both; or none.",
    )
    log_probes: Literal["best", "all"] = key(
        "best",
        "Curves of the best layer and the best control of each lag, with the median and the largest loss of all "
        "probes; or those of every probe and control as well.",
    )

    def __post_init__(self) -> None:
        require(not (self.resume and self.dry_run), "dry_run with resume", "one of them", "drop --dry_run or --resume")
        given = self.report_to
        require(
            given == ["none"] or (0 < len(given) == len(set(given)) and set(given) <= set(TRACKERS)),
            f"report_to {' '.join(given) or 'nothing'}",
            f"none, or one or more of {', '.join(TRACKERS)}, each once",
            "correct --report_to",
        )
