"""Every dialect over HTTP, from a real functions-framework process that serves a release with known answers."""

import json
import logging
import re
import subprocess
import sys
import uuid
from hashlib import sha256
from pathlib import Path

import openapi_spec_validator
import pytest
import requests
from flask import Request
from known import NAMES, release_known, score_known, write_known
from werkzeug.test import create_environ

from build import local
from function import app

LONG = "친" + "가" * 200
ORIGIN = "https://diary.example"
TRACE = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def served(bucket, tmp_path_factory):
    """A function's address, its release and its log."""
    folder = tmp_path_factory.mktemp("known")
    uri = f"gs://{local.BUCKET}/{uuid.uuid4().hex}"
    release = release_known(uri, folder / "release")
    limits = {"MAX_TEXTS": "3", "MAX_CALLS": "40", "MAX_TEXT_CHARS": "300", "MAX_WINDOWS": "3", "THREADS": "16"}
    settings = {"MODEL_URI": uri, "CACHE_DIR": str(folder / "cache"), "ALLOWED_ORIGINS": f"{ORIGIN}, https://b.example"}
    log = folder / "log"
    environment = {**limits, **settings, "GOOGLE_CLOUD_PROJECT": "house"}
    with log.open("w") as stderr, local.run_function(bucket, environment=environment, stderr=stderr) as address:
        yield address, release, log


@pytest.fixture(scope="module")
def address(served):
    return served[0]


def post(address, body, status=200, **headers):
    response = requests.post(address, json=body, headers=headers, timeout=30)
    assert response.status_code == status, response.text
    return response.json()


def result(text, *needs, truncated=False):
    return {"needs": list(needs), "scores": score_known(text), "truncated": truncated}


def test_each_dialect_answers_in_its_shape(served):
    address, release, _ = served
    first, second = result("안 인", "안정감", "인정"), result("공", "공정성")
    assert post(address, {"text": "안 인"}) == first | {"release": release}
    assert post(address, {"texts": ["안 인", "공"]}) == {"results": [first, second], "release": release}
    instances = {"instances": ["안 인", {"text": "공", "other": 1}], "parameters": {}}
    assert post(address, instances) == {"predictions": [first, second], "release": release}
    calls = {"requestId": "1", "caller": "//bigquery", "sessionUser": "a@b", "calls": [["안 인"], ["공"]]}
    assert post(address, calls) == {"replies": [first, second]}


def test_scores_keep_the_manifests_order_and_needs_come_highest_first(address):
    answer = post(address, {"text": "공 안 안"})
    assert list(answer["scores"]) == NAMES
    assert answer["needs"] == ["안정감", "공정성"]


@pytest.mark.parametrize("member", ["text", "texts", "instances"])
def test_a_threshold_counts_for_every_need(address, member):
    text = "안"
    answer = post(address, {member: text if member == "text" else [text], "threshold": 0.1})
    only = answer if member == "text" else answer.get("results", answer.get("predictions"))[0]
    assert set(only["needs"]) == set(NAMES)
    edge = score_known(text)["안정감"]
    assert post(address, {"text": text, "threshold": edge})["needs"] == ["안정감"]


def test_a_row_without_text_gets_null_and_a_long_one_is_cut(address):
    rows = ["안", None, "", "  ", "가" * 299 + "공" * 9, "안"]
    replies = post(address, {"calls": [[row] for row in rows]})["replies"]
    assert replies[1:4] == [None, None, None]
    assert replies[0] == replies[5] == result("안", "안정감")
    assert (replies[4]["truncated"], replies[4]["needs"]) == (True, [])  # 3 windows of 64 end before the 300th
    assert post(address, {"calls": []}) == {"replies": []}


def test_a_call_takes_more_rows_than_a_request_takes_texts_or_windows(address):
    rows = [[LONG]] * 40
    assert len(post(address, {"calls": rows})["replies"]) == 40


@pytest.mark.parametrize(
    "calls", [{}, [["a", "b"]], [[]], ["a"], [[1]], [[{"text": "a"}]], [["a"]] * 41, [["\ud800"]]], ids=str
)
def test_bigquery_is_refused_in_its_own_words(address, calls):
    response = requests.post(address, data=json.dumps({"calls": calls}), headers=JSON, timeout=30)
    assert (response.status_code, response.headers["Content-Type"]) == (400, "application/json")
    assert set(response.json()) == {"errorMessage"}
    assert "expected" in response.json()["errorMessage"]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"instances": ["a", {"txt": "a"}]}, "#/instances/1/text"),
        ({"instances": ["a", 1]}, "#/instances/1"),
        ({"instances": ["a"] * 4}, "#/instances"),
        ({"texts": ["a"], "explain": True}, "#/explain"),
        ({"calls": [["a"]], "explain": True}, "#/explain"),
        ({"text": "a", "explain": "yes"}, "#/explain"),
        ({"text": "a", "calls": [["a"]]}, "#"),
    ],
    ids=str,
)
def test_a_wrong_member_is_pointed_at(address, body, pointer):
    assert post(address, body, 422)["errors"][0]["pointer"] == pointer


