"""Where a run's numbers come from: the versions, the machine and the model behind them."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import nn

from streamprobe.config.load import RunConfig
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError, first_line
from streamprobe.model.backbone import pick_dtype
from streamprobe.model.places import main_device
from streamprobe.model.served import whole_tensors
from streamprobe.probes.storage import raw_bytes
from streamprobe.system.files import write_atomic
from streamprobe.system.privacy import without_secrets

PACKAGES = "streamprobe torch transformers tokenizers accelerate bitsandbytes numpy datasets safetensors".split()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def facts_of(config: RunConfig, data_fingerprint: str, model: Any) -> dict[str, Any]:
    """What defines the numbers of a run."""
    return {
        "config": without_secrets(config.flat()),
        "versions": versions(),
        "git_commit": git_commit(),
        "data_fingerprint": data_fingerprint,
        "model_fingerprint": model_fingerprint(model),
        "device": device_name(main_device(model)),
        "dtype": str(pick_dtype(config.model.dtype)),
    }


def sizes_of(splits: Mapping[str, Sequence[Chain]]) -> dict[str, dict[str, int]]:
    """How many chains and tokens each split has."""
    return {
        name: {"chains": len(chains), "tokens": sum(len(chain.ids) for chain in chains)}
        for name, chains in splits.items()
    }


def git_commit() -> str:
    """The commit that this package runs from, with `+changes` if files differ; `unknown` outside of a checkout."""
    here = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and the first 1,024 values of every tensor of the truncated model."""
    digest = hashlib.sha256()
    for name, tensor in whole_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(raw_bytes(tensor.flatten()[:1024]))
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """What the model runs on, as a person would say it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent process too, as it was when it started this one
        return 1024 * int(status.read_text("utf-8", "replace").split("VmHWM:")[1].split()[0])
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_config(folder: Path, facts: dict[str, Any]) -> None:
    """config.yaml: every key, so that `run.py FOLDER/config.yaml` runs it again; what else defined it, as comments.

    Where the data's URL had a user or a query, which are left out, it takes --data with the whole URL.
    """
    keys = yaml.safe_dump({**facts["config"], "output_dir": None, "resume": None}, sort_keys=False, allow_unicode=True)
    rest = {name: value for name, value in facts.items() if name != "config"}
    notes = "".join(f"# {name}: {json.dumps(value)}\n" for name, value in rest.items())
    write_atomic(folder / "config.yaml", (keys + notes).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """The keys that `write_config` wrote.  Raises InputError for a file that holds none."""
    path = folder / "config.yaml"
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(keys, dict):
            raise ValueError("no keys in it")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path}, which cannot be read ({first_line(error)})",
            "the config of the run that is to go on",
            "put it back, or start a new run without --resume",
        ) from error
    return keys
