"""The HTTP contract as an OpenAPI 3.1 document: settings in, a description for programs out.

https://spec.openapis.org/oas/v3.1.0
"""

from function.dialects import MEMBERS
from function.manifest import SCHEMA
from function.settings import Settings

PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}
VISIBLE = "[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""At least one character that `str.strip` leaves: what \\S means differs from one language's patterns to the next."""


def describe_api(settings: Settings) -> dict:
    """The document for a function with these settings."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Needs",
            "version": str(SCHEMA),
            "description": "Scores which psychological needs a text expresses.",
        },
        "paths": {
            "/": {"post": _describe_scoring(), "get": _describe_root()},
            "/health": {"get": _describe_get("Whether the process can answer; loads nothing", "Health")},
            "/ready": {"get": _describe_get("Whether a release is loaded; loads it if need be", "Readiness", True)},
            "/release": {"get": _describe_get("The manifest now served", "Manifest", True)},
            "/openapi.json": {"get": _describe_get("This document", "Document")},
        },
        "components": {
            "schemas": _describe_schemas(settings),
            "responses": _describe_responses(),
            "headers": {
                "RequestId": {"schema": {"type": "string"}, "description": "The caller's, if sane, else a new one"},
                "ServerTiming": {"schema": {"type": "string"}, "description": "Milliseconds by part of the work"},
                "RetryAfter": {"schema": {"type": "integer"}, "description": "Seconds to wait"},
            },
        },
    }


def _describe_scoring() -> dict:
    bodies = [_refer("schemas", f"{member.capitalize()}Request") for member in MEMBERS]
    answers = [_refer("schemas", f"{member.capitalize()}Answer") for member in MEMBERS]
    refusals = {
        "400": "NotJson",
        "413": "BodyTooLarge",
        "415": "UnsupportedMediaType",
        "422": "InvalidInput",
        "503": "Unavailable",
    }
    return {
        "operationId": "score",
        "summary": "Score texts",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"oneOf": bodies}}}},
        "responses": {
            "200": _describe_answer("The scores, in the shape of the question", {"anyOf": answers}),
            **{status: _refer("responses", name) for status, name in refusals.items()},
        },
    }


def _describe_root() -> dict:
    answer = _describe_answer("The service and its release, or a page for people", _refer("schemas", "Service"))
    answer["content"]["text/html"] = {"schema": {"type": "string"}}
    return {
        "operationId": "describe",
        "summary": "A page to browsers, a description to programs",
        "responses": {"200": answer, "503": _refer("responses", "Unavailable")},
    }


def _describe_get(summary: str, schema: str, loads: bool = False) -> dict:
    responses = {"200": _describe_answer(summary, _refer("schemas", schema))}
    if loads:
        responses["503"] = _refer("responses", "Unavailable")
    return {"operationId": schema.lower(), "summary": summary, "responses": responses}


def _describe_answer(description: str, schema: dict) -> dict:
    headers = {
        "X-Request-Id": _refer("headers", "RequestId"),
        "Server-Timing": _refer("headers", "ServerTiming"),
    }
    return {"description": description, "headers": headers, "content": {"application/json": {"schema": schema}}}


def _describe_schemas(settings: Settings) -> dict:
    text = {"type": "string", "minLength": 1, "maxLength": settings.max_text_chars, "pattern": VISIBLE}
    limits = {"minItems": 1, "maxItems": settings.max_texts}
    instance = {"anyOf": [text, _object({"text": text}, ["text"])]}
    threshold = {"threshold": {**PROBABILITY, "type": ["number", "null"]}}
    result = {
        "needs": {"type": "array", "items": {"type": "string"}},
        "scores": {"type": "object", "additionalProperties": PROBABILITY},
        "truncated": {"type": "boolean"},
    }
    release = {"release": {"type": "string"}}
    span = {
        "start": {"type": "integer", "minimum": 0},
        "end": {"type": "integer", "minimum": 1},
        "weight": PROBABILITY,
    }
    spans = {"type": "array", "items": _object(span, list(span))}
    row = {"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": ["string", "null"]}}
    explanation = {"explanation": {"type": "object", "additionalProperties": spans}}
    problem = {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    }
    pointed = _object({"pointer": {"type": "string"}, "detail": {"type": "string"}}, ["pointer", "detail"])
    return {
        "Result": _object(result, list(result)),
        "TextRequest": _only("text", text, {**threshold, "explain": {"type": "boolean"}}),
        "TextAnswer": _object({**result, **release, **explanation}, [*result, *release]),
        "TextsRequest": _only("texts", {"type": "array", **limits, "items": text}, threshold),
        "TextsAnswer": _object({"results": _list_of("Result"), **release}, ["results", *release]),
        "InstancesRequest": _only("instances", {"type": "array", **limits, "items": instance}, threshold),
        "InstancesAnswer": _object({"predictions": _list_of("Result"), **release}, ["predictions", *release]),
        "CallsRequest": _only("calls", {"type": "array", "maxItems": settings.max_calls, "items": row}, {}),
        "CallsAnswer": _object(
            {"replies": {"type": "array", "items": {"anyOf": [_refer("schemas", "Result"), {"type": "null"}]}}},
            ["replies"],
        ),
        "CallError": _object({"errorMessage": {"type": "string"}}, ["errorMessage"]),
        "Problem": _object({**problem, "errors": {"type": "array", "items": pointed}}, list(problem)),
        "Health": _object({"status": {"const": "ok"}}, ["status"]),
        "Readiness": _object(
            {
                "ready": {"const": True},
                **release,
                "sequence": {"type": ["integer", "null"]},
                "checked": {"type": "string", "format": "date-time"},
                "refused": {"type": ["string", "null"]},
            },
            ["ready", "release", "sequence", "checked", "refused"],
        ),
        "Manifest": _object({"schema": {"const": SCHEMA}, **release}, ["schema", "release"]),
        "Service": _object({"service": {"type": "string"}, **release}, ["service", "release"]),
        "Document": _object({"openapi": {"type": "string"}}, ["openapi"]),
    }


def _describe_responses() -> dict:
    problem = {"application/problem+json": {"schema": _refer("schemas", "Problem")}}
    call = {"application/json": {"schema": _refer("schemas", "CallError")}}
    waits = {"Retry-After": _refer("headers", "RetryAfter")}
    return {
        "NotJson": {"description": "Not JSON or not UTF-8; a wrong row of calls", "content": problem | call},
        "BodyTooLarge": {"description": "Too many bytes", "content": problem},
        "UnsupportedMediaType": {"description": "Not application/json in UTF-8", "content": problem},
        "InvalidInput": {"description": "JSON of the wrong shape", "content": problem},
        "Unavailable": {"description": "Overloaded, or no release", "headers": waits, "content": problem | call},
    }


def _only(member: str, schema: dict, others: dict) -> dict:
    """A body with this one of the four members; what is unknown is ignored."""
    rivals = [{"required": [rival]} for rival in MEMBERS if rival != member]
    if member != "text":
        rivals.append({"required": ["explain"]})
    return {**_object({member: schema, **others}, [member]), "not": {"anyOf": rivals}}


def _object(properties: dict, required: list[str]) -> dict:
    return {"type": "object", "properties": properties, "required": required}


def _list_of(schema: str) -> dict:
    return {"type": "array", "items": _refer("schemas", schema)}


def _refer(kind: str, name: str) -> dict:
    return {"$ref": f"#/components/{kind}/{name}"}
