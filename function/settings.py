"""The function's settings: environment variables in, checked values out. One table, here.

The container's CPUs come from its cgroup quota and affinity, since
`os.cpu_count()` is the host's.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from function.errors import SettingError

MAX_WINDOWS_A_REQUEST = 256
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def _setting(default: object, unit: str, help: str, accepts: str, check: Callable[[Any], bool]) -> Any:
    metadata = {"unit": unit, "help": help, "accepts": accepts, "check": check}
    return field(default=default, metadata=metadata)


def _at_least(lowest: float) -> tuple[str, Callable[[Any], bool]]:
    return f"a number of at least {lowest:g}", lambda value: math.isfinite(value) and value >= lowest


_ANY = ("any text", lambda value: True)
_URI = (
    "gs://bucket/prefix or file:///folder",
    lambda value: value.startswith(("gs://", "file:///")) and len(value) > len("gs://"),
)
_ORIGIN = re.compile(r"https?://[\w.-]+(:\d+)?")
_ORIGINS = (
    "scheme://host[:port], scheme://host[:port], …",
    lambda value: all(_ORIGIN.fullmatch(origin) for origin in split_origins(value)),
)


def split_origins(value: str) -> list[str]:
    """ALLOWED_ORIGINS as a list."""
    return [origin.strip() for origin in value.split(",") if origin.strip()]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each field is read from the environment variable of its name in capitals."""

    model_uri: str = _setting("", "URI", "where the releases are", *_URI)
    release: str = _setting("current", "name", "the release to serve: `current`, or one to pin", *_ANY)
    refresh_seconds: float = _setting(300.0, "s", "between looks at the pointer; 0 = never", *_at_least(0))
    load_seconds: float = _setting(30.0, "s", "for a whole load with its retries", *_at_least(0.1))
    cache_dir: str = _setting("/tmp/needs", "path", "where released files are kept, by their sha256", *_ANY)
    max_texts: int = _setting(64, "texts", "in one request", *_at_least(1))
    max_calls: int = _setting(1000, "rows", "in one call of BigQuery", *_at_least(1))
    max_text_chars: int = _setting(5000, "code points", "in one text", *_at_least(1))
    max_windows: int = _setting(8, "windows", "of one text; what is beyond is cut (`truncated`)", *_at_least(1))
    max_body_bytes: int = _setting(1048576, "bytes", "in one request", *_at_least(1))
    inference_threads: int = _setting(0, "threads", "of one inference; 0 = the container's CPUs", *_at_least(0))
    max_concurrent: int = _setting(0, "requests", "inferring at once; 0 = CPUs // threads", *_at_least(0))
    max_queue: int = _setting(0, "requests", "waiting before 503; 0 = twice those inferring", *_at_least(0))
    allowed_origins: str = _setting("", "origins", "pages of which may ask, by commas; empty = none", *_ORIGINS)
    preload: int = _setting(1, "0 or 1", "begin to load right after the fork", "0 or 1", lambda value: value in (0, 1))


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings with every 0 that means "choose" chosen.

    Raises SettingError for a value that cannot be used.
    """
    values = {field.name: _read_value(field, environ) for field in fields(Settings)}
    cpus = count_cpus()
    values["inference_threads"] = values["inference_threads"] or cpus
    values["max_concurrent"] = values["max_concurrent"] or max(1, cpus // values["inference_threads"])
    values["max_queue"] = values["max_queue"] or 2 * values["max_concurrent"]
    _check_threads(environ, values["max_concurrent"] + values["max_queue"])
    return Settings(**values)


def _read_value(field: Any, environ: Mapping[str, str]) -> Any:
    name = field.name.upper()
    text = environ.get(name, "").strip() or str(field.default)
    try:
        value = field.type(text)
        if field.metadata["check"](value):
            return value
    except ValueError:
        pass
    raise SettingError(
        f"{name}: expected {field.metadata['accepts']}, found {text!r}; {name} is {field.metadata['help']}"
    )


def _check_threads(environ: Mapping[str, str], busy: int) -> None:
    """A request is shed by a thread, so one must be free when all places are taken."""
    threads = environ.get("THREADS", "").strip() or str((os.cpu_count() or 1) * 4)  # functions-framework's default
    if not threads.isdecimal() or int(threads) <= busy:
        raise SettingError(
            f"THREADS: expected more than MAX_CONCURRENT + MAX_QUEUE = {busy}, found {threads}; "
            "raise THREADS or lower the other two"
        )


def count_cpus() -> int:
    """CPUs that this process may use: affinity, and the cgroup's quota rounded down, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
