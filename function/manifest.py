"""The release contract: bytes of a manifest or pointer in, checked values out.

The one thing that `build` and `function` share. `build.publish` writes what
this module reads.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import version

from function.errors import ReleaseRefused

SCHEMA = 1
MODEL, TOKENIZER = "model.onnx", "tokenizer.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
_RELEASE = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{12}")


@dataclass(frozen=True)
class Label:
    """One output of the model, with the probability from which it counts."""

    name: str
    id: str
    threshold: float


@dataclass(frozen=True)
class File:
    """One released file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What the function needs of a release."""

    release: str
    labels: tuple[Label, ...]
    max_tokens: int
    prefix: str
    files: dict[str, File]
    document: dict
    """All that the manifest says, as it was parsed."""


@dataclass(frozen=True)
class Pointer:
    """What `current.json` says."""

    release: str
    manifest_sha256: str
    sequence: int


def canonical(document: dict) -> bytes:
    """The one byte form of a JSON document: hashes are taken of it."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def name_release(document: dict) -> str:
    """The release id of a manifest: when it was made, and a hash of all else that it says."""
    rest = {key: value for key, value in document.items() if key != "release"}
    stamp = re.sub(r"\.\d+", "", document["created"]).replace("-", "").replace(":", "")
    return f"{stamp}-{hashlib.sha256(canonical(rest)).hexdigest()[:12]}"


def parse_manifest(stored: bytes) -> Manifest:
    """Read and check `manifest.json`.

    Raises ReleaseRefused where it is not canonical, names another release than
    its content gives, or asks for what this process cannot meet.
    """
    document = _parse(stored, "manifest.json")
    try:
        if document["schema"] != SCHEMA:
            raise _refusal("schema", SCHEMA, document["schema"], "deploy a function that knows it")
        if canonical(document) != stored:
            raise _refusal("manifest.json", "its canonical form", "another", "publish it again")
        if document["release"] != name_release(document):
            raise _refusal("release", name_release(document), document["release"], "publish it again")
        for key, known in (("normalization", "NFC"), ("activation", "sigmoid")):
            if document[key] != known:
                raise _refusal(key, known, document[key], "deploy a function that knows it")
        _check_requirements(document["requires"])
        labels = tuple(
            Label(str(label["name"]), str(label["id"]), float(label["threshold"])) for label in document["labels"]
        )
        files = {name: File(str(file["sha256"]), int(file["bytes"])) for name, file in document["files"].items()}
        if not labels or not {MODEL, TOKENIZER} <= set(files):
            raise _refusal("manifest.json", f"labels, {MODEL} and {TOKENIZER}", "less", "publish it again")
        return Manifest(
            document["release"], labels, int(document["max_tokens"]), str(document["prefix"]), files, document
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _refusal("manifest.json", "the members of schema 1", repr(error), "publish it again") from error


def parse_pointer(stored: bytes) -> Pointer:
    """Read and check `current.json`. Raises ReleaseRefused where it is not whole."""
    document = _parse(stored, "current.json")
    release, digest, sequence = (document.get(key) for key in ("release", "manifest_sha256", "sequence"))
    well_formed = (
        document.get("schema") == SCHEMA
        and _RELEASE.fullmatch(str(release))
        and SHA256.fullmatch(str(digest))
        and type(sequence) is int
        and sequence >= 1
    )
    if not well_formed:
        raise _refusal("current.json", "schema 1, a release, a sha256, a sequence", document, "promote again")
    return Pointer(str(release), str(digest), int(str(sequence)))


def check_release_name(release: str) -> str:
    """A release id as given by a person. Raises ReleaseRefused for anything else."""
    if not _RELEASE.fullmatch(release):
        raise _refusal("RELEASE", "current or YYYYMMDDTHHMMSSZ-<12 hex digits>", release, "mend the setting")
    return release


def _parse(stored: bytes, name: str) -> dict:
    try:
        document = json.loads(stored.decode())
    except ValueError as error:
        raise _refusal(name, "JSON", f"{error}", "promote or publish again") from error
    if not isinstance(document, dict):
        raise _refusal(name, "a JSON object", document, "promote or publish again")
    return document


def _check_requirements(requires: dict[str, str]) -> None:
    for package, wanted in requires.items():
        installed = version(package)
        if not wanted.startswith(">=") or _numbers(installed) < _numbers(wanted[2:]):
            raise _refusal(f"requires {package}", wanted, installed, "deploy the function again with a newer one")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)[:3]]


def _refusal(what: str, expected: object, found: object, remedy: str) -> ReleaseRefused:
    return ReleaseRefused(f"{what}: expected {expected}, found {found}; {remedy}")
