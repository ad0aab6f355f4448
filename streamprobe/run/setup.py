"""What stands before the first pass of a run."""

import json
from typing import Any, NamedTuple

from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.activations.shards import Trip
from streamprobe.config.load import RunConfig
from streamprobe.data.overlap import problem_hashes
from streamprobe.probes.kinds import half_lives_of, looks_back
from streamprobe.run.cost import Cost
from streamprobe.run.inputs import Inputs, make_inputs, read_texts
from streamprobe.run.jobs import make_feeds
from streamprobe.run.provenance import facts_of
from streamprobe.run.reader import Backbone, Reader, embed_controls, load_model, make_reader, skip_bad_chains
from streamprobe.run.resume import Earlier, check_same_run
from streamprobe.system.console import say
from streamprobe.system.distributed import agree, local_main_first


class Setup(NamedTuple):
    """What stands before the first pass, each made of those before it."""

    config: RunConfig
    tokenizer: Any
    inputs: Inputs
    backbone: Backbone
    reader: Reader
    feeds: list[Feed]
    facts: dict[str, Any]  # what defines the numbers of this run
    seen: Tensor  # hashes of the problems of training and validation: see `KeptProbes`

    def read_pass(self, number: int) -> Trip:
        """Pass `number` over the training chains."""
        return self.reader.trip("train", self.config.training.seed + number, f"pass {number}")

    def read_validation(self) -> Trip:
        """One trip over the validation chains."""
        return self.reader.trip("validation")


def set_up(config: RunConfig, earlier: Earlier, cost: Cost) -> Setup:
    """Reads the data, loads the model, and sees what is to be trained; prints what was read.

    Raises InputError where that is another run than the earlier one.
    """
    with local_main_first():
        texts, config = read_texts(config)
    inputs = make_inputs(config, texts)
    say(inputs.preflight)
    backbone = load_model(config, texts, inputs)
    facts = facts_of(config, inputs.fingerprint, backbone.model)
    agree("device", backbone.device.type)
    defining = {"keys": "config", "versions": "versions", "data": "data_fingerprint", "weights": "model_fingerprint"}
    for what, name in defining.items():
        agree(what, json.dumps(facts[name], sort_keys=True))
    if earlier.keys:
        check_same_run(facts["config"], earlier.keys)
    if earlier.checkpoint:
        check_same_run(facts, earlier.checkpoint.facts)
    if config.data.bad_chains == "skip":
        inputs = skip_bad_chains(config, texts, inputs, backbone, cost=cost)
    embedded = embed_controls(inputs, backbone)
    kinds = config.probes.kinds
    every, half_lives = any(map(looks_back, kinds)), half_lives_of(kinds)
    reader = make_reader(config, inputs, backbone, cost, embedded=embedded, every=every, half_lives=half_lives)
    feeds = make_feeds(inputs, backbone, embedded.width if embedded else None, kinds=kinds)
    used = [*inputs.dataset.splits["train"], *inputs.dataset.splits["validation"]]
    seen = problem_hashes(texts.records, used).unique()
    return Setup(config, texts.tokenizer, inputs, backbone, reader, feeds, facts, seen)
