"""Put the probes of a run on the Hugging Face hub, for others to use.

Uploaded are probes.safetensors, results.csv and a model card with the results.  They are read back by
`streamprobe.load_probes("user/name")`.  The file of the probes names the run's model and data as the config does.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save

from streamprobe.errors import InputError, first_line
from streamprobe.evaluation.rows import place, site_title
from streamprobe.lags import Column
from streamprobe.probes.kinds import about as about_kind
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.storage import FILE, find_probes, kinds_in, read_about, sites_in
from streamprobe.system.csv_files import read_csv
from streamprobe.system.privacy import ON_HUB, for_others

COLUMNS = ("solver", "kind", "site", "label", "target", "layer", "lag", "control", "auroc", "auroc_low", "auroc_high")
PUBLIC = (  # of what probes say of themselves
    *("solvers", "kinds", "layers", "sites", "widths", "columns"),
    *("data_fingerprint", "model_fingerprint"),
)
Cells = dict[tuple[str, int], str]  # (layer or control, lag) -> AUROC with its interval
OF_FOLDS = ", of probes that the others of {n} folds trained (those here are their means, trained on all chains)"
CARD = """---
{head}---

# {title}: {labels}

Probes of the hidden states of {model}, one for each layer and lag, trained by streamprobe.

    from streamprobe import load_probes

    probes = load_probes("{repo}")
    logits = probes.scores(acts)                      # [N, L, K] of activations [N, L, D] of {reads}
    l, k = probes.place(layer={layer}, lag={lag})     # one probe: logits[:, l, k], its direction probes.weight[l, k]

Layer i is the output of decoder block i, counted from 0.  Lag k: the activation at token t predicts the label at token
t + k.  Solvers: {solvers}.

## Results

AUROC on held-out test chains{folds}, with the 95% interval over resampled chains; below the layers, what they must
beat.

{tables}{others}"""
OTHER_KINDS = """
## Other kinds

Beside the linear ones there are, to be used like these:

{loading}

Test AUROC at the best layer of each lag, which is named; all of them are in results.csv.

{tables}"""


def push_to_hub(run: str | Path, repo_id: str, private: bool = False) -> str:
    """Puts the probes of a run, its results and a card into the hub repository `user/name`; returns the address.

    The repository is made if there is none (`private` then says who may see it).  Raises InputError for a folder that
    holds no finished run, and for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    folder = Path(run)
    probes = find_probes(folder) if os.path.isdir(folder) else None
    if probes is None or not os.path.isfile(folder / "results.csv"):
        raise InputError(f"{folder}, which holds no results.csv", "the folder of a finished run", "check the path")
    about, results = read_about(probes), folder / "results.csv"
    card = make_card(about, read_csv(results, COLUMNS), repo_id)
    files: dict[str, str | bytes] = {FILE: for_upload(probes, about), "results.csv": str(results)}
    files["README.md"] = card.encode(errors="replace")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo_id, operations, commit_message="Upload probes")
    except (OSError, HTTPError, HFValidationError) as error:
        raise InputError(
            f"{repo_id} on the hub ({first_line(error)})",
            "user/name, a token that may write there, and a connection",
            "check the name; `hf auth login` or set HF_TOKEN",
        ) from error
    return f"{api.endpoint}/{repo_id}"


def for_upload(path: Path, about: dict[str, Any]) -> str | bytes:
    """The file of probes `path`, or its content without what others may not see of what it says `about` itself.

    Runs leave that out; an older one may not have, and keys that are not the package's may hold anything.
    """
    shown = {name: about[name] for name in PUBLIC if name in about} | {"config": for_others(about["config"])}
    with safe_open(str(path), framework="pt") as f:
        if set(f.metadata()) == {"streamprobe"} and shown == about:
            return str(path)
        tensors = {name: f.get_tensor(name) for name in sorted(f.keys())}
    return save(tensors, {"streamprobe": json.dumps(shown, sort_keys=True)})


def make_card(about: dict[str, Any], rows: Sequence[dict[str, str]], repo_id: str) -> str:
    """The model card: how to load the probes, and a table of test AUROC for each solver, label and target.

    Where there are other kinds than linear, they have a table of their own, at the best layer of each lag.
    `about` is the probes' metadata; a model that is a folder is not named.
    """
    model = str(for_others(about.get("config", {})).get("model", ""))
    on_hub = ON_HUB.fullmatch(model) is not None
    head: dict[str, Any] = {"library_name": "streamprobe", "tags": ["linear-probes", "interpretability"]}
    if on_hub:
        head["base_model"] = model
    columns, others = [Column(*column) for column in about["columns"]], _other_kinds(about, rows, repo_id)
    return CARD.format(
        title="Linear and other probes" if others else "Linear probes",
        head=yaml.safe_dump(head, sort_keys=False),
        labels=plain(", ".join(dict.fromkeys(column.label for column in columns))),
        repo=repo_id,
        model=f"`{model}`" if on_hub else "a model that is not on the hub",
        reads=_reads(about),
        layer=about["layers"][0],
        lag=columns[0].lag,
        solvers=", ".join(about["solvers"]),
        folds=OF_FOLDS.format(n=folds) if (folds := about.get("config", {}).get("folds", 1)) != 1 else "",
        tables="\n".join(table(name, cells) for name, cells in _group(rows, place, _linear).items()),
        others=others,
    )


