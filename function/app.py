"""HTTP: a request in, a response out. The only file that knows status codes."""

import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from http import HTTPStatus

from flask import Request, Response, current_app, has_app_context
from werkzeug.exceptions import HTTPException

from function import errors
from function.dialects import Scored, parse_query, render_answer, round_probabilities
from function.serving import Served, Serving, Timing
from function.settings import MAX_WINDOWS_A_REQUEST, Settings, read_settings

ROUTES = {"/": ("GET", "POST"), "/health": ("GET",), "/ready": ("GET",), "/release": ("GET",)}
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
CHUNK_BYTES = 65536
_SANE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_log = logging.getLogger("needs")


def create_function(environ: Mapping[str, str]) -> Callable[[Request], Response]:
    """The function that functions-framework calls for every path and method.

    Ends the process with a plain message where a setting cannot be used.
    """
    try:
        settings = read_settings(environ)
    except errors.SettingError as error:
        raise SystemExit(str(error)) from None
    _log_to_stderr()
    serving = Serving(settings)
    if settings.preload:
        # In the worker, right after gunicorn forks it. Under --debug nothing forks: the first request loads.
        os.register_at_fork(after_in_child=serving.begin_load)

    def needs(request: Request) -> Response:
        return _finish(request, lambda timing: _answer(request, settings, serving, timing))

    if has_app_context():  # functions-framework imports main.py inside its application's context
        current_app.register_error_handler(HTTPException, _answer_framework_error)
    return needs


def _finish(request: Request, answer: Callable[[Timing], Response]) -> Response:
    """The answer, or the problem that came of it, with the headers that every response carries."""
    timing = Timing()
    try:
        response = answer(timing)
    except errors.NeedsError as error:
        response = _render_error(error)
    except Exception:
        _log.exception("defect")
        response = _render_problem(500, "the function failed; the log says why", {})
    given = request.headers.get("X-Request-Id", "")
    response.headers["X-Request-Id"] = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
    parts = (f"{name};dur={ms:.2f}" for name, ms in timing.milliseconds.items())
    response.headers["Server-Timing"] = ", ".join(parts)
    response.headers.update(SECURITY_HEADERS)
    return response


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
    if request.path == "/health":
        return _render({"status": "ok"})
    served = serving.served(timing)
    if request.path == "/ready":
        return _render(_describe_readiness(served))
    return _render(served.manifest.document if request.path == "/release" else _describe_service(served))


def _score(request: Request, settings: Settings, serving: Serving, timing: Timing) -> Response:
    query = parse_query(_read_json(request, settings.max_body_bytes), settings)
    with serving.admit():
        served = serving.served(timing)
        with timing.add("tokenize"):
            split = [served.classifier.split(text) for text in query.texts]
        windows = sum(len(one.ids) for one in split)
        if windows > MAX_WINDOWS_A_REQUEST:
            limit = f"expected at most {MAX_WINDOWS_A_REQUEST} windows of {served.manifest.max_tokens} tokens in all"
            raise errors.InvalidInput({f"#/{query.member}": f"texts: {limit}, found {windows}; split the request"})
        scored = [
            Scored(round_probabilities(serving.infer(served.classifier, one, timing)), one.truncated) for one in split
        ]
    return _render(render_answer(query, scored, served.manifest.labels, served.manifest.release))


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


def _describe_readiness(served: Served) -> dict:
    return {
        "ready": True,
        "release": served.manifest.release,
        "sequence": served.sequence,
        "checked": served.checked,
        "refused": None,
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


def _render_error(error: errors.NeedsError) -> Response:
    problems = error.problems if isinstance(error, errors.InvalidInput) else {}
    response = _render_problem(STATUS_CODES[type(error)], str(error), problems)
    if isinstance(error, errors.MethodNotAllowed):
        response.headers["Allow"] = error.allow
    if type(error) in RETRY_AFTER_SECONDS:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS[type(error)])
    return response


def _render_problem(status: int, detail: str, problems: dict[str, str]) -> Response:
    """application/problem+json, RFC 9457."""
    document: dict = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if problems:
        document["errors"] = [{"pointer": pointer, "detail": text} for pointer, text in problems.items()]
    return _render(document, status, "application/problem+json")


def _answer_framework_error(error: HTTPException) -> Response:
    """What Flask refuses before the function is called, such as a method that the framework has no route for."""
    from flask import request

    def answer(timing: Timing) -> Response:
        response = _render_problem(error.code or 500, error.description or "", {})
        if error.code == 405:
            response.headers["Allow"] = ", ".join((*ROUTES.get(request.path, ("GET",)), "HEAD", "OPTIONS"))
        return response

    return _finish(request, answer)


class _JsonLines(logging.Formatter):
    """One line of JSON an entry, as Cloud Logging reads it."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"severity": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            entry["message"] += "\n" + self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    _log.handlers = [handler]
    _log.setLevel(logging.INFO)
    _log.propagate = False
