"""The wide branch: hashed character n-grams beside the encoder, one table of label logits.

The encoder knows what words mean, n-grams know which phrases people use, and
each is right on texts where the other is not (a wide and a deep part in one
model: Cheng et al. 2016, https://arxiv.org/abs/1606.07792). The text is spelled
again from its tokens, n-grams of one to four characters are hashed (Weinberger
et al. 2009, https://arxiv.org/abs/0902.2206) to rows of a table that logistic
regressions fill, on TF-IDF features of unit length. A stacking on the validation
split then weighs the two parts, so that neither's over-confidence on its own
training texts counts (Wolpert 1992, https://doi.org/10.1016/S0893-6080(05)80023-1).
N-grams of characters gain twice what tokens and pairs of tokens do (cross-validated
on the validation split: 0.801 and 0.789, the encoder alone 0.783): Korean's
endings are cut by the tokenizer, and told apart by characters.

Served, it is a look-up and a sum inside the model's graph: microseconds, and
nothing that the function must know about.
"""

import json

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array
from tokenizers import Tokenizer
from torch import nn

ROWS = 1 << 17
"""Rows of the table; half as many lost half a point on validation, twice as many gained nothing."""
LONGEST = 4
"""Characters of an n-gram, at most; five gained nothing."""
C = 10.0
"""Inverse strength of the L2 penalty."""
NEED_WEIGHT = 1.4
"""How much more than its absence a need counts in the stacking. Of calibrated
probabilities the decision that is best for F1 lies at half of the F1 that can be had
(Lipton et al. 2014, https://arxiv.org/abs/1402.1892), here 0.41; (1 - 0.41) / 0.41
moves it to 0.5. More gained nothing on validation and gave more neutral texts a need."""
MIX, PRIME = 2039, (1 << 20) - 3
"""Of the hash: PRIME * MIX + CODES is below 2^31, so that integers of 32 bits hold it."""
SMALLEST = 1e-6
"""In place of the length of a text whose n-grams are all in every text."""
CODES = 32749
"""A character's code is its code point modulo this prime, so that it fits 16 bits; 0 is no character."""


class WideBranch(nn.Module):
    """Adds the n-grams' label logits to the encoder's."""

    def __init__(self, labels: int, spelling: torch.Tensor):
        super().__init__()
        self.spelling = nn.Buffer(spelling)
        """int16 [V, K]: the codes of each piece's characters, 0 after its last."""
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
        texts = input_ids.unbind()
        if attention_mask is not None:
            texts = [ids[there > 0] for ids, there in zip(texts, attention_mask.unbind(), strict=True)]
        summed = torch.stack([self.table[torch.cat(hash_ngrams(spell(self.spelling, ids)))].sum(0) for ids in texts])
        return summed[:, :-1] / summed[:, -1:].clamp_min(SMALLEST).sqrt()

    def weigh(self, deep: np.ndarray, ngrams: np.ndarray, targets: np.ndarray) -> None:
        """Set the scales and the bias to the logistic regression of [B, L] targets on both parts' logits."""
        from sklearn.linear_model import LogisticRegression  # a second that who only reads a model need not wait

        labels = targets.shape[1]
        columns = [deep.reshape(-1, 1), ngrams.reshape(-1, 1), np.tile(np.eye(labels), (len(targets), 1))]
        stacked = LogisticRegression(class_weight={True: NEED_WEIGHT}, max_iter=1000)
        stacked.fit(np.hstack(columns), targets.ravel() >= 0.5)
        weights = torch.from_numpy(stacked.coef_[0]).float()  # [2 + L]
        self.scale.copy_(weights[:2])
        self.bias.copy_(weights[2:] + float(stacked.intercept_[0]))


def fit_ngrams(ids: list[list[int]], targets: np.ndarray, spelling: torch.Tensor) -> WideBranch:
    """A branch whose table holds one logistic regression a label, on texts' token ids and [B, L] targets.

    A label that is never or always expressed gets no weights.
    """
    from sklearn.linear_model import LogisticRegression  # as above

    counts = _count_rows([spell(spelling, torch.tensor(row)).numpy() for row in ids])  # [B, ROWS]
    idf = np.log((1 + len(ids)) / (1 + (counts > 0).sum(0)))  # an n-gram that is in every text counts nothing
    norms = np.sqrt(np.maximum(counts @ idf**2, SMALLEST))
    features = csr_array(diags_array(1 / norms) @ counts @ diags_array(idf))
    branch = WideBranch(targets.shape[1], spelling)
    branch.table[:, -1] = torch.from_numpy(idf**2)
    for label, target in enumerate(targets.T >= 0.5):
        if target.any() and not target.all():
            model = LogisticRegression(C=C, class_weight="balanced", solver="liblinear").fit(features, target)
            branch.table[:, label] = torch.from_numpy(idf * model.coef_[0])
    return branch


def spell_pieces(tokenizer: Tokenizer) -> torch.Tensor:
    """int16 [V, K]: the codes of each piece's characters; a word begins with a space, the text ends with one."""
    wordpiece = json.loads(tokenizer.to_str())["model"]["type"] == "WordPiece"
    special = tokenizer.get_added_tokens_decoder()
    pieces = {i: piece.lower() for piece, i in tokenizer.get_vocab().items() if i not in special}
    for i, piece in pieces.items():
        begun = piece.removeprefix("##") if piece.startswith("##") else f" {piece}"
        pieces[i] = begun if wordpiece else piece.replace("▁", " ")
    pieces[tokenizer.encode("").ids[-1]] = " "
    spelling = torch.zeros(tokenizer.get_vocab_size(), max(map(len, pieces.values())), dtype=torch.int16)  # [V, K]
    for i, piece in pieces.items():
        spelling[i, : len(piece)] = torch.tensor([ord(character) % CODES for character in piece])
    return spelling


def spell(spelling: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 [T] ids to the int64 [C] codes of their characters."""
    codes = spelling[ids].flatten()  # [T, K] -> [T*K]
    return codes[codes > 0].long()


def hash_ngrams(codes):
    """An array or tensor of C codes to the rows of its n-grams: one of C, one of C-1, … for each length."""
    hashed, rows = codes, [codes % ROWS]
    for length in range(2, LONGEST + 1):
        hashed = (hashed[:-1] * MIX + codes[length - 1 :]) % PRIME
        rows.append(hashed % ROWS)
    return rows


def _count_rows(texts: list[np.ndarray]) -> csr_array:
    rows = [np.concatenate(hash_ngrams(codes)) for codes in texts]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)  # liblinear takes indices of 32 bits only
    columns = np.concatenate(rows).astype(np.int32)
    counts = csr_array((np.ones(len(columns)), columns, starts), shape=(len(texts), ROWS))
    counts.sum_duplicates()
    return counts
