"""A finished run is opened as it was made, also where its data lie elsewhere today."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from streamprobe import cli
from streamprobe.config.load import load_config
from streamprobe.run.opened import chains_of_run, open_run


@pytest.fixture
def moved(run_folder: Path, chains_file: Path, tmp_path: Path) -> tuple[Path, str]:
    """A run whose data have columns of their own names, and the place to which these data were moved."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    rows = [{"question": row.pop("problem"), **row} for row in json.loads(chains_file.read_text())]
    (tmp_path / "moved.json").write_text(json.dumps(rows))
    keys = yaml.safe_load((folder / "config.yaml").read_text())
    keys |= {"data": "gone.json", "problem_column": "question", "label_names": ["x=deduction"], "max_chains": 40}
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    return folder, str(tmp_path / "moved.json")


def test_data_in_another_place_are_read_by_the_runs_own_keys(moved):
    folder, data = moved
    config = open_run(folder, changed={"data": data, "model": None}).config
    assert config.data.data == data and config.data.problem_column == "question" and config.data.names
    assert len(list(chains_of_run(config).chains())) == 40


def test_data_in_another_place_fail_without_the_same_data_said(moved):
    """The negative control: other data in its stead have none of its columns."""
    folder, data = moved
    config = load_config([str(folder / "config.yaml"), "--data", data])
    assert config.data.problem_column != "question" and config.data.label_names is None


def test_steer_reads_the_runs_data_where_they_lie_today(moved, capsys):
    folder, data = moved
    asked = ["steer", str(folder), "--strengths", "1", "--problems", "2", "--max_new_tokens", "2"]
    assert cli.main(asked) == 2 and "gone.json" in capsys.readouterr().err
    assert cli.main([*asked, "--data", data]) == 0
    assert "left out" not in capsys.readouterr().out
