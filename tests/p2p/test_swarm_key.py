"""The key of a private swarm: its file, its text, and that it is never shown."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.errors import SwarmKeyError
from p2p.swarm_key import SwarmKey

KEY = SwarmKey(bytes(range(32)))


def test_a_key_is_private_and_survives_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "swarm.key"
    assert SwarmKey.load(file) is None
    SwarmKey.generate().store(file)
    KEY.store(file)
    assert SwarmKey.load(file) == KEY
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in file.parent.iterdir()] == ["swarm.key"]
    assert file.read_text().splitlines() == ["/key/swarm/psk/1.0.0/", "/base16/", KEY.secret.hex()]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "swarm.key"
    KEY.store(file)
    file.chmod(mode)
    with pytest.raises(SwarmKeyError, match="other users") as refused:
        SwarmKey.load(file)
    assert refused.value.fix == f"chmod 600 {file}"


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 90, KEY.secret, b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"0" * 63]
)
def test_a_file_that_holds_no_key_is_explained(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "swarm.key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(SwarmKeyError, match="holds no swarm key") as refused:
        SwarmKey.load(file)
    assert "gossamer join" in refused.value.fix


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SwarmKeyError, match="cannot write"):
        KEY.store(tmp_path / "file" / "swarm.key")


@given(st.binary(min_size=32, max_size=32))
def test_a_key_reads_as_it_was_written_and_does_not_show_itself(secret: bytes) -> None:
    key = SwarmKey(secret)
    assert SwarmKey.from_text(key.text) == key
    assert repr(key) == "SwarmKey()"


@given(st.text(max_size=60) | st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52))
def test_what_is_no_key_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert SwarmKey.from_text(text).text == text


def test_one_use_tells_nothing_of_another() -> None:
    derived = {KEY.derived("one"), KEY.derived("other"), SwarmKey(bytes(32)).derived("one")}
    assert len(derived) == 3
    assert KEY.secret not in derived
