"""Bodies: JSON in, texts out; scores in, JSON out.

The function's own is `{"text": "…"}` or `{"texts": ["…", …]}`. Vertex AI asks with
`{"instances": ["…" or {"text": "…"}, …]}`
(https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements),
BigQuery with `{"calls": [["…"], …]}` (https://cloud.google.com/bigquery/docs/remote-functions#input_format).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from function.errors import InvalidInput
from function.manifest import Label
from function.settings import Settings

if TYPE_CHECKING:
    import numpy as np

MEMBERS = ("text", "texts", "instances", "calls")
"""Exactly one of these is in a body, and names its dialect."""


@dataclass(frozen=True)
class Query:
    """What a request asks for."""

    texts: list[str | None]
    """None is a row of a call that has no text, and gets null."""
    member: str
    """Which of MEMBERS asked, and so the shape of the answer."""
    threshold: float | None = None
    """In place of the manifest's thresholds, None to use those."""
    explain: bool = False
    cut: frozenset[int] = frozenset()
    """Rows of a call that were longer than MAX_TEXT_CHARS."""


@dataclass(frozen=True)
class Scored:
    """One text's probabilities, rounded to 4 decimals, and whether it was cut."""

    probabilities: list[float]
    truncated: bool


def is_call(body: object) -> bool:
    """Whether BigQuery asks, which understands no refusal but its own; it never asks for an explanation."""
    return isinstance(body, dict) and [member for member in (*MEMBERS, "explain") if member in body] == ["calls"]


def parse_query(body: object, settings: Settings) -> Query:
    """Read a request's JSON. Raises InvalidInput with a pointer to each member that is wrong."""
    if not isinstance(body, dict):
        raise InvalidInput({"#": f'body: expected a JSON object, found {_kind(body)}; send {{"text": "…"}}'})
    present = [member for member in MEMBERS if member in body]
    if len(present) != 1:
        found = " and ".join(present) or "none"
        raise InvalidInput({"#": f"body: expected exactly one of {', '.join(MEMBERS)}, found {found}; send one"})
    member = present[0]
    problems = _check_explain(body, member)
    if member == "calls":
        texts, wrong = _read_calls(body["calls"], settings)
        cut = frozenset(i for i, text in enumerate(texts) if text and len(text) > settings.max_text_chars)
        query = Query([text and text[: settings.max_text_chars] for text in texts], member, cut=cut)
    else:
        texts, wrong = _read_texts(body[member], member, settings)
        problems |= _check_threshold(body.get("threshold"))
        query = Query(texts, member, body.get("threshold"), body.get("explain") is True)
    if problems | wrong:
        raise InvalidInput(problems | wrong)
    return query


def _read_texts(value: object, member: str, settings: Settings) -> tuple[list, dict[str, str]]:
    if member == "text":
        texts, pointers = [value], ["#/text"]
    else:
        limit = settings.max_texts
        if not isinstance(value, list) or not 1 <= len(value) <= limit:
            found = len(value) if isinstance(value, list) else _kind(value)
            return [], {f"#/{member}": f"{member}: expected 1 to {limit} texts, found {found}; split the request"}
        texts, pointers = list(value), [f"#/{member}/{i}" for i in range(len(value))]
    if member == "instances":
        for i, instance in enumerate(texts):
            if isinstance(instance, dict):
                texts[i], pointers[i] = instance.get("text"), f"{pointers[i]}/text"
    checked = {pointer: _check_text(text, settings) for pointer, text in zip(pointers, texts, strict=True)}
    return texts, {pointer: problem for pointer, problem in checked.items() if problem}


def _read_calls(calls: object, settings: Settings) -> tuple[list[str | None], dict[str, str]]:
    limit = settings.max_calls
    if not isinstance(calls, list) or len(calls) > limit:
        found = len(calls) if isinstance(calls, list) else _kind(calls)
        return [], {"#/calls": f"calls: expected at most {limit} rows, found {found}; lower max_batching_rows"}
    texts: list[str | None] = []
    problems = {}
    for i, row in enumerate(calls):
        if not isinstance(row, list) or len(row) != 1:
            found = f"{len(row)} arguments" if isinstance(row, list) else _kind(row)
            problems[f"#/calls/{i}"] = f"calls: expected one argument a row, found {found}; pass the text alone"
        elif row[0] is not None and (problem := _check_string(row[0])):
            problems[f"#/calls/{i}/0"] = problem
        else:
            texts.append(row[0] if row[0] and row[0].strip() else None)
    return texts, problems


def _check_text(text: Any, settings: Settings) -> str | None:
    limit = settings.max_text_chars
    if problem := _check_string(text):
        return problem
    if not text.strip():
        return "text: expected at least one visible character, found none; leave empty texts out"
    if len(text) > limit:
        return f"text: expected at most {limit} characters, found {len(text)}; shorten it"
    return None


def _check_string(text: object) -> str | None:
    if not isinstance(text, str):
        return f"text: expected a string, found {_kind(text)}; send the text itself"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "text: expected Unicode, found half a surrogate pair; send the character as UTF-8"
    return None


def _check_threshold(threshold: object) -> dict[str, str]:
    if threshold is None or (type(threshold) in (int, float) and 0 <= threshold <= 1):  # type: ignore[operator]
        return {}
    return {"#/threshold": f"threshold: expected a number from 0 to 1, found {threshold!r:.40}; mend it"}


def _check_explain(body: dict, member: str) -> dict[str, str]:
    if "explain" not in body:
        return {}
    if member != "text":
        return {"#/explain": f"explain: expected it beside text alone, found it beside {member}; leave it out"}
    if not isinstance(body["explain"], bool):
        return {"#/explain": f"explain: expected true or false, found {_kind(body['explain'])}; mend it"}
    return {}


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def render_answer(query: Query, scored: list[Scored | None], labels: tuple[Label, ...], release: str) -> dict:
    """The answer in the shape that the request asked for."""
    results = [one and _render_result(one, labels, query.threshold) for one in scored]
    if query.member == "text":
        return {**(results[0] or {}), "release": release}
    if query.member == "calls":
        return {"replies": results}
    return {"predictions" if query.member == "instances" else "results": results, "release": release}


def _render_result(scored: Scored, labels: tuple[Label, ...], threshold: float | None) -> dict:
    scores = {label.name: p for label, p in zip(labels, scored.probabilities, strict=True)}
    needs = [labels[i].name for i in find_needs(scored.probabilities, labels, threshold)]
    return {"needs": needs, "scores": scores, "truncated": scored.truncated}


def find_needs(probabilities: list[float], labels: tuple[Label, ...], threshold: float | None) -> list[int]:
    """The labels at or over their threshold, highest first."""
    over = [
        i
        for i, (p, label) in enumerate(zip(probabilities, labels, strict=True))
        if p >= (label.threshold if threshold is None else threshold)
    ]
    return sorted(over, key=lambda i: -probabilities[i])


def round_probabilities(probabilities: "np.ndarray") -> list[float]:
    """float32 [L] to what is compared with thresholds and sent."""
    return [round(float(p), 4) for p in probabilities]
