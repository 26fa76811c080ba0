"""Refresh and faults: a real function process before a bucket that changes and fails."""

import hashlib
import http.client
import json
import threading
import time
import uuid

import pytest
import requests
from known import release_known, score_known, write_known, write_manifest
from proxy import run_proxy

from build import local
from build.publish import Bucket, promote, publish
from function.manifest import canonical, name_release

pytestmark = pytest.mark.alone

EAGER = {"REFRESH_SECONDS": "0.05", "LOAD_SECONDS": "1", "THREADS": "16", "MAX_QUEUE": "8"}
TEXT = "안 가"


class Place:
    """A bucket's prefix with its proxy, and a function that serves from there."""

    def __init__(self, uri, proxy, address, log, folder):
        self.uri, self.proxy, self.address, self.log, self.folder = uri, proxy, address, log, folder
        self.bucket = Bucket(uri)

    def release(self, strength):
        return release_known(self.uri, self.folder / str(strength), strength)

    def ask(self):
        return requests.post(self.address, json={"text": TEXT}, timeout=30).json()

    def ready(self):
        return requests.get(f"{self.address}/ready", timeout=30).json()

    def overwrite(self, name, content):
        self.bucket._bucket.blob(self.bucket._prefix + name).upload_from_string(content)

    def delete(self, name):
        self.bucket._bucket.blob(self.bucket._prefix + name).delete()

    def read(self, name):
        return self.bucket.read(name)[0]


