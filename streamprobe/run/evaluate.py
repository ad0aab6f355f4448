"""The probes and controls of a finished run, judged on other data, or once more on the run's own test chains.

Nothing is trained: the thresholds stay those that the run's validation chose.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from streamprobe.activations.feed import PROBED, Feed
from streamprobe.config.load import RunConfig
from streamprobe.controls.embedding import EmbeddingLayers, WordBasis
from streamprobe.data.dataset import NOT_FINITE, Dataset
from streamprobe.errors import InputError
from streamprobe.evaluation.results import TestResults, judge, score
from streamprobe.evaluation.rows import PLACE, Row, place_fields
from streamprobe.evaluation.texts import labels_of_texts, text_rows
from streamprobe.evaluation.verdict import verdicts
from streamprobe.model.places import main_device
from streamprobe.probes.kept import FinalProbes, KeptProbes
from streamprobe.probes.kinds import looks_back
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.nested import NESTED
from streamprobe.probes.storage import find_probes, read_about
from streamprobe.reporting import terminal
from streamprobe.reporting.files import EVALUATION, write_files
from streamprobe.reporting.read_back import read_rows
from streamprobe.run.cost import Cost
from streamprobe.run.folder import claim_folder
from streamprobe.run.inputs import Inputs, Texts, controls_that_know, read_texts
from streamprobe.run.jobs import make_feeds
from streamprobe.run.judged_chains import columns_of, count_overlap, make_inputs, read_chains
from streamprobe.run.kind_feeds import kind_feed, mixed_feed
from streamprobe.run.nested import nested_feeds
from streamprobe.run.opened import check_chains
from streamprobe.run.provenance import facts_of, sizes_of
from streamprobe.run.reader import Backbone, Reader, embedding_size, find_bad_rows, load_model, make_reader
from streamprobe.run.streaming.kept_chains import open_kept_chains
from streamprobe.system.console import say
from streamprobe.system.hardware import exact_float32
from streamprobe.system.wrapping import columns

FOLDER = "evaluations"  # in that of the run


class Asked(NamedTuple):
    """What is to be judged, and on what."""

    folder: Path  # of the run
    kept: KeptProbes
    config: RunConfig  # the run's, with what says how the data are read
    own: bool  # whether on the run's own test chains, and not on all chains of other data


class Setup(NamedTuple):
    """What stands before the model reads, each made of those before it."""

    config: RunConfig
    tokenizer: Any
    inputs: Inputs
    seen: int  # chains with a problem that the run has seen
    facts: dict[str, Any]  # what defines the numbers of this evaluation
    backbone: Backbone
    feeds: list[Feed]  # of the groups of probes, in their order
    reader: Reader


@exact_float32()
def evaluate_run(asked: Asked, name: str, out: str | None) -> Path:
    """Judges the probes and controls of a run; writes into `out`, or into evaluations/`name` in the run's folder.

    Returns the folder that was written.  Raises InputError for what the user can fix.
    """
    cost, before = Cost(), rows_of_run(asked)
    with claim_folder(out, name, False, beside=asked.folder / FOLDER, option="out") as folder:
        results = judge_chains(asked, set_up(asked, cost), folder, cost)
        write_files(results, EVALUATION)
        width = columns()
        compared = "" if asked.own else f"\n{terminal.compare(before, results.rows, width)}"
        say(f"\n{terminal.table(results.rows, results.texts, width)}{compared}")
        say(f"{terminal.describe_cost(results.cost())}\n{terminal.describe_files(folder, width)}")
        say(f"\n{terminal.describe_outcome(results.described['verdicts'], folder, width)}")
    return folder


@exact_float32()
def rows_of_run(asked: Asked) -> list[Row]:
    """The rows of the run's own results.csv.  Raises InputError where that is not of its probes."""
    path = asked.folder / "results.csv"
    rows = read_rows(path)
    found = {tuple(row[name] for name in PLACE) for row in rows if not row["control"]}
    kept = set()
    for each in asked.kept.final:
        columns = [each.bank.columns[k] for k in each.shared]
        places = (place_fields(each.solver, s, c, kind=each.of_kind) for c in columns for s in each.bank.sites)
        kept |= {tuple(place[name] for name in PLACE) for place in places}
    if found != kept:
        raise InputError(f"{path}, which is not of the probes of this run", "the results of all of them", "put it back")
    return rows


def set_up(asked: Asked, cost: Cost) -> Setup:
    """Reads the data, loads the model, and makes of what the run kept what its controls are fed.

    Raises InputError for data on which no probe can be judged, and for a model that is not the one that was probed.
    """
    texts, config, read = open_chains(asked)
    asked, chains = asked._replace(config=config), read()
    inputs, seen = look_at(asked, texts, chains)
    backbone = load_model(config, texts, inputs)
    facts = facts_of(config, chains.fingerprint(), backbone.model)
    check_model(asked, backbone, facts)
    bad = find_bad_rows(config, chains, backbone, cost=cost) if config.data.bad_chains == "skip" else set()
    if bad:
        say(f"skipped   {len(bad)} chains {NOT_FINITE}; what is left:\n")
        inputs, seen = look_at(asked, texts, read(bad))
    embedded = restore_embedded(asked.kept, inputs, backbone)
    every = any(looks_back(each.of_kind) for each in asked.kept.final)
    reader = make_reader(config, inputs, backbone, cost, embedded=embedded, every=every)
    feeds = feeds_of(asked.kept, inputs, backbone, embedded.width if embedded else None)
    return Setup(config, texts.tokenizer, inputs, seen, facts, backbone, feeds, reader)


