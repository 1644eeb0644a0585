"""Whole command lines of ``gossamer sim``, with swarms made of formulas: what they print, write, and end with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli.sim_commands
from cli.exit_codes import ExitCode
from cli.sim_views import machines_text
from netsim import experiments
from netsim.experiments import Verdict
from netsim.registry import builtin_names, parse_scenario
from netsim.results import SeedResult, read_header, read_lines

pytestmark = pytest.mark.usefixtures("home")
Gossamer = Any

SHORT = ("--duration", "5m", "--set", "sample_every_s=30")
INTERRUPTED = """
import os, pathlib, signal, sys, threading, time
import cli.sim_commands
from cli.main import main

def interrupt():
    while '"line":"seed"' not in pathlib.Path("r.jsonl").read_text():
        time.sleep(0.1)
    os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without it
    cli.sim_commands.RUNNER = "tests.netsim.fake_runner"
    pathlib.Path("r.jsonl").touch()
    threading.Thread(target=interrupt, daemon=True).start()
    sys.exit(main(["sim", "run", "churn", "--seeds", "0:3", "-j", "1", "--set", "about=hang:1", "--out", "r.jsonl"]))
"""
EXPERIMENT = """
name = "compare"
nodes = 4
duration_s = 120
[run]
name = "compare"
[experiment]
criterion = "made-up"
seeds = 2
small = { nodes = 3 }
[[experiment.variants]]
name = "ring"
change = { topology = "ring" }
[[experiment.variants]]
name = "mean rule"
change = { "run.exchange.rule" = "mean" }
"""


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.sim_commands, "RUNNER", "tests.netsim.fake_runner")


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def judge(results: Any) -> Verdict:
        table = (("variant", "seed"), *((result.variant, str(result.seed)) for result in results))
        return Verdict(passed=len(results) == 4, table=table, sentence="four results, as published")

    monkeypatch.setitem(experiments.CRITERIA, "made-up", judge)
    file = tmp_path / "compare.toml"
    file.write_text(EXPERIMENT)
    return file


def seeds_in(file: Path) -> list[tuple[str, int]]:
    return [(line.variant, line.seed) for line in read_lines(file) if isinstance(line, SeedResult)]


# --- run ----------------------------------------------------------------------------------------------------------


def test_one_seed(gossamer: Gossamer, tmp_path: Path) -> None:
    shown = gossamer("sim", "run", "churn", *SHORT)
    assert shown.code == 0
    assert "1 seed passed" in shown.out
    assert "commit_share" in shown.out
    assert "≥ 90.0%" in shown.out
    file = tmp_path / "gossamer-sim-churn-0.jsonl"
    assert f"gossamer sim plot {file.name}" in shown.err
    assert seeds_in(file) == [("", 0)]


def test_many_seeds_with_changes_that_are_in_the_header(gossamer: Gossamer, tmp_path: Path) -> None:
    options = (
        "--seeds",
        "3:7",
        "--nodes",
        "9",
        "--set",
        "churn.per_hour=0.5",
        "-j",
        "2",
        "--out",
        "my.jsonl",
    )
    shown = gossamer("sim", "run", "churn", *SHORT, *options)
    assert shown.code == 0
    assert "4 of 4 seeds passed" in shown.out
    assert "lowest" in shown.out
    scenario = parse_scenario(read_header(tmp_path / "my.jsonl").scenario)
    assert (scenario.nodes, scenario.duration_s, scenario.churn.per_hour) == (9, 300.0, 0.5)
    assert seeds_in(tmp_path / "my.jsonl") == [("", seed) for seed in range(3, 7)]


def test_results_as_json(gossamer: Gossamer) -> None:
    shown = gossamer("sim", "run", "ideal", *SHORT, "--seeds", "0:2", "--json")
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [(line["line"], line["seed"], line["verdict"]) for line in lines] == [
        ("seed", 0, "passed"),
        ("seed", 1, "passed"),
    ]


def test_a_failed_seed_says_all_there_is_to_know_and_how_to_see_it_again(gossamer: Gossamer) -> None:
    changes = ("--set", "about=fail:1 die:2", "--nodes", "5")
    shown = gossamer("sim", "run", "churn", *SHORT, "--seeds", "0:4", *changes)
    assert shown.code == ExitCode.CHECK_FAILED
    for text in (
        "seed 1 FAILED",
        "churn per hour 0.",
        "equal-anchors at 180.5 s, machine 2: machines 1 and 2 differ at height 3",
        "gossamer sim replay 1 churn --nodes 5 --duration 5m --set sample_every_s=30 --set 'about=fail:1 die:2'",
        "process at 150.0 s: the process was ended by SIGSEGV",
        "2 of 4 seeds FAILED",
    ):
        assert text in shown.out
    assert "seed 1 failed at 180.5 s: equal-anchors" in shown.err
    assert "error 2 of 4 seeds failed" in shown.err
    same = ("--nodes", "5", *SHORT, "--set", "about=fail:1 die:2")
    replayed = gossamer("sim", "replay", "1", "churn", *same)
    assert replayed.code == ExitCode.CHECK_FAILED
    assert "equal-anchors at 180.5 s" in replayed.out


def test_an_experiment_runs_every_variant_and_is_judged(
    gossamer: Gossamer, experiment: Path, tmp_path: Path
) -> None:
    shown = gossamer("sim", "run", str(experiment), "--out", "r.jsonl")
    assert shown.code == 0
    assert seeds_in(tmp_path / "r.jsonl") == [("ring", 0), ("ring", 1), ("mean rule", 0), ("mean rule", 1)]
    assert "REPRODUCED  four results, as published" in shown.out
    assert "2 of 2" in shown.out
    small = gossamer("sim", "run", str(experiment), "--small", "--seeds", "0:1", "--out", "s.jsonl")
    assert small.code == ExitCode.CHECK_FAILED
    assert "NOT REPRODUCED" in small.out
    assert "compare does not show what it must" in small.err
    assert parse_scenario(read_header(tmp_path / "s.jsonl").scenario).nodes == 3


def test_a_variant_that_fails_is_replayed_by_its_name(gossamer: Gossamer, experiment: Path) -> None:
    shown = gossamer("sim", "run", str(experiment), "--set", "about=fail:1")
    assert f"sim replay 1 {experiment} --variant 'mean rule' --set about=fail:1" in shown.out
    assert "REPRODUCED" not in shown.out
    assert gossamer("sim", "replay", "1", str(experiment), "--variant", "mean rule").code == 0
    assert "--variant with one of ring, mean rule" in gossamer("sim", "replay", "1", str(experiment)).err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["churm"], ExitCode.CONFIG, "did you mean churn?"),
        (["churn", "--set", "noodes=3"], ExitCode.CONFIG, "did you mean nodes?"),
        (["churn", "--nodes", "2000"], ExitCode.CONFIG, "nodes must be a whole number from 1 to 1,024"),
        (["churn", "--set", "topology=torus", "--nodes", "7"], ExitCode.CONFIG, "use 9 or 12 members"),
        (["churn", "--nodes", "1024", "--set", "learner.dimension=1048576"], ExitCode.CONFIG, "of memory"),
        (
            ["churn", "--nodes", "1024", "-j", "1000", "--seeds", "0:1000"],
            ExitCode.CONFIG,
            "run fewer at once: -j",
        ),
        (["churn", "--duration", "soon"], ExitCode.USAGE, "is not a duration"),
        (["churn", "--seeds", "5"], ExitCode.USAGE, "write for example 0:100"),
        (["churn", "--seeds", "7:7"], ExitCode.USAGE, "are no seeds"),
        (["churn", "--seeds", "0:3", "--seed", "1"], ExitCode.USAGE, "give one of them"),
        (["churn", "--seeds", "0:3", "--trace", "t"], ExitCode.USAGE, "--trace takes one seed"),
        (["churn", "--small"], ExitCode.USAGE, "is no experiment"),
        (["churn", "--set", "about=refuse"], ExitCode.CONFIG, "the scenario is impossible"),
        (["churn", "--out", "nowhere/r.jsonl"], ExitCode.FAILED, "name a file that can be written"),
    ],
)
def test_what_is_told_before_anything_runs(
    gossamer: Gossamer, arguments: list[str], code: int, expected: str
) -> None:
    shown = gossamer("sim", "run", *arguments)
    assert shown.code == code
    assert expected in shown.err
    assert shown.out == ""


def test_ctrl_c_keeps_what_was_finished(gossamer: Gossamer, tmp_path: Path) -> None:
    """A process of its own, with all of its group interrupted, as a terminal does it."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    assert ended.returncode == ExitCode.INTERRUPTED, ended.stderr
    assert "the seeds that had ended are in r.jsonl" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert seeds_in(tmp_path / "r.jsonl") == [("", 0)]


