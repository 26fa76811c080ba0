"""The README's `curl` commands, run as they stand; numbers and release names are those of a release of one's own."""

import json
import re
import subprocess
import uuid
from pathlib import Path

import pytest
from known import release_known

from build import local

EXAMPLES = re.findall(
    r"^\$ (curl .*)\n(\{.*\})$", Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8"), re.M
)


@pytest.fixture(scope="module")
def address(bucket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    uri = f"gs://{local.BUCKET}/{uuid.uuid4().hex}"
    release_known(uri, folder / "release")
    with local.run_function(bucket, environment={"MODEL_URI": uri, "CACHE_DIR": str(folder / "cache")}) as address:
        yield address


def mask(value):
    """An answer without what hangs on the model: scores, weights and the release's name."""
    if isinstance(value, dict):
        return {key: "…" if key == "release" else mask(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [mask(inner) for inner in value]
    return 0.5 if isinstance(value, float) else value


def test_there_is_an_example_of_each_dialect():
    asked = " ".join(command for command, _ in EXAMPLES)
    assert all(f'"{member}"' in asked for member in ("text", "texts", "instances", "calls", "explain", "threshold"))


@pytest.mark.parametrize(("command", "answer"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_a_curl_command_gets_its_answer(address, command, answer):
    command = command.replace("http://127.0.0.1:8080", address).replace("curl", "curl --silent", 1)
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30).stdout
    assert mask(json.loads(found)) == mask(json.loads(answer))
    assert list(json.loads(found)) == list(json.loads(answer))
