"""Whole command lines against a fake node: what they print, where, and the code they end with."""

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from rich.console import Console

import cli.ask_commands
import cli.exit_codes
from cli.ask_commands import parse_duration_s
from cli.exit_codes import ExitCode, exit_code_of
from cli.views import peers_table, status_text
from node.control import ControlError, Evaluate, Export, HandOver, MakeInvite, Sample, Stop
from node.home import Home
from node.status import Arrival
from p2p.errors import GossamerError
from tests.cli.fake_node import MERGE, PEERS, FakeNode, status_of

pytestmark = pytest.mark.usefixtures("home")
Gossamer = Any
PID_OF_NOBODY = 2**30
"""Above what any kernel gives out."""


def test_help_lists_every_command(gossamer: Gossamer) -> None:
    shown = gossamer("--help")
    assert shown.code == 0
    names = (
        "init run join swarms advertise train invite stop status top peers merge export eval sample testnet sim doctor"
        " service config keys version help"
    )
    for name in names.split():
        assert f" {name} " in shown.out


def test_the_flags_of_daily_commands_are_few_and_known(gossamer: Gossamer) -> None:
    """New knobs belong into the run spec or config.toml; a new flag has to be added here too, on purpose."""
    everywhere = {"--home", "--json", "--quiet", "--debug", "--no-color", "--help"}
    expected = {
        "init": set(),
        "run": {
            "--run",
            "--listen",
            "--bootstrap",
            "--bootstrap-only",
            "--private",
            "--allow",
            "--dht",
            "--no-dht",
            "--lan",
            "--no-lan",
            "--device",
            "--threads",
            "--data",
            "--base",
            "--part",
            "--metrics-listen",
            "--linger",
            "--no-linger",
        },
        "join": {
            "--listen",
            "--allow",
            "--bootstrap",
            "--bootstrap-only",
            "--dht",
            "--no-dht",
            "--lan",
            "--no-lan",
            "--device",
            "--threads",
            "--data",
            "--base",
            "--part",
            "--metrics-listen",
            "--linger",
            "--from",
            "--no-linger",
        },
        "status": {"--watch"},
        "top": set(),
        "stop": {"--now", "--hand-over"},
        "invite": {"--peers", "--expires"},
        "advertise": {"--about", "--expires"},
        "swarms": {"--from"},
        "doctor": {"--bootstrap", "--bundle"},
        "export": {"--out", "--dtype", "--which"},
        "eval": {"--which", "--bytes"},
        "sample": {"--count", "--temperature", "--which"},
    }
    for name, flags in expected.items():
        words = gossamer(name, "--help").out.replace("│", " ").split()
        assert {word for word in words if word.startswith("--")} == flags | everywhere, name


def test_init_creates_and_then_keeps(gossamer: Gossamer, home: Home) -> None:
    first = gossamer("init")
    assert first.code == 0
    assert "created" in first.out
    assert stat.S_IMODE(home.identity_file.stat().st_mode) == 0o600
    again = json.loads(gossamer("init", "--json").out)
    assert again["created"] == {"identity": False, "config": False}
    assert again["peer"] in first.out
    assert json.loads(gossamer("--json", "keys", "show").out)["peer"] == again["peer"]


def test_home_is_taken_before_and_after_the_command(gossamer: Gossamer, tmp_path: Path) -> None:
    for number, arguments in enumerate([("--home", "X", "init"), ("init", "--home", "X")]):
        folder = str(tmp_path / f"other-{number}")
        assert gossamer(*(folder if word == "X" else word for word in arguments)).code == 0
        assert Path(folder, "identity.key").exists()


def test_status_on_one_screen_and_as_json(gossamer: Gossamer, node: FakeNode) -> None:
    text = gossamer("status").out
    for part in (
        "node-1 (AAAAAAAA)",
        "step 50 of 100",
        "loss 2.7500",
        "variance 0.50 -> 1.00",
        "hash 2",
        "banned",
    ):
        assert part in text
    shown = json.loads(gossamer("status", "--json").out)
    assert shown["schema"] == 1
    assert shown["peer"] == PEERS[0]


def test_a_rendezvous_shows_no_model() -> None:
    text = status_text(status_of(0, phase="rendezvous", parameters=0, device=""))
    assert "rendezvous[/]: holds no model, is no member" in text
    assert "1 connected" in text
    assert "parameters" not in text
    assert "checkpoint" not in text


