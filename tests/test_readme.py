"""The README's `curl` commands, run as they stand; numbers and release names are those of a release of one's own."""

import json
import re
import subprocess
import uuid
from dataclasses import fields
from pathlib import Path

import pytest
from known import release_known

from build import local
from function.app import STATUS_CODES
from function.settings import Settings

TOP = ("main.py", "cloudbuild.yaml", "requirements.txt", "Makefile", "pyproject.toml")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"^\$ (curl .*)\n(\{.*\})$", README, re.M)


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
    if isinstance(value, list) and value and isinstance(value[0], dict) and "weight" in value[0]:
        return list(value[0])  # how many words speak for a need hangs on the model, too
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


def read_section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_table_of_settings_is_the_functions():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| ([^|]+) \| ([^|]+) \|$", read_section("Settings of the function"), re.M)
    shown = {field.name.upper(): str(field.default) or "empty" for field in fields(Settings)} | {
        "MODEL_URI": "required"
    }
    assert {name: default for name, default, _, _ in rows} == {
        name: default.removesuffix(".0") for name, default in shown.items()
    }
    assert [(unit, help_) for _, _, unit, help_ in rows] == [
        (field.metadata["unit"], field.metadata["help"]) for field in fields(Settings)
    ]


def test_the_table_of_errors_has_every_status_code():
    rows = re.findall(r"^\| (\d+) \|", read_section("Errors"), re.M)
    assert rows == sorted({str(code) for code in STATUS_CODES.values()})


def test_the_tree_is_the_one_in_git():
    listed, folder = set(), ""
    for line in re.findall(r"^(?! *```)( *\S+)  +\S", read_section("The tree"), re.M):
        name = line.strip()
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        listed.add(name if name == folder or not folder else folder + name)
    tracked = subprocess.run(
        ["git", "ls-files", *TOP, "function", "training", "build", "tests"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    files = {path for path in tracked if not re.search(r"__init__\.py$|tests/test_|/data/|/twins/", path)}
    rooms = {f"{room}/" for room in ("function", "training", "build", "tests")}
    assert listed == files | rooms | {"training/data/", "tests/twins/"}


def test_every_make_target_and_module_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets
    for module in set(re.findall(r"-m ((?:build|training)\.\w+)", README)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for script in set(re.findall(r"build/\w+\.sh", README)):
        assert (ROOT / script).exists(), script


def test_the_korean_readme_gives_no_command_that_the_english_one_does_not():
    korean = (ROOT / "README.ko.md").read_text("utf-8")
    lines = [line for block in re.findall(r"```\n(.*?)```", korean, re.S) for line in block.splitlines()]
    commands = [line.split("  #")[0].strip() for line in lines]
    assert len(commands) > 8
    assert [command for command in commands if command not in README] == []
