"""The same text gives the same corpus anywhere; batches are a pure function of seed and number; bad text is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.data import PIECE_BYTES, WHOLE_FILE_BYTES_MAX, Corpus, DataError, TextBatches, held_out_windows

TEXTS = [b"text number %d. " % index * 50 for index in range(60)]


def test_the_standard_library_is_megabytes_with_at_least_200_kb_held_out() -> None:
    corpus = Corpus.load("stdlib", None)
    assert len(corpus.train) > 5_000_000
    assert len(corpus.held_out) > 200_000


def test_a_corpus_does_not_depend_on_where_its_text_lies(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        folder = tmp_path / "a" / str(index % 7)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.txt").write_bytes(text)
    (tmp_path / "a" / ".hidden").write_bytes(b"not text")
    (tmp_path / "a" / "empty").touch()
    found, given = Corpus.load("text", tmp_path / "a"), Corpus.of(TEXTS[::-1] + TEXTS[:5])
    assert found.train.tobytes() == given.train.tobytes()
    assert found.held_out_digest == given.held_out_digest


def test_held_out_text_is_never_trained_on() -> None:
    corpus = Corpus.of(TEXTS)
    train, held_out = corpus.train.tobytes(), corpus.held_out.tobytes()
    for text in TEXTS:
        assert (text in train) != (text in held_out)
    assert held_out


def test_one_long_file_is_cut_into_pieces(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_bytes(np.random.default_rng(0).bytes(WHOLE_FILE_BYTES_MAX + 1))
    corpus = Corpus.load("text", file)
    assert len(corpus.train) + len(corpus.held_out) == WHOLE_FILE_BYTES_MAX + 1
    assert len(corpus.held_out) >= PIECE_BYTES or len(corpus.held_out) == 1


def test_a_cap_on_held_out_text_changes_its_digest_and_nothing_else() -> None:
    corpus = Corpus.of(TEXTS)
    capped = corpus.evaluated_on(100)
    assert capped.held_out.tobytes() == corpus.held_out.tobytes()[:100]
    assert capped.train is corpus.train
    assert capped.held_out_digest != corpus.held_out_digest
    assert corpus.evaluated_on(1 << 20).held_out_digest == corpus.held_out_digest


def test_parts_are_disjoint_and_together_everything() -> None:
    corpus = Corpus.of(TEXTS)
    parts = [corpus.part((k, 7)) for k in range(1, 8)]
    assert b"".join(part.tobytes() for part in parts) == corpus.train.tobytes()
    assert corpus.part(None) is corpus.train


def test_batches_are_a_pure_function_of_seed_and_number() -> None:
    text = Corpus.of(TEXTS).train
    stream = TextBatches(text, seed=b"run and peer", batch=3, context=8)
    batches = [stream.at(number) for number in range(5)]
    resumed = TextBatches(text, seed=b"run and peer", batch=3, context=8)
    assert np.array_equal(resumed.at(3), batches[3])
    assert batches[0].shape == (3, 9)
    assert all(window.tobytes() in text.tobytes() for batch in batches for window in batch)
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(TextBatches(text, seed=b"other", batch=3, context=8).at(0), batches[0])


def test_a_batch_fixed_for_ever() -> None:
    text = np.arange(200, dtype=np.uint8)
    batch = TextBatches(text, seed=b"seed", batch=4, context=2).at(0)
    assert batch[:, 0].tolist() == [196, 187, 42, 129]


def test_missing_empty_and_short_text_are_answered_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_bytes(b"short")
    cases = [
        (None, "no path"),
        (tmp_path / "missing", "cannot read"),
        (tmp_path / "empty", "no text"),
        (tmp_path / "one.txt", "too short"),
    ]
    for path, what in cases:
        with pytest.raises(DataError, match=what) as caught:
            Corpus.load("text", path)
        assert caught.value.why
        assert caught.value.fix
    with pytest.raises(DataError, match="window"):
        TextBatches(Corpus.of(TEXTS).train[:8], seed=b"", batch=1, context=8)
    with pytest.raises(DataError, match="held-out"):
        held_out_windows(Corpus.of(TEXTS).evaluated_on(8).held_out, 8)
