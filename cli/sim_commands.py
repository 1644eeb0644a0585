"""``gossamer sim``: simulations of whole swarms in virtual time, run, replayed, drawn and listed.

Owns the command lines and what a scenario becomes under their options. Running is ``netsim.campaign``'s, judging
``netsim.runner``'s, and what people see of both ``cli.sim_views``'s. The simulator is imported when a command needs it,
torch only where one seed is replayed.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cli.ask_commands import parse_duration_s
from cli.common import Common, command
from p2p.errors import GossamerError

if TYPE_CHECKING:
    from netsim.campaign import Job, Runner
    from netsim.results import SeedResult
    from netsim.scenario import Scenario

SEEDS_MAX = 1_000_000
RUNNER = "netsim.runner"

sim_app = typer.Typer(
    help="Whole swarms in virtual time, with faults, on this machine.", no_args_is_help=True
)

ScenarioName = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="One of gossamer sim ls, or the path of a TOML file.")
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Replace the number of machines.")]
Duration = Annotated[
    str | None, typer.Option("--duration", metavar="TIME", help="Replace the length: 90s, 10m, 1h.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace any key: churn.per_hour=0.5, fault.0.at_s=5."),
]
Small = Annotated[bool, typer.Option("--small", help="An experiment's small form, which takes minutes.")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write every delivery and event of the one seed there."),
]


class SimulationFailed(GossamerError):
    """A seed failed, an experiment did not show what it must, or a replay went another way."""


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.add_typer(sim_app, name="sim", rich_help_panel="Try it here")


@dataclass(frozen=True, slots=True)
class Asked:
    """A scenario as the command line names and changes it."""

    scenario: str
    nodes: int | None
    duration: str | None
    settings: Sequence[str]
    small: bool

    def changed(self, scenario: Scenario) -> Scenario:
        """``scenario`` with all the changes; the small form comes first."""
        from netsim.registry import parse_changes, small_form, with_changes

        if self.small and scenario.experiment is None:
            raise typer.BadParameter(f"{scenario.name} is no experiment, so it has no small form")
        if self.small and scenario.experiment is not None:
            scenario = small_form(scenario)
        changes = {"nodes": self.nodes} if self.nodes is not None else {}
        if self.duration is not None:
            changes["duration_s"] = parse_duration_s(self.duration)
        return with_changes(scenario, changes | parse_changes(self.settings))

    def replay_command(self, result: SeedResult) -> str:
        """What to type to see one seed again."""
        words = ["gossamer", "sim", "replay", str(result.seed), self.scenario]
        words += ["--variant", result.variant] if result.variant else []
        words += ["--small"] if self.small else []
        words += ["--nodes", str(self.nodes)] if self.nodes is not None else []
        words += ["--duration", self.duration] if self.duration is not None else []
        for setting in self.settings:
            words += ["--set", setting]
        return shlex.join(words)


@command(sim_app, "run")
def run(
    common: Common,
    scenario: ScenarioName,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Run this seed; 0 if absent.")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="A:B", help="Run the seeds from A up to B, without B.")
    ] = None,
    nodes: Nodes = None,
    duration: Duration = None,
    settings: Settings = None,
    processes: Annotated[
        int | None,
        typer.Option("-j", "--processes", min=1, max=1024, help="Seeds at once; one per core if absent."),
    ] = None,
    trace: Trace = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.jsonl", help="Where the results go.")
    ] = None,
    small: Small = False,
) -> None:
    """Run a scenario with one seed or many, and check everything that must hold."""
    from cli.sim_views import figures_view, progress_view, seeds_view
    from netsim.campaign import run_campaign
    from netsim.feasible import check_scenario
    from netsim.registry import load_scenario, scenario_as_toml
    from netsim.results import encode_line, header_for

    asked = Asked(scenario, nodes, duration, settings or [], small)
    base = load_scenario(scenario)
    changed = asked.changed(base)
    chosen = _seeds(seed, seeds, changed)
    check_scenario(changed)
    jobs = _jobs(changed, chosen, trace)
    processes = _processes(jobs, processes)
    if out is None:
        numbers = f"{chosen[0]}" if len(chosen) == 1 else f"{chosen[0]}-{chosen[-1]}"
        out = Path(f"gossamer-sim-{changed.name.replace('/', '-')}-{numbers}.jsonl")
    header = header_for(scenario_as_toml(changed))
    view = progress_view(common.err(), changed.name, jobs)
    try:
        with view:
            results = run_campaign(
                jobs, processes=processes, header=header, out=out, view=view, runner=RUNNER
            )
    except KeyboardInterrupt:
        common.err().print(f"stopped; the seeds that had ended are in {out}", markup=False, soft_wrap=True)
        raise
    except OSError as error:
        raise GossamerError(
            f"the simulation could not go on: {error}",
            why=f"it writes its results to {out}, and needs processes to run in",
            fix="name a file that can be written: --out FILE.jsonl",
        ) from error
    if common.json:
        for result in results:
            common.print(msgspec.Raw(encode_line(result).strip()), "")
    else:
        common.out().print(figures_view(changed, results))
        common.out().print(seeds_view(results, asked.replay_command), soft_wrap=True)
    common.err().print(f"results  {out}", markup=False, soft_wrap=True)
    common.err().print(f"draw it  gossamer sim plot {shlex.quote(str(out))}", markup=False, soft_wrap=True)
    failed = [result for result in results if result.verdict == "failed"]
    if failed:
        raise SimulationFailed(
            f"{len(failed)} of {len(results)} seeds failed",
            why="a seed passes when every checker is content and every [[expect]] is met",
            fix=asked.replay_command(failed[0]),
        )
    if changed.experiment is not None:
        _judge(common, changed, results)


@command(sim_app, "replay")
def replay(
    common: Common,
    seed: Annotated[int, typer.Argument(metavar="SEED", min=0, help="The seed to see again.")],
    scenario: Annotated[
        str | None, typer.Argument(metavar="[SCENARIO]", help="As for sim run.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", metavar="FILE", help="Take the scenario from these results instead."),
    ] = None,
    variant: Annotated[
        str, typer.Option("--variant", metavar="NAME", help="Of an experiment, the variant.")
    ] = "",
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="Stop there and show the swarm: 90s, 10m.")
    ] = None,
    nodes: Nodes = None,
    duration: Duration = None,
    settings: Settings = None,
    small: Small = False,
    trace: Trace = None,
) -> None:
    """Run one seed again, exactly as it was: what happened when, and the swarm as it was then."""
    from cli.sim_views import Timeline, failures_text, state_view
    from netsim.feasible import check_scenario
    from netsim.registry import load_scenario, parse_scenario, variant_of
    from netsim.results import read_header

    if (scenario is None) == (results is None):
        raise typer.BadParameter("name either a scenario or, with --results, the file of its results")
    if scenario is not None:
        base = load_scenario(scenario)
    else:
        assert results is not None
        base = parse_scenario(read_header(results).scenario, origin=f"in {results}")
    asked = Asked(scenario or "", nodes, duration, settings or [], small)
    changed = asked.changed(base)
    check_scenario(changed)
    if changed.experiment is not None and not variant:
        names = ", ".join(variant.name for variant in changed.experiment.variants)
        raise typer.BadParameter(f"say which variant: --variant with one of {names}")
    until_s = None if until is None else float(parse_duration_s(until))
    timeline = Timeline(common)
    runner: Runner = importlib.import_module(RUNNER)
    result = runner.run_seed(
        variant_of(changed, variant),
        seed,
        variant=variant,
        until_s=until_s,
        trace=trace,
        emit=timeline.add,
    )
    if not common.json:
        common.out().print(state_view(timeline.last_sample))
        common.out().print(failures_text(result, until_s=until_s), soft_wrap=True)
    if results is not None and until is None and changed == base:
        _compare(results, result)
    if result.verdict == "failed":
        raise SimulationFailed(
            f"seed {seed} failed at {result.failures[0].at_s:.1f} s: {result.failures[0].what}",
            why=f"{result.failures[0].checker} looks after that",
            fix=f"see the moments before: add --until {max(1, int(result.failures[0].at_s) - 1)}s --trace FILE",
        )


@command(sim_app, "plot")
def plot(
    common: Common,
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A file that sim run wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A .png or .svg file; beside the results if absent."),
    ] = None,
) -> None:
    """Draw results: loss, bytes, dispersion and membership over time, and the faults below them."""
    from netsim.plots import plot_results

    out = results.with_suffix(".png") if out is None else out
    plot_results(results, out)
    common.print({"drawn": str(out)}, f"drawn    {out}")


@command(sim_app, "ls")
def ls(common: Common) -> None:
    """The scenarios that come with gossamer."""
    from cli.sim_views import scenarios_table
    from netsim.registry import builtin_names, load_scenario

    scenarios = [load_scenario(name) for name in builtin_names()]
    rows = [
        {
            "name": scenario.name,
            "about": scenario.about,
            "nodes": scenario.nodes,
            "duration_s": scenario.duration_s,
            "variants": [variant.name for variant in scenario.experiment.variants]
            if scenario.experiment
            else [],
        }
        for scenario in scenarios
    ]
    common.print(rows, scenarios_table(scenarios))


def _seeds(seed: int | None, seeds: str | None, scenario: Scenario) -> range:
    if seed is not None and seeds is not None:
        raise typer.BadParameter("--seed is one seed, --seeds are many: give one of them")
    if seed is not None:
        return range(seed, seed + 1)
    if seeds is None:
        return range(scenario.experiment.seeds if scenario.experiment else 1)
    first, colon, end = seeds.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 0 < int(end) - int(first) <= SEEDS_MAX):
        raise typer.BadParameter(f"{seeds!r} are no seeds; write for example 0:100 for the first hundred")
    return range(int(first), int(end))


def _jobs(scenario: Scenario, seeds: Sequence[int], trace: Path | None) -> list[Job]:
    """One for each seed of each variant, variant by variant."""
    from netsim.campaign import Job
    from netsim.registry import variant_of

    names = [variant.name for variant in scenario.experiment.variants] if scenario.experiment else [""]
    forms = {name: variant_of(scenario, name) for name in names}
    jobs = [Job(scenario=forms[name], seed=seed, variant=name) for name in names for seed in seeds]
    if trace is None:
        return jobs
    if len(jobs) > 1:
        raise typer.BadParameter("--trace takes one seed of one variant: use sim replay, or --seed")
    return [msgspec.structs.replace(jobs[0], trace=str(trace))]


def _processes(jobs: Sequence[Job], wanted: int | None) -> int:
    """As many as were asked for, if they fit into memory; else as many as there are cores, or as fit."""
    from netsim.feasible import check_memory, processes_that_fit

    forms = [job.scenario for job in {job.variant: job for job in jobs}.values()]
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = max(1, min(cores, *(processes_that_fit(form) for form in forms)))
    wanted = min(wanted, len(jobs))
    for form in forms:
        check_memory(form, processes=wanted)
    return wanted


def _judge(common: Common, scenario: Scenario, results: Sequence[SeedResult]) -> None:
    """Whether an experiment shows what it must."""
    from cli.sim_views import verdict_view
    from netsim.experiments import CRITERIA

    assert scenario.experiment is not None
    verdict = CRITERIA[scenario.experiment.criterion](results)
    common.print(verdict, verdict_view(verdict))
    if not verdict.passed:
        raise SimulationFailed(
            f"{scenario.name} does not show what it must: {verdict.sentence}",
            why=f"the criterion {scenario.experiment.criterion} is what the published finding comes to",
            fix="more seeds: --seeds 0:10; if it stays so, something in the mathematics has changed",
        )


def _compare(results: Path, now: SeedResult) -> None:
    """Raise unless the same seed is in ``results`` with the same trace, or is not there."""
    from netsim.results import SeedResult, read_header, read_lines

    for line in read_lines(results):
        if isinstance(line, SeedResult) and (line.seed, line.variant) == (now.seed, now.variant):
            if line.trace and line.trace != now.trace:
                raise SimulationFailed(
                    f"seed {now.seed} went another way than in {results}",
                    why="a scenario and a seed decide everything, so it is the program that has changed",
                    fix=f"use the gossamer that wrote it, version {read_header(results).version}, at its commit",
                )
            return
