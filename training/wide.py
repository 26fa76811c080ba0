"""The wide branch: hashed token n-grams beside the encoder, one small table of label logits.

The encoder knows what words mean, n-grams know which phrases people use, and
each is right on texts where the other is not (a wide and a deep part in one
model: Cheng et al. 2016, https://arxiv.org/abs/1606.07792). Tokens and pairs of
tokens are hashed (Weinberger et al. 2009, https://arxiv.org/abs/0902.2206) to
rows of a table that logistic regressions fill, on TF-IDF features of unit
length. A stacking on the validation split then weighs the two parts, so that
neither's over-confidence on its own training texts counts (Wolpert 1992,
https://doi.org/10.1016/S0893-6080(05)80023-1).

Served, it is a `Gather` and a sum inside the model's graph: microseconds, and
nothing that the function must know about.
"""

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array
from sklearn.linear_model import LogisticRegression
from torch import nn

ROWS = 1 << 15
"""Rows of the table; twice as many gained nothing on validation."""
C = 5.0
"""Inverse strength of the L2 penalty."""
NEED_WEIGHT = 1.6
"""How much more than its absence a need counts in the stacking. Of calibrated
probabilities the decision that is best for F1 lies at half of the F1 that can be had
(Lipton et al. 2014, https://arxiv.org/abs/1402.1892), here 0.38; (1 - 0.38) / 0.38
moves it to 0.5."""
MIX = 31337
"""Odd, so that a pair's first token spreads over all rows."""
SMALLEST = 1e-6
"""In place of the length of a text whose n-grams are all in every text."""


class WideBranch(nn.Module):
    """Adds the n-grams' label logits to the encoder's."""

    def __init__(self, labels: int):
        super().__init__()
        self.table = nn.Buffer(torch.zeros(ROWS, labels + 1))
        """A row an n-gram: its idf-weighted label logits, and its idf squared."""
        self.scale = nn.Buffer(torch.ones(2))
        """How much the encoder's and the n-grams' logits count."""
        self.bias = nn.Buffer(torch.zeros(labels))

    def forward(
        self, logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """float32 [B, L] logits of the encoder, and its int64 [B, T] ids and mask, to float32 [B, L] logits."""
        return self.scale[0] * logits + self.scale[1] * self.score(input_ids, attention_mask) + self.bias

    def score(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """float32 [B, L]: the n-grams' own logits, their bias left to the sum."""
        rows = torch.cat([input_ids, hash_pairs(input_ids[:, :-1], input_ids[:, 1:])], 1)  # [B, 2T-1]
        found = self.table[rows]  # [B, 2T-1, L+1]
        if attention_mask is not None:  # a pair is there where its second token is
            found = found * torch.cat([attention_mask, attention_mask[:, 1:]], 1).unsqueeze(-1)
        summed = found.sum(1)  # [B, L+1]
        return summed[:, :-1] / summed[:, -1:].clamp_min(SMALLEST).sqrt()

    def weigh(self, deep: np.ndarray, ngrams: np.ndarray, targets: np.ndarray) -> None:
        """Set the scales and the bias to the logistic regression of [B, L] targets on both parts' logits."""
        labels = targets.shape[1]
        columns = [deep.reshape(-1, 1), ngrams.reshape(-1, 1), np.tile(np.eye(labels), (len(targets), 1))]
        stacked = LogisticRegression(class_weight={True: NEED_WEIGHT}, max_iter=1000)
        stacked.fit(np.hstack(columns), targets.ravel() >= 0.5)
        weights = torch.from_numpy(stacked.coef_[0]).float()  # [2 + L]
        self.scale.copy_(weights[:2])
        self.bias.copy_(weights[2:] + float(stacked.intercept_[0]))


def fit_ngrams(ids: list[list[int]], targets: np.ndarray) -> WideBranch:
    """A branch whose table holds one logistic regression a label, on texts' token ids and [B, L] targets.

    A label that is never or always expressed gets no weights.
    """
    counts = _count_rows(ids)  # [B, ROWS]
    idf = np.log((1 + len(ids)) / (1 + (counts > 0).sum(0)))  # an n-gram that is in every text counts nothing
    norms = np.sqrt(np.maximum(counts @ idf**2, SMALLEST))
    features = csr_array(diags_array(1 / norms) @ counts @ diags_array(idf))
    branch = WideBranch(targets.shape[1])
    branch.table[:, -1] = torch.from_numpy(idf**2)
    for label, target in enumerate(targets.T >= 0.5):
        if target.any() and not target.all():
            model = LogisticRegression(C=C, class_weight="balanced", solver="liblinear").fit(features, target)
            branch.table[:, label] = torch.from_numpy(idf * model.coef_[0])
    return branch


def hash_pairs(first, second):
    """Ids of neighbours, arrays or tensors of one shape, to rows of the table."""
    return (first * MIX + second) % ROWS


def _count_rows(ids: list[list[int]]) -> csr_array:
    arrays = [np.array(row) for row in ids]
    rows = [np.concatenate([row, hash_pairs(row[:-1], row[1:])]) for row in arrays]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)  # liblinear takes indices of 32 bits only
    columns = np.concatenate(rows).astype(np.int32)
    counts = csr_array((np.ones(len(columns)), columns, starts), shape=(len(ids), ROWS))
    counts.sum_duplicates()
    return counts
