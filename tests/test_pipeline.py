"""The whole way with a tiny encoder: cloudbuild.yaml's own steps, the embedded bucket, the function over HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from build import local

pytestmark = pytest.mark.slow

PROBLEM = "application/problem+json"
LEAST_SECONDS = 0.05
"""What bash alone takes less than, and Python more."""


@pytest.fixture(scope="module")
def address(released, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    with local.run_function(released, environment={"CACHE_DIR": cache, "MAX_TEXTS": "3"}) as address:
        yield address


def test_a_text_gets_its_scores_and_release(address):
    response = requests.post(address, json={"text": "우리 팀 좋 다"}, timeout=30)
    answer = response.json()
    assert response.status_code == 200
    assert set(answer) == {"needs", "scores", "truncated", "release"}
    assert list(answer["scores"]) == ["소속감", "즐거움"]
    assert all(0 <= p <= 1 for p in answer["scores"].values())
    assert {"X-Request-Id", "Server-Timing", "X-Content-Type-Options"} <= set(response.headers)


def test_a_text_scores_the_same_alone_and_in_any_request(address):
    texts = ["우리 팀", "혼자 싫 다 정말 정말 정말", "좋"]

    def ask(body, member):
        return [result["scores"] for result in requests.post(address, json=body, timeout=30).json()[member]]

    alone = [requests.post(address, json={"text": text}, timeout=30).json()["scores"] for text in texts]
    assert ask({"texts": texts}, "results") == alone
    assert ask({"instances": texts}, "predictions") == alone
    assert ask({"calls": [[text] for text in texts]}, "replies") == alone


def test_a_decomposed_text_scores_as_the_composed_one(address):
    forms = ("\uac00\ub098", "\u1100\u1161\u1102\u1161")
    first, second = (requests.post(address, json={"text": form}, timeout=30).json() for form in forms)
    assert first == second


def test_a_threshold_replaces_the_manifests(address):
    body = {"text": "우리 팀", "threshold": 0}
    assert len(requests.post(address, json=body, timeout=30).json()["needs"]) == 2


def test_health_ready_release_and_description(address):
    assert requests.get(f"{address}/health", timeout=30).json() == {"status": "ok"}
    ready = requests.get(f"{address}/ready", timeout=30).json()
    assert (ready["ready"], ready["sequence"], ready["refused"]) == (True, 1, None)
    manifest = requests.get(f"{address}/release", timeout=30).json()
    assert manifest["release"] == ready["release"]
    assert requests.get(address, timeout=30).json()["release"] == ready["release"]
    assert requests.head(f"{address}/ready", timeout=30).text == ""
    assert requests.options(address, timeout=30).headers["Allow"] == "GET, POST, HEAD, OPTIONS"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b'{"text": NaN}', 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"text": "a", "texts": ["a"]}', 422),
        (b'{"text": 1}', 422),
        (b'{"text": " "}', 422),
        (b'{"text": "\\ud800"}', 422),
        (b'{"texts": []}', 422),
        (b'{"texts": ["a", "b", "c", "d"]}', 422),
        (b'{"text": "a", "threshold": 2}', 422),
        (json.dumps({"text": "가" * 5001}).encode(), 422),
        (b"x" * 1_048_577, 413),
    ],
)
def test_bad_input_gets_a_problem(address, body, status):
    response = requests.post(address, data=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert (response.status_code, response.headers["Content-Type"]) == (status, PROBLEM)
    assert response.json()["status"] == status
    assert response.json()["detail"].count("expected") >= 1


def test_wrong_path_method_and_media_type_get_a_problem(address):
    found = [
        requests.get(f"{address}/nowhere", timeout=30),
        requests.delete(address, timeout=30),
        requests.request("TRACE", address, timeout=30),
        requests.post(address, data="{}", headers={"Content-Type": "text/plain"}, timeout=30),
        requests.post(address, data="{}", headers={"Content-Type": "application/json; charset=euc-kr"}, timeout=30),
    ]
    assert [response.status_code for response in found] == [404, 405, 405, 415, 415]
    assert {response.headers["Content-Type"] for response in found} == {PROBLEM}
    assert found[1].headers["Allow"] == "GET, POST, HEAD, OPTIONS"


def test_without_a_release_every_score_is_refused_with_retry_after(released, tmp_path):
    environment = {"MODEL_URI": f"gs://{local.BUCKET}/nothing", "CACHE_DIR": str(tmp_path), "LOAD_SECONDS": "2"}
    with local.run_function(released, environment=environment) as address:
        response = requests.post(address, json={"text": "좋 다"}, timeout=30)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert requests.get(f"{address}/health", timeout=30).status_code == 200
        assert requests.get(f"{address}/ready", timeout=30).status_code == 503


def test_a_bad_setting_stops_the_start(released):
    framework = Path(".venv/bin/functions-framework").resolve()
    command = [str(framework), "--target", "needs", "--host", "127.0.0.1", "--port", str(local.free_port())]
    done = subprocess.run(
        command,
        env={"MODEL_URI": "gs://b/p", "MAX_TEXTS": "many", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "MAX_TEXTS: expected a number of at least 1, found 'many'" in done.stderr


def test_an_unknown_substitution_is_refused():
    with pytest.raises(local.LocalError, match=r"expected one of .*_BASE.*found _BASS"):
        local.read_pipeline(local.PIPELINE, {"_BASS": "x"})


def test_substitutions_are_replaced_as_cloud_build_does():
    assert local.substitute("$A-${A}-$$A-$B", {"A": "1"}) == "1-1-$A-$B"


def test_a_failing_step_ends_the_build():
    with pytest.raises(local.LocalError, match="step second: expected exit code 0, found 3"):
        local.run_pipeline([{"id": "second", "script": "exit 3"}, {"id": "third", "script": "exit 4"}], {}, {})


def test_killing_any_step_half_way_leaves_the_bucket_serving_what_it_served(pipeline, released, step_seconds, tmp_path):
    """A build with another seed: each step is killed with its children, looked at, and then done to its end.

    Only `publish` and `promote` may touch the bucket; where it is as it was, no function could answer otherwise.
    """
    steps, values = pipeline
    values = {**values, "_SEED": "2"}
    environment = {**os.environ, **values, "STORAGE_EMULATOR_HOST": released}
    before, served = ask_fresh_function(released, tmp_path / "before"), {}
    for step in steps:
        if step_seconds[step["id"]] < LEAST_SECONDS:  # bash alone: it has nothing to leave half done
            local.run_pipeline([step], values, {"STORAGE_EMULATOR_HOST": released})
            continue
        held, seconds = list_objects(released), step_seconds[step["id"]] / 2
        while not kill_after(seconds, step, environment):  # it was over already, quicker than the first time
            seconds /= 2
        if step["id"] in ("publish", "promote"):
            served[step["id"]] = ask_fresh_function(released, tmp_path / step["id"])
        else:
            assert list_objects(released) == held, step["id"]
        local.run_pipeline([step], values, {"STORAGE_EMULATOR_HOST": released})
    after = ask_fresh_function(released, tmp_path / "after")
    assert after[0] != before[0]
    assert after[1] == before[1] + 1
    assert served["publish"] == before
    assert served["promote"] in (before, after)  # its one write is its last act: done or not, nothing between


def kill_after(seconds, step, environment):
    running = subprocess.Popen(["bash", "-c", step["script"]], cwd=step["dir"], env=environment, start_new_session=True)
    time.sleep(seconds)
    os.killpg(running.pid, signal.SIGKILL)
    return running.wait() == -signal.SIGKILL


def list_objects(bucket):
    found = requests.get(f"{bucket}/storage/v1/b/{local.BUCKET}/o", timeout=30).json()["items"]
    return {(item["name"], item["generation"]) for item in found}


def ask_fresh_function(bucket, cache):
    with local.run_function(bucket, environment={"CACHE_DIR": str(cache)}) as fresh:
        ready = requests.get(f"{fresh}/ready", timeout=30).json()
        answer = requests.post(fresh, json={"text": "우리 팀 좋 다"}, timeout=30).json()
    return ready["release"], ready["sequence"], answer


def test_the_locked_requirements_alone_serve_and_know_no_torch(released, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = ["-m", "pip", "install", "--quiet", "--require-hashes", "-r", "requirements.txt"]
    subprocess.run([str(python), *install], check=True)
    for module in ("torch", "transformers"):
        assert subprocess.run([str(python), "-c", f"import {module}"], stderr=subprocess.DEVNULL).returncode == 1
    environment = {
        "PATH": os.environ["PATH"],
        "MODEL_URI": local.MODEL_URI,
        "STORAGE_EMULATOR_HOST": released,
        "CACHE_DIR": str(tmp_path / "cache"),
    }
    port = local.free_port()
    command = [
        str(python.with_name("functions-framework")),
        "--target",
        "needs",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with local.run_server(command, f"http://127.0.0.1:{port}/health", environment) as health:
        answer = requests.post(health.removesuffix("health"), json={"text": "좋 다"}, timeout=30).json()
    assert list(answer["scores"]) == ["소속감", "즐거움"]
