"""Rows outlast whatever ends the run that made them, and a digest is of what can change them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kept import KeptRow, KeptRows, code_digest


class Figure(KeptRow, frozen=True, kw_only=True):
    value: float


def test_a_run_that_was_killed_in_the_middle_of_a_line_loses_that_line(tmp_path: Path) -> None:
    file = tmp_path / "made" / "rows.jsonl"
    KeptRows(file, Figure).add(Figure(key="a", value=1.0))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:7])
    rows = KeptRows(file, Figure)
    assert rows.get("a") == Figure(key="a", value=1.0)
    rows.add(Figure(key="b", value=2.0))
    again = KeptRows(file, Figure)
    assert [again.get(key) for key in "abc"] == [rows.get("a"), Figure(key="b", value=2.0), None]


def test_a_digest_is_of_what_a_module_brings_and_of_nothing_else() -> None:
    assert code_digest("training.codecs.named") == code_digest.__wrapped__("training.codecs.named")
    assert code_digest("training.codecs.named") != code_digest("training.layout")
