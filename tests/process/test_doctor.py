"""``gossamer doctor`` on faults that only a real machine has: full and read-only disks, a running node, a swarm."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from cli import doctor
from cli.checks import registry
from cli.checks.finding import Finding, Subject, examine
from cli.common import Common
from cli.exit_codes import ExitCode
from node.home import Home
from tests.process.swarm import SPEC, gossamer
from tests.process.test_service_life import home_with_key, running, status_when

pytestmark = [pytest.mark.process, pytest.mark.slow]

DAY_S = 86_400.0


def examined(ran: subprocess.CompletedProcess[str]) -> dict[str, Finding]:
    """The findings that a doctor printed, by check."""
    findings = [Finding(**finding) for finding in json.loads(ran.stdout)["findings"]]
    return {finding.check: finding for finding in findings}


def in_a_mount_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` where it may mount whatever it likes, seen by nobody else."""
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-ec", script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = home_with_key(tmp_path / "home")
    home.config_file.write_text('listen = ["/ip4/127.0.0.1/tcp/0"]\ndevice = "cpu"\n')
    return home


def doctor_in(home: Home) -> str:
    """The command line."""
    return shlex.join(
        [sys.executable, "-P", "-m", "cli", "doctor", "--json", "--home", str(home.data_folder)]
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("mount", "found", "fix"),
    [
        (
            "cp -a {home} {home}.copy; mount -t tmpfs -o size=256k none {home}; cp -a {home}.copy/. {home};"
            " head -c 1M /dev/zero > {home}/ballast || true",
            "No space left on device",
            "df -h {home}",
        ),
        (
            "mount --bind {home} {home}; mount -o remount,bind,ro {home}",
            "Read-only file system",
            "findmnt -T {home}",
        ),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_nothing_more(home: Home, mount: str, found: str, fix: str) -> None:
    quoted = shlex.quote(str(home.data_folder))
    ran = in_a_mount_namespace(f"{mount.format(home=quoted)}; {doctor_in(home)}")
    assert ran.returncode == ExitCode.CHECK_FAILED, ran.stderr
    findings = examined(ran)
    assert {name for name, finding in findings.items() if finding.level == "fail"} == {"disk"}
    assert found in findings["disk"].found
    assert fix.format(home=quoted) in findings["disk"].fix


@pytest.mark.timeout(240)
def test_a_package_of_the_same_name_that_is_not_ours(home: Home, tmp_path: Path) -> None:
    """Our names are common ones; the other one would be imported, and nobody would know why nothing works."""
    stranger = tmp_path / "elsewhere" / "training" / "__init__.py"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("")
    path = os.pathsep.join([str(tmp_path / "elsewhere"), os.environ.get("PYTHONPATH", "")])
    ran = in_a_mount_namespace(f"PYTHONPATH={shlex.quote(path)} {doctor_in(home)}")
    modules = examined(ran)["modules"]
    assert (modules.level, str(stranger) in modules.found) == ("fail", True)


@pytest.mark.timeout(240)
async def test_a_swarm_that_is_there(home: Home, tmp_path: Path) -> None:
    """A node's own doctor finds it well; a newcomer's finds it, and whose clock is wrong."""
    spec = tmp_path / "run.toml"
    spec.write_text(SPEC.format(steps=100_000, merges=1))
    home.config_file.write_text('listen = ["/ip4/127.0.0.1/tcp/4391"]\ndevice = "cpu"\n')
    newcomer = home_with_key(tmp_path / "newcomer")
    with running(home, "--run", spec):
        status = await status_when(home, lambda status: status.step > 0)
        invite = gossamer("invite", "--home", home.data_folder).stdout.strip()

        async def findings_of(home: Home, invite: str | None) -> dict[str, Finding]:
            subject = doctor._subject(Common(home_path=home.data_folder), invite, [])
            checks = {name: registry.CHECKS[name] for name in ("port", "peers", "node")}
            return {finding.check: finding for finding in await examine(subject, checks)}

        own = await findings_of(home, None)
        assert (own["port"].level, "this home's own node" in own["port"].found) == ("ok", True)
        assert (own["node"].level, "training" in own["node"].found) == ("ok", True), own["node"]
        assert (own["clock"].level, own["peers"].level) == ("ok", "skip")

        welcome = await findings_of(newcomer, invite)
        assert (welcome["peers"].level, "1 of 1 answered" in welcome["peers"].found) == ("ok", True)
        assert (welcome["clock"].level, welcome["node"].level) == ("ok", "skip")

        subject = Subject(
            home=newcomer,
            config=doctor._subject(Common(home_path=newcomer.data_folder), None, []).config,
            environ={},
            run=bytes.fromhex(status.run_id),
            bootstrap=[status.addresses[0]],
            now_unix_s=doctor._now_unix_s() - DAY_S,
        )
        _, clock = await examine(subject, {"peers": registry.CHECKS["peers"]})
        assert (clock.level, "24.0 hours behind 1 of 1 members" in clock.found) == ("fail", True), clock

        stranger = Subject(
            home=newcomer,
            config=subject.config,
            environ={},
            run=bytes(32),
            bootstrap=[status.addresses[0]],
            now_unix_s=doctor._now_unix_s(),
        )
        peers, _ = await examine(stranger, {"peers": registry.CHECKS["peers"]})
        assert (peers.level, "0 of 1 answered" in peers.found) == ("fail", True)
        assert "this peer is in run" in peers.found
        await trio.sleep(0.5)
        after = await status_when(home, lambda status: True)
        assert (after.peers, after.refusals) == ([], {})  # It was looked at, and joined by nobody.
