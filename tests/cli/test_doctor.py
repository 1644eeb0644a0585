"""``gossamer doctor``: every planted fault is found, with its cure, and a healthy home has none."""

import json
import os
import socket
import stat
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from cli.checks import accelerator, registry, running, software
from cli.checks.finding import Finding, Subject, examine, in_thread
from cli.checks.network import CLOCK_S_OFF, judge_addresses, judge_clock
from cli.doctor_bundle import LOG_BYTES_MAX, REMOVED, without_secrets, write_bundle
from cli.exit_codes import ExitCode
from cli.node_process import free_ports
from node.config import NodeConfig
from node.control import serve_control
from node.home import Home
from node.status import NodeStatus
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId
from tests.cli.fake_node import FakeNode, status_of
from training.self_test import self_test

Gossamer = Any
NOW_S = 1_800_000_000.0


def subject_of(home: Home, **changes: Any) -> Subject:
    """``home`` as a doctor sees it, with a free port to listen on."""
    (port,) = free_ports(1)
    values: dict[str, Any] = {
        "home": home,
        "config": NodeConfig(listen=(f"/ip4/127.0.0.1/tcp/{port}",), device="cpu"),
        "environ": {},
        "run": None,
        "bootstrap": [],
        "now_unix_s": NOW_S,
    }
    return Subject(**values | changes)


async def look(subject: Subject, name: str) -> list[Finding]:
    """What one of the checks finds."""
    return await examine(subject, {name: registry.CHECKS[name]})


@pytest.fixture
def healthy(home: Home) -> Home:
    home.create()
    Identity.create(home.identity_file)
    return home


# --- the whole command ------------------------------------------------------------------------------------------------


def test_a_healthy_home_has_no_failure(gossamer: Gossamer, healthy: Home) -> None:
    (port,) = free_ports(1)
    healthy.config_file.write_text(f'listen = ["/ip4/127.0.0.1/tcp/{port}"]\ndevice = "cpu"\n')
    before = sorted(healthy.data_folder.rglob("*"))
    told = gossamer("doctor", "--json")
    findings = json.loads(told.out)["findings"]
    assert told.code == ExitCode.OK, told.out
    checked = [finding["check"] for finding in findings]
    assert {*registry.CHECKS, "clock"} == set(checked)
    assert not [finding for finding in findings if finding["level"] == "fail"]
    assert sorted(healthy.data_folder.rglob("*")) == before  # It leaves nothing behind.


