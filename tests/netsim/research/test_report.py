"""The page and the figure say what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from netsim.research import report
from netsim.research.rates import Rate

RING = Rate(scheme="ring", models_sent=2.0, rho=0.949, rho_theory=0.95, exact_after=None, drift=2e-12)
ONE_PEER = Rate(scheme="one-peer", models_sent=1.0, rho=1e-3, rho_theory=0.0, exact_after=4, drift=1e-16)
PULL = Rate(scheme="pull", models_sent=4.0, rho=0.43, rho_theory=0.431, exact_after=None, drift=0.4321)


def test_a_line_for_each_exchange() -> None:
    assert report.rates_table(16, [RING, ONE_PEER, PULL]).splitlines()[-3:] == [
        "| ring | 2 | 0.949 | 0.950 | 0.974 | no |",
        "| one-peer | 1 | exact after 4 rounds | exact | - | no |",
        "| pull | 4 | 0.430 | 0.431 | 0.810 | 0.43 |",
    ]


def test_a_line_for_each_fan_out() -> None:
    lines = report.fan_out_table(96, {1: [PULL] * 3, 4: [PULL] * 4}).splitlines()
    cell = "0.185 (0.186)"
    assert lines[-2:] == [
        f"| 1 | {cell} | {cell} | {cell} | - |",
        f"| 4 | {cell} | {cell} | {cell} | {cell} |",
    ]


def test_a_whole_report_of_a_small_swarm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "MEMBERS": (12,),
        "FAN_OUT_MEMBERS": 8,
        "FAN_OUTS": (1, 3),
        "FIGURE_ROUNDS": 3,
    }.items():
        monkeypatch.setattr(report, name, value)
    report.write_report(tmp_path, seeds=1)
    assert (tmp_path / "mixing.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "mixing.md").read_text()
    assert "| torus | 4 |" in text
    assert "| 3 | " in text