# --- replay, plot, ls ---------------------------------------------------------------------------------------------


def test_replay_tells_what_happened_and_shows_the_swarm_then(gossamer: Gossamer) -> None:
    shown = gossamer("sim", "replay", "2", "churn", "--nodes", "3", *SHORT, "--until", "2m", "--trace", "t")
    assert shown.code == 0
    assert "60.00 s  commit      0  height 1" in shown.out
    assert "at 120.0 s: " in shown.out
    assert "240.00 s" not in shown.out
    assert "seed 2 has nothing wrong up to 120 s" in shown.out
    assert Path("t").read_text() == "trace of seed 2\n"


def test_replay_from_results_compares_the_trace(gossamer: Gossamer, tmp_path: Path) -> None:
    gossamer("sim", "run", "churn", *SHORT, "--nodes", "3", "--seeds", "0:2", "--out", "r.jsonl")
    file = tmp_path / "r.jsonl"
    assert gossamer("sim", "replay", "1", "--results", "r.jsonl").code == 0
    (trace,) = {line.trace for line in read_lines(file) if isinstance(line, SeedResult) and line.seed == 1}
    file.write_text(file.read_text().replace(trace, "0" * 32))
    shown = gossamer("sim", "replay", "1", "--results", "r.jsonl")
    assert shown.code == ExitCode.CHECK_FAILED
    assert "seed 1 went another way than in r.jsonl" in shown.err
    assert gossamer("sim", "replay", "1", "--results", "r.jsonl", "--until", "60").code == 0


