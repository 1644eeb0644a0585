"""All experiments of the simulator in full, and what they came to, written into docs/EXPERIMENTS.md with its pictures.

``make experiments`` runs it. Owns the generated parts of that page, between markers; the words around them are written
by hand. Fails when a criterion is not met, after the page is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from netsim.plots import plot_results
from netsim.registry import builtin_names
from netsim.research.report import write_report

PAGE = Path("docs/EXPERIMENTS.md")
PICTURES = Path("docs/experiments")
BEGIN, END = "<!-- {name}: written by {by} -->", "<!-- end of {name} -->"


def main() -> int:
    """Run all, or those named on the command line; returns the exit code."""
    wanted = sys.argv[1:] or [name for name in builtin_names() if name.startswith("paper/")]
    PICTURES.mkdir(exist_ok=True)
    failed = [name for name in wanted if not _run(name)]
    if not sys.argv[1:]:
        write_report(PICTURES)
    for name in failed:
        print(f"{name} does not show what it must", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str) -> bool:
    """One experiment, its picture and its part of the page; returns whether its criterion was met."""
    short = name.removeprefix("paper/")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, f"{short}.jsonl")
        gossamer = Path(sys.executable).with_name("gossamer")
        command = [gossamer, "--json", "sim", "run", name, "--out", str(results)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        verdicts = [line for line in map(json.loads, ended.stdout.splitlines()) if "sentence" in line]
        if not verdicts:
            raise SystemExit(f"{name} came to no verdict (exit code {ended.returncode})")
        plot_results(results, PICTURES / f"{short}.png")
    verdict = verdicts[-1]
    shown = "**Shown:**" if verdict["passed"] else "**Not shown:**"
    part = f"{shown} {verdict['sentence']}.\n\n{as_markdown(verdict['table'])}\n\n![{name}](experiments/{short}.png)"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replaced(page, short, part), encoding="utf-8")
    return bool(verdict["passed"])


def replaced(page: str, name: str, part: str, *, by: str = "make experiments") -> str:
    """``page`` with ``part`` between the markers of ``name``, written by ``by``. Raises ValueError for want of them."""
    begin, end = BEGIN.format(name=name, by=by), END.format(name=name)
    before, found, rest = page.partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"the page has no place for {name}: {begin} and {end}")
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """``table``, whose first row is its header."""
    header, *rows = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([header, "|" + "---|" * len(table[0]), *rows])


if __name__ == "__main__":
    sys.exit(main())
