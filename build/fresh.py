"""Freshness: everything that a release is made from in, a decision out whether to make it.

The inputs are the data's content, the code, the base's revision and the
parameters. Where a release of the same inputs is served, was served or was
refused against the one now served, there is nothing new: the later steps are
skipped and the build ends well. A build that was cut off goes on.

    python -m build.fresh --model-uri gs://bucket/needs
"""

import argparse
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from build.parameters import model_parameters, read_defaults
from build.publish import Bucket, PublishError, list_promotions, list_verdicts, read_current, read_inputs
from function.manifest import canonical
from training.files import read_json, sha256_of, write_json

INPUTS, NOTHING_NEW = "inputs.json", "nothing-new"
SOURCES = ("build", "function", "training", "cloudbuild.yaml", "requirements.txt")


def gather_inputs(build: Path, commit: str, given: Mapping[str, str]) -> dict:
    """What a release is made from, and `inputs`, the sha256 over it.

    Without a commit, as under `gcloud builds submit`, the code's own content stands for it.
    """
    checkpoint = given.get("_CHECKPOINT", "").removeprefix("dir:")
    code = {name: hash_files(Path(name)) for name in SOURCES}
    made = {
        "data": hash_files(build / "data"),
        "commit": commit or hashlib.sha256(canonical(code)).hexdigest(),
        "base": hash_files(Path(checkpoint)) if checkpoint else read_json(build / "base" / "base.json"),
        "parameters": model_parameters(given, read_defaults()),
    }
    return {**made, "inputs": hashlib.sha256(canonical(made)).hexdigest()}


def hash_files(root: Path) -> dict[str, str]:
    """The sha256 of a file, or of every file under a folder, by its path in there."""
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    kept = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): sha256_of(path) for path in kept}


def find_same(bucket: Bucket, inputs: str, *, forced: bool = False) -> str:
    """Why a release of these inputs need not be made; "" where it is to be made.

    `forced` makes one that was refused again, to be promoted this time.
    """
    current, _ = read_current(bucket)
    if current and read_inputs(bucket, current["release"]) == inputs:
        return f"{current['release']}, which is served, was made from the same inputs"
    sequence = current["sequence"] if current else 0
    promoted = {promotion["release"] for promotion in list_promotions(bucket)}
    for verdict in list_verdicts(bucket):
        if verdict["inputs"] != inputs:
            continue
        if verdict["release"] in promoted:
            return f"{verdict['release']}, which was served once, was made from the same inputs"
        if not verdict["passed"] and not forced and verdict["sequence"] == sequence:
            return f"{verdict['release']}, made from the same inputs, was refused: {verdict['reason']}"
    return ""


def main() -> None:
    """Write inputs.json, and nothing-new beside it where there is nothing to do."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model-uri", required=True, help="gs://bucket/prefix")
    parser.add_argument("--build", type=Path, default=Path(".local/build"), help="the folder of the steps before")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    made = gather_inputs(args.build, args.commit, os.environ)
    write_json(args.build / INPUTS, made)
    try:
        same = find_same(Bucket(args.model_uri), made["inputs"], forced=bool(os.environ.get("_FORCE")))
    except PublishError as error:
        raise SystemExit(str(error)) from None
    if same:
        (args.build / NOTHING_NEW).write_text(same)
    print(f"nothing new: {same}" if same else f"inputs {made['inputs'][:12]}: to be made")


if __name__ == "__main__":
    main()
