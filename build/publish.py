"""Publishing: a folder of released files in, an immutable release and one pointer out.

    python -m build.publish --model-uri gs://bucket/needs              uploads the release
    python -m build.publish --model-uri gs://bucket/needs --promote    makes it the current one

Every object of a release is written with generation precondition 0 and the
manifest last, so a half-written release is never found and a whole one never
changes. The pointer is written with the generation that was read, so of two
that promote at once exactly one wins. Each command may be run again.

Beside the releases lie two kinds of notes, each written once: `verdicts/` has
what `build.gate` said of each release, `promotions/` every pointer that was.
"""

import argparse
import hashlib
import json
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud import storage
from tqdm import tqdm

from function.errors import ReleaseRefused
from function.manifest import MODEL, TOKENIZER, canonical, name_release, parse_manifest, parse_pointer
from training.files import read_json, sha256_of

FILES = (MODEL, TOKENIZER, "report.html", "report.md", "metrics.json", "README.md")
TIMEOUT_SECONDS = 60
PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "numpy", "scikit-learn")


class PublishError(ValueError):
    """The release was not published, or not promoted; what was served before still is."""


class Bucket:
    """The objects under one gs:// address."""

    def __init__(self, model_uri: str):
        bucket, _, prefix = model_uri.removeprefix("gs://").strip("/").partition("/")
        if not model_uri.startswith("gs://") or not bucket:
            raise PublishError(f"--model-uri: expected gs://bucket/prefix, found {model_uri!r}; name a bucket")
        self._bucket = storage.Client().bucket(bucket)
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"gs://{bucket}/{prefix}".rstrip("/")

    def read(self, name: str) -> tuple[bytes | None, int]:
        """An object's bytes and generation; None and 0 where there is none."""
        blob = self._bucket.blob(self._prefix + name)
        try:
            content = blob.download_as_bytes(timeout=TIMEOUT_SECONDS)
        except NotFound:
            return None, 0
        return content, int(blob.generation)

    def list(self, under: str = "") -> list[str]:
        """The names of all objects that begin with `under`, sorted."""
        blobs = self._bucket.list_blobs(prefix=self._prefix + under, timeout=TIMEOUT_SECONDS)
        return sorted(blob.name.removeprefix(self._prefix) for blob in blobs)

    def write(self, name: str, content: bytes, generation: int) -> None:
        """Write over the given generation (0: nothing there yet). Raises PreconditionFailed."""
        kinds = {".json": "application/json", ".html": "text/html; charset=utf-8", ".md": "text/markdown"}
        self._bucket.blob(self._prefix + name).upload_from_string(
            content,
            content_type=kinds.get(Path(name).suffix, "application/octet-stream"),
            if_generation_match=generation,
            timeout=TIMEOUT_SECONDS,
        )


def make_manifest(folder: Path, inputs: str, build_id: str, commit: str) -> bytes:
    """The canonical manifest of a folder of released files; the same files and inputs keep the one they have.

    `inputs` is the sha256 over all that the release was made from (`build.fresh`).
    """
    metrics = read_json(folder / "metrics.json")
    made = metrics["export"]
    files = {name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES}
    noted = folder / "manifest.json"
    if noted.exists():
        known = read_json(noted)
        if known["files"] == files and known["provenance"]["inputs"] == inputs:
            return noted.read_bytes()
    document = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "labels": [
            {**label, "threshold": threshold}
            for label, threshold in zip(made["labels"], metrics["verification"]["thresholds"], strict=True)
        ],
        "max_tokens": made["max_tokens"],
        "prefix": made["prefix"],
        "normalization": "NFC",
        "activation": "sigmoid",
        "files": files,
        "metrics": summarize_metrics(metrics),
        "provenance": {
            **made["provenance"],
            "inputs": inputs,
            "build_id": build_id,
            "commit": commit,
            "quantization": metrics["quantization"]["recipe"],
            "packages": {name: version(name) for name in PACKAGES},
        },
        "requires": {"onnxruntime": f">={'.'.join(version('onnxruntime').split('.')[:2])}"},
    }
    document["release"] = name_release(document)
    noted.write_bytes(canonical(document))
    return noted.read_bytes()