def open_chains(asked: Asked) -> tuple[Texts, RunConfig, Callable[..., Dataset]]:
    """What reads the chains that are judged, the config that this settles, and what gives them without `bad` rows.

    Raises InputError for data that cannot be read, and where those of the run itself are others now.
    """
    if asked.own and asked.config.stream.streaming:
        kept = open_kept_chains(asked.folder, asked.config)
        return kept.texts, kept.config, kept.read
    texts, config = read_texts(asked.config)
    read = partial(read_chains, config, texts, asked.own, section_labels=asked.kept.section_labels)
    if asked.own:
        check_chains(asked.folder, read())
    return texts, config, read


def look_at(asked: Asked, texts: Texts, chains: Dataset) -> tuple[Inputs, int]:
    """The chains that are judged with what is asked of them, and how many have a problem that the run has seen.

    Prints what was read.
    """
    inputs = make_inputs(asked.config, texts, chains, columns_of(asked.kept))
    say(inputs.preflight)
    return inputs, 0 if asked.own else count_overlap(asked.kept, texts, inputs)


def check_model(asked: Asked, backbone: Backbone, facts: Mapping[str, Any]) -> None:
    """Raises InputError for a model of another size than the probes', and says where its weights are others."""
    probed = max(each.bank.n_features for each in asked.kept.final if each.shared)
    if probed != max(backbone.widths):
        raise InputError(
            f"probes of {probed} features and a model of hidden size {max(backbone.widths)}",
            "the model that was probed",
            "correct --model",
        )
    if read_about(find_probes(asked.folder)).get("model_fingerprint") != facts["model_fingerprint"]:
        say("model     its weights, or their number format, are not those that the probes were trained on")


def restore_embedded(kept: KeptProbes, inputs: Inputs, backbone: Backbone) -> EmbeddingLayers | None:
    """The controls that are layers made of embeddings, as the run had them.  Raises InputError for other embeddings."""
    controls = inputs.controls.embedded
    if not controls:
        return None
    embedding = backbone.model.get_input_embeddings()
    device, width = main_device(embedding), embedding_size(backbone.model)
    if width != len(kept.words.get("mean", ())):
        raise InputError(
            f"embeddings of size {width}", "those of the model that was probed", "correct --model, or run it again"
        )
    words = WordBasis(**{name: tensor.to(device) for name, tensor in kept.words.items()})
    return EmbeddingLayers(embedding, words, backbone.hidden_size, controls)


def feeds_of(kept: KeptProbes, inputs: Inputs, backbone: Backbone, embedding_size: int | None) -> list[Feed]:
    """What each group of probes is fed.  Raises InputError where the run's config does not give that."""
    made = make_feeds(inputs, backbone, embedding_size)
    by_name = {feed.name: feed for feed in [*made, *nested_feeds(made)]}
    feeds: list[Feed] = []
    for number, each in enumerate(kept.final):
        before = {
            done.feed: feed for done, feed in zip(kept.final[:number], feeds, strict=True) if done.solver == each.solver
        }
        feed, bank = _feed_of(each, by_name, before), each.bank
        if not feed or feed.sites != bank.reads or feed.n_features != bank.n_features:
            raise InputError(
                f"a config.yaml with other layers or controls than the {each.feed} of the probes",
                "the run's own",
                "put it back",
            )
        asked = [column if column.control else column._replace(seed=0) for column in bank.columns]
        feeds.append(feed._replace(columns=torch.tensor([inputs.columns.index(column) for column in asked])))
    return feeds


def _feed_of(each: FinalProbes, by_name: Mapping[str, Feed], before: Mapping[str, Feed]) -> Feed | None:
    """What a group of probes is fed, whatever its columns; None where the run's config does not give that.

    `by_name` are the feeds of linear and nested probes and of controls; `before` those of the groups of the same solver
    before this one, with the columns that these have.
    """
    kind = each.of_kind
    if kind == LINEAR:
        return by_name.get(each.feed)
    if each.feed != f"{NESTED} {kind}":
        return kind_feed(by_name[PROBED], each.feed)
    if {NESTED, PROBED, kind} - before.keys():
        return None
    return mixed_feed(before[NESTED], before[PROBED], kind, own=before[kind])


def judge_chains(asked: Asked, setup: Setup, folder: Path, cost: Cost) -> TestResults:
    """Scores the chains once with every probe and control, and judges them as the run's test chains were."""
    inputs, training, device = setup.inputs, setup.config.training, setup.backbone.device
    chains = inputs.dataset.splits["test"]
    known = controls_that_know(setup.config.probes.controls, inputs.dataset)
    scored = score(asked.kept.final, setup.feeds, (batch.to(device) for batch in setup.reader.read("test")))
    probes = [fair for each in scored if (fair := each.without(known))]
    say(f"test      {len(chains):,} chains, resampled {training.bootstrap:,} times for the intervals")
    judged = judge(probes, len(chains), training.bootstrap, training.seed, tolerance=training.tolerance)
    described = {
        "title": f"{asked.folder.resolve().name} on {folder.resolve().name}",
        "probes_of": str(asked.folder),
        "chains_seen": setup.seen,
        "counts": inputs.dataset.counts.as_dict(),
        "splits": sizes_of(inputs.dataset.splits),
        "verdicts": verdicts(judged, training.tolerance, labels_of_texts(probes)),
        "preflight": inputs.preflight,
    }
    return TestResults(
        folder=folder,
        probes=probes,
        judged=judged,
        kept=asked.kept,
        chains=chains,
        labels=setup.config.probes.labels,
        tokenizer=setup.tokenizer,
        facts=setup.facts,
        described=described,
        cost=cache(partial(cost.as_dict, device)),
        resamples=training.bootstrap,
        seed=training.seed,
        texts=text_rows(probes, len(chains), training.bootstrap, training.seed),
    )
