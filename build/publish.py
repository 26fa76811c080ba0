"""Publishing: a folder of released files in, an immutable release and one pointer out.

    python -m build.publish --model-uri gs://bucket/needs              uploads the release
    python -m build.publish --model-uri gs://bucket/needs --promote    makes it the current one

Every object of a release is written with generation precondition 0 and the
manifest last, so a half-written release is never found and a whole one never
changes. The pointer is written with the generation that was read, so of two
that promote at once exactly one wins. Each command may be run again.
"""

import argparse
import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud import storage
from tqdm import tqdm

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

    def write(self, name: str, content: bytes, generation: int) -> None:
        """Write over the given generation (0: nothing there yet). Raises PreconditionFailed."""
        kinds = {".json": "application/json", ".html": "text/html; charset=utf-8", ".md": "text/markdown"}
        self._bucket.blob(self._prefix + name).upload_from_string(
            content,
            content_type=kinds.get(Path(name).suffix, "application/octet-stream"),
            if_generation_match=generation,
            timeout=TIMEOUT_SECONDS,
        )


def hash_inputs(data: Path, commit: str, provenance: dict) -> str:
    """sha256 over all that a release is made from: data, commit, base revision and parameters."""
    files = {
        path.name: sha256_of(path) for path in sorted(data.iterdir()) if path.suffix in (".json", ".jsonl", ".csv")
    }
    return hashlib.sha256(canonical({"data": files, "commit": commit, "made": provenance})).hexdigest()


def make_manifest(folder: Path, data: Path, build_id: str, commit: str) -> bytes:
    """The canonical manifest of a folder of released files; the same files and inputs keep the one they have."""
    metrics = read_json(folder / "metrics.json")
    made = metrics["export"]
    inputs = hash_inputs(data, commit, made["provenance"])
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


def promote(bucket: Bucket, release: str) -> dict:
    """Make a published release the current one and return the pointer.

    Raises PublishError where the release is not whole or another promotion came first.
    """
    manifest, _ = bucket.read(f"releases/{release}/manifest.json")
    if manifest is None:
        raise PublishError(f"{release}: expected its manifest in {bucket.uri}, found none; publish it first")
    digest = hashlib.sha256(manifest).hexdigest()
    stored, generation = bucket.read("current.json")
    known = json.loads(stored) if stored else None
    if known and known["manifest_sha256"] == digest:
        return known
    pointer = {
        "schema": 1,
        "release": release,
        "manifest_sha256": digest,
        "sequence": parse_pointer(stored).sequence + 1 if stored else 1,
        "promoted": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "previous": known["release"] if known else None,
    }
    try:
        bucket.write("current.json", canonical(pointer), generation)
    except PreconditionFailed:
        stored, _ = bucket.read("current.json")
        if stored != canonical(pointer):  # else it was ours, and only its acknowledgement was lost
            winner = json.loads(stored)["release"] if stored else "none"
            raise PublishError(
                f"current.json: expected generation {generation}, found that of {winner}; "
                "another promotion came first: look at it, then promote again if need be"
            ) from None
    return pointer


def main() -> None:
    """Publish the release folder, or promote what was published."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model-uri", required=True, help="gs://bucket/prefix")
    parser.add_argument("--release", type=Path, default=Path(".local/build/release"), help="the release's folder")
    parser.add_argument("--promote", action="store_true", help="write the pointer; the upload was before")
    parser.add_argument("--data", type=Path, default=Path("training/data"), help="what it was trained on")
    parser.add_argument("--build-id", default="local")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    try:
        bucket = Bucket(args.model_uri)
        if args.promote:
            pointer = promote(bucket, read_json(args.release / "manifest.json")["release"])
            print(f"current: {pointer['release']}, sequence {pointer['sequence']}")
        else:
            manifest = make_manifest(args.release, args.data, args.build_id, args.commit)
            print(f"published: {bucket.uri}/releases/{publish(bucket, args.release, manifest)}")
    except PublishError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