def summarize_metrics(metrics: dict) -> dict:
    """The figures that a manifest carries: those of the INT8 model that is served, and of the n-grams beside it."""
    verified = metrics["verification"]
    scores = {key: verified["int8"][key] for key in ("macro_f1", "micro_f1")} if "int8" in verified else {}
    if "evaluation" in metrics:
        scores["ngrams_macro_f1"] = metrics["evaluation"]["ngrams"]["at_half"]["macro_f1"]
    return {**scores, "flips": verified["flips"], "logit_difference": verified["logit_difference"]}


def publish(bucket: Bucket, folder: Path, manifest: bytes) -> str:
    """Upload a release and return its id; parts that are already there are compared, not written."""
    release = parse_manifest(manifest).release
    for name in tqdm(FILES, f"upload {release}"):
        _write_once(bucket, f"releases/{release}/{name}", (folder / name).read_bytes())
    _write_once(bucket, f"releases/{release}/manifest.json", manifest)
    return release


def publish_verdict(bucket: Bucket, release: str, inputs: str, verdict: dict) -> None:
    """Note what the gate first said of a release, against the promotion that it was compared with."""
    known = {"release": release, "inputs": inputs, **verdict}
    with suppress(PreconditionFailed):  # by a build that was cut off after it
        bucket.write(f"verdicts/{verdict['sequence']:06d}-{release}.json", canonical(known), generation=0)


def _write_once(bucket: Bucket, name: str, content: bytes) -> None:
    try:
        bucket.write(name, content, generation=0)
    except PreconditionFailed:  # there already: from an upload that was cut off, or whose answer was lost
        stored, _ = bucket.read(name)
        if stored != content:
            found = hashlib.sha256(stored or b"").hexdigest()
            raise PublishError(
                f"{name}: expected sha256 {hashlib.sha256(content).hexdigest()}, found {found}; "
                "a release never changes: build a new one"
            ) from None


def read_current(bucket: Bucket) -> tuple[dict | None, int]:
    """The pointer to the release that is served, and its generation; None and 0 before the first promotion.

    Raises ReleaseRefused where it is not whole.
    """
    stored, generation = bucket.read("current.json")
    if stored is None:
        return None, 0
    parse_pointer(stored)
    return json.loads(stored), generation


def read_inputs(bucket: Bucket, release: str) -> str:
    """The sha256 over all that a published release was made from."""
    stored, _ = bucket.read(f"releases/{release}/manifest.json")
    return str(json.loads(stored)["provenance"]["inputs"]) if stored else ""


def list_promotions(bucket: Bucket) -> list[dict]:
    """Every pointer that was promoted, first to last; the newest is the one in force."""
    noted = [json.loads(bucket.read(name)[0] or b"{}") for name in bucket.list("promotions/")]
    current, _ = read_current(bucket)
    if current and current["sequence"] not in [pointer["sequence"] for pointer in noted]:
        noted.append(current)  # its promotion was cut off before the note
    return noted


def list_verdicts(bucket: Bucket) -> list[dict]:
    """What the gate said of each release, in the order of the promotions that it was compared with."""
    return [json.loads(bucket.read(name)[0] or b"{}") for name in bucket.list("verdicts/")]


def promote(bucket: Bucket, release: str, *, after: int | None = None, forced: str = "") -> dict:
    """Make a published release the current one and return the pointer.

    `after` is the sequence of the promotion that the gate compared with, 0 for
    none; `forced` is a person's reason to pass over the gate. Raises
    PublishError where the release is not whole or another promotion came first.
    """
    manifest, _ = bucket.read(f"releases/{release}/manifest.json")
    if manifest is None:
        raise PublishError(f"{release}: expected its manifest in {bucket.uri}, found none; publish it first")
    digest = hashlib.sha256(manifest).hexdigest()
    known, generation = read_current(bucket)
    sequence = known["sequence"] if known else 0
    if known:
        _note_promotion(bucket, known)
        if known["manifest_sha256"] == digest:
            return known
    if after is not None and after != sequence:
        raise _overtaken(bucket, f"promotion {after}, with which the gate compared", known)
    pointer = {
        "schema": 1,
        "release": release,
        "manifest_sha256": digest,
        "sequence": sequence + 1,
        "promoted": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "previous": known["release"] if known else None,
    }
    if forced:
        pointer["forced"] = forced
    try:
        bucket.write("current.json", canonical(pointer), generation)
    except PreconditionFailed:
        winner, _ = read_current(bucket)
        if winner != pointer:  # else it was ours, and only its acknowledgement was lost
            raise _overtaken(bucket, f"generation {generation}", winner) from None
    _note_promotion(bucket, pointer)
    return pointer


