"""Bodies: JSON in, texts out; scores in, JSON out. One dialect so far: the function's own."""

from dataclasses import dataclass

import numpy as np

from function.errors import InvalidInput
from function.manifest import Label
from function.settings import Settings

MEMBERS = ("text", "texts")


@dataclass(frozen=True)
class Query:
    """What a request asks for."""

    texts: list[str]
    member: str
    """Which of MEMBERS asked, and so the shape of the answer."""
    threshold: float | None
    """In place of the manifest's thresholds, None to use those."""


@dataclass(frozen=True)
class Scored:
    """One text's probabilities, rounded to 4 decimals, and whether it was cut."""

    probabilities: list[float]
    truncated: bool


def parse_query(body: object, settings: Settings) -> Query:
    """Read a request's JSON. Raises InvalidInput with a pointer to each member that is wrong."""
    if not isinstance(body, dict):
        raise InvalidInput({"#": f'body: expected a JSON object, found {_kind(body)}; send {{"text": "…"}}'})
    present = [member for member in MEMBERS if member in body]
    if len(present) != 1:
        found = " and ".join(present) or "neither"
        raise InvalidInput({"#": f"body: expected exactly one of {' and '.join(MEMBERS)}, found {found}; send one"})
    problems = _check_threshold(body.get("threshold"))
    if present == ["text"]:
        texts, problems = [body["text"]], problems | _check_texts([body["text"]], ["#/text"], settings)
    else:
        texts = body["texts"]
        problems |= _check_list(texts, settings)
    if problems:
        raise InvalidInput(problems)
    return Query(texts, present[0], body.get("threshold"))


def _check_list(texts: object, settings: Settings) -> dict[str, str]:
    limit = settings.max_texts
    if not isinstance(texts, list) or not 1 <= len(texts) <= limit:
        found = len(texts) if isinstance(texts, list) else _kind(texts)
        return {"#/texts": f"texts: expected 1 to {limit} strings, found {found}; split the request"}
    return _check_texts(texts, [f"#/texts/{i}" for i in range(len(texts))], settings)


def _check_texts(texts: list, pointers: list[str], settings: Settings) -> dict[str, str]:
    found = {pointer: _check_text(text, settings) for pointer, text in zip(pointers, texts, strict=True)}
    return {pointer: problem for pointer, problem in found.items() if problem}


def _check_text(text: object, settings: Settings) -> str | None:
    limit = settings.max_text_chars
    if not isinstance(text, str):
        return f"text: expected a string, found {_kind(text)}; send the text itself"
    if not text.strip():
        return "text: expected at least one visible character, found none; leave empty texts out"
    if len(text) > limit:
        return f"text: expected at most {limit} characters, found {len(text)}; shorten it"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "text: expected Unicode, found half a surrogate pair; send the character as UTF-8"
    return None


def _check_threshold(threshold: object) -> dict[str, str]:
    if threshold is None or (type(threshold) in (int, float) and 0 <= threshold <= 1):  # type: ignore[operator]
        return {}
    return {"#/threshold": f"threshold: expected a number from 0 to 1, found {threshold!r:.40}; mend it"}


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def render_answer(query: Query, scored: list[Scored], labels: tuple[Label, ...], release: str) -> dict:
    """The answer in the shape that the request asked for."""
    results = [_render_result(one, labels, query.threshold) for one in scored]
    if query.member == "text":
        return {**results[0], "release": release}
    return {"results": results, "release": release}


def _render_result(scored: Scored, labels: tuple[Label, ...], threshold: float | None) -> dict:
    scores = {label.name: p for label, p in zip(labels, scored.probabilities, strict=True)}
    over = [
        label.name for label in labels if scores[label.name] >= (label.threshold if threshold is None else threshold)
    ]
    needs = sorted(over, key=lambda name: -scores[name])
    return {"needs": needs, "scores": scores, "truncated": scored.truncated}


def round_probabilities(probabilities: np.ndarray) -> list[float]:
    """float32 [L] to what is compared with thresholds and sent."""
    return [round(float(p), 4) for p in probabilities]
