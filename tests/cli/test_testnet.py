"""What a testnet shows and concludes, from canned statuses; real processes are in tests/process."""

import io
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from cli.live_view import LiveView, NodeRow, PlainView, row_line, view_for
from cli.node_process import free_ports
from cli.testnet_folder import Plan, TestnetError, claim_folder, purge, supervisor_home
from cli.testnet_report import Report, WeightsDiffer, build_report, check_weights, report_view
from node.status import NodeStatus
from tests.cli.fake_node import MERGE, status_of
from training.run_spec import RunSpec

SPEC = RunSpec(name="demo")


def row(index: int, status: NodeStatus | None, **changes: object) -> NodeRow:
    values: dict[str, object] = {
        "name": f"node-{index + 1}",
        "alone": False,
        "part": f"{index + 1}/3",
        "state": status.phase if status else "starting",
        "pid": 4000 + index,
        "home": "/tmp/home",
        "restarts": 0,
        "status": status,
    }
    return NodeRow(**(values | changes))  # type: ignore[arg-type]


def finished(index: int, **changes: object) -> NodeRow:
    merge = msgspec.structs.replace(MERGE, **{"loss_before": 2.5 + index / 10, **changes})
    return row(index, status_of(index, phase="finished", step=100, last_merge=merge))


ALONE = row(
    0,
    status_of(0, phase="finished", step=100, last_merge=msgspec.structs.replace(MERGE, loss_before=2.375)),
    name="alone-1",
    alone=True,
)


def drawn(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_lines_show_a_first_loss_at_once_then_every_five_seconds_and_an_end_once() -> None:
    out = io.StringIO()
    view = view_for(Console(file=out, width=200), "demo")
    assert isinstance(view, PlainView)
    starting, training = row(0, None), row(1, status_of(1))

    def lines_after(elapsed_s: float, *rows: NodeRow) -> list[str]:
        out.truncate(0)
        out.seek(0)
        view.show(rows, elapsed_s)
        return out.getvalue().splitlines()

    assert lines_after(1.0, starting, row(1, None)) == []
    (first,) = lines_after(1.5, starting, training)
    assert "step 50/100  loss 2.7500" in first
    assert "variance_corrected with CCCCCCCC at step 45, variance 0.50 -> 1.00" in first
    assert lines_after(2.0, starting, training) == []
    assert [line.split()[1] for line in lines_after(5.1, starting, training)] == ["node-1", "node-2"]
    assert len(lines_after(10.2, finished(0), training)) == 2
    assert [line.split()[1] for line in lines_after(15.3, finished(0), training)] == ["node-2"]


def test_a_problem_is_on_the_line() -> None:
    assert row_line(row(0, status_of(0, problem="no peer answers")), {}).endswith("! no peer answers")


def test_speed_is_told_in_what_the_model_learns_from() -> None:
    assert "12,345 bytes/s" in row_line(row(0, status_of(0)), {})
    assert "12,345 tokens/s" in row_line(row(0, status_of(0, unit="token")), {})


def test_the_live_table_has_a_row_for_each_node_dead_or_alive() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, height=40)
    view = view_for(console, "testnet demo")
    assert isinstance(view, LiveView)
    with view:
        view.show([row(0, status_of(0)), row(1, status_of(1), state="killed"), row(2, None), ALONE], 65.0)
    for part in ("1m05s", "50/100", "killed", "starting", "trains alone", "3.0 MiB", "with node-2"):
        assert part in out.getvalue()


def test_equal_hashes_are_a_success_that_says_how_much_was_gained() -> None:
    report = build_report([finished(0), finished(1), finished(2), ALONE], run_id="0f" * 32, seconds=61.0)
    check_weights(report)
    assert report.weights_agree
    assert report.merged_loss == 2.25
    assert [node.loss_before for node in report.nodes] == [2.5, 2.6, 2.7]
    assert report.alone[0].loss == 2.375
    text = drawn(
        report_view(
            msgspec.structs.replace(report, sample="[bold]def\x1b[2J", exported="m", exported_bytes=9)
        )
    )
    for part in (
        "0.1250 below the node alone",
        "3 of 3 nodes hold the same weights",
        "cd" * 32,
        "[bold]def\N{REPLACEMENT CHARACTER}[2J",
    ):
        assert part in text
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_different_hashes_are_a_loud_failure() -> None:
    report = build_report(
        [finished(0), finished(1), finished(2, weights_hash="00" * 32)], run_id="", seconds=1.0
    )
    assert not report.weights_agree
    assert "DIFFERENT WEIGHTS" in drawn(report_view(report))
    with pytest.raises(WeightsDiffer, match="node-3: 0000"):
        check_weights(report)


def test_a_swarm_that_never_merged_has_failed() -> None:
    report = build_report([row(0, status_of(0, phase="finished"))], run_id="", seconds=1.0)
    assert "no merge was committed" in drawn(report_view(report))
    with pytest.raises(WeightsDiffer, match="node-1: no merge"):
        check_weights(report)


def test_a_node_that_was_killed_for_good_does_not_spoil_the_others_agreement() -> None:
    dead = row(2, status_of(2), state="killed")
    report = build_report([finished(0), finished(1), dead], run_id="", seconds=1.0)
    assert report.weights_agree
    assert "node-3 (killed)" in drawn(report_view(report))


def plan(folder: Path, **changes: object) -> Plan:
    values: dict[str, object] = {
        "folder": folder,
        "spec": SPEC,
        "nodes": 2,
        "alone": 0,
        "keep": False,
        "kill_demo": False,
        "fresh": False,
    }
    return Plan(**(values | changes))  # type: ignore[arg-type]


def test_a_testnet_goes_on_in_its_own_folder_and_in_no_other(tmp_path: Path) -> None:
    claim_folder(plan(tmp_path))
    (tmp_path / "node-1").mkdir()
    claim_folder(plan(tmp_path))
    with pytest.raises(TestnetError, match="another testnet"):
        claim_folder(plan(tmp_path, nodes=3))
    claim_folder(plan(tmp_path, nodes=3, fresh=True))
    assert not (tmp_path / "node-1").exists()
    assert json.loads((tmp_path / "testnet.json").read_text())["nodes"] == 3


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TestnetError, match="holds other things"):
        claim_folder(plan(tmp_path, fresh=True))
    assert (tmp_path / "thesis.tex").exists()


def test_purging_leaves_only_the_supervisors_corner(tmp_path: Path) -> None:
    claim_folder(plan(tmp_path))
    supervisor_home(tmp_path).create()
    (tmp_path / "node-1" / "runs").mkdir(parents=True)
    purge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["supervisor"]


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_asking_for_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from cli.main import main; main(['--help']);"
        "print({'torch', 'libp2p', 'trio', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stderr == "set()\n"
