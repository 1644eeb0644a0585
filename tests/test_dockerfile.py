"""The Dockerfile, read as docker reads it: it can be built from what is here, and the node in it is nobody special."""

import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

from cli.main import app

ROOT = Path(__file__).parents[1]


@dataclass
class Stage:
    """One FROM, and what follows."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """The arguments of every such step, in order."""
        return [arguments for name, arguments in self.steps if name == instruction]

    def place(self, instruction: str, part: str = "") -> int:
        """Where the first such step stands."""
        return next(i for i, (name, text) in enumerate(self.steps) if name == instruction and part in text)


@pytest.fixture
def stages() -> list[Stage]:
    """The Dockerfile, taken apart: comments out, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            found.append(Stage(base, name))
        elif instruction:
            found[-1].steps.append((instruction, arguments.strip()))
    return found


def sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets ``path`` through; the last line that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            if fnmatch(path, pattern) or fnmatch(path.split("/")[-1], pattern):
                sent = line.startswith("!")
    return sent


def test_every_file_it_copies_is_there_and_sent(stages: list[Stage]) -> None:
    build, image = stages
    copied = [source for step in build.all("COPY") for source in shlex.split(step)[:-1]]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {pattern.rstrip("*") for pattern in packages["find"]["include"]} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert sent_to_docker(source), source
    assert image.all("COPY") == [f"--from={build.name} /opt/gossamer /opt/gossamer"]


@pytest.mark.parametrize(
    "path", [".git", ".venv", "swarm", "tests", "identity.key", "model.safetensors", "quality"]
)
def test_nothing_else_is_sent(path: str) -> None:
    assert not sent_to_docker(path)


def test_versions_are_pinned(stages: list[Stage]) -> None:
    build, image = stages
    installs = [step for step in build.all("RUN") if "pip install" in step]
    assert len(installs) == 2
    assert all("-c constraints.txt" in step for step in installs)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", build.base)
    assert image.base == build.base


@pytest.mark.parametrize(
    ("accelerator", "said"), [("cpu", "whl/cpu"), ("cuda", ""), ("tpu", "is cpu or cuda")]
)
def test_which_torch_is_a_build_argument(
    stages: list[Stage], tmp_path: Path, accelerator: str, said: str
) -> None:
    """The very step, with a pip that only tells what it was asked for."""
    build, _ = stages
    assert build.all("ARG") == ["ACCELERATOR=cpu"]
    (step,) = [step for step in build.all("RUN") if "torch==" in step]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$PIP_EXTRA_INDEX_URL" "$@"\n')
    pip.chmod(0o755)
    ran = subprocess.run(
        ["sh", "-c", step],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "ACCELERATOR": accelerator},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode == 0) == (accelerator in ("cpu", "cuda"))
    assert said in ran.stdout + ran.stderr
    assert ran.returncode or re.search(r"install -c constraints.txt torch==\d", ran.stdout)


def test_the_node_is_nobody_special_and_its_home_outlives_it(stages: list[Stage]) -> None:
    image = stages[-1]
    assert image.all("USER") == ["gossamer"]
    assert image.all("VOLUME") == ["/data"]
    assert image.place("RUN", "install -d -m 0700 -o gossamer") < image.place("VOLUME")
    assert image.place("RUN", "useradd") < image.place("USER") < image.place("ENTRYPOINT")
    assert "GOSSAMER_HOME=/data" in image.all("ENV")[0]


def test_what_it_runs_are_commands_that_there_are(stages: list[Stage]) -> None:
    image = stages[-1]
    (check,) = image.all("HEALTHCHECK")
    health = json.loads(check.partition(" CMD ")[2])
    start = json.loads(image.all("ENTRYPOINT")[0]) + json.loads(image.all("CMD")[0])
    assert health[:2] == ["gossamer", "status"]
    assert start == ["gossamer", "run"]
    commands = {command.name for command in app.registered_commands}
    assert {health[1], start[1]} <= commands
