"""The proofs of `make soak` at a hundredth of their length, on a model with known answers and a real one's time."""

import pytest
import soak
from known import LABELS, MAX_TOKENS, write_known

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SHARE = 1 / 100
TEXTS = ["안녕 " * 3, "공평하게 나누었다", "오늘은 아무 일도 없었다 " * 2, "친구와 즐거운 하루", "성취"]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory, bucket):
    folder = tmp_path_factory.mktemp("soak")
    write_known(folder / "release", work=20)
    return soak.run_proofs(folder, {"labels": LABELS, "max_tokens": MAX_TOKENS, "prefix": ""}, TEXTS, SHARE)


def test_under_load_nothing_is_wrong_or_lost(proofs):
    load = proofs["load"]
    assert (load["wrong"], load["lost"]) == (0, 0)
    assert load["accepted"] > 0
    assert load["highest_calm_rate"] > 0
    assert load["memory"]["most_mb"] <= 160


def test_every_answer_during_refreshes_is_that_of_one_release(proofs):
    refreshes = proofs["refreshes"]
    assert refreshes["refreshes"] == 10
    assert refreshes["answers"] > 10
    assert refreshes["wrong"] == 0


def test_hostile_requests_get_answers_of_the_contract(proofs):
    hostile = proofs["hostile"]
    assert hostile["requests"] >= 100
    assert hostile["wrong"] == []
    assert {200, 400, 415, 422} <= set(hostile["by_status"])


def test_a_cold_start_is_near_the_frameworks_own_and_far_from_torchs(proofs):
    cold = proofs["cold_start"]
    assert cold["times_hello"] < 6  # one run on a busy machine; `make soak` holds it to 3
    assert cold["times_faster_than_plain"] > 4
    assert cold["distant_round_trips"] <= 3
