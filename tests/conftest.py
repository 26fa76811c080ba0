"""Tiny models, data and servers: everything real but the size."""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from known import release_known
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from build import local
from training.files import write_json

ROOT = Path(__file__).parent.parent
LONGEST = ("test_story.py", "test_readme.py", "released")
HANGUL = ["오늘", "기분", "좋", "다", "싫", "정말", "우리", "팀", "혼자", "일", "친구", "너무", "가", "나", "은", "이"]
FOREIGN = [
    "привет",
    "мир",
    "日本",
    "語",
    "bonjour",
    "query",
    "a",
    "b",
    "q",
    "u",
    "e",
    "r",
    "y",
    ":",
    ".",
    "!",
    "♥",
    "😊",
    "3",
]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes: the longest first, each file in one, and all that stands on `released` in one."""
    for item in items:
        together = "released" if "released" in getattr(item, "fixturenames", ()) else item.path.name
        item.add_marker(pytest.mark.xdist_group(together))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] not in LONGEST)


def make_unigram() -> Tokenizer:
    """A SentencePiece-like tokenizer as XLM-R and E5 have it."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [*HANGUL, *FOREIGN]
    pieces += [(f"▁{word}", -3.0 - i / 10) for i, word in enumerate(words) if len(word) > 1]
    pieces += [(word, -5.0 - i / 10) for i, word in enumerate(words)]
    pieces.append(("<mask>", 0.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


def make_wordpiece() -> Tokenizer:
    """A tokenizer as multilingual BERT and DistilBERT have it: special ids in the middle, foreign pieces first."""
    words = [*FOREIGN, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *HANGUL]
    pieces = words + [f"##{word}" for word in [*HANGUL, *FOREIGN]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def make_encoder(family: str, vocabulary: int, pad: int, layers: int = 2) -> PreTrainedModel:
    """A randomly initialized encoder."""
    torch.manual_seed(0)
    common = {"vocab_size": vocabulary, "max_position_embeddings": 66, "pad_token_id": pad}
    if family == "distilbert":
        return DistilBertModel(DistilBertConfig(dim=32, n_layers=layers, n_heads=2, hidden_dim=64, **common))
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        **common,
    }
    if family == "bert":
        return BertModel(BertConfig(**sizes), add_pooling_layer=False)
    return XLMRobertaModel(XLMRobertaConfig(**sizes), add_pooling_layer=False)


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in transformers' format for each family of encoders."""
    folders = {}
    for family in ("bert", "xlm-roberta", "distilbert"):
        folder = tmp_path_factory.mktemp(family)
        tokenizer = make_wordpiece() if family == "distilbert" else make_unigram()
        pad = tokenizer.token_to_id("[PAD]" if family == "distilbert" else "<pad>")
        make_encoder(family, tokenizer.get_vocab_size(), pad).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        folders[family] = folder
    return folders


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two needs that a word gives away, in texts without splits."""
    folder = tmp_path_factory.mktemp("data")
    write_json(folder / "labels.json", [{"name": "소속감", "id": "belonging"}, {"name": "즐거움", "id": "enjoyment"}])
    lines = []
    for i in range(120):
        needs = [[], ["소속감"], ["즐거움"], ["소속감", "즐거움"]][i % 4]
        words = ["우리 팀" if "소속감" in needs else "혼자", "좋 다" if "즐거움" in needs else "싫 다"]
        lines.append(json.dumps({"text": f"오늘 {' '.join(words)} {'정말 ' * (i // 4 % 5)}{i}", "needs": needs}))
    (folder / "diary.jsonl").write_text("\n".join(lines), "utf-8")
    probes = [{"text": "우리 팀", "need": "소속감"}, {"text": "정말 좋 다", "need": "즐거움"}]
    (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, probes)), "utf-8")
    return folder


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded Cloud Storage server, as STORAGE_EMULATOR_HOST of this process."""
    with local.run_bucket(tmp_path_factory.mktemp("bucket")) as address:
        os.environ["STORAGE_EMULATOR_HOST"] = address
        yield address
        del os.environ["STORAGE_EMULATOR_HOST"]


@pytest.fixture(scope="session")
def address_of_known(bucket, tmp_path_factory):
    """The function over HTTP, on a release with known answers."""
    folder = tmp_path_factory.mktemp("known")
    uri = f"gs://{local.BUCKET}/{uuid.uuid4().hex}"
    release_known(uri, folder / "release")
    with local.run_function(bucket, environment={"MODEL_URI": uri, "CACHE_DIR": str(folder / "cache")}) as address:
        yield address


@pytest.fixture(scope="session")
def pipeline(tiny_bases, tiny_data, tmp_path_factory):
    """The pipeline's own steps for a tiny encoder, with their substitutions, in a checkout of their own."""
    work = tmp_path_factory.mktemp("work")
    root = Path(__file__).parent.parent
    for name in ("build", "function", "training", "main.py", "cloudbuild.yaml", "requirements.txt", ".venv"):
        (work / name).symlink_to(root / name)
    given = {
        "_MODEL_URI": local.MODEL_URI,
        "_BASE": f"dir:{tiny_bases['bert']}",
        "_DATA": str(tiny_data),
        "_EPOCHS": "1",
        "_STUDENT_LAYERS": "1",
        "_STUDENT_EPOCHS": "1",
    }
    bounds = ("_MAX_FLIPS", "_MAX_F1_LOSS", "_MAX_F1_DROP", "_MAX_NEED_DROP")
    given |= {**dict.fromkeys(bounds, "1"), "_MIN_MACRO_F1": "0"}  # an untrained model's decisions hang on nothing
    steps, values = local.read_pipeline(root / "cloudbuild.yaml", given)
    return [{**step, "dir": str(work)} for step in steps if step["id"] != "install"], values


@pytest.fixture(scope="session")
def step_seconds() -> dict[str, float]:
    """How long each step of `released` took, once that was made."""
    return {}


@pytest.fixture(scope="session")
def released(pipeline, step_seconds, tmp_path_factory):
    """A bucket with a release that the pipeline made."""
    with local.run_bucket(tmp_path_factory.mktemp("bucket")) as address:
        step_seconds |= local.run_pipeline(*pipeline, {"STORAGE_EMULATOR_HOST": address})
        yield address
