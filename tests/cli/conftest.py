"""Fixtures for whole command lines: a home, a fake node in it, and the three things a command gives back."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import main
from node.home import Home
from tests.cli import fake_node


@dataclass(frozen=True)
class Outcome:
    """What a command line gave back."""

    code: int
    out: str
    err: str


Gossamer = Callable[..., Outcome]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in os.environ:
        if name.startswith("GOSSAMER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return Home.at(tmp_path / "home")


@pytest.fixture
def gossamer(home: Home, capfd: pytest.CaptureFixture[str]) -> Gossamer:
    """Run one command line in this process."""

    def run(*arguments: str) -> Outcome:
        code = main(arguments)
        out, err = capfd.readouterr()
        return Outcome(int(code), out, err)

    return run


@pytest.fixture
def node(home: Home) -> Iterator[fake_node.FakeNode]:
    with fake_node.running(home) as node:
        yield node
