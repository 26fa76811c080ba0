"""What the transformer has to beat: two cheap rivals and logistic regression.

Character n-grams are strong on short Korean texts, trained in seconds, blind to
meaning. The static rival is the mean of the base's token embeddings, frequent
tokens weighing less, in the manner of model2vec.
"""

import numpy as np
from scipy.sparse import csr_array, diags_array
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from training.examples import Examples

SIF = 1e-3
"""Smooth inverse frequency, Arora et al. 2017, https://openreview.net/forum?id=SyK00v5xx."""
STATIC_C = 0.01


def predict_baseline(train: Examples, parts: list[list[str]]) -> list[np.ndarray]:
    """Fit on `train`, return float64 [B, L] probabilities for each list of texts.

    A soft target counts as expressed from 0.5 on; a label that train never
    (or always) expresses gets that constant.
    """
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
    features = vectorizer.fit_transform(train.texts)
    vectors = [vectorizer.transform(texts) for texts in parts]
    return _fit_and_predict(features, train.targets, vectors, C=20, solver="liblinear")


def predict_static(
    embeddings: np.ndarray, train_ids: list[list[int]], targets: np.ndarray, parts: list[list[list[int]]]
) -> list[np.ndarray]:
    """The same for token ids, out of the mean of their float32 [vocabulary, H] embeddings."""
    counts = [_count_tokens(ids, len(embeddings)) for ids in (train_ids, *parts)]
    share = counts[0].sum(0) / counts[0].sum()
    weights = diags_array(SIF / (SIF + share))
    means = [(m @ weights @ embeddings) / np.maximum((m @ weights).sum(1), 1e-9)[:, None] for m in counts]  # [B, H]
    middle, spread = means[0].mean(0), means[0].std(0) + 1e-9
    train, *others = ((mean - middle) / spread for mean in means)
    return _fit_and_predict(train, targets, others, C=STATIC_C, max_iter=500)


def _count_tokens(ids: list[list[int]], vocabulary: int) -> csr_array:
    starts = np.cumsum([0, *map(len, ids)])
    return csr_array((np.ones(starts[-1]), np.concatenate(ids), starts), shape=(len(ids), vocabulary))


def _fit_and_predict(features, targets: np.ndarray, vectors: list, **options) -> list[np.ndarray]:
    columns: list[list[np.ndarray]] = [[] for _ in vectors]
    for target in targets.T >= 0.5:
        if target.all() or not target.any():
            predicted = [np.full(x.shape[0], float(target[0])) for x in vectors]
        else:
            model = LogisticRegression(class_weight="balanced", **options).fit(features, target)
            predicted = [model.predict_proba(x)[:, 1] for x in vectors]
        for column, p in zip(columns, predicted, strict=True):
            column.append(p)
    return [np.stack(column, axis=1) for column in columns]