def test_a_long_text_is_read_in_windows_and_says_what_was_cut(address):
    assert post(address, {"text": LONG})["truncated"] is True  # three windows of 62 characters, a quarter shared
    assert post(address, {"text": LONG[:150]})["truncated"] is False
    assert post(address, {"text": "가" * 100 + "친"})["needs"] == ["친밀감"]


def test_an_explanation_names_the_words_that_speak_for_a_need(served):
    address, release, _ = served
    text = "오늘 안전하고 공평한 날, 안녕 😊"
    answer = post(address, {"text": text, "explain": True})
    assert answer["release"] == release
    assert set(answer["explanation"]) == set(answer["needs"]) == {"안정감", "공정성"}
    (fair,) = answer["explanation"]["공정성"]
    assert text[fair["start"] : fair["end"]] == "공평한"
    assert fair["weight"] == pytest.approx(score_known("공")["공정성"] - score_known("가")["공정성"], abs=1e-4)
    safe = [text[word["start"] : word["end"]] for word in answer["explanation"]["안정감"]]
    assert safe == ["안전하고", "안녕"]


def test_an_explanation_counts_code_points_as_received_and_stays_within_64_runs(address):
    text = "\u1100\u1161 \u1100\u1161 공"  # decomposed: five syllables' letters, then a space, then the word
    (word,) = post(address, {"text": text, "explain": True})["explanation"]["공정성"]
    assert text[word["start"] : word["end"]] == "공"
    many = "가 " * 69 + "공"
    (group,) = post(address, {"text": many, "explain": True})["explanation"]["공정성"]
    assert group["end"] == len(many)
    assert len(many[group["start"] :].split()) > 1
    assert post(address, {"text": "가", "explain": True})["explanation"] == {}


def test_what_an_explanation_costs_is_in_server_timing(address):
    plain, explained = (
        requests.post(address, json={"text": "공 가", "explain": wish}, timeout=30).headers["Server-Timing"]
        for wish in (False, True)
    )
    assert re.findall(r"(\w+);dur=\d+\.\d\d", plain) == ["queue", "load", "tokenize", "infer"]
    assert re.findall(r"(\w+);dur=\d+\.\d\d", explained) == ["queue", "load", "tokenize", "infer", "explain"]


def test_the_root_is_a_page_to_browsers_and_json_to_programs(served):
    address, release, _ = served
    browser = requests.get(address, headers={"Accept": "text/html,*/*;q=0.8"}, timeout=30)
    assert browser.headers["Content-Type"] == "text/html; charset=utf-8"
    assert browser.headers["Vary"] == "Accept, Origin"
    for accept in ("*/*", "application/json"):
        assert requests.get(address, headers={"Accept": accept}, timeout=30).json()["release"] == release


def test_the_openapi_document_is_valid(address):
    document = requests.get(f"{address}/openapi.json", timeout=30).json()
    assert document["openapi"] == "3.1.0"
    openapi_spec_validator.validate(document)
    assert document["components"]["schemas"]["TextsRequest"]["properties"]["texts"]["maxItems"] == 3


