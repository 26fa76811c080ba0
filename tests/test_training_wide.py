"""The wide branch: what its table holds, what a text gets from it, and how the two parts are weighed."""

import numpy as np
import pytest
import torch
from conftest import make_unigram, make_wordpiece

from training.wide import CODES, ROWS, WideBranch, fit_ngrams, hash_ngrams, spell, spell_pieces

A, B, C = 5, 7, 9
SPELLING = torch.zeros(10, 2, dtype=torch.int16)
SPELLING[A, 0], SPELLING[B, 0], SPELLING[C] = 101, 102, torch.tensor([103, 104])
"""Token A is one character, B another, C two more; others are none."""


def rows_of(*codes):
    return [int(row) for part in hash_ngrams(np.array(codes)) for row in part]


def score(branch, *texts):
    longest = max(map(len, texts))
    ids = torch.tensor([[*text] + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return branch.score(ids, mask).numpy()


def test_a_text_has_each_run_of_one_to_four_characters():
    assert [len(part) for part in hash_ngrams(np.arange(5))] == [5, 4, 3, 2]
    assert [len(part) for part in hash_ngrams(np.arange(2))] == [2, 1, 0, 0]
    assert rows_of(101, 102)[2] in rows_of(103, 101, 102)
    assert rows_of(101, 102)[2] not in rows_of(102, 101)
    assert all(0 <= row < ROWS for row in rows_of(*range(32000, 32060)))


def test_arrays_and_tensors_are_hashed_alike():
    codes = np.random.default_rng(1).integers(1, CODES, 50)
    for array, tensor in zip(hash_ngrams(codes), hash_ngrams(torch.from_numpy(codes)), strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())


def test_a_text_is_spelled_from_its_pieces():
    unigram, wordpiece = make_unigram(), make_wordpiece()
    for tokenizer, text in ((unigram, "오늘 기분 좋다"), (wordpiece, "오늘 기분 좋다")):
        ids = torch.tensor(tokenizer.encode(text).ids)
        spelled = "".join(map(chr, spell(spell_pieces(tokenizer), ids).tolist()))
        expected = "".join(chr(ord(character) % CODES) for character in f" {text} ")
        assert spelled == expected


def test_a_text_gets_its_ngrams_over_their_length():
    branch = WideBranch(2, SPELLING)
    a, b, pair = rows_of(101, 102)
    branch.table[a] = torch.tensor([1.0, -1.0, 4.0])
    branch.table[b] = torch.tensor([2.0, 0.0, 3.0])
    branch.table[pair] = torch.tensor([3.0, 5.0, 9.0])
    np.testing.assert_allclose(score(branch, [A, B]), [[6 / 4, 4 / 4]])  # 4 + 3 + 9 is 4 squared
    np.testing.assert_allclose(score(branch, [A]), [[1 / 2, -1 / 2]])


def test_padding_adds_nothing():
    branch = WideBranch(2, SPELLING)
    branch.table.copy_(torch.rand_like(branch.table))
    np.testing.assert_array_equal(score(branch, [A], [A, B, C])[0], score(branch, [A])[0])


def test_a_text_without_any_known_ngram_gets_nothing():
    np.testing.assert_array_equal(score(WideBranch(2, SPELLING), [A, B]), [[0, 0]])


@pytest.fixture
def fitted():
    """The first label hangs on token A, the second on B before C; C is in every text; the third is never there."""
    texts = [[A, C], [C, B], [C, A], [B, C], [A, B, C], [C]] * 5
    targets = np.array([[A in text, text[-2:] == [B, C], False] for text in texts], np.float32)
    return fit_ngrams(texts, targets, SPELLING)


def test_the_table_learns_characters_and_their_order(fitted):
    first, second = score(fitted, [A, C], [C, B], [B, C]).T[:2]
    assert first[0] > max(first[1:]) + 1
    assert second[2] > max(second[:2]) + 1


def test_what_says_nothing_weighs_nothing(fitted):
    assert not fitted.table[rows_of(103)[0]].any()  # in every text
    assert not fitted.table[:, 2].any()  # a label that was never expressed


def test_the_part_that_is_right_on_validation_counts():
    random = np.random.default_rng(1)
    targets = (random.random((200, 3)) < [0.1, 0.3, 0.5]).astype(np.float32)
    telling, noise = 4 * targets - 2 + random.normal(size=targets.shape), random.normal(size=targets.shape)
    branch = WideBranch(3, SPELLING)
    branch.weigh(noise, telling, targets)
    noise_scale, telling_scale = branch.scale.tolist()
    assert telling_scale > 10 * abs(noise_scale)
    together = noise_scale * noise + telling_scale * telling + branch.bias.numpy()
    probabilities = 1 / (1 + np.exp(-together))
    weights = np.where(targets > 0, 1.4, 1)  # calibrated label by label, but that a need counts 1.4 times
    np.testing.assert_allclose((weights * (probabilities - targets)).mean(0), 0, atol=0.01)
