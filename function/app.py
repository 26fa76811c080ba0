"""HTTP: a request in, a response out. The only file that knows status codes."""

import json
import logging
import os
import re
import sys
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from traceback import format_tb  # which logging has imported

from flask import Request, Response, current_app, has_app_context
from werkzeug.exceptions import HTTPException

from function import errors
from function.dialects import is_call, parse_query
from function.serving import Served, Serving, Timing
from function.settings import Settings, read_settings, split_origins

ROUTES = {
    "/": ("GET", "POST"),
    "/health": ("GET",),
    "/ready": ("GET",),
    "/release": ("GET",),
    "/openapi.json": ("GET",),
}
STATUS_CODES = {
    errors.NotJson: 400,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.BodyTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.InvalidInput: 422,
    errors.Overloaded: 503,
    errors.ReleaseRefused: 503,
    errors.ReleaseUnavailable: 503,
}
RETRY_AFTER_SECONDS = {errors.Overloaded: 1, errors.ReleaseRefused: 5, errors.ReleaseUnavailable: 5}
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PREFLIGHT_SECONDS = 3600
CHUNK_BYTES = 65536
_SANE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_log = logging.getLogger("needs")


@cache
def _read_page() -> tuple[str, str]:
    """The page and its policy: it may run its own script and style and ask its own server, nothing else."""
    page, own = (Path(__file__).parent / "page.html").read_text("utf-8"), {}
    for tag in ("script", "style"):
        content = page.split(f"<{tag}>")[1].split(f"</{tag}>", maxsplit=1)[0]
        own[tag] = b64encode(sha256(content.encode()).digest()).decode()
    return page, (
        f"default-src 'none'; script-src 'sha256-{own['script']}'; style-src 'sha256-{own['style']}'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def create_function(environ: Mapping[str, str]) -> Callable[[Request], Response]:
    """The function that functions-framework calls for every path and method.

    Ends the process with a plain message where a setting cannot be used.
    """
    try:
        settings = read_settings(environ)
    except errors.SettingError as error:
        raise SystemExit(str(error)) from None
    _log_to_stderr(environ.get("GOOGLE_CLOUD_PROJECT", ""))
    serving = Serving(settings)
    origins = split_origins(settings.allowed_origins)
    if settings.preload:
        # In the worker, right after gunicorn forks it. Under --debug nothing forks: the first request loads.
        os.register_at_fork(after_in_child=serving.begin_load)

    def needs(request: Request) -> Response:
        return _finish(request, origins, lambda timing: _answer(request, settings, serving, timing))

    def answer_framework_error(error: HTTPException) -> Response:
        from flask import request

        return _finish(request, origins, lambda timing: _render_framework_error(error, request.path))

    if has_app_context():  # functions-framework imports main.py inside its application's context
        current_app.register_error_handler(HTTPException, answer_framework_error)
    return needs


def _finish(request: Request, origins: list[str], answer: Callable[[Timing], Response]) -> Response:
    """The answer, or the problem that came of it, with the headers that every response carries, and its log line."""
    timing, started = Timing(), time.monotonic()
    try:
        response = answer(timing)
    except errors.NeedsError as error:
        response = _render_error(error)
    except Exception:
        _log.exception("defect", extra={"headers": request.headers})
        response = _render_problem(500, "the function failed; the log says why", {})
    given = request.headers.get("X-Request-Id", "")
    response.headers["X-Request-Id"] = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
    parts = (f"{name};dur={ms:.2f}" for name, ms in timing.milliseconds.items())
    response.headers["Server-Timing"] = ", ".join(parts)
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    if origins:
        _allow_origin(request, response, origins)
    _log_request(request, response, timing, time.monotonic() - started)
    return response


def _allow_origin(request: Request, response: Response, origins: list[str]) -> None:
    """Cross-origin resource sharing, https://fetch.spec.whatwg.org/#http-cors-protocol."""
    response.vary.add("Origin")
    if request.headers.get("Origin") not in origins:
        return
    response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
    response.headers["Access-Control-Expose-Headers"] = "Retry-After, Server-Timing, X-Request-Id"
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = response.headers.get("Allow", "")
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-Id"
        response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)


def _answer(request: Request, settings: Settings, serving: Serving, timing: Timing) -> Response:
    methods = ROUTES.get(request.path)
    if methods is None:
        _drain(request)
        raise errors.NotFound(f"path: expected one of {', '.join(ROUTES)}, found {request.path}; use one of those")
    allow = ", ".join((*methods, "HEAD", "OPTIONS"))
    if request.method == "OPTIONS":
        return Response(status=204, headers={"Allow": allow})
    if request.method not in (*methods, "HEAD"):
        _drain(request)
        raise errors.MethodNotAllowed(request.method, allow)
    if request.method == "POST":
        return _score(request, settings, serving, timing)
    return _describe(request, settings, serving, timing)


def _describe(request: Request, settings: Settings, serving: Serving, timing: Timing) -> Response:
    if request.path == "/health":
        return _render({"status": "ok"})
    if request.path == "/openapi.json":
        from function.openapi import describe_api

        return _render(describe_api(settings))
    if request.path == "/" and request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return _render_page()
    served = serving.served(timing)
    if request.path == "/ready":
        return _render(_describe_readiness(serving, served))
    if request.path == "/release":
        return _render(served.manifest.document)
    response = _render(_describe_service(served))
    response.vary.add("Accept")
    return response


def _score(request: Request, settings: Settings, serving: Serving, timing: Timing) -> Response:
    body = _read_json(request, settings.max_body_bytes)
    try:
        query = parse_query(body, settings)
        timing.texts = len(query.texts)
        served = serving.served(timing)
        with serving.admit():
            from function.scoring import answer_query  # numpy and onnxruntime: loaded by now, and not at import

            return _render(answer_query(query, served, serving, timing))
    except errors.NeedsError as error:
        if is_call(body):
            return _render_call_error(error)
        raise