@pytest.mark.slow
def test_schemathesis_finds_nothing(address, tmp_path):
    schemathesis = Path(sys.executable).with_name("schemathesis")
    command = [str(schemathesis), "run", f"{address}/openapi.json", "--checks", "all", "--max-examples", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout


def test_an_allowed_origin_may_ask_and_no_other(address):
    asked = requests.options(address, headers={"Origin": ORIGIN}, timeout=30)
    assert asked.status_code == 204
    assert asked.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "POST" in asked.headers["Access-Control-Allow-Methods"]
    assert "Content-Type" in asked.headers["Access-Control-Allow-Headers"]
    answered = requests.post(address, json={"text": "가"}, headers={"Origin": "https://b.example"}, timeout=30)
    assert answered.headers["Access-Control-Allow-Origin"] == "https://b.example"
    refused = requests.options(address, headers={"Origin": "https://evil.example"}, timeout=30)
    assert not [name for name in refused.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    "header", [{"X-Cloud-Trace-Context": f"{TRACE}/1;o=1"}, {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}], ids=str
)
def test_a_log_line_has_trace_latency_and_count_and_never_a_text(served, header):
    address, _, log = served
    secret = f"비밀 {uuid.uuid4().hex}"
    given = uuid.uuid4().hex
    post(address, {"texts": [secret, "공"]}, **header, **{"X-Request-Id": given})
    requests.get(f"{address}/{secret}", timeout=30)
    written = log.read_text("utf-8")
    (line,) = [line for line in written.splitlines() if given in line]
    entry = json.loads(line)
    assert (entry["severity"], entry["texts"]) == ("INFO", 2)
    assert entry["logging.googleapis.com/trace"] == f"projects/house/traces/{TRACE}"
    assert re.fullmatch(r"\d+\.\d{6}s", entry["httpRequest"]["latency"])
    assert (entry["httpRequest"]["requestMethod"], entry["httpRequest"]["status"]) == ("POST", 200)
    assert secret not in written
    assert secret.split()[1] not in written


def test_a_sane_request_id_is_kept_and_another_replaced(address):
    ids = ["order-17", "x" * 200, "a b", ""]
    kept = [requests.get(f"{address}/health", headers={"X-Request-Id": i}, timeout=30) for i in ids]
    found = [response.headers["X-Request-Id"] for response in kept]
    assert found[0] == "order-17"
    assert all(re.fullmatch(r"[0-9a-f]{32}", new) for new in found[1:])


def test_a_method_that_the_framework_has_no_route_for_is_a_problem_like_the_others(address):
    response = requests.request("TRACE", address, timeout=30)
    assert (response.status_code, response.headers["Content-Type"]) == (405, "application/problem+json")
    assert response.headers["Allow"] == "GET, POST, HEAD, OPTIONS"
    assert "X-Request-Id" in response.headers


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Ask the function in this process, with the default limits and a release in a folder."""
    for name in ("handlers", "level", "propagate"):  # of the log, to be as before afterwards
        monkeypatch.setattr(app._log, name, getattr(app._log, name))
    stored = write_known(tmp_path / "new")
    release = json.loads(stored)["release"]
    (tmp_path / "releases").mkdir()
    (tmp_path / "new").rename(tmp_path / "releases" / release)
    pointer = {"schema": 1, "release": release, "manifest_sha256": sha256(stored).hexdigest(), "sequence": 1}
    (tmp_path / "current.json").write_text(json.dumps(pointer))
    settings = {"MODEL_URI": f"file://{tmp_path}", "CACHE_DIR": str(tmp_path / "cache")}
    needs = app.create_function({**settings, "PRELOAD": "0", "GOOGLE_CLOUD_PROJECT": "house"})

    def ask(body, **headers):
        return needs(Request(create_environ(method="POST", json=body, headers=headers)))

    return ask


def test_more_windows_than_a_request_may_have_are_refused_together(here):
    answer = here({"texts": ["가" * 2000] * 64})
    assert answer.status_code == 422
    assert answer.json["detail"] == (
        "texts: expected at most 256 windows of 64 tokens in all, found 512; split the request"
    )


def fail(*_):
    raise ZeroDivisionError("비밀")


def test_a_defect_is_a_problem_with_an_id(here, monkeypatch):
    monkeypatch.setattr(app, "_answer", fail)
    answer = here({"text": "안"})
    assert (answer.status_code, answer.json["detail"]) == (500, "the function failed; the log says why")
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_the_log_says_where_a_defect_is_and_not_what_it_says_which_may_hold_a_text():
    try:
        fail()
    except ZeroDivisionError:
        record = logging.LogRecord("needs", logging.ERROR, "", 0, "defect", (), sys.exc_info())
    record.headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    entry = json.loads(app._JsonLines("house").format(record))
    assert (entry["severity"], entry["logging.googleapis.com/trace"]) == ("ERROR", f"projects/house/traces/{TRACE}")
    first, *_, last = entry["message"].splitlines()
    assert (first, last, "in fail" in entry["message"]) == ("defect", "ZeroDivisionError", True)


def test_a_setting_that_cannot_be_used_ends_the_start_with_a_plain_message():
    with pytest.raises(SystemExit, match="MODEL_URI: expected gs://bucket/prefix"):
        app.create_function({"MODEL_URI": "s3://x"})