@pytest.fixture(scope="module")
def place(bucket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    uri = f"gs://{local.BUCKET}/{uuid.uuid4().hex}"
    log = folder / "log"
    with run_proxy(bucket) as proxy, log.open("w") as stderr:
        release_known(uri, folder / "1.0", 1.0)
        settings = {**EAGER, "MODEL_URI": uri, "CACHE_DIR": str(folder / "cache")}
        with local.run_function(proxy.address, environment=settings, stderr=stderr) as address:
            place = Place(uri, proxy, address, log, folder)
            assert place.ready()["ready"]
            yield place


def wait_until(holds, seconds=10):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def test_a_newer_release_takes_over_and_the_older_ones_files_go(place):
    before = place.ready()
    release = place.release(0.5)
    after = wait_until(lambda: (ready := place.ready())["release"] == release and ready)
    assert (after["sequence"], after["refused"]) == (before["sequence"] + 1, None)
    assert after["checked"] > before["checked"]
    assert place.ask()["scores"] == score_known(TEXT, 0.5)
    files = json.loads(place.read(f"releases/{release}/manifest.json"))["files"]
    needed = {files[name]["sha256"] for name in ("model.onnx", "tokenizer.json")}
    wait_until(lambda: {path.name for path in (place.folder / "cache").iterdir()} == needed)


def test_every_answer_under_load_is_that_of_one_release(place):
    """Requests go on while releases of two strengths take turns."""
    known = {place.release(strength): score_known(TEXT, strength) for strength in (2.0, 3.0)}
    wait_until(lambda: place.ready()["release"] in known)
    wrong, seen, stop = [], set(), threading.Event()

    def ask_on():
        while not stop.is_set():
            answer = place.ask()
            seen.add(answer.get("release"))
            if answer.get("scores") != known.get(answer.get("release"), 0):
                wrong.append(answer)

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            for release in known:
                promote(place.bucket, release)
                wait_until(lambda release=release: place.ready()["release"] == release)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert seen == set(known)


def tear_pointer(place, pointer):
    place.overwrite("current.json", place.read("current.json")[:40])


def remove_pointer(place, pointer):
    place.delete("current.json")


def point_nowhere(place, pointer):
    change_pointer(place, pointer, release="20260101T000000Z-0123456789ab", sequence=pointer["sequence"] + 1)


def send_back(place, pointer):
    change_pointer(place, pointer, sequence=pointer["sequence"] - 1)


def keep_sequence(place, pointer):
    change_pointer(place, pointer, manifest_sha256="0" * 64)


def change_pointer(place, pointer, **members):
    place.overwrite("current.json", canonical({**pointer, **members}))


def release_broken(place, name, change):
    """A published and promoted release of which one object is then changed."""
    strength = 5 + int(uuid.uuid4().hex[:6], 16) / 1e6  # another model than any before, so that none is cached
    folder = place.folder / f"broken-{strength}"
    release = publish(place.bucket, folder, write_known(folder, strength))
    stored = f"releases/{release}/{name}"
    place.overwrite(stored, change(place.read(stored)))
    promote(place.bucket, release)


def drop_manifest(place, pointer):
    folder = place.folder / f"dropped-{uuid.uuid4().hex}"
    release = publish(place.bucket, folder, write_known(folder, 7.5))
    promote(place.bucket, release)
    place.delete(f"releases/{release}/manifest.json")


def tamper_manifest(place, pointer):
    folder = place.folder / f"tampered-{uuid.uuid4().hex}"
    release = publish(place.bucket, folder, write_known(folder, 7.0))
    good = place.read(f"releases/{release}/manifest.json")
    promote(place.bucket, release)
    place.overwrite(f"releases/{release}/manifest.json", good.replace(b'"threshold":0.5', b'"threshold":0.1'))


def raise_schema(place, pointer):
    folder = place.folder / f"schema-{uuid.uuid4().hex}"
    document = json.loads(write_known(folder, 8.0)) | {"schema": 2}
    document["release"] = name_release(document)
    place.overwrite(f"releases/{document['release']}/manifest.json", canonical(document))
    digest = hashlib.sha256(canonical(document)).hexdigest()
    change_pointer(
        place, pointer, release=document["release"], manifest_sha256=digest, sequence=pointer["sequence"] + 1
    )


def truncate_model(place, pointer):
    release_broken(place, "model.onnx", lambda content: content[:-1])


def flip_byte(place, pointer):
    release_broken(place, "model.onnx", lambda content: bytes([content[0] ^ 1]) + content[1:])


def swap_tokenizer(place, pointer):
    """Its own tokenizer is another than that of the release which serves, and which lies in its place."""
    folder = place.folder / f"swapped-{uuid.uuid4().hex}"
    write_known(folder, 6.0)
    served = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(served + b"\n")
    release = publish(place.bucket, folder, write_manifest(folder))
    place.overwrite(f"releases/{release}/tokenizer.json", served)
    promote(place.bucket, release)


def name_garbage(place, pointer):
    """A release whose hashes are right and whose model is none."""
    folder = place.folder / f"garbage-{uuid.uuid4().hex}"
    write_known(folder, 9.0)
    (folder / "model.onnx").write_bytes(b"no model")
    promote(place.bucket, publish(place.bucket, folder, write_manifest(folder)))


CONTENT_FAULTS = {
    tear_pointer: "current.json",
    point_nowhere: "manifest.json",
    send_back: "expected a sequence above",
    keep_sequence: "expected a sequence above",
    drop_manifest: "manifest.json",
    tamper_manifest: "manifest.json: expected sha256",
    raise_schema: "schema: expected 1, found 2",
    truncate_model: "model.onnx: expected",
    flip_byte: "model.onnx: expected",
    swap_tokenizer: "tokenizer.json: expected",
    name_garbage: "expected a model that runs here",
    remove_pointer: "current.json: expected the object",
}


@pytest.mark.parametrize("break_it", CONTENT_FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_release_leaves_the_old_one_serving(place, break_it):
    before, pointer = place.ask(), place.read("current.json")
    break_it(place, json.loads(pointer))
    refused = wait_until(lambda: place.ready()["refused"])
    assert CONTENT_FAULTS[break_it] in refused
    assert place.ask() == before
    said = [line for line in place.log.read_text("utf-8").splitlines() if refused[:60] in json.loads(line)["message"]]
    assert json.loads(said[-1])["severity"] == "ERROR"
    place.overwrite("current.json", pointer)
    wait_until(lambda: place.ready()["refused"] is None)
    assert place.ask() == before


def test_a_refused_release_is_logged_once_and_not_fetched_again(place):
    pointer = place.read("current.json")

    def count_errors():
        return place.log.read_text("utf-8").count('"severity": "ERROR"')

    before, asked = count_errors(), len(place.proxy.begun)
    truncate_model(place, json.loads(pointer))
    wait_until(lambda: place.ready()["refused"])
    for _ in range(3):
        checked = place.ready()["checked"]
        wait_until(lambda checked=checked: place.ready()["checked"] > checked)
    assert count_errors() == before + 1
    assert sum("model.onnx" in path for _, _, path in place.proxy.begun[asked:]) == 1
    place.overwrite("current.json", pointer)
    wait_until(lambda: place.ready()["refused"] is None)


@pytest.mark.parametrize("fault", [403, 404, 429, 500, "slow", "silence", "cut"])
def test_a_bucket_that_fails_leaves_the_old_release_serving_and_is_tried_again(place, fault):
    before = place.ask()
    if fault == "slow":
        place.proxy.delay_seconds = 1.5
    else:
        place.proxy.fault = fault
    try:
        refused = wait_until(lambda: place.ready()["refused"])
        assert "current.json: expected the object" in refused
        assert place.ask() == before
    finally:
        place.proxy.fault, place.proxy.delay_seconds = None, 0.0
    wait_until(lambda: place.ready()["refused"] is None)
    assert place.ask() == before


def test_a_refused_release_keeps_its_reason_when_the_bucket_fails_meanwhile(place):
    pointer = place.read("current.json")
    send_back(place, json.loads(pointer))
    refused = wait_until(lambda: place.ready()["refused"])
    logged = place.log.read_text("utf-8").count("expected a sequence above")
    place.proxy.fault = 500
    wait_until(lambda: "status 500" in place.ready()["refused"])
    place.proxy.fault = None
    wait_until(lambda: place.ready()["refused"] == refused)
    assert place.log.read_text("utf-8").count("expected a sequence above") == logged
    place.overwrite("current.json", pointer)
    wait_until(lambda: place.ready()["refused"] is None)


def test_a_pinned_release_stays_and_reads_no_pointer(place, tmp_path):
    pinned = place.ready()["release"]
    settings = {**EAGER, "MODEL_URI": place.uri, "RELEASE": pinned, "CACHE_DIR": str(tmp_path)}
    with run_proxy(place.proxy.target) as proxy, local.run_function(proxy.address, environment=settings) as address:
        ready = requests.get(f"{address}/ready", timeout=30).json()
        assert (ready["release"], ready["sequence"]) == (pinned, None)
        place.release(11.0)
        time.sleep(0.2)
        assert requests.get(f"{address}/ready", timeout=30).json()["release"] == pinned
        assert not [path for _, _, path in proxy.begun if "current.json" in path]


def test_two_workers_may_start_at_once_on_one_cache(place, tmp_path):
    settings = {"MODEL_URI": place.uri, "CACHE_DIR": str(tmp_path / "cache"), "WORKERS": "2"}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".new-killed").write_bytes(b"half")
    with local.run_function(place.proxy.address, environment=settings) as address:
        answers = [requests.post(address, json={"text": TEXT}, timeout=30).json() for _ in range(20)]
    assert answers == [answers[0]] * 20


@pytest.fixture
def busy(bucket, tmp_path):
    """A function that infers one window at a time, each some 30 ms long, with room for two waiting requests."""
    uri = f"gs://{local.BUCKET}/{uuid.uuid4().hex}"
    release_known(uri, tmp_path / "release", work=60)
    settings = {"MODEL_URI": uri, "CACHE_DIR": str(tmp_path / "cache"), "INFERENCE_THREADS": "1", "MAX_CONCURRENT": "1"}
    with local.run_function(bucket, environment={**settings, "THREADS": "16"}) as address:
        requests.get(f"{address}/ready", timeout=30)
        yield address


def test_a_short_request_gets_between_a_long_ones_windows(busy):
    times = {}

    def ask(name, body):
        began = time.monotonic()
        assert requests.post(busy, json=body, timeout=60).status_code == 200
        times[name] = time.monotonic() - began

    long = threading.Thread(target=ask, args=("long", {"texts": ["가 " * 200] * 10}))
    long.start()
    time.sleep(0.2)
    ask("short", {"text": "가"})
    long.join()
    assert times["short"] < times["long"] / 4


def test_beyond_the_queue_a_request_is_refused_at_once(busy):
    body = {"texts": ["가 " * 200] * 10}
    waiting = [threading.Thread(target=requests.post, args=(busy,), kwargs={"json": body}) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    native = requests.post(busy, json={"text": "가"}, timeout=30)
    call = requests.post(busy, json={"calls": [["가"]]}, timeout=30)
    took = time.monotonic() - began
    for thread in waiting:
        thread.join()
    assert (native.status_code, native.headers["Retry-After"]) == (503, "1")
    assert native.headers["Content-Type"] == "application/problem+json"
    assert (call.status_code, call.headers["Retry-After"]) == (503, "1")
    assert "queue" in call.json()["errorMessage"]
    assert took < 1


def test_sigterm_lets_a_request_end(place, tmp_path):
    settings = {"MODEL_URI": place.uri, "CACHE_DIR": str(tmp_path)}
    body = json.dumps({"text": TEXT}).encode()
    with local.run_function(place.proxy.address, environment=settings) as address:
        expected = requests.post(address, json={"text": TEXT}, timeout=30).json()
        host, port = address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:5])
        time.sleep(0.3)
        threading.Timer(0.5, connection.send, [body[5:]]).start()
    response = connection.getresponse()  # the process was told to stop before it had the whole body
    assert json.load(response) == expected
    connection.close()


@pytest.mark.slow
def test_sigterm_ends_what_would_take_too_long(place, tmp_path):
    limits = {"MAX_CALLS": "1000000", "MAX_BODY_BYTES": "10000000"}
    settings = {"MODEL_URI": place.uri, "CACHE_DIR": str(tmp_path), **limits}
    answers = []
    with local.run_function(place.proxy.address, environment=settings) as address:
        requests.get(f"{address}/ready", timeout=30)
        asking = threading.Thread(
            target=lambda: answers.append(requests.post(address, json={"calls": [["가"]] * 400_000}, timeout=60))
        )
        asking.start()
        time.sleep(2)
        began = time.monotonic()
    took = time.monotonic() - began
    asking.join()
    assert took < 10
    assert [(answer.status_code, answer.headers["Retry-After"]) for answer in answers] == [(503, "1")]
    assert "before it stops" in answers[0].json()["errorMessage"]