def _reads(about: dict[str, Any]) -> str:
    """What is read, in the order of the probes."""
    if "sites" not in about:
        return f"the layers {about['layers']}"
    filled = ", narrower ones filled up with zeros" if "widths" in about else ""
    return f"the sites {' '.join(site.name for site in sites_in(about))}{filled}"


def _other_kinds(about: dict[str, Any], rows: Sequence[dict[str, str]], repo_id: str) -> str:
    """What the card says of kinds that are not linear; nothing where there are none.

    Raises InputError for a kind that is not known.
    """
    held = {solver: [kind for kind in kinds_in(about, solver) if kind != LINEAR] for solver in about["solvers"]}
    if not any(held.values()):
        return ""
    lines = []
    for number, (solver, kinds) in enumerate(held.items()):
        named = f', "{solver}"' if number else ""
        lines += [f'    load_probes("{repo_id}"{named}, kind="{kind}")  # {_about(kind)}' for kind in kinds]
    tables = [table(name, cells) for name, cells in _group(rows, _kind, _is_best_among(rows)).items()]
    return OTHER_KINDS.format(loading="\n".join(lines), tables="\n".join(tables))


def _about(kind: str) -> str:
    """A kind in a line.  Raises InputError for one that is not known."""
    try:
        return about_kind(kind)
    except ValueError as error:
        raise InputError(f"{FILE} with {error}", "one that a run of this version wrote", "check the path") from error


def _linear(row: dict[str, str]) -> bool:
    return row["kind"] == LINEAR


def _kind(row: dict[str, str]) -> str:
    return row["kind"]


def _is_best_among(rows: Sequence[dict[str, str]]) -> Callable[[dict[str, str]], bool]:
    """Whether a row is that of the best layer of its kind and lag, and of no control nor of a linear probe."""
    best: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if _linear(row) or row["control"]:
            continue
        name = tuple(row[key] for key in ("solver", "kind", "label", "target", "lag"))
        if name not in best or _area(row) > _area(best[name]):
            best[name] = row
    chosen = {id(row) for row in best.values()}
    return lambda row: id(row) in chosen


def _area(row: dict[str, str]) -> float:
    """The AUROC of a row; below all others where there is none."""
    area = float(row["auroc"])
    return area if area == area else -1.0


def _group(
    rows: Sequence[dict[str, str]], line: Callable[[dict[str, str]], str], shown: Callable[[dict[str, str]], bool]
) -> dict[tuple[str, ...], Cells]:
    """The tables of the card, by solver, label and target, of the rows that are `shown`, each in its `line`.

    Raises InputError for rows that no run wrote.
    """
    groups: dict[tuple[str, ...], Cells] = {}
    try:
        for row in filter(shown, rows):
            name = tuple(row[key] for key in ("solver", "label", "target"))
            area, low, high = (float(row[key]) for key in ("auroc", "auroc_low", "auroc_high"))
            cell = f"{area:.3f}" + (f" ({low:.3f}&ndash;{high:.3f})" if low == low else "")
            cell += f", {site_title(row)}" if not _linear(row) else ""
            groups.setdefault(name, {})[line(row), int(row["lag"])] = cell
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"results.csv with {error}", "one that a run wrote", "check the path") from error
    return groups


def table(name: tuple[str, ...], cells: Cells) -> str:
    """A Markdown table of cells by layer or control (rows) and lag (columns)."""
    solver, label, target = map(plain, name)
    places, lags = dict.fromkeys(at for at, _ in cells), sorted({lag for _, lag in cells})
    lines = [f"### {label}, target {target}, solver {solver}", ""]
    lines += ["| | " + " | ".join(f"{lag:+d}" for lag in lags) + " |", "|---" * (len(lags) + 1) + "|"]
    for at in places:
        lines.append(f"| {plain(at)} | " + " | ".join(cells.get((at, lag), "") for lag in lags) + " |")
    return "\n".join([*lines, ""])


def plain(text: str) -> str:
    """Text that Markdown takes as it stands: what has a meaning there is escaped."""
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>#|&!" else " " if c in "\r\n" else c for c in text)
