"""Figures of results: what is on them, for one seed, many, and variants; and what cannot be drawn."""

import struct
from pathlib import Path

import msgspec
import pytest

from netsim.plots import plot_results
from netsim.registry import load_scenario, scenario_as_toml
from netsim.results import Event, Sample, SeedResult, encode_line, header_for, read_header, read_lines
from netsim.scenario import Scenario
from p2p.errors import GossamerError
from tests.netsim.fake_runner import run_seed

HEAL = msgspec.structs.replace(load_scenario("partition-heal"), sample_every_s=60.0)
CHURN = msgspec.structs.replace(load_scenario("churn"), sample_every_s=60.0)


def results(
    folder: Path,
    scenario: Scenario,
    *,
    seeds: int = 1,
    variants: tuple[str, ...] = ("",),
    only: tuple[type, ...] = (),
) -> Path:
    """A file of made-up results; ``only``: of its lines, these."""
    file = folder / "r.jsonl"
    lines: list[Sample | Event | SeedResult] = []
    for variant in variants:
        for seed in range(seeds):
            run_seed(scenario, seed, variant=variant, emit=lines.append)
    kept = [line for line in lines if isinstance(line, only or object)]
    file.write_bytes(b"".join(map(encode_line, [header_for(scenario_as_toml(scenario)), *kept])))
    return file


def drawn(folder: Path, file: Path) -> str:
    plot_results(file, folder / "r.svg")
    return (folder / "r.svg").read_text()


def test_a_png_of_a_size_that_can_be_read(tmp_path: Path) -> None:
    plot_results(results(tmp_path, HEAL, seeds=2), tmp_path / "r.png")
    data = (tmp_path / "r.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1600, 1200)


def test_one_seed_with_its_faults_and_its_calm_end(tmp_path: Path) -> None:
    svg = drawn(tmp_path, results(tmp_path, HEAL))
    for text in (
        "partition-heal",
        "1 seed passed",
        "partition",
        "commit",
        "no more faults",
        "virtual time, minutes",
    ):
        assert text in svg
    assert "what happened in seed 0" in svg
    assert ">seed 0<" not in svg


def test_few_seeds_are_drawn_apart_and_many_as_one(tmp_path: Path) -> None:
    few = drawn(tmp_path, results(tmp_path, msgspec.structs.replace(CHURN, duration_s=300), seeds=3))
    assert all(f">seed {seed}<" in few for seed in range(3))
    many = drawn(tmp_path, results(tmp_path, msgspec.structs.replace(CHURN, duration_s=300), seeds=6))
    assert ">seed 1<" not in many
    assert "6 seeds: 6 passed" in many
    assert "virtual time, seconds" in many


def test_variants_are_in_the_legend(tmp_path: Path) -> None:
    svg = drawn(tmp_path, results(tmp_path, HEAL, seeds=2, variants=("ring", "full")))
    assert ">ring<" in svg
    assert ">full<" in svg
    assert "what happened in seed 0 of ring" in svg


def test_machines_that_are_down_are_so_until_they_start(tmp_path: Path) -> None:
    svg = drawn(tmp_path, results(tmp_path, CHURN))
    assert ">kill<" in svg
    assert ">leave<" in svg
    assert ">start<" not in svg


def test_accuracy_has_a_panel_where_there_are_labels(tmp_path: Path) -> None:
    file = results(tmp_path, HEAL)
    assert ">accuracy<" not in drawn(tmp_path, file)
    lines = [
        msgspec.structs.replace(line, accuracy=[0.5, None], merged_accuracy=0.75)
        if isinstance(line, Sample)
        else line
        for line in read_lines(file)
    ]
    file.write_bytes(b"".join(map(encode_line, [read_header(file), *lines])))
    assert ">accuracy<" in drawn(tmp_path, file)


def test_equal_results_make_equal_pictures(tmp_path: Path) -> None:
    file = results(tmp_path, HEAL)
    assert drawn(tmp_path, file) == drawn(tmp_path, file)


def test_a_swarm_that_is_off_and_seeds_that_have_not_ended_can_be_drawn(tmp_path: Path) -> None:
    sample = Sample(
        seed=0,
        at_s=0.0,
        up=0,
        seen=[None],
        step=[None],
        loss=[None],
        dispersion=None,
        height=[None],
        bytes_sent=[0],
    )
    file = tmp_path / "r.jsonl"
    later = msgspec.structs.replace(sample, at_s=5.0)
    file.write_bytes(b"".join(map(encode_line, [header_for(scenario_as_toml(HEAL)), sample, later])))
    assert "no seed has ended" in drawn(tmp_path, file)


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    file = results(tmp_path, HEAL, only=(SeedResult, Event))
    with pytest.raises(GossamerError, match="there is nothing to draw"):
        plot_results(file, tmp_path / "r.png")
    with pytest.raises(GossamerError, match="cannot draw into") as caught:
        plot_results(file, tmp_path / "r.jpeg")
    assert str(tmp_path / "r.png") in caught.value.fix
    file = results(tmp_path, HEAL)
    with pytest.raises(GossamerError, match="cannot write"):
        plot_results(file, tmp_path / "nowhere" / "r.png")
    assert not (tmp_path / "r.png").exists()