def _note_promotion(bucket: Bucket, pointer: dict) -> None:
    with suppress(PreconditionFailed):  # noted already; a pointer that was mended by hand must not stop the next one
        bucket.write(f"promotions/{pointer['sequence']:06d}.json", canonical(pointer), generation=0)


def _overtaken(bucket: Bucket, expected: str, winner: dict | None) -> PublishError:
    found = f"promotion {winner['sequence']} of {winner['release']}" if winner else "none"
    return PublishError(
        f"{bucket.uri}/current.json: expected {expected}, found {found}; another promotion came first: "
        "look at it with `make status`, then run the build again if need be"
    )


def _promote_judged(bucket: Bucket, folder: Path, verdict: dict, forced: str) -> None:
    """Promote what the gate let pass, or what a person forces, and say where it lies."""
    manifest = read_json(folder / "manifest.json")
    release = manifest["release"]
    passed = verdict["passed"]
    if not passed and not forced:
        raise PublishError(f"{release}: published, not promoted: {verdict['reason']}")
    if twin := _find_twin(bucket, manifest):
        print(f"nothing new: {twin}, from the same inputs, was promoted meanwhile")
        return
    after = verdict["sequence"] if passed else None
    try:
        pointer = promote(bucket, release, after=after, forced="" if passed else forced)
    except PublishError:
        if not (twin := _find_twin(bucket, manifest)):
            raise
        print(f"nothing new: {twin}, from the same inputs, was promoted meanwhile")
        return
    print(f"current: {pointer['release']}, sequence {pointer['sequence']}")
    where = f"{bucket.uri.removeprefix('gs://')}/releases/{release}"
    print(f"files: https://console.cloud.google.com/storage/browser/{where}")
    print(f"report: https://storage.cloud.google.com/{where}/report.html")


def _find_twin(bucket: Bucket, manifest: dict) -> str:
    """The release that is served, if it is another from the same inputs; else ""."""
    current, _ = read_current(bucket)
    if not current or current["release"] == manifest["release"]:
        return ""
    same = read_inputs(bucket, current["release"]) == manifest["provenance"]["inputs"]
    return str(current["release"]) if same else ""


def main() -> None:
    """Publish the release folder, or promote what was published."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model-uri", required=True, help="gs://bucket/prefix")
    parser.add_argument("--release", type=Path, default=Path(".local/build/release"), help="the release's folder")
    parser.add_argument("--inputs", type=Path, default=Path(".local/build/inputs.json"), help="what it was made from")
    parser.add_argument("--verdict", type=Path, default=Path(".local/build/gate.json"), help="what the gate said of it")
    parser.add_argument("--promote", action="store_true", help="write the pointer; the upload was before")
    parser.add_argument("--force", default="", metavar="REASON", help="promote what the gate refused; noted for ever")
    parser.add_argument("--build-id", default="local")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    try:
        bucket, verdict = Bucket(args.model_uri), read_json(args.verdict)
        if args.promote:
            _promote_judged(bucket, args.release, verdict, args.force)
        else:
            inputs = read_json(args.inputs)["inputs"]
            release = publish(bucket, args.release, make_manifest(args.release, inputs, args.build_id, args.commit))
            publish_verdict(bucket, release, inputs, verdict)
            print(f"published: {bucket.uri}/releases/{release}")
    except (PublishError, ReleaseRefused) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
