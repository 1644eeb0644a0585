"""The same examples give the same data anywhere; nothing held out is trained on; bad files are named, not believed."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import training.labelled
from training.data import DataError
from training.labelled import Examples, LabelledBatches, LabelledData

RNG = np.random.default_rng(0)
X = RNG.standard_normal((300, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 300)
Arrays = dict[str, np.ndarray]


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def load(path: Path | None) -> LabelledData:
    return LabelledData.load(path, inputs=5, classes=3)


def rows(examples: Examples) -> set[bytes]:
    return {x.tobytes() + y.tobytes() for x, y in zip(examples.x, examples.y, strict=True)}


def test_data_does_not_depend_on_order_repetition_or_the_integer_type_of_labels(tmp_path: Path) -> None:
    order = RNG.permutation(len(Y))
    data = load(saved(tmp_path, x=X, y=Y))
    again = load(
        saved(
            tmp_path,
            x=np.concatenate([X[order], X[:9]]),
            y=np.concatenate([Y[order], Y[:9]]).astype(np.uint8),
        )
    )
    assert again.train.x.tobytes() == data.train.x.tobytes()
    assert again.train.y.tobytes() == data.train.y.tobytes()
    assert again.held_out_digest == data.held_out_digest
    assert len(data.train) + len(data.held_out) == 300
    assert 10 < len(data.held_out) < 60


def test_an_example_keeps_its_label_and_is_never_both_learned_from_and_held_out(tmp_path: Path) -> None:
    data = load(saved(tmp_path, x=X, y=Y))
    assert rows(data.train) | rows(data.held_out) == rows(Examples(X, Y))
    assert not rows(data.train) & rows(data.held_out)


def test_a_test_set_in_the_file_is_what_is_held_out_and_is_not_learned_from(tmp_path: Path) -> None:
    data = load(saved(tmp_path, x=X, y=Y, x_test=X[:40], y_test=Y[:40]))
    assert rows(data.held_out) == rows(Examples(X[:40], Y[:40]))
    assert rows(data.train) == rows(Examples(X[40:], Y[40:]))


def test_something_is_always_held_out() -> None:
    for seed in range(20):
        x = np.array([[seed], [seed + 0.5]], np.float32)
        data = LabelledData.of(Examples(x, np.array([0, 1])))
        assert (len(data.train), len(data.held_out)) == (1, 1)


def test_a_cap_on_held_out_examples_changes_the_digest_and_nothing_else(tmp_path: Path) -> None:
    data = load(saved(tmp_path, x=X, y=Y))
    capped = data.evaluated_on(5)
    assert capped.held_out.x.tobytes() == data.held_out.x[:5].tobytes()
    assert capped.train is data.train
    assert capped.held_out_digest != data.held_out_digest == data.evaluated_on(10_000).held_out_digest


def test_parts_are_disjoint_and_together_everything(tmp_path: Path) -> None:
    data = load(saved(tmp_path, x=X, y=Y))
    parts = [data.part((k, 7)) for k in range(1, 8)]
    assert b"".join(part.x.tobytes() for part in parts) == data.train.x.tobytes()
    assert data.part(None) is data.train


def test_batches_are_a_pure_function_of_seed_and_number() -> None:
    examples = Examples(X, Y)
    for preference in (None, (0.5, 0.25, 0.25)):
        batches = LabelledBatches(examples, seed=b"a", batch=4, preference=preference)
        again = LabelledBatches(examples, seed=b"a", batch=4, preference=preference)
        other = LabelledBatches(examples, seed=b"b", batch=4, preference=preference)
        assert np.array_equal(batches.at(7).x, again.at(7).x)
        assert not np.array_equal(batches.at(7).x, batches.at(8).x)
        assert not np.array_equal(batches.at(7).x, other.at(7).x)
        assert rows(batches.at(7)) <= rows(examples)
        assert batches.at(0).x.shape == (4, 5)


def test_a_batch_fixed_for_ever() -> None:
    x = np.arange(200, dtype=np.float32)[:, None]
    batch = LabelledBatches(Examples(x, np.zeros(200, np.int64)), seed=b"seed", batch=4, preference=None).at(
        0
    )
    assert batch.x[:, 0].tolist() == [26, 105, 96, 159]


def test_a_preference_decides_the_classes_and_those_without_examples_are_left_out() -> None:
    y = np.repeat([0, 1, 3], [10, 80, 10])
    examples = Examples(np.arange(100, dtype=np.float32)[:, None], y)
    batch = LabelledBatches(examples, seed=b"s", batch=4000, preference=(0.25, 0.0, 0.5, 0.25)).at(1)
    shares = np.bincount(batch.y, minlength=4) / 4000
    assert shares == pytest.approx([0.5, 0, 0, 0.5], abs=0.05)
    assert np.array_equal(y[batch.x[:, 0].astype(int)], batch.y)
    assert len(set(batch.x[:, 0].tolist())) == 20
    with pytest.raises(DataError, match="no examples"):
        LabelledBatches(examples, seed=b"s", batch=1, preference=(0.0, 0.0, 1.0))
    with pytest.raises(DataError, match="no examples"):
        LabelledBatches(examples.take(slice(0)), seed=b"s", batch=1, preference=None)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda arrays: arrays.pop("x"), "no array x"),
        (lambda arrays: arrays.pop("y"), "no array y"),
        (lambda arrays: arrays.update(x_test=X), "no array y_test"),
        (lambda arrays: arrays.update(y_test=Y), "no array x_test"),
        (lambda arrays: arrays.update(x=X.astype(np.float64)), "float64"),
        (lambda arrays: arrays.update(x=X.astype(">f4")), "float32 (n, 5)"),
        (lambda arrays: arrays.update(x=X[:, :4]), "(300, 4)"),
        (lambda arrays: arrays.update(x=X[0]), "(5,)"),
        (lambda arrays: arrays.update(y=Y[:-1]), "(299,)"),
        (lambda arrays: arrays.update(y=Y.astype(np.float32)), "expected integers"),
        (lambda arrays: arrays.update(y=Y[:, None]), "(300, 1)"),
        (lambda arrays: arrays.update(y=Y + 1), "outside 0 to 2"),
        (lambda arrays: arrays.update(y=Y - 1), "outside 0 to 2"),
        (lambda arrays: arrays.update(y=np.full(300, 2**64 - 1, np.uint64)), "outside 0 to 2"),
        (lambda arrays: arrays.update(x=np.where(X[7, 2] == X, np.float32(np.nan), X)), "not finite"),
        (lambda arrays: arrays.update(x=np.where(X[7, 2] == X, np.float32(np.inf), X)), "not finite"),
        (lambda arrays: arrays.update(x=X[:1], y=Y[:1]), "too few different examples: 0 to learn from, 1"),
        (lambda arrays: arrays.update(x=X[:0], y=Y[:0]), "too few different examples: 0 to learn from, 0"),
        (lambda arrays: arrays.update(x=np.array([{}], object)), "pickle"),
    ],
)
def test_arrays_that_are_not_labelled_examples_are_named(
    tmp_path: Path, change: Callable[[Arrays], object], what: str
) -> None:
    arrays: Arrays = {"x": X, "y": Y}
    change(arrays)
    with pytest.raises(DataError) as caught:
        load(saved(tmp_path, **arrays))
    assert what in caught.value.what
    assert caught.value.fix


def test_missing_files_and_files_of_another_kind_are_answered_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no archive")
    np.save(tmp_path / "one.npy", X)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("x.npy", "no array")
    for path, what in [
        (None, "no path"),
        (tmp_path / "missing", "cannot read"),
        (tmp_path, "cannot read"),
        (tmp_path / "text", "cannot use"),
        (tmp_path / "one.npy", "cannot use"),
        (tmp_path / "zip", "cannot use"),
    ]:
        with pytest.raises(DataError, match=what) as caught:
            load(path)
        assert caught.value.fix


def test_a_file_that_unpacks_to_too_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((100_000, 5), np.float32), y=np.zeros(100_000, np.int64))
    monkeypatch.setattr(training.labelled, "DATA_BYTES_MAX", 1 << 20)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"2,800,[0-9]{3} bytes"):
        load(path)
    monkeypatch.setattr(training.labelled, "DATA_BYTES_MAX", 1 << 30)
    monkeypatch.setattr(training.labelled, "EXAMPLES_MAX", 1000)
    with pytest.raises(DataError, match="100,000 examples"):
        load(path)


def test_a_shape_that_the_file_has_no_bytes_for_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 5)}
    )
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="cannot use"):
        load(tmp_path / "lie.npz")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Whatever byte of a small file is changed: it loads to valid data, or a DataError says why not."""
    whole = saved(tmp_path, x=X[:4], y=Y[:4]).read_bytes()
    rng = random.Random(0)
    path = tmp_path / "damaged.npz"
    refused = 0
    for _ in range(400):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
        try:
            assert np.isfinite(load(path).train.x).all()
        except DataError:
            refused += 1
    assert refused > 100
