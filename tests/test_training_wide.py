"""The wide branch: what its table holds, what a text gets from it, and how the two parts are weighed."""

import numpy as np
import pytest
import torch

from training.wide import WideBranch, fit_ngrams, hash_pairs

A, B, C = 5, 7, 9


def score(branch, *texts):
    longest = max(map(len, texts))
    ids = torch.tensor([[*text] + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return branch.score(ids, mask).numpy()


def test_a_text_gets_its_tokens_and_pairs_over_their_length():
    branch = WideBranch(2)
    branch.table[A] = torch.tensor([1.0, -1.0, 4.0])
    branch.table[B] = torch.tensor([2.0, 0.0, 3.0])
    branch.table[hash_pairs(A, B)] = torch.tensor([3.0, 5.0, 9.0])
    np.testing.assert_allclose(score(branch, [A, B]), [[6 / 4, 4 / 4]])  # 4 + 3 + 9 is 4 squared
    np.testing.assert_allclose(score(branch, [A]), [[1 / 2, -1 / 2]])


def test_padding_adds_nothing():
    branch = WideBranch(2)
    branch.table.copy_(torch.rand_like(branch.table))
    np.testing.assert_array_equal(score(branch, [A], [A, B, C])[0], score(branch, [A])[0])


def test_a_text_without_any_known_ngram_gets_nothing():
    np.testing.assert_array_equal(score(WideBranch(2), [A, B]), [[0, 0]])


@pytest.fixture
def fitted():
    """The first label hangs on token A, the second on B before C; C is in every text; the third is never there."""
    texts = [[A, C], [C, B], [C, A], [B, C], [A, B, C], [C]] * 5
    targets = np.array([[A in text, text[-2:] == [B, C], False] for text in texts], np.float32)
    return fit_ngrams(texts, targets)


def test_the_table_learns_tokens_and_pairs(fitted):
    first, second = score(fitted, [A, C], [C, B], [B, C]).T[:2]
    assert first[0] > max(first[1:]) + 1
    assert second[2] > max(second[:2]) + 1


def test_what_says_nothing_weighs_nothing(fitted):
    assert not fitted.table[C].any()  # in every text
    assert not fitted.table[:, 2].any()  # a label that was never expressed


def test_the_part_that_is_right_on_validation_counts():
    random = np.random.default_rng(1)
    targets = (random.random((200, 3)) < [0.1, 0.3, 0.5]).astype(np.float32)
    telling, noise = 4 * targets - 2 + random.normal(size=targets.shape), random.normal(size=targets.shape)
    branch = WideBranch(3)
    branch.weigh(noise, telling, targets)
    noise_scale, telling_scale = branch.scale.tolist()
    assert telling_scale > 10 * abs(noise_scale)
    together = noise_scale * noise + telling_scale * telling + branch.bias.numpy()
    probabilities = 1 / (1 + np.exp(-together))
    weights = np.where(targets > 0, 1.6, 1)  # calibrated label by label, but that a need counts 1.6 times
    np.testing.assert_allclose((weights * (probabilities - targets)).mean(0), 0, atol=0.01)
