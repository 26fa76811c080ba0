"""The README's `curl` commands, run as they stand; numbers and release names are those of a release of one's own."""

import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import requests
from conftest import make_encoder, make_unigram, make_wordpiece
from test_story import PLAIN_DEPLOY, SUBMIT
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from build import local
from function.app import STATUS_CODES
from function.settings import Settings

TOP = ("main.py", "cloudbuild.yaml", "requirements.txt", "Makefile", "pyproject.toml")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"^\$ (curl .*)\n(\{.*\})$", README, re.M)


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
def test_a_curl_command_gets_its_answer(address_of_known, command, answer):
    command = command.replace("http://127.0.0.1:8080", address_of_known).replace("curl", "curl --silent", 1)
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


def list_commands():
    """Every command of the README: those of its blocks, and those with arguments inside a sentence or a table."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", README, re.M | re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:make|\.venv/bin/python|build/)[^`]* [^`]*)`", README)
    return {line for line in [*lines, *inline] if re.match(r"make |build/\w+\.sh |gcloud |\.venv/bin/python ", line)}


HERE = (
    "make demo",
    'make try TEXT="요즘 너무 불안해"',
    "make serve PORT=8080",
    "make status",
    ".venv/bin/python -m training.examples --data path/to/folder",
    ".venv/bin/python -m build.local build --set _CHECKPOINT=dir:path/to/model --set _MIN_MACRO_F1=0",
    ".venv/bin/python -m build.local demo --set _DATA=path/to/folder",
)
LONG = {
    "make test": "what runs here",
    "make release": "the steps of make demo, on more texts",
    "make soak": "test_soak.py runs it at a hundredth",
    "make bench PEERS=1": "test_build_bench.py runs its engines",
    "make bench": "the same",
    "make story": "test_story.py is it",
    "make lock": "it would take other versions than those that are locked",
    ".venv/bin/python -m training.study": "test_training_study.py runs it on a few texts",
    ".venv/bin/python -m build.behaviour": "test_build_behaviour.py runs it on a known model",
}
CLONED = ("training/data", "path/to/folder")


def test_every_command_is_run_by_a_test_or_said_to_be_long():
    story = (ROOT / "tests/test_story.py").read_text("utf-8").replace("{SUBMIT}", SUBMIT) + PLAIN_DEPLOY
    commands = list_commands()
    assert commands >= set(HERE) | set(LONG)
    assert [command for command in commands - set(HERE) - set(LONG) if command not in story] == []


@pytest.fixture(scope="module")
def clone(tiny_data, tmp_path_factory):
    """A fresh clone with this environment, a tiny base and few texts, and a folder and a model of one's own."""
    folder = tmp_path_factory.mktemp("fresh") / "needs"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    (folder / ".venv").mkdir()
    for part in (ROOT / ".venv").iterdir():
        (folder / ".venv" / part.name).symlink_to(part)
    (folder / ".venv" / ".installed").unlink()
    (folder / ".venv" / ".installed").touch()
    pipeline = (folder / "cloudbuild.yaml").read_text("utf-8")
    assert "_BASE: packaged:e5-small" in pipeline
    pipeline = pipeline.replace("packaged:e5-small", "dir:path/to/base")
    (folder / "cloudbuild.yaml").write_text(pipeline, "utf-8")
    shutil.rmtree(folder / "training/data")
    for place in CLONED:
        shutil.copytree(tiny_data, folder / place)
    tokenizer = make_unigram()
    make_encoder("bert", tokenizer.get_vocab_size(), pad=1, layers=7).save_pretrained(folder / "path/to/base")
    tokenizer.save(str(folder / "path/to/base/tokenizer.json"))
    write_own_model(folder / "path/to/model")
    return folder


def write_own_model(folder):
    """As `save_pretrained` leaves it."""
    tokenizer = make_wordpiece()
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 66}
    sizes |= {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": tokenizer.token_to_id("[PAD]")}
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.slow
def test_the_commands_do_in_a_fresh_clone_what_is_said(clone):
    def run(command):
        done = subprocess.run(["bash", "-c", command], cwd=clone, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    demo, ask, _, status, check, own_model, own_data = HERE
    assert "macro-F1" in run(demo)
    assert "소속감" in run(ask)
    assert "served: " in run(status)
    port = local.free_port()
    address = f"http://127.0.0.1:{port}"
    with local.run_server(["make", "-C", str(clone), "serve", f"PORT={port}"], f"{address}/health", {}):
        assert list(requests.post(address, json={"text": "우리 팀"}, timeout=60).json()["scores"]) == [
            "소속감",
            "즐거움",
        ]
    assert "2 labels: 소속감, 즐거움" in run(check)
    assert "2 labels: 소속감, 즐거움" in run(own_data)
    assert "promoted" in run(own_model)
