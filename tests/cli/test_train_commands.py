"""``gossamer train new`` writes a run that people can read, change and start, and leaves what is there alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.exit_codes import ExitCode
from cli.main import main
from cli.testnet import _spec
from training.default_run import default_run
from training.run_spec import load_run_spec


def test_a_new_run_is_the_default_one_under_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "My Run 1.toml"
    assert main(["train", "new", str(file)]) == ExitCode.OK
    assert load_run_spec(file) == default_run("my-run-1")
    assert main(["train", "new", str(tmp_path / "b.toml"), "--name", "other"]) == ExitCode.OK
    assert load_run_spec(tmp_path / "b.toml").name == "other"


def test_every_section_says_what_it_decides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    main(["train", "new", str(file)])
    lines = file.read_text().splitlines()
    sections = [number for number, line in enumerate(lines) if line.startswith("[")]
    assert len(sections) == 8
    assert all(lines[number - 1].startswith("# ") for number in sections)


def test_a_testnet_without_a_run_file_trains_the_same() -> None:
    assert _spec(None, None, None, None, nodes=4) == default_run("testnet")


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text("mine")
    assert main(["train", "new", str(file)]) == ExitCode.FAILED
    assert file.read_text() == "mine"
    assert "left alone" in capsys.readouterr().err


def test_a_name_that_no_run_may_have_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert main(["train", "new", str(file), "--name", "No Spaces"]) != ExitCode.OK
    assert not file.exists()


def test_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    main(["--json", "train", "new", str(file)])
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "name": "run"}