@pytest.mark.parametrize("flag", [("--device", "cpu"), ("--data", "texts"), ("--no-linger",)])
def test_a_rendezvous_is_not_told_how_to_train(gossamer: Gossamer, flag: tuple[str, ...]) -> None:
    for command in [("run",), ("join", "gossamer:join/1/x")]:
        refused = gossamer(*command, "--bootstrap-only", *flag)
        assert refused.code == ExitCode.USAGE
        assert f"leave out {flag[0]}" in refused.err


def test_peers_lists_the_connected_first(gossamer: Gossamer, node: FakeNode) -> None:
    lines = gossamer("peers").out.splitlines()
    assert [line.split()[0] for line in lines] == ["peer", "BBBBBBBB", "CCCCCCCC"]
    assert "hash" in lines[2]


def test_a_hand_over_waits_for_the_process_to_be_gone(
    gossamer: Gossamer, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.status = status_of(0, pid=PID_OF_NOBODY)
    gone = gossamer("stop", "--hand-over")
    assert (gone.code, "gossamer run goes on" in gone.out) == (ExitCode.OK, True)
    assert "a merge that did not end will be caught up with" in gone.out
    assert [type(request) for request in node.asked] == [HandOver]
    monkeypatch.setattr(cli.ask_commands, "EXIT_S_MAX", 0.3)
    node.status = status_of(0, pid=os.getpid())
    still_there = gossamer("stop", "--hand-over")
    assert (still_there.code, "gossamer stop --now" in still_there.err) == (ExitCode.FAILED, True)


def test_at_once_and_in_good_order_is_too_much_to_ask(gossamer: Gossamer, node: FakeNode) -> None:
    assert gossamer("stop", "--now", "--hand-over").code == ExitCode.USAGE
    assert node.asked == []


def test_merge_export_eval_sample_invite_stop(gossamer: Gossamer, node: FakeNode, tmp_path: Path) -> None:
    assert MERGE.weights_hash in gossamer("merge", "now").out
    assert "2.1250" in gossamer("eval", "--bytes", "1000").out
    assert gossamer("sample", "def ", "--count", "9").out == "[red]self[/red] = None\n"
    assert gossamer("invite", "--expires", "7d").out.startswith("gossamer:join/1/abc?peer=/ip4/")
    assert gossamer("export", "--out", "m.safetensors", "--which", "live").code == 0
    assert gossamer("stop", "--now").code == 0
    assert node.asked == [
        Evaluate(which="live", bytes_max=1000),
        Sample(prompt="def ", count=9),
        MakeInvite(peers=3, expires_s=7 * 86400),
        Export(path=str(tmp_path / "m.safetensors"), which="live"),
        Stop(now=True),
    ]


def test_a_merge_is_foretold_with_what_it_is_worth(gossamer: Gossamer, node: FakeNode) -> None:
    shown = gossamer("merge", "foretell").out
    assert "2.2500" in shown
    assert "2.5000, the mean of 2 models" in shown
    assert "+0.2500: a merge would be worth having" in shown
    node.foretold = msgspec.structs.replace(node.foretold, merged=3.0)
    assert "-0.5000: the models have drifted too far apart" in gossamer("merge", "foretell").out
    assert json.loads(gossamer("merge", "foretell", "--json").out)["merged"] == 3.0


def test_an_error_is_three_lines_on_stderr_and_never_a_traceback(gossamer: Gossamer, node: FakeNode) -> None:
    shown = gossamer("export", "--out", "m.safetensors")
    assert shown.code == ExitCode.FAILED
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "error there is no merged model yet",
        "why   none was made",
        "fix   gossamer merge now",
    ]
    as_json = gossamer("export", "--out", "m.safetensors", "--json")
    assert json.loads(as_json.err)["error"]["fix"] == "gossamer merge now"
    assert "Traceback" in gossamer("export", "--out", "m.safetensors", "--debug").err