def test_replay_as_json(gossamer: Gossamer) -> None:
    shown = gossamer("sim", "replay", "2", "churn", "--nodes", "3", *SHORT, "--json")
    lines = [json.loads(line)["line"] for line in shown.out.splitlines()]
    assert set(lines) == {"event", "sample", "seed"}
    assert lines[-1] == "seed"


def test_replay_needs_a_scenario_from_one_place(gossamer: Gossamer) -> None:
    for arguments in (["1"], ["1", "churn", "--results", "r.jsonl"]):
        shown = gossamer("sim", "replay", *arguments)
        assert shown.code == ExitCode.USAGE
        assert "name either a scenario" in shown.err
    shown = gossamer("sim", "replay", "1", "--results", "r.jsonl")
    assert shown.code == ExitCode.CONFIG
    assert "No such file" in shown.err


def test_plot_draws_beside_the_results(gossamer: Gossamer, tmp_path: Path) -> None:
    gossamer("sim", "run", "churn", *SHORT, "--nodes", "3", "--out", "r.jsonl")
    assert "r.png" in gossamer("sim", "plot", "r.jsonl").out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(gossamer("sim", "plot", "r.jsonl", "--out", "x.svg", "--json").out) == {
        "drawn": "x.svg"
    }
    (tmp_path / "old.jsonl").write_text('{"line":"header","format":99,"version":"9.9"}\n')
    shown = gossamer("sim", "plot", "old.jsonl")
    assert shown.code == ExitCode.CONFIG
    assert "format 99" in shown.err


def test_ls(gossamer: Gossamer) -> None:
    shown = gossamer("sim", "ls").out
    listed = json.loads(gossamer("sim", "ls", "--json").out)
    assert [row["name"] for row in listed] == builtin_names()
    for row in listed:
        assert row["name"] in shown
        assert row["about"] in shown


def test_machines_in_a_few_characters() -> None:
    assert machines_text([]) == "none"
    assert machines_text([9, 0, 1, 2, 4]) == "0-2, 4, 9"


def test_help_costs_no_simulator() -> None:
    code = "import sys, cli.main; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "cli.sim_commands" in loaded
    assert not [name for name in loaded if name.startswith(("netsim", "torch", "matplotlib"))]