def _read_json(request: Request, limit: int) -> object:
    _check_media_type(request)
    body = request.stream.read(limit + 1)
    if len(body) > limit:
        # functions-framework reads the rest after the answer; max_content_length would make that an HTML 500.
        _drain(request)
        raise errors.BodyTooLarge(f"body: expected at most {limit} bytes, found more; split the request")
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise errors.NotJson(f"body: expected UTF-8 JSON, found {error}; mend it") from None


def _check_media_type(request: Request) -> None:
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    coded = request.headers.get("Content-Encoding", "identity").lower()
    if request.mimetype != "application/json" or charset not in ("utf-8", "utf8") or coded != "identity":
        found = request.headers.get("Content-Type", "none") + (f", {coded}" if coded != "identity" else "")
        _drain(request)
        raise errors.UnsupportedMediaType(
            f"Content-Type: expected application/json in UTF-8, found {found}; send that header"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


def _drain(request: Request) -> None:
    while request.stream.read(CHUNK_BYTES):
        pass


def _describe_readiness(serving: Serving, served: Served) -> dict:
    return {
        "ready": True,
        "release": served.manifest.release,
        "sequence": served.pointer.sequence if served.pointer else None,
        "checked": serving.checked,
        "refused": serving.refused,
    }


def _describe_service(served: Served) -> dict:
    return {
        "service": "psychological needs in a text",
        "release": served.manifest.release,
        "labels": [label.name for label in served.manifest.labels],
        "routes": {path: list(methods) for path, methods in ROUTES.items()},
        "example": {"text": "요즘 너무 불안하고 흔들려서 쉬고 싶어."},
    }


def _render(document: dict, status: int = 200, media_type: str = "application/json") -> Response:
    body = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body + "\n", status=status, content_type=media_type)


def _render_page() -> Response:
    page, policy = _read_page()
    response = Response(page, content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = policy
    response.vary.add("Accept")
    return response


def _render_error(error: errors.NeedsError) -> Response:
    problems = error.problems if isinstance(error, errors.InvalidInput) else {}
    response = _render_problem(STATUS_CODES[type(error)], str(error), problems)
    if isinstance(error, errors.MethodNotAllowed):
        response.headers["Allow"] = error.allow
    return _say_when(response, error)


def _render_call_error(error: errors.NeedsError) -> Response:
    """BigQuery tries again what is 503 and gives up on 400, with this message in the job's error."""
    status = 503 if STATUS_CODES[type(error)] == 503 else 400
    return _say_when(_render({"errorMessage": str(error)}, status), error)


def _say_when(response: Response, error: errors.NeedsError) -> Response:
    if type(error) in RETRY_AFTER_SECONDS:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS[type(error)])
    return response


def _render_problem(status: int, detail: str, problems: dict[str, str]) -> Response:
    """application/problem+json, RFC 9457."""
    document: dict = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if problems:
        document["errors"] = [{"pointer": pointer, "detail": text} for pointer, text in problems.items()]
    return _render(document, status, "application/problem+json")


def _render_framework_error(error: HTTPException, path: str) -> Response:
    """What Flask refuses before the function is called, such as a method that the framework has no route for."""
    response = _render_problem(error.code or 500, error.description or "", {})
    if error.code == 405:
        response.headers["Allow"] = ", ".join((*ROUTES.get(path, ("GET",)), "HEAD", "OPTIONS"))
    return response


def _log_request(request: Request, response: Response, timing: Timing, seconds: float) -> None:
    """One entry a request: never a text, nor a path that the service does not have, which could hold one."""
    status = response.status_code
    level = logging.INFO if status < 500 else logging.WARNING if status == 503 else logging.ERROR
    path = request.path if request.path in ROUTES else "elsewhere"
    http = {"requestMethod": request.method, "requestUrl": path, "status": status, "latency": f"{seconds:.6f}s"}
    known = {
        "httpRequest": http,
        "texts": timing.texts,
        "milliseconds": {name: round(ms, 2) for name, ms in timing.milliseconds.items()},
        "requestId": response.headers["X-Request-Id"],
    }
    _log.log(level, "%s %s %d", request.method, path, status, extra={"known": known, "headers": request.headers})


class _JsonLines(logging.Formatter):
    """One line of JSON an entry, as Cloud Logging reads it.

    https://cloud.google.com/logging/docs/structured-logging#special-payload-fields
    """

    def __init__(self, project: str):
        super().__init__()
        self._project = project

    def format(self, record: logging.LogRecord) -> str:
        entry = {"severity": record.levelname, "message": record.getMessage(), **getattr(record, "known", {})}
        if record.exc_info:  # where it failed and on what kind of error; what the error says may hold a text
            kind, _, frames = record.exc_info
            entry["message"] += "\n" + "".join([*format_tb(frames), kind.__name__ if kind else ""])
        trace = _find_trace(getattr(record, "headers", {}))
        if trace and self._project:
            entry["logging.googleapis.com/trace"] = f"projects/{self._project}/traces/{trace}"
        return json.dumps(entry, ensure_ascii=False)


def _find_trace(headers: Mapping[str, str]) -> str | None:
    """The trace that Cloud Run's front end gave the request."""
    cloud = re.match(r"([0-9a-f]{32})(?:/|$)", headers.get("X-Cloud-Trace-Context", ""))
    w3c = re.match(r"[0-9a-f]{2}-([0-9a-f]{32})-", headers.get("traceparent", ""))
    found = cloud or w3c
    return found[1] if found else None


def _log_to_stderr(project: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(project))
    _log.handlers = [handler]
    _log.setLevel(logging.INFO)
    _log.propagate = False
