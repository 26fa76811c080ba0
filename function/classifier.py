"""Scores: a text in, one probability a label out.

Dynamic INT8 has one activation scale a tensor, so in a batch a text's score
would depend on its neighbours and on padding. Every text is therefore run alone
and unpadded, and gets the same scores in any request. A text of more tokens
than the model takes is run as overlapping windows, of which each label gets the
mean odds: a need that one window expresses clearly stays, one that a single
window barely claims does not (`build.behaviour` measures this against others).
"""

import os
from dataclasses import dataclass

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
import onnxruntime
from tokenizers import Tokenizer

OVERLAP = 4
"""Neighbouring windows share a quarter of their tokens."""


@dataclass(frozen=True)
class Windows:
    """A text as the model takes it: int64 [1, T] arrays, and whether the text went on beyond them."""

    ids: list[np.ndarray]
    truncated: bool


class Classifier:
    """A model and its tokenizer, ready to score."""

    def __init__(self, model: bytes, tokenizer: bytes, *, prefix: str, max_tokens: int, max_windows: int, threads: int):
        self._session = onnxruntime.InferenceSession(
            model, sess_options=_session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._session._model_bytes = None  # kept for other providers to fall back from: 26 MB for nothing
        self._tokenizer = Tokenizer.from_str(tokenizer.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prefix = prefix
        self._max_tokens = max_tokens
        self._max_windows = max_windows

    def split(self, text: str) -> Windows:
        """The windows of a text: one, unless it is long."""
        encoding = self._tokenizer.encode(self._prefix + text)
        ids = encoding.ids
        if len(ids) <= self._max_tokens:
            return Windows([np.array([ids], np.int64)], False)
        head = sum(end <= len(self._prefix.rstrip()) for _, end in encoding.offsets[:-1])  # [CLS] and the prefix
        start, body, tail = ids[:head], ids[head:-1], ids[-1:]
        room = self._max_tokens - len(start) - len(tail)
        step = room - room // OVERLAP
        starts = range(0, max(1, len(body) - room + step), step)
        windows = [np.array([start + body[at : at + room] + tail], np.int64) for at in starts]
        return Windows(windows[: self._max_windows], len(windows) > self._max_windows)

    def run(self, ids: np.ndarray) -> np.ndarray:
        """int64 [1, T] to float32 [L] logits."""
        logits: np.ndarray = self._session.run(None, {"input_ids": ids})[0][0]
        return logits

    def score(self, text: str) -> np.ndarray:
        """float32 [L] probabilities in [0, 1]."""
        return combine([self.run(ids) for ids in self.split(text).ids])


def combine(logits: list[np.ndarray]) -> np.ndarray:
    """The windows' float32 [L] logits as one text's [L] probabilities: those of the mean odds."""
    mean: np.ndarray = logits[0] if len(logits) == 1 else np.logaddexp.reduce(logits) - np.log(len(logits))  # [L]
    probabilities: np.ndarray = 0.5 * (1 + np.tanh(0.5 * mean))  # the sigmoid, without overflow
    return probabilities


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # the default pins threads to the host's CPUs and fails in containers
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # the arena grows with every new length and never shrinks
    options.enable_mem_pattern = False  # a plan a length: worth nothing where every text has another
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # `build.quantize` did it
    options.log_severity_level = 4  # errors are raised; a log line must be JSON
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