def test_what_fails_is_told_with_why_and_fix_and_an_exit_code(
    gossamer: Gossamer, healthy: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy.identity_file.chmod(0o644)
    monkeypatch.setattr(registry, "CHECKS", {name: registry.CHECKS[name] for name in ("key", "settings")})
    told = gossamer("doctor")
    assert told.code == ExitCode.CHECK_FAILED
    assert f"fix  chmod 600 {healthy.identity_file}" in told.out
    assert "whoever reads it can speak as this node" in told.out
    assert "2 checks: 1 failed, 0 to look at, 0 not possible" in told.out


# --- how checks are run -----------------------------------------------------------------------------------------------


async def test_a_check_that_hangs_or_breaks_leaves_the_others_alone(healthy: Home) -> None:
    def hang(_: Subject) -> list[Finding]:
        time.sleep(20)
        return []

    async def break_down(_: Subject) -> list[Finding]:
        raise ZeroDivisionError("oh")

    checks = {"hangs": in_thread(hang), "breaks": break_down, "key": registry.CHECKS["key"]}
    with trio.fail_after(10):
        hangs, breaks, key = await examine(subject_of(healthy), checks, timeout_s=1.0)
    assert (hangs.level, "no answer within 1 s" in hangs.found) == ("fail", True)
    assert (breaks.level, "ZeroDivisionError: oh" in breaks.found) == ("fail", True)
    assert key.level == "ok"


# --- the home ---------------------------------------------------------------------------------------------------------


def _open_key(home: Home) -> None:
    home.identity_file.chmod(0o640)


def _no_key(home: Home) -> None:
    home.identity_file.unlink()


def _damaged_key(home: Home) -> None:
    home.identity_file.write_text("not a key")


def _settings_that_are_no_toml(home: Home) -> None:
    home.config_file.write_text("threads = 1\nlisten = [oops\n")


def _misspelt_setting(home: Home) -> None:
    home.config_file.write_text("treads = 1\n")


def _settings_that_name_what_is_not_there(home: Home) -> None:
    home.config_file.write_text('data_path = "/nowhere/texts"\n')


def _announced_nonsense(home: Home) -> None:
    home.config_file.write_text('announce = ["203.0.113.7:4100"]\n')


def _no_home(home: Home) -> None:
    home.data_folder.rename(home.data_folder.with_name("away"))


@pytest.mark.parametrize(
    ("spoil", "check", "found", "fix"),
    [
        (_open_key, "key", "mode 0640", "chmod 600"),
        (_no_key, "key", "no identity key", "gossamer init"),
        (_damaged_key, "key", "is not a PEM private key", "restore it from a backup"),
        (_settings_that_are_no_toml, "settings", "cannot read", "correct the line"),
        (_misspelt_setting, "settings", "unknown setting 'treads'", "did you mean threads?"),
        (_settings_that_name_what_is_not_there, "settings", "/nowhere/texts", "correct"),
        (_announced_nonsense, "settings", "is not an address", "/ip4/192.0.2.7/tcp/4100"),
        (_no_home, "disk", "is not there", "gossamer init"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
async def test_faults_of_the_home(
    healthy: Home, spoil: Callable[[Home], None], check: str, found: str, fix: str
) -> None:
    (before,) = await look(subject_of(healthy), check)
    assert before.level == "ok"
    spoil(healthy)
    (after,) = await look(subject_of(healthy), check)
    assert (after.level, found in after.found, fix in after.fix) == ("fail", True, True), after
    assert after.why


# --- what is installed ------------------------------------------------------------------------------------------------


async def test_a_package_of_the_wrong_version_or_none(healthy: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real = software.version_of

    def version_of(name: str) -> str:
        if name == "cbor2":
            return "5.6.5"
        if name == "blake3":
            raise software.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(software, "version_of", version_of)
    (finding,) = await look(subject_of(healthy), "packages")
    assert finding.level == "fail"
    assert "cbor2 is 5.6.5, gossamer needs <7,>=6" in finding.found
    assert "blake3 is missing" in finding.found
    assert finding.fix.startswith(f"{sys.executable} -m pip install ")
    assert "'cbor2<7,>=6'" in finding.fix
    assert "'blake3>=1.0'" in finding.fix


async def test_a_clash_between_two_packages_that_are_both_there(
    healthy: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pip leaves behind when something else is installed into the same environment."""
    real = software.requires
    monkeypatch.setattr(
        software, "requires", lambda name: ["multiaddr<0.0.1"] if name == "libp2p" else real(name)
    )
    (finding,) = await look(subject_of(healthy), "packages")
    assert (finding.level, "libp2p needs <0.0.1" in finding.found) == ("fail", True)


# --- the network ------------------------------------------------------------------------------------------------------


async def test_a_port_that_another_program_holds(healthy: Home) -> None:
    subject = subject_of(healthy)
    port = int(subject.config.listen[0].rpartition("/")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        (finding,) = await look(subject, "port")
    assert (finding.level, f"port {port}" in finding.found) == ("fail", True)
    assert f"ss -ltnp 'sport = :{port}'" in finding.fix


async def test_a_port_that_this_homes_node_holds_or_somebody_elses(healthy: Home) -> None:
    subject = subject_of(healthy)
    for identity, level in [(Identity.load(healthy.identity_file), "ok"), (Identity.generate(), "fail")]:
        async with open_libp2p(identity, listen=subject.config.listen):
            (finding,) = await look(subject, "port")
        assert finding.level == level, finding


@pytest.mark.parametrize("given", [{"swarm_key": SwarmKey(bytes(32))}, {"allowed": [PeerId("somebody")]}])
async def test_a_node_that_lets_few_in_is_still_this_homes(healthy: Home, given: dict[str, Any]) -> None:
    run = bytes(32)
    healthy.remember_run(run)
    if "swarm_key" in given:
        given["swarm_key"].store(healthy.swarm_key_file(run))
    identity, elsewhere = Identity.load(healthy.identity_file), Identity.generate()
    subject = replace(subject_of(healthy), swarm_key=given.get("swarm_key"))
    async with (
        open_libp2p(identity, listen=subject.config.listen, **given),
        open_libp2p(elsewhere, listen=["/ip4/127.0.0.1/tcp/0"], **given) as other,
    ):
        (port,) = await look(subject, "port")
        named = replace(subject, bootstrap=[f"{other.local.addresses[0]}/p2p/{elsewhere.peer}"], run=None)
        peers, _ = await look(named, "peers")
    assert port.level == "ok", port
    assert (peers.level, "1 of 1 answered" in peers.found) == ("ok", True), peers


@pytest.mark.parametrize(
    ("addresses", "level", "found"),
    [
        (["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1"], "warn", "only this machine"),
        (["/ip4/192.168.1.5/tcp/1", "/ip4/127.0.0.1/tcp/1"], "warn", "only the local network"),
        (["/ip4/100.64.3.4/tcp/1"], "warn", "only the network of the provider"),
        (["/ip6/2a00:1450::1/tcp/1", "/ip4/10.0.0.1/tcp/1"], "warn", "only over IPv6"),
        (["/ip4/8.8.8.8/tcp/1", "/ip6/2a00:1450::1/tcp/1"], "ok", "anybody"),
        (["/dns/example.org/tcp/1"], "ok", "anybody"),
        ([], "warn", "only this machine"),
    ],
)
def test_who_can_dial_an_address(addresses: list[str], level: str, found: str) -> None:
    finding = judge_addresses(addresses)
    assert (finding.level, found in finding.found) == (level, True), finding
    assert bool(finding.fix) == (level != "ok")


async def test_peers_that_nobody_is_at(healthy: Home) -> None:
    (port,) = free_ports(1)
    dead = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer}"
    peers, clock = await look(subject_of(healthy, bootstrap=[dead]), "peers")
    assert (peers.level, "0 of 1 answered" in peers.found) == ("fail", True)
    assert "gossamer status" in peers.fix
    assert clock.level == "skip"


async def test_a_peer_that_is_somebody_else(healthy: Home) -> None:
    """Whoever listens there now cannot prove the id that the invite names."""
    (port,) = free_ports(1)
    address = f"/ip4/127.0.0.1/tcp/{port}"
    async with open_libp2p(Identity.generate(), listen=[address]):
        subject = subject_of(healthy, bootstrap=[f"{address}/p2p/{Identity.generate().peer}"])
        peers, _ = await look(subject, "peers")
    assert peers.level == "fail"


async def test_no_peer_is_known_yet(healthy: Home) -> None:
    peers, clock = await look(subject_of(healthy), "peers")
    assert (peers.level, clock.level) == ("skip", "skip")
    assert "gossamer doctor 'INVITE'" in peers.fix


@pytest.mark.parametrize(
    ("begun", "own", "level"),
    [
        ([NOW_S - 1e6, NOW_S + 7200, NOW_S + 9000], None, "fail"),
        ([NOW_S - 1e6, NOW_S - 1e5, NOW_S + 9000], None, "ok"),  # Whose clock is wrong, most say.
        ([NOW_S + CLOCK_S_OFF - 1], None, "ok"),
        ([], int(NOW_S) + 7200, "fail"),
        ([NOW_S - 1e6], int(NOW_S) - 5, "ok"),
        ([], None, "skip"),
    ],
)
def test_the_clock_by_the_lives_of_others(begun: list[float], own: int | None, level: str) -> None:
    finding = judge_clock(NOW_S, [int(life) for life in begun], own)
    assert finding.level == level, finding
    if level == "fail":
        assert "2.0 hours behind" in finding.found
        assert "set-ntp" in finding.fix


# --- what trains ------------------------------------------------------------------------------------------------------


async def test_a_device_that_is_not_there(healthy: Home) -> None:
    subject = subject_of(healthy, config=NodeConfig(device="cuda:99"))
    (finding,) = await look(subject, "accelerator")
    assert (finding.level, "cuda:99" in finding.found, "--device cpu" in finding.fix) == ("fail", True, True)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ('echo \'{"result":{"device":"cuda","name":"Card","error":0.25,"seconds":1}}\'', "off by 2.5e-01"),
        ('echo \'{"result":{"device":"cuda","name":"Card","error":null,"seconds":1}}\'', "off by inf"),
        ("echo driver too old >&2; kill -SEGV $$", "signal 11"),
        ("echo no memory >&2; exit 3", "exit code 3): no memory"),
    ],
)
async def test_a_device_that_computes_wrongly_or_takes_its_process_along(
    healthy: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, found: str
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(accelerator.sys, "executable", str(interpreter))
    (finding,) = await look(subject_of(healthy), "accelerator")
    assert (finding.level, found in finding.found) == ("fail", True), finding
    assert 'device = "cpu"' in finding.fix


def test_the_self_test_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert self_test(torch.device("cpu")).error < accelerator.ERROR_MAX / 100
    real = torch.Tensor.to

    def one_value_lost(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved = real(tensor, device).clone()
        moved[3, 5] = 0.0
        return moved

    monkeypatch.setattr(torch.Tensor, "to", one_value_lost)
    assert self_test(torch.device("cpu")).error > accelerator.ERROR_MAX


# --- the node that runs -----------------------------------------------------------------------------------------------


async def looked_at(home: Home, status: NodeStatus) -> Finding:
    """What is found of a node that says ``status``."""
    node = FakeNode()
    node.status = status
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, home.control_socket, node.handlers()))
        (finding,) = await look(subject_of(home), "node")
        nursery.cancel_scope.cancel()
    return finding


async def test_what_a_running_node_says_of_itself(healthy: Home) -> None:
    installed = software.version_of("gossamer")
    well = await looked_at(healthy, status_of(0, version=installed, refusals={"hash": 2}))
    assert (well.level, "step 50 of 100" in well.found, "hash 2" in well.found) == ("ok", True, True)
    stuck = await looked_at(healthy, status_of(0, version=installed, problem="no answer from anybody"))
    assert (stuck.level, "no answer from anybody" in stuck.found) == ("warn", True)
    cut_off = await looked_at(healthy, status_of(0, version=installed, reach="private"))
    assert (cut_off.level, "gossamer run --bootstrap-only" in cut_off.fix) == ("warn", True)
    relayed = await looked_at(
        healthy, status_of(0, version=installed, reach="private", relays=["12D3KooWrelay"])
    )
    assert (relayed.level, "reached through" in relayed.found) == ("ok", True)
    assert "no router forwards" in relayed.found
    mapped = await looked_at(healthy, status_of(0, version=installed, mapped=["/ip4/45.3.0.1/tcp/4101"]))
    assert (mapped.level, "forwards /ip4/45.3.0.1/tcp/4101" in mapped.found) == ("ok", True)
    old = await looked_at(healthy, status_of(0, version="0.0.1"))
    assert (old.level, "gossamer stop --hand-over" in old.fix) == ("warn", True)


async def test_a_node_that_does_not_answer(healthy: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ANSWER_S_MAX", 0.5)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(os.fspath(healthy.control_socket))
        deaf.listen()
        (finding,) = await look(subject_of(healthy), "node")
    assert (finding.level, "gossamer stop --now" in finding.fix) == ("fail", True)


# --- the bundle -------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_it_says_and_never_the_key(
    gossamer: Gossamer, healthy: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "CHECKS", {"key": registry.CHECKS["key"]})
    key = healthy.identity_file.read_text()
    log = tmp_path / "node.log"
    shown = f"gossamer:join/1/abc?peer=/ip4/1.2.3.4&secret=s3cr3t&check=00\n{key}"
    cut = "&secret=" + "s3cr3t" * 10
    log.write_text(f"old line\n{cut}\n".ljust(LOG_BYTES_MAX + len(cut) - len(shown), "x") + "\n" + shown)
    healthy.config_file.write_text(f'log_file = "{log}"\nname = "mine"\n')
    file = tmp_path / "report.zip"
    told = gossamer("doctor", "--bundle", str(file))
    assert told.code == ExitCode.OK, told.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(held) == {"findings.json", "versions.json", "settings.json", "logs/node.log"}
    for name in held:
        assert name in told.out
    everything = "".join(held.values())
    assert key.splitlines()[1] not in everything
    assert "s3cr3t" not in everything
    assert f"secret={REMOVED}&check=00" in held["logs/node.log"]
    assert "old line" not in held["logs/node.log"]
    assert json.loads(held["settings.json"])["name"]["value"] == "mine"
    assert json.loads(held["findings.json"])[0]["check"] == "key"
    assert "torch" in json.loads(held["versions.json"])["packages"]
    again = gossamer("doctor", "--bundle", str(file))
    assert (again.code, "File exists" in again.err) == (ExitCode.FAILED, True)


def test_settings_that_cannot_be_read_stay_out(healthy: Home, tmp_path: Path) -> None:
    healthy.config_file.write_text("swarm_secret = 'hunter2\n")
    write_bundle(tmp_path / "report.zip", subject_of(healthy), [], None)
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        assert "hunter2" not in archive.read("settings.json").decode()


@pytest.mark.parametrize(
    "text",
    [
        "swarm secret=hunter2 more",
        '{"token": "hunter2", "a": 1}',
        "password: 'hunter2'",
        "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2",
    ],
)
def test_secrets_are_taken_out_wherever_they_are(text: str) -> None:
    assert "hunter2" not in without_secrets(text)
    assert REMOVED in without_secrets(text)
