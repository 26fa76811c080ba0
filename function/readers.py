"""Where releases lie: a MODEL_URI in, a way to read its objects out.

On Cloud Run (K_SERVICE is set there) and against an emulator
(STORAGE_EMULATOR_HOST) a bucket is read over Cloud Storage's JSON API with the
standard library alone: importing google-cloud-storage takes 0.3 s and 49 MB,
more than ONNX Runtime. Anywhere else google-cloud-storage reads it, with
whatever credentials the machine has. The environment chooses, once; neither
stands in for the other when something fails.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from function.errors import ReleaseUnavailable

TIMEOUT_SECONDS = 5.0
"""To connect, and between two parts of an answer."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
TRANSIENT = {408, 429, 500, 502, 503, 504}
"""https://cloud.google.com/storage/docs/retry-strategy#retryable"""
CHUNK_BYTES = 1 << 20
TOKEN_MARGIN_SECONDS = 60
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"

Read = Callable[[str, float], bytes]
"""(object name under MODEL_URI, deadline on time.monotonic) to its bytes; ReleaseUnavailable where it fails."""


def open_reader(uri: str, environ: Mapping[str, str] = os.environ) -> Read:
    """How to read the objects under a MODEL_URI. Connects to nothing yet."""
    scheme, _, rest = uri.rstrip("/").partition("://")
    if scheme == "file":
        return _FolderReader(Path(unquote(urlsplit(uri).path)))
    bucket, _, prefix = rest.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    if any(environ.get(name) for name in ("STORAGE_EMULATOR_HOST", "K_SERVICE", "GCE_METADATA_HOST")):
        return JsonApiReader(bucket, prefix, environ)
    return ClientReader(bucket, prefix)


def _unavailable(name: str, found: object, remedy: str) -> ReleaseUnavailable:
    return ReleaseUnavailable(f"{name}: expected the object, found {found}; {remedy}")


class _FolderReader:
    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, name: str, deadline: float) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise _unavailable(name, error, "check MODEL_URI") from error


class ClientReader:
    """google-cloud-storage, with the credentials that it finds."""

    def __init__(self, bucket: str, prefix: str):
        self._bucket, self._prefix = bucket, prefix
        self._client: Any = None

    def __call__(self, name: str, deadline: float) -> bytes:
        """One object's content; see Read."""
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
        from requests import RequestException

        try:
            self._client = self._client or storage.Client(project="_")
            blob = self._client.bucket(self._bucket).blob(self._prefix + name)
            patience = DEFAULT_RETRY.with_timeout(max(0.1, deadline - time.monotonic()))
            content: bytes = blob.download_as_bytes(timeout=TIMEOUT_SECONDS, retry=patience, checksum=None)
            return content
        except (GoogleAPIError, GoogleAuthError, RequestException, OSError) as error:
            place = f"gs://{self._bucket}/{self._prefix}{name}"
            raise _unavailable(place, error, "check MODEL_URI and the right to read it") from error


class JsonApiReader:
    """Objects over `storage/v1/b/<bucket>/o/<object>?alt=media`; connections are kept and may be used at once.

    https://cloud.google.com/storage/docs/json_api/v1/objects/get
    """

    def __init__(self, bucket: str, prefix: str, environ: Mapping[str, str]):
        emulator = environ.get("STORAGE_EMULATOR_HOST", "")
        if emulator and "://" not in emulator:
            emulator = f"http://{emulator}"
        self._address = urlsplit(emulator or "https://storage.googleapis.com")
        self._place = f"gs://{bucket}/{prefix}"
        self._path = f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(prefix, safe='')}"
        self._tokens = None if emulator else _MetadataTokens(environ)
        self._idle: list[HTTPConnection] = []

    def __call__(self, name: str, deadline: float) -> bytes:
        """One object's content; see Read. What is transient is tried again, with growing pauses."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                status, content = self._get(name, deadline)
                if status == 200:
                    return content
                found: object = f"status {status}: {content[:200].decode(errors='replace').strip()}"
            except (OSError, HTTPException) as error:
                status, found = 503, repr(error)
            if status == 401 and self._tokens:
                self._tokens.forget()
            if status not in TRANSIENT or time.monotonic() + pause >= deadline:
                raise _unavailable(self._place + name, found, "check MODEL_URI and the function's right to read it")
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _get(self, name: str, deadline: float) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self._tokens.get(deadline)}"} if self._tokens else {}
        idle = bool(self._idle)
        connection = self._idle.pop() if idle else self._connect()
        try:
            answer = _get(connection, f"{self._path}{quote(name, safe='')}?alt=media", headers, deadline)
        except (ConnectionError, HTTPException):
            connection.close()
            if idle:
                return self._get(name, deadline)  # the server had closed it meanwhile, as it may
            raise
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        return kind(self._address.hostname or "", self._address.port, timeout=TIMEOUT_SECONDS)


class _MetadataTokens:
    """Access tokens of the service account that the function runs as, kept until a minute before they end.

    https://cloud.google.com/run/docs/securing/service-identity#access_tokens
    """

    def __init__(self, environ: Mapping[str, str]):
        self._host = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        self._lock = threading.Lock()
        self._token, self._ends = "", 0.0

    def get(self, deadline: float) -> str:
        """A token that is good for a minute at least. Raises OSError where none is given."""
        with self._lock:
            if time.monotonic() >= self._ends:
                connection = HTTPConnection(self._host, timeout=TIMEOUT_SECONDS)
                try:
                    status, content = _get(connection, TOKEN_PATH, {"Metadata-Flavor": "Google"}, deadline)
                finally:
                    connection.close()
                if status != 200:
                    raise OSError(f"metadata server {self._host}: expected a token, found status {status}")
                self._keep(content)
            return self._token

    def _keep(self, content: bytes) -> None:
        try:
            given = json.loads(content)
            self._token = str(given["access_token"])
            self._ends = time.monotonic() + float(given["expires_in"]) - TOKEN_MARGIN_SECONDS
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"metadata server {self._host}: expected a token, found {error!r}") from error

    def forget(self) -> None:
        """Ask for another next time: this one was refused."""
        self._ends = 0.0


def _get(connection: HTTPConnection, path: str, headers: Mapping[str, str], deadline: float) -> tuple[int, bytes]:
    """Status and whole body of one GET. Raises OSError or HTTPException, past the deadline TimeoutError."""
    connection.timeout = max(0.01, min(TIMEOUT_SECONDS, deadline - time.monotonic()))
    if connection.sock:
        connection.sock.settimeout(connection.timeout)
    connection.request("GET", path, headers=dict(headers))
    response = connection.getresponse()
    parts = []
    while part := response.read1(CHUNK_BYTES):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer went on past LOAD_SECONDS")
    if response.length:  # read1 does not say that the connection was cut
        raise ConnectionError(f"the answer ended {response.length} bytes short")
    response.read()  # nor does it end the answer, before which the connection takes no other request
    return response.status, b"".join(parts)
