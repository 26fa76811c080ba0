"""Scoring: what a request asks and the release that it got in, its answer out."""

import numpy as np

from function.classifier import Windows
from function.dialects import Query, Scored, find_needs, render_answer, round_probabilities
from function.errors import InvalidInput
from function.explain import explain
from function.serving import Served, Serving, Timing
from function.settings import MAX_WINDOWS_A_REQUEST


def answer_query(query: Query, served: Served, serving: Serving, timing: Timing) -> dict:
    """The answer in the query's dialect, all of it from one release.

    Raises InvalidInput for too many windows in all, Overloaded where the process must stop first.
    """
    with timing.add("tokenize"):
        split = [_split(text, served, serving) for text in query.texts]
    windows = sum(len(one.ids) for one in split if one)
    if windows > MAX_WINDOWS_A_REQUEST and query.member != "calls":  # a refused call would end a whole SQL query
        limit = f"expected at most {MAX_WINDOWS_A_REQUEST} windows of {served.manifest.max_tokens} tokens in all"
        raise InvalidInput({f"#/{query.member}": f"texts: {limit}, found {windows}; split the request"})
    scored: list[Scored | None] = []
    for i, one in enumerate(split):
        if one is None:
            scored.append(None)
            continue
        probabilities = serving.infer(served.classifier, one, timing)  # [L]
        scored.append(Scored(round_probabilities(probabilities), one.truncated or i in query.cut))
    answer = render_answer(query, scored, served.manifest.labels, served.manifest.release)
    if query.explain:
        with timing.add("explain"):
            answer["explanation"] = _explain(str(query.texts[0]), probabilities, query.threshold, served, serving)
    return answer


def _split(text: str | None, served: Served, serving: Serving) -> Windows | None:
    serving.check_time_left()
    return None if text is None else served.classifier.split(text)


def _explain(
    text: str, probabilities: np.ndarray, threshold: float | None, served: Served, serving: Serving
) -> dict[str, list[dict]]:
    labels, classifier, inside = served.manifest.labels, served.classifier, Timing()

    def score(shorter: str) -> np.ndarray:
        return serving.infer(classifier, classifier.split(shorter), inside)

    needs = find_needs(round_probabilities(probabilities), labels, threshold)
    if not needs:
        return {}
    spans = explain(text, probabilities, score, len(classifier.split(text).ids), needs)
    return {labels[i].name: words for i, words in zip(needs, spans, strict=True)}
