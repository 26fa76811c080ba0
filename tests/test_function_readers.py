"""Both ways to read a bucket, against a server on loopback that fails in every way a bucket can."""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from function.errors import ReleaseUnavailable
from function.readers import ClientReader, JsonApiReader, open_reader

CONTENT = b"whole" * 1000


class Faulty(BaseHTTPRequestHandler):
    """Answers one GET after the other with the next of `faults`, and the object once there are none left."""

    protocol_version = "HTTP/1.1"
    faults: list[object]
    seen: list[tuple[str, dict]]

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        fault = self.faults.pop(0) if self.faults else 200
        if fault == "silence":
            time.sleep(1.5)
        if fault in ("silence", "cut before"):
            self.close_connection = True
            return
        if fault == "no token":
            self._send(200, b"{}")
            return
        if "computeMetadata" in self.path and fault != 503:
            self._send(200, b'{"access_token": "abc", "expires_in": 3600}')
            return
        if fault == "cut half-way":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100])
            self.close_connection = True
            return
        self._send(fault, CONTENT if fault == 200 else b'{"error": {}}')

    def _send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def run_faulty(*faults) -> Iterator[tuple[str, list]]:
    handler = type("Handler", (Faulty,), {"faults": list(faults), "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", handler.seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def make_json_reader(host: str, environ: dict[str, str] | None = None) -> Iterator[JsonApiReader]:
    reader = JsonApiReader("b", "p/", environ or {"STORAGE_EMULATOR_HOST": host})
    yield reader
    for connection in reader._idle:
        connection.close()


@contextmanager
def make_client_reader(host: str) -> Iterator[ClientReader]:
    reader = ClientReader("b", "p/")
    options = {"api_endpoint": f"http://{host}"}
    with storage.Client(project="_", credentials=AnonymousCredentials(), client_options=options) as reader._client:
        yield reader
    gc.collect()  # it leaves the sockets of cut connections to the garbage collector


@pytest.fixture(autouse=True)
def _no_bucket_traces(monkeypatch):
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


CLIENT = pytest.param(
    make_client_reader, marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
)
READERS = pytest.mark.parametrize("make", [make_json_reader, CLIENT], ids=["json", "client"])


@READERS
@pytest.mark.parametrize("faults", [[], [503], [429, 500], ["cut before"], ["cut half-way"]])
def test_what_is_transient_is_tried_again(make, faults):
    with run_faulty(*faults) as (host, seen), make(host) as read:
        assert read("a/b", time.monotonic() + 20) == CONTENT
    assert len(seen) == len(faults) + 1
    assert seen[0][0].startswith(("/storage/v1/b/b/o/p%2Fa%2Fb?alt=media", "/download/storage/v1/b/b/o/p%2Fa%2Fb?alt"))


def test_an_idle_connection_that_was_closed_costs_no_pause(monkeypatch):
    with run_faulty(200, "cut before") as (host, seen), make_json_reader(host) as read:
        read("a", time.monotonic() + 20)
        monkeypatch.setattr("function.readers.time.sleep", lambda seconds: pytest.fail(f"paused {seconds} s"))
        assert read("a", time.monotonic() + 20) == CONTENT
    assert len(seen) == 3


@READERS
@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_not_transient_fails_at_once(make, status):
    problem = pytest.raises(ReleaseUnavailable, match=f"gs://b/p/a: expected.*({status}|refreshed)")
    with run_faulty(status) as (host, seen), make(host) as read, problem:
        read("a", time.monotonic() + 20)
    assert len(seen) == 1


@pytest.mark.parametrize("fault", [503, "silence"])
def test_the_deadline_ends_the_attempts(fault):
    started = time.monotonic()
    with run_faulty(*[fault] * 50) as (host, _), make_json_reader(host) as read, pytest.raises(ReleaseUnavailable):
        read("a", started + 1)
    assert time.monotonic() - started < 4


def test_a_port_that_nothing_listens_on_is_unavailable():
    with run_faulty() as (host, _):
        pass
    with make_json_reader(host) as read, pytest.raises(ReleaseUnavailable, match="refused"):
        read("a", time.monotonic() + 0.5)


def test_one_connection_serves_one_read_after_another():
    with run_faulty() as (host, _), make_json_reader(host) as reader:
        reader("a", time.monotonic() + 5)
        (first,) = reader._idle
        reader("b", time.monotonic() + 5)
        assert reader._idle == [first]


def test_on_cloud_run_the_metadata_server_gives_the_token_once():
    with (
        run_faulty() as (host, seen),
        make_json_reader(host, {"K_SERVICE": "needs", "GCE_METADATA_HOST": host}) as reader,
    ):
        reader._address = reader._address._replace(scheme="http", netloc=host)
        reader("a", time.monotonic() + 5)
        reader("b", time.monotonic() + 5)
    assert [path.partition("?")[0] for path, _ in seen] == [
        "/computeMetadata/v1/instance/service-accounts/default/token",
        "/storage/v1/b/b/o/p%2Fa",
        "/storage/v1/b/b/o/p%2Fb",
    ]
    assert seen[0][1]["Metadata-Flavor"] == "Google"
    assert [headers.get("Authorization") for _, headers in seen] == [None, "Bearer abc", "Bearer abc"]


def test_a_refused_token_is_asked_for_anew_and_a_failing_metadata_server_tried_again():
    with (
        run_faulty(200, 401, 200, 200, 503) as (host, seen),
        make_json_reader(host, {"K_SERVICE": "needs", "GCE_METADATA_HOST": host}) as reader,
    ):
        reader._address = reader._address._replace(scheme="http", netloc=host)
        with pytest.raises(ReleaseUnavailable, match="401"):
            reader("a", time.monotonic() + 5)
        reader("b", time.monotonic() + 5)
        reader._tokens.forget()
        reader("c", time.monotonic() + 5)
    asked = [path.partition("?")[0].removeprefix("/storage/v1/b/b/o/p%2F") for path, _ in seen]
    token = "/computeMetadata/v1/instance/service-accounts/default/token"
    assert asked == [token, "a", token, "b", token, token, "c"]


def test_a_metadata_server_without_a_token_is_said():
    with run_faulty(*["no token"] * 9) as (host, _), pytest.raises(ReleaseUnavailable, match="metadata server"):
        JsonApiReader("b", "", {"GCE_METADATA_HOST": host})("a", time.monotonic() + 1)


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({"STORAGE_EMULATOR_HOST": "localhost:1"}, JsonApiReader),
        ({"K_SERVICE": "needs"}, JsonApiReader),
        ({"GCE_METADATA_HOST": "localhost:1"}, JsonApiReader),
        ({}, ClientReader),
    ],
)
def test_the_environment_chooses_the_reader(environ, kind):
    assert type(open_reader("gs://b/p", environ)) is kind