def test_no_node_is_code_4(gossamer: Gossamer) -> None:
    for command in (
        ["status"],
        ["peers"],
        ["stop"],
        ["merge", "now"],
        ["testnet", "kill", "1"],
        ["testnet", "down"],
    ):
        shown = gossamer(*command)
        assert shown.code == ExitCode.NO_DAEMON, command
        assert "gossamer" in shown.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["statu"], ExitCode.USAGE, "Did you mean 'status'"),
        (["merge", "noww"], ExitCode.USAGE, "gossamer merge --help"),
        (["join"], ExitCode.USAGE, "INVITE"),
        (["run", "--fast"], ExitCode.USAGE, "--fast"),
        (["sample", "--count", "0"], ExitCode.USAGE, "--count"),
        (["invite", "--expires", "soon"], ExitCode.USAGE, "7d"),
        (["eval", "--which", "other"], ExitCode.USAGE, "anchor"),
        (["export", "--out", "x", "--dtype", "fp8"], ExitCode.USAGE, "bf16"),
        (["join", "gossamer:join/1/nonsense"], ExitCode.USAGE, "in quotes"),
        (["join", "https://example.org/"], ExitCode.USAGE, "not an invite"),
        (["join", "a" * 64], ExitCode.USAGE, "--bootstrap ADDR"),
        (["run"], ExitCode.CONFIG, "gossamer init"),
        (["run", "--run", "absent.toml"], ExitCode.CONFIG, "absent.toml"),
        (["run", "--run", "z" * 64], ExitCode.CONFIG, "z" * 64),
        (["run", "--part", "5/4"], ExitCode.CONFIG, "--part"),
        (["config", "check", "absent.toml"], ExitCode.CONFIG, "absent.toml"),
        (["keys", "show"], ExitCode.CONFIG, "gossamer init"),
        (["testnet", "up", "-n", "2", "--alone", "3"], ExitCode.USAGE, "at most as many"),
        (["testnet", "logs"], ExitCode.FAILED, "gossamer testnet up"),
        (["help", "everything"], ExitCode.USAGE, "exit-codes"),
    ],
)
def test_mistakes_get_a_code_and_a_next_step(
    gossamer: Gossamer, arguments: list[str], code: ExitCode, said: str
) -> None:
    shown = gossamer(*arguments)
    assert shown.code == code
    assert said in shown.err
    assert [line.split()[0] for line in shown.err.splitlines()] == ["error", "why", "fix"]
    as_json = json.loads(gossamer(*arguments, "--json").err)["error"]
    assert as_json["code"] == code
    assert all(as_json[part] for part in ("what", "why", "fix"))


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "0.0.0.0:4100",
        "/dns4/localhost",
        "/dns4/localhost/udp/4100",
        "/ip4/127.0.0.1/tcp/70000",
        "/ip4/192.0.2.250/tcp/0",
    ],
)
def test_an_address_one_cannot_listen_on_is_a_setting_to_correct(
    gossamer: Gossamer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    monkeypatch.setattr("node.logs.set_up_logging", lambda *_, **__: None)
    (tmp_path / "run.toml").write_text('name = "mine"\n')
    gossamer("init")
    shown = gossamer("run", "--run", "run.toml", "--listen", address)
    assert shown.code == ExitCode.CONFIG
    assert [line.split()[0] for line in shown.err.splitlines()] == ["error", "why", "fix"]
    assert address in shown.err
    assert "/ip4/0.0.0.0/tcp/4100" in shown.err


def test_an_address_others_cannot_dial_is_not_announced(
    gossamer: Gossamer, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("node.logs.set_up_logging", lambda *_, **__: None)
    (tmp_path / "run.toml").write_text('name = "mine"\n')
    gossamer("init")
    home.config_file.write_text('announce = ["/ip4/0.0.0.0/tcp/4100"]\n')
    shown = gossamer("run", "--run", "run.toml", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert shown.code == ExitCode.CONFIG
    assert [line.split()[0] for line in shown.err.splitlines()] == ["error", "why", "fix"]


def test_a_bug_is_reported_as_one_with_its_trace_in_a_file(
    gossamer: Gossamer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("p2p.identity.Identity.load", lambda _: 1 / 0)
    shown = gossamer("keys", "show")
    assert shown.code == ExitCode.FAILED
    assert "this is a bug in gossamer" in shown.err
    (trace,) = tmp_path.glob("gossamer-error-*.txt")
    assert "ZeroDivisionError" in trace.read_text()
    assert trace.name in shown.err


def test_errors_inside_nurseries_are_explained_too(
    gossamer: Gossamer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise ExceptionGroup("nursery", [ExceptionGroup("nursery", [GossamerError("the port is taken")])])

    monkeypatch.setattr("p2p.identity.Identity.load", fail)
    assert gossamer("keys", "show").err == "error the port is taken\n"


def test_config_show_says_where_values_come_from(gossamer: Gossamer, home: Home) -> None:
    gossamer("init")
    home.config_file.write_text("threads = 3\n")
    shown = json.loads(gossamer("config", "show", "--json").out)
    assert shown["threads"] == {"value": 3, "origin": f"{home.config_file}:1"}
    assert shown["device"] == {"value": "auto", "origin": "default"}
    home.config_file.write_text("thread = 3\n")
    broken = gossamer("config", "check")
    assert broken.code == ExitCode.CONFIG
    assert "did you mean threads?" in broken.err


def test_config_check_reads_a_spec(gossamer: Gossamer, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text('name = "mine"\n[train]\nsteps = 7\n')
    shown = json.loads(gossamer("config", "check", "spec.toml", "--json").out)
    assert len(shown["run_id"]) == 64
    (tmp_path / "spec.toml").write_text('name = "mine"\n[train]\nstep = 7\n')
    assert "did you mean steps?" in gossamer("config", "check", "spec.toml").err


def test_limits_paths_version_and_exit_codes_are_printed(gossamer: Gossamer, home: Home) -> None:
    assert json.loads(gossamer("config", "limits", "--json").out)["frame_bytes_max"] == 1 << 20
    assert str(home.identity_file) in gossamer("config", "paths").out
    assert "gossamer" in json.loads(gossamer("version", "--json").out)
    codes = json.loads(gossamer("help", "exit-codes", "--json").out)
    assert codes["4"] == "no node is running in this home"


def test_errors_map_to_codes_here_and_over_the_socket() -> None:
    assert exit_code_of(ControlError("SpecError", "bad spec")) == ExitCode.CONFIG
    assert exit_code_of(ControlError("ValueError", "odd")) == ExitCode.FAILED
    assert exit_code_of(GossamerError("odd")) == ExitCode.FAILED


def test_every_error_that_has_a_code_exists() -> None:
    sources = "".join(
        path.read_text()
        for package in ("p2p", "gossip", "training", "node", "netsim", "cli")
        for path in (Path(cli.exit_codes.__file__).parent.parent / package).glob("*.py")
    )
    for name in cli.exit_codes._BY_ERROR:
        assert f"class {name}(" in sources or f'"{name}"' in sources.replace(f'"{name}":', ""), name


def test_durations() -> None:
    assert [parse_duration_s(text) for text in ("90", "90s", "30m", "12h", "7d")] == [
        90,
        90,
        1800,
        43200,
        604800,
    ]


@pytest.mark.parametrize(
    ("reach", "relays", "told"),
    [
        ("unknown", [], None),
        ("public", [], "others can dial this node"),
        ("private", [], "no relay was found yet"),
        ("private", ["12D3KooWabcdefgh"], "it is reached through abcdefgh"),
    ],
)
def test_whether_others_can_dial_the_node_is_told(
    reach: Literal["unknown", "public", "private"], relays: list[str], told: str | None
) -> None:
    text = status_text(status_of(0, reach=reach, relays=relays))
    assert ("reach" in text) == (told is not None)
    assert told is None or told in text


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [(["run", "--bootstrap"], "gossamer run --help"), (["--no-color", "run", "--part"], "gossamer --help")],
)
def test_an_option_whose_value_is_left_out(gossamer: Gossamer, arguments: list[str], fix: str) -> None:
    shown = gossamer(*arguments)
    assert shown.code == ExitCode.USAGE
    assert [line.split()[0] for line in shown.err.splitlines()] == ["error", "why", "fix"]
    assert arguments[-1] in shown.err
    assert fix in shown.err


def test_weights_on_their_way_are_told_with_a_bar() -> None:
    arrival = Arrival(received=12_500_000, total=50_000_000, holders=["a", "b", "c"])
    text = status_text(status_of(0, arrival=arrival))
    assert "█████" + 15 * "░" + "  11.9 MiB of 47.7 MiB, from 3 members" in text
    assert "fetch" not in status_text(status_of(0))


def test_what_the_router_forwards_is_shown() -> None:
    assert "forwards /ip4/45.3.0.1/tcp/4101" in status_text(status_of(0, mapped=["/ip4/45.3.0.1/tcp/4101"]))


def test_who_is_connected_through_a_relay_is_shown_as_such() -> None:
    status = status_of(0)
    peers = [msgspec.structs.replace(peer, connected=True, relay="12D3KooWrelay") for peer in status.peers]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(peers_table(peers))
    assert console.export_text().count("by relay") == len(peers) > 0
