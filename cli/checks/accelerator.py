"""The check of what trains: a small computation on the device of the settings, in a process that may die of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec
import trio

from cli.checks.finding import Finding, Subject

TEST_S_MAX = 80.0
ERROR_MAX = 1e-3
"""Of the largest value, in fp32. Ordinary rounding makes it 1e-6, TF32 a few 1e-4, a broken device anything."""
_WHY = "weights that are computed wrongly spread to everybody"


class _SelfTest(msgspec.Struct):
    device: str
    name: str
    error: float | None
    seconds: float


class _Error(msgspec.Struct):
    what: str
    why: str
    fix: str


class _Outcome(msgspec.Struct):
    result: _SelfTest | None = None
    error: _Error | None = None


async def check_accelerator(subject: Subject) -> Sequence[Finding]:
    """A matrix product and its gradients against the CPU's in fp64."""
    device = subject.config.device
    with trio.move_on_after(TEST_S_MAX):
        done = await trio.run_process(
            [sys.executable, "-P", "-m", "training.self_test", device],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        return [_judge(device, done)]
    return [
        _failed(
            f"{device} did not answer within {TEST_S_MAX:g} s",
            "look at its driver: nvidia-smi    dmesg | tail",
        )
    ]


def _judge(device: str, done: subprocess.CompletedProcess[bytes]) -> Finding:
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return _failed(
            f"computing on {device} ended the process ({how}): {' '.join(last)}",
            'install a torch that fits the driver, or train without it: device = "cpu" in config.toml',
        )
    outcome = msgspec.json.decode(done.stdout, type=_Outcome)
    if outcome.error is not None:
        return Finding(
            check="accelerator",
            level="fail",
            found=outcome.error.what,
            why=outcome.error.why or _WHY,
            fix=outcome.error.fix or 'free its memory, or train without it: device = "cpu" in config.toml',
        )
    tested = outcome.result
    assert tested is not None
    if tested.error is None or tested.error > ERROR_MAX:
        return _failed(
            f"{tested.device} ({tested.name}) computes wrongly: off by {tested.error or float('inf'):.1e}",
            'do not train on it: device = "cpu" in config.toml',
        )
    where = "no accelerator is used, training is on the CPU" if tested.device == "cpu" else tested.name
    return Finding(
        check="accelerator",
        level="ok",
        found=f"{tested.device}: {where}; right to {tested.error:.0e} in {tested.seconds:.2f} s",
    )


def _failed(found: str, fix: str) -> Finding:
    return Finding(check="accelerator", level="fail", found=found, why=_WHY, fix=fix)
