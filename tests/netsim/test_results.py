"""Results files: what was written is read, and what is no results file of this version is refused by line."""

import math
from pathlib import Path

import msgspec
import pytest

from netsim.results import (
    FORMAT,
    Event,
    Failure,
    Line,
    ResultsError,
    Sample,
    SeedResult,
    encode_line,
    header_for,
    read_header,
    read_lines,
)

HEADER = header_for('name = "a"')
SAMPLE = Sample(
    seed=3,
    variant="v",
    at_s=1.5,
    up=1,
    seen=[1, None],
    step=[7, None],
    loss=[0.25, None],
    dispersion=0.0,
    height=[0, None],
    bytes_sent=[10, 20],
)
EVENT = Event(seed=3, at_s=2.0, what="kill", machines=[1], until_s=9.0)
RESULT = SeedResult(
    seed=3,
    verdict="failed",
    failures=[Failure(checker="c", what="w", at_s=2.0, machine=None)],
    drawn={"faults": {"kill": 3.5}, "core": [0, 1]},
    trace="00ff",
    virtual_s=10.0,
    wall_s=0.5,
    deliveries=12,
    summary={"final_loss": 0.5},
)


def written(path: Path, *lines: Line, more: bytes = b"") -> Path:
    path.write_bytes(b"".join(map(encode_line, lines)) + more)
    return path


def told(path: Path) -> str:
    with pytest.raises(ResultsError) as caught:
        list(read_lines(path))
    return f"{caught.value.what} | {caught.value.why} | {caught.value.fix}"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "r.jsonl", HEADER, SAMPLE, EVENT, RESULT)
    assert read_header(file) == HEADER
    assert list(read_lines(file)) == [SAMPLE, EVENT, RESULT]
    assert file.read_bytes().count(b"\n") == 4


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    figures = {"commit_share": math.nan, "final_loss": math.inf, "commits": 2.0}
    odd = msgspec.structs.replace(RESULT, summary=figures)
    far = msgspec.structs.replace(SAMPLE, dispersion=math.inf)
    file = written(tmp_path / "r.jsonl", HEADER, far, odd)
    sample, result = read_lines(file)
    assert isinstance(sample, Sample)
    assert isinstance(result, SeedResult)
    assert sample.dispersion is None
    assert result.summary == {"commits": 2.0}


def test_a_file_of_another_version(tmp_path: Path) -> None:
    other = b'{"line":"header","format":%d,"version":"9.9","scenes":[]}\n' % (FORMAT + 1)
    text = told(written(tmp_path / "r.jsonl", more=other))
    assert f"has format {FORMAT + 1}, this program reads format {FORMAT}" in text
    assert "written by gossamer 9.9" in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello\n",
        b"\x89PNG\r\n",
        b'{"a": 1}\n',
        b"[]\n",
        b'{"line":"header"}\n',
        encode_line(SAMPLE),
    ],
)
def test_what_is_no_results_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(content)
    assert f"{file} is not a results file" in told(file)


def test_a_last_line_that_was_cut_off(tmp_path: Path) -> None:
    file = written(tmp_path / "r.jsonl", HEADER, SAMPLE, more=encode_line(RESULT)[:-9])
    text = told(file)
    assert f"line 3 of {file} ends in the middle" in text
    assert "sed -i '$d'" in text


@pytest.mark.parametrize(
    "line", [b'{"line":"sample"}\n', b"nonsense\n", b'{"line":"other"}\n', encode_line(HEADER)]
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes) -> None:
    file = written(tmp_path / "r.jsonl", HEADER, SAMPLE, more=line + encode_line(RESULT))
    assert f"line 3 of {file} is no line of results" in told(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in told(tmp_path / "r.jsonl")
    with pytest.raises(ResultsError):
        read_header(tmp_path)
