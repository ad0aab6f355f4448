"""What a run works with: chains, grid, frozen model and room for activations."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.store import ActivationMemory, Sizes
from streamprobe.activations.stream import check_finite, find_bad_chains, stream
from streamprobe.config.load import RunConfig
from streamprobe.controls import table as controls
from streamprobe.controls.embedding import Surface
from streamprobe.controls.permuted import permute_labels, with_permuted
from streamprobe.data import dataset as chains
from streamprobe.data import preflight, prompts
from streamprobe.data.sources import read_rows
from streamprobe.errors import InputError
from streamprobe.lags import Column, make_columns
from streamprobe.model import backbone, blocks, trial
from streamprobe.model.chunks import check_chunks
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.run.memory_plan import Plan, Reserve, estimate_reserve, memory_room, plan_memory
from streamprobe.run.provenance import device_name, git_commit, model_fingerprint, peak_memory, versions
from streamprobe.solvers.newton import curvature_bytes, vector_bytes
from streamprobe.system.console import say, shows_progress
from streamprobe.system.privacy import without_secrets

Memories = tuple[Plan, ActivationMemory, ActivationMemory]  # train, validation


class Lab:
    """The chains, the grid and the frozen model of one run, and a count of what the model was asked to do."""

    def __init__(self, config: RunConfig):
        """Reads and checks everything that needs no weights."""
        self.config = config
        data, probes, model = config.data, config.probes, config.model
        self.source = {
            "revision": model.revision, "gguf_file": model.gguf_file, "trust_remote_code": model.trust_remote_code
        }  # fmt: skip
        model_config = self.model_config = backbone.read_config(model.model, **self.source)
        blocks.check_layers(model_config, probes.layers)
        fields = (data.id_column, data.problem_column, data.response_column, data.annotation_column)
        columns = (*fields, data.category_column) if data.category_column else fields
        rows = read_rows(data.data, data.data_split, columns, data.data_sha256)
        self.partial = bool(data.max_chains and data.max_chains < len(rows))
        if data.max_chains and self.partial:
            rows = [rows[i] for i in np.linspace(0, len(rows) - 1, data.max_chains).astype(int)]
        self.rows, self.fields = rows, fields
        self.tokenizer = load_tokenizer(model.model, **self.source)
        data.chat_date = prompts.resolve_day(data.prompt, data.chat_date, self.tokenizer)
        if data.chat_date:
            say(f"prompt    the chat template writes the date: {data.chat_date} (--chat_date)")
        self._load_chains()
        self.fingerprint = chains.fingerprint(self.splits)
        self._take_stock()
        highest = max(int(c.ids.max()) for split in self.splits.values() for c in split)
        blocks.check_vocabulary(model_config, highest)
        longest = max(len(c.ids) for split in self.splits.values() for c in split)
        self.chunked = longest > model.max_batch_tokens
        if self.chunked:
            where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
            check_chunks(model_config, **where)
        self.forwards = self.tokens = self.padded = 0
        self.seconds = 0.0

    def _load_chains(self, bad: Collection[int] = ()) -> None:
        """The splits, and what became of every row; the rows `bad` are refused."""
        data, labels = self.config.data, self.config.probes.labels
        reading = chains.Reading(
            prompt=data.prompt, support=data.support, unlabelled=data.unlabelled, bos=data.bos, response=data.response,
            day=data.chat_date, label_names=data.names,
        )  # fmt: skip
        division = chains.Division(
            test_share=data.test_share, validation_share=data.validation_share, seed=data.split_seed,
            test_categories=data.test_categories, validate_on_test=data.validation == "test", by=data.split_by,
        )  # fmt: skip
        context = blocks.context(self.model_config)
        self.splits, self.counts = chains.load_chains(
            self.rows, self.fields, self.tokenizer, labels, context, reading, division, data.category_column, bad,
            self.partial,
        )  # fmt: skip

    def _take_stock(self) -> None:
        """Checks the splits, adds the controls and describes what will be fed."""
        probes = self.config.probes
        preflight.check_splits(self.splits, probes.labels, self.counts)
        self._add_controls(make_columns(probes.labels, probes.targets, probes.lags))
        self.preflight = preflight.describe(
            self.counts, self.splits, self.census, self.columns, probes.labels, self.tokenizer
        )

    def _add_controls(self, real: list[Column]) -> None:
        """Permuted labels behind those of every chain, and the columns and places of the features on the side.

        A permuted column without both classes, as may happen with a rare label, is left out.
        """
        probes, training = self.config.probes, self.config.training
        n_permuted = training.seeds if "permuted" in probes.controls else 0
        columns = with_permuted(real, n_permuted)
        self.arrays = list(dict.fromkeys(column.array for column in columns))
        random = np.random.default_rng(training.seed)
        for chain in {id(c): c for split in self.splits.values() for c in split}.values():
            permuted = [permute_labels(chain.codes, chain.support, random) for _ in range(n_permuted)]
            chain.codes = torch.cat([chain.codes, *permuted], dim=1)
        census = preflight.take_census(self.splits, columns, self.arrays)
        preflight.check_census(census, real, self.splits)
        kept = [k for k, column in enumerate(columns) if not column.control or preflight.has_both(census, k)]
        self.n_real, self.columns = len(real), [columns[k] for k in kept]
        self.census = {name: (n, valid[kept], hits[kept]) for name, (n, valid, hits) in census.items()}
        if len(kept) < len(columns):
            say(f"permuted  {len(columns) - len(kept)} columns without both classes are left out")
        nothing = torch.zeros(1, len(probes.labels), dtype=torch.int8)
        widths = [part.shape[1] for part in controls.side_features(1, 0, nothing, probes.controls)]
        ends = np.cumsum([0, *widths]).tolist()
        names = [name for name in controls.BESIDE if name in probes.controls]
        self.side = {name: slice(*ends[i : i + 2]) for i, name in enumerate(names)}

    def _side(self, chain: chains.Chain) -> list[Tensor]:
        """What is known of the chain's tokens without a model, control by control: [T, P] each."""
        probes = self.config.probes
        codes = chain.codes[:, : len(probes.labels)]
        return controls.side_features(len(chain.ids), chain.start, codes, probes.controls)

    def load_model(self) -> None:
        """Puts the truncated model into memory."""
        c = self.config.model
        self.model = backbone.load_backbone(
            c.model,
            self.config.probes.layers,
            c.dtype,
            c.attn_implementation,
            c.quantization,
            c.device_map,
            **self.source,
        )
        self.device: torch.device = self.model.device  # type: ignore[assignment]
        tokens = trial.some_tokens(self.tokenizer, self.model_config)
        self.hidden_size = trial.check_reading(self.model, self.config.probes.layers, tokens, self.chunked)
        if self.config.data.bad_chains == "skip":
            self._skip_bad_chains()
        self.rows = []  # the chains are final, and texts may take much memory
        self.surface_layers = [name for name in Surface.LAYERS if name in self.config.probes.controls]
        self.surface: Surface | None = None
        if self.surface_layers:
            ids = torch.cat([chain.ids for chain in self.splits["train"]])
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
            self.surface = Surface(embedding, ids, self.hidden_size, self.surface_layers)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # so that the plan sees what is free

    def _skip_bad_chains(self) -> None:
        """Leaves out chains with activations that are infinite or not numbers, as if their rows had been refused."""
        every = list({c.row: c for split in self.splits.values() for c in split}.values())
        layers, most = self.config.probes.layers, self.config.model.max_batch_tokens
        start = time.perf_counter()
        bad = find_bad_chains(every, self.model, layers, most, self._count_forward)
        self.seconds += time.perf_counter() - start
        if bad:
            self._load_chains({c.row for c in bad})
            self._take_stock()
            say(f"skipped   {len(bad)} chains {chains.NOT_FINITE}; what is left:\n\n{self.preflight}")

    def stream(
        self,
        chosen: list[chains.Chain],
        seed: int | None = None,
        on_forward: Callable[[int, int], None] | None = None,
    ) -> Iterator[TokenBatch]:
        """One trip over chains through the model; `seed` and `on_forward` are those of `stream.stream`."""
        layers, most = self.config.probes.layers, self.config.model.max_batch_tokens
        return stream(
            chosen, self.model, layers, self.columns, self.arrays, most, seed, on_forward, self.surface,
            lambda chain: torch.cat([torch.empty(len(chain.ids), 0), *self._side(chain)], dim=1),
        )  # fmt: skip

    def read(self, split: str, seed: int | None = None, title: str = "") -> Iterator[TokenBatch]:
        """One trip over a split through the model, with a progress bar in a terminal.

        Raises InputError for an activation that is infinite or not numbers, at the moment it is read.
        """
        chosen = self.splits[split]
        total = sum(len(c.ids) for c in chosen)
        hidden = not shows_progress()
        with tqdm(total=total, desc=title or split, unit="tok", unit_scale=True, disable=hidden, leave=False) as bar:

            def count(tokens: int, padded: int) -> None:
                self._count_forward(tokens, padded)
                bar.update(tokens)

            batches = self.stream(chosen, seed, count)
            start = time.perf_counter()
            for batch in check_finite(batches, chosen, [*self.config.probes.layers, *self.surface_layers]):
                self.seconds += time.perf_counter() - start
                yield batch
                start = time.perf_counter()

    def _count_forward(self, tokens: int, padded: int) -> None:
        self.forwards, self.tokens, self.padded = self.forwards + 1, self.tokens + tokens, self.padded + padded

    def plan(self, before: list[int] | None) -> tuple[Plan, Sizes]:
        """Where the train and validation tokens will lie, and what each has; prints it.

        `before` is the plan of the run that is resumed.
        """
        n_train, n_validation = self.census["train"][0], self.census["validation"][0]
        n_layers, n_side = len(self.config.probes.layers), sum(s.stop - s.start for s in self.side.values())
        sizes = Sizes(
            n_layers + len(self.surface_layers), self.hidden_size, len(self.columns), n_side,
            backbone.pick_dtype(self.config.model.dtype),
        )  # fmt: skip
        one, cap = sizes.token_bytes(), self.config.training.memory_cap
        needed, reserve = (n_train + n_validation) * one, self._reserve(sizes)
        room = memory_room(cap, self.device, reserve.on(self.device, self.device))
        self.shared, curvature = self._curvature(room, needed, before)
        same = (before[0], bool(before[1]), bool(before[2])) if before else None
        plan = plan_memory(
            cap, one, n_train, n_validation, self.config.training.batch_size, self.device, curvature, reserve, same
        )
        kept = n_validation * plan.keep_validation
        say(
            f"memory    {(plan.rows + kept) * one / 1e9:.2f} GB on {plan.home} for "
            + (f"all {plan.rows + kept:,} training and validation tokens: the model reads them once" if plan.keep_train
               else f"a pool of {plan.rows:,} of {n_train:,} training tokens: the model reads them in every pass"),
        )  # fmt: skip
        return plan, sizes

    def _reserve(self, sizes: Sizes) -> Reserve:
        """What the forward passes, a chunk of tokens, the evaluation and a checkpoint will take for a while."""
        most = self.config.model.max_batch_tokens
        lengths = [len(c.ids) for split in self.splits.values() for c in split]
        batch = min(most, sum(lengths)), min(most, max(lengths))
        text = blocks.text_config(self.model.config)
        width = getattr(text, "intermediate_size", None) or 4 * self.hidden_size
        intermediate = max(width) if isinstance(width, list) else width  # some models have one a block
        evaluated = max(sum(int(c.support.sum()) for c in self.splits[name]) for name in ("validation", "test"))
        n_beside = len(self.surface_layers) + len(self.side)
        n_probes = len(self.config.probes.layers) * len(self.columns) + n_beside * self.n_real
        passing = estimate_reserve(sizes, batch, intermediate, evaluated, n_probes * len(self.config.training.solvers))
        return passing._replace(host=max(passing.host, 2 * self._vectors()))  # twice while a checkpoint is written

    def memories(self, before: list[int] | None) -> Memories:
        """Room for the train and the validation tokens, as planned."""
        plan, sizes = self.plan(before)
        kept = self.census["validation"][0] * plan.keep_validation
        train = ActivationMemory(plan.rows, plan.keep_train, sizes, self.device, plan.home)
        return plan, train, ActivationMemory(kept, plan.keep_validation, sizes, self.device, plan.home)

    def _vectors(self) -> int:
        """Bytes of what Newton's solvers hold beside their matrices."""
        if "newton" not in self.config.training.solvers:
            return 0
        n_probes = len(self.config.probes.layers) * len(self.columns) + len(self.surface_layers) * self.n_real
        beside = sum(vector_bytes(1, self.n_real, part.stop - part.start) for part in self.side.values())
        return vector_bytes(1, n_probes, self.hidden_size) + beside

    def _curvature(self, room: int, activations: int, before: list[int] | None) -> tuple[bool, int]:
        """Whether Newton's columns must share a matrix per layer, and the bytes that the solver takes.

        They share it where one for each would take over half of the room, or the place of activations that could else
        be kept; a resumed run does as it did.
        """
        if "newton" not in self.config.training.solvers:
            return False, 0
        if self.device.type == "mps":
            raise InputError("solver newton on mps", "a device with float64", "give --device_map cpu or --solvers adam")
        n_layers, n_surface = len(self.config.probes.layers), len(self.surface_layers)
        n_probes, vectors = n_layers * len(self.columns) + n_surface * self.n_real, self._vectors()
        all_probes, one = (curvature_bytes(1, n, self.hidden_size) for n in (n_probes, n_layers + n_surface))
        for width in (part.stop - part.start for part in self.side.values()):
            all_probes, one = all_probes + curvature_bytes(1, self.n_real, width), one + curvature_bytes(1, 1, width)
        spare = room - activations - vectors - one
        shared = bool(before[3]) if before else all_probes > room / 2 or 0 <= spare < all_probes
        taken = vectors + one + (0 if shared else all_probes)
        kind = f"one per layer: {all_probes / 1e9:.2f} GB would be too much" if shared else "one per layer and column"
        say(f"curvature {taken / 1e9:.2f} GB on {self.device}, {kind}")
        return shared, taken

    @property
    def positive_weight(self) -> Tensor:
        """Negatives over positives [K] among the training tokens of each column."""
        _, valid, positive = self.census["train"]
        return (valid - positive) / positive

    def facts(self) -> dict[str, Any]:
        """What defines the numbers of this run."""
        return {
            "config": without_secrets(self.config.flat()), "versions": versions(), "git_commit": git_commit(),
            "data_fingerprint": self.fingerprint, "model_fingerprint": model_fingerprint(self.model),
            "device": device_name(self.device), "dtype": str(backbone.pick_dtype(self.config.model.dtype)),
        }  # fmt: skip

    def cost(self) -> dict[str, Any]:
        """What the model was asked to do and what that took, since this process began."""
        return {
            "model_forwards": self.forwards, "model_tokens": self.tokens,
            "padding": f"{1 - self.tokens / max(1, self.padded):.1%}", "model_seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9)),
            "peak_memory_gb": round(peak_memory(self.device) / 1e9, 2),
        }  # fmt: skip
