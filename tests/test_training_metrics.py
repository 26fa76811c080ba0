import numpy as np

from training.baseline import predict_static
from training.examples import Examples, Label
from training.metrics import (
    calibration_error,
    choose_thresholds,
    confuse,
    find_uneventful,
    share_claimed,
    summarize_probes,
    summarize_scores,
)

P = np.array([[0.9, 0.2], [0.6, 0.7], [0.4, 0.8], [0.1, 0.1]])
T = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)


def test_f1_is_counted_by_hand():
    summary = summarize_scores(P, T)
    assert summary["f1"] == [0.5, 1.0]
    assert summary["macro_f1"] == 0.75
    assert summary["micro_f1"] == 0.75


def test_a_threshold_has_the_highest_f1_and_is_nearest_to_half():
    assert choose_thresholds(P, T).tolist() == [0.4, 0.5]


def test_the_trust_test_counts_tops_and_others():
    labels = [Label("가", "a"), Label("나", "b")]
    probes = [{"need": "가"}, {"need": "나"}]
    assert summarize_probes(probes, np.array([[0.45, 0.25], [0.75, 0.5]]), labels) == {
        "sentences": 2,
        "on_top": 1,
        "trusted": 0,
        "others": 2,
        "others_mean": 0.5,
        "others_at_half": 1,
    }


def test_the_calibration_error_is_what_probabilities_miss_on_average():
    p = np.array([[0.95], [0.95], [0.95], [0.95], [0.25], [0.25], [0.25], [0.25]])
    right = np.array([[1], [1], [1], [1], [1], [0], [0], [0]])
    np.testing.assert_allclose(calibration_error(p, right), 0.5 * 0.05)
    wrong = 1 - right
    np.testing.assert_allclose(calibration_error(p, wrong), 0.5 * 0.95 + 0.5 * 0.5)


def test_the_static_rival_tells_texts_by_their_tokens():
    embeddings = np.eye(6, dtype=np.float32)
    train = [[1, 2], [1, 3], [4, 2], [4, 3], [5, 3], [1, 5]] * 4
    targets = np.array([[1 in ids, False] for ids in train], np.float32)
    (scores,) = predict_static(embeddings, train, targets, [[[1, 2], [4, 2], [3]]])
    assert scores[0, 0] > 0.5 > scores[1, 0]
    assert list(scores[:, 1]) == [0, 0, 0]


def test_a_text_without_a_need_that_is_given_one_is_counted():
    targets = np.array([[0, 0], [0, 0], [1, 0], [0, 1]], np.float32)
    assert share_claimed(np.array([[0.6, 0.1], [0.1, 0.2], [0.1, 0.9], [0.9, 0.9]]), targets) == 0.5
    assert share_claimed(P[:1], T[:1]) == 0.0


def test_uneventful_are_the_sources_mostly_without_a_need():
    targets = np.array([[0], [0], [1], [0], [1], [1]], np.float32)
    examples = Examples(list("abcdef"), targets, ["diary", "diary", "diary", "", "work", "work"])
    assert find_uneventful(examples) == [0, 1, 2]


def test_confusion_is_recall_on_the_diagonal_and_false_claims_beside_it():
    targets = np.array([[1, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    claimed = np.array([[1, 1], [1, 0], [0, 1], [0, 1]], float)
    np.testing.assert_allclose(confuse(claimed, targets), [[2 / 3, 1 / 2], [0, 1]])
