"""``gossamer train``: what people do before there is a swarm, which is to decide what it trains.

Owns the file that a new run begins with. Never starts anything.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cli.common import Common, command
from p2p.errors import GossamerError

app = typer.Typer(help="Decide what a swarm trains.", no_args_is_help=True)

ABOUT = {
    "model": "A byte-level GPT. Every member holds the whole of it.",
    "data": 'The sources of Python\'s standard library; for your own text: source = "text", --data PATH.',
    "optimizer": "What a member does with its own gradients.",
    "train": "Inner steps of each member, and how much text it reads in one.",
    "schedule": 'When members average: "every" exchange.every_steps steps; docs/ALGORITHMS.md has the others.',
    "exchange": "How often. More steps send less and learn a little less: docs/QUALITY.md says how much.",
    "merge": "How long a merge waits for members that are behind.",
    "outer": "DiLoCo: what members send is how far they have come, in a codec, and the average has momentum.",
}
"""What is written above each section."""


def register(into: typer.Typer) -> None:
    """Add this module's commands to ``into``."""
    into.add_typer(app, name="train", rich_help_panel="Take part")


@command(app, "new")
def new(
    common: Common,
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="Where to write it; must not exist yet.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the run; the file's when not given.")
    ] = None,
) -> None:
    """Write a commented run file to start from."""
    from training.default_run import default_run
    from training.run_spec import parse_run_spec, spec_as_toml

    wanted = name or re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("-._")
    text = commented(spec_as_toml(default_run(wanted)))
    parse_run_spec(text, origin=f"called {wanted}")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise GossamerError(
            f"cannot write {file}: {error.strerror}",
            why="what is there is left alone" if isinstance(error, FileExistsError) else "a run is one file",
            fix="gossamer train new ANOTHER.toml",
        ) from error
    lines = [
        f"written  {file}",
        f"try it   gossamer testnet up --run {file}",
        f"for real gossamer run --run {file}",
    ]
    common.print({"file": str(file), "name": wanted}, "\n".join(lines))


def commented(toml: str) -> str:
    """``toml`` with a line above each section that says what it decides."""
    lines = [
        "# A run: whoever has the same file is in the same swarm. Change what you like before it starts."
    ]
    for line in toml.splitlines():
        if (section := line.strip("[]")) in ABOUT and line.startswith("["):
            lines.append(f"# {ABOUT[section]}")
        lines.append(line)
    return "\n".join(lines) + "\n"
