import numpy as np

from training.evaluate import choose_thresholds, summarize_probes, summarize_scores
from training.examples import Label

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
