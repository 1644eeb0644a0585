"""The generator of directions: its known answers, the independence of slices, and that its signs look random."""

from __future__ import annotations

import math

import pytest
import torch

from training.directions import SIGNS_PER_WORD, Key, KeySequence, direction_words, signs_of

CPU = torch.device("cpu")
RUN = bytes(range(32))
MASK = (1 << 64) - 1
OWN_STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def plain_word(key: Key, number: int) -> int:
    """A word by the formula of docs/PROTOCOL.md, in whole numbers of any size."""
    start, step = (half & MASK for half in key)
    z = (start + (number + 1) * step) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def signs(keys: list[Key], words: int, first: int = 0) -> torch.Tensor:
    return signs_of(direction_words(keys, first, words, CPU)).to(torch.float64)


def some_keys(count: int) -> list[Key]:
    sequence = KeySequence(RUN, b"log")
    return [sequence.key(number) for number in range(count)]


def test_known_answers() -> None:
    """The vectors of docs/PROTOCOL.md, and those that SplitMix64 with its own step gives for seed zero."""
    assert [word & MASK for word in direction_words([(0, OWN_STEP)], 0, 3, CPU)[0].tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    sequence = KeySequence(RUN, b"log")
    expected = {
        0: (0x462160F457711E36, 0xD77F0599DBEA7921, 0x12968E584B70C131, 0x8234AAA385903541),
        1: (0x4022F34527015B8F, 0xC280D36F4BB35839, 0xDF16ED80F452D803, 0x9C3E68DA382A5196),
        2**40: (0x043E843B25CEE84F, 0xA8C68584A2898BE3, 0x4920F66450C23586, 0x07221ED81B02A810),
    }
    for number, answer in expected.items():
        key = sequence.key(number)
        words = direction_words([key], 0, 2, CPU)[0].tolist()
        assert tuple(value & MASK for value in (*key, *words)) == answer
    signs = signs_of(direction_words([sequence.key(0)], 0, 1, CPU))[0].tolist()
    bits = "1101000000010111000001100001110010101011101000000111100001000110"
    assert signs == [1 - 2 * int(bit) for bit in bits]


def test_words_are_those_of_the_formula() -> None:
    keys = some_keys(5)
    words = direction_words(keys, 1000, 40, CPU)
    for row, key in zip(words.tolist(), keys, strict=True):
        assert [word & MASK for word in row] == [plain_word(key, 1000 + number) for number in range(40)]


def test_signs_are_the_bits_of_words_in_the_order_of_the_protocol() -> None:
    words = direction_words(some_keys(2), 0, 3, CPU)
    signs = signs_of(words)
    for row in range(2):
        for position in range(3 * SIGNS_PER_WORD):
            word, (i, j) = position // SIGNS_PER_WORD, divmod(position % SIGNS_PER_WORD, 8)
            assert signs[row, position] == 1 - 2 * (words[row, word].item() >> (8 * j + i) & 1)


def test_any_slice_can_be_made_alone() -> None:
    keys = some_keys(3)
    whole = direction_words(keys, 0, 100, CPU)
    for first, count in ((0, 1), (17, 40), (99, 1)):
        assert torch.equal(direction_words(keys, first, count, CPU), whole[:, first : first + count])


def test_keys_tell_runs_logs_and_numbers_apart() -> None:
    keys = {
        KeySequence(run, log).key(number)
        for run in (RUN, bytes(32))
        for log in (b"a", b"b")
        for number in (0, 1, 2**32)
    }
    assert len(keys) == 12


WORDS = 1 << 12
COUNT = 64
SIGNS = WORDS * SIGNS_PER_WORD


def test_as_many_signs_are_plus_as_minus() -> None:
    """Means of 2^18 signs: each within 5 standard errors, and all together spread as coins would be."""
    means = signs(some_keys(COUNT), WORDS).mean(1) * math.sqrt(SIGNS)
    assert means.abs().max() < 5
    assert (means**2).mean() == pytest.approx(1, abs=0.7)


def test_every_bit_of_a_word_is_fair() -> None:
    """A weak finalizer shows in single bits: the mean of each of the 64, over 2^18 words."""
    by_bit = signs(some_keys(COUNT), WORDS).view(-1, SIGNS_PER_WORD).mean(0) * math.sqrt(COUNT * WORDS)
    assert by_bit.abs().max() < 5


def test_directions_of_different_keys_are_not_alike() -> None:
    drawn = signs(some_keys(COUNT), WORDS)
    correlations = (drawn @ drawn.T / math.sqrt(SIGNS)).triu(diagonal=1)
    assert correlations.abs().max() < 5.5
    assert (correlations**2).sum() / (COUNT * (COUNT - 1) / 2) == pytest.approx(1, abs=0.15)


def test_neighbouring_words_are_not_alike() -> None:
    drawn = signs(some_keys(COUNT), WORDS).view(COUNT, WORDS, SIGNS_PER_WORD)
    for distance in (1, 2, 64):
        products = drawn[:, distance:] * drawn[:, :-distance]
        assert abs(products.mean().item()) * math.sqrt(products.numel()) < 5


def test_keys_that_are_nearly_the_same_give_different_signs() -> None:
    """No hash gives such keys; a generator that tells even them apart tells all others apart."""
    near = signs(
        [(start, step) for start in (0, 1) for step in (OWN_STEP, OWN_STEP + 2, OWN_STEP - 2)], WORDS
    )
    correlations = (near @ near.T / math.sqrt(SIGNS)).triu(diagonal=1)
    assert correlations.abs().max() < 5


def test_no_frequency_stands_out() -> None:
    """Spectral flatness: the power at each of 2^17 frequencies is exponential, its largest about their logarithm."""
    drawn = signs(some_keys(8), WORDS)
    power = torch.fft.rfft(drawn, norm="ortho").abs().square()[:, 1:-1]
    assert power.mean().item() == pytest.approx(1, abs=0.02)
    assert power.max() < math.log(power.numel()) + 8
    flatness = power.clamp(min=1e-12).log().mean().exp() / power.mean()
    assert flatness.item() == pytest.approx(math.exp(-0.5772156649), abs=0.01)
