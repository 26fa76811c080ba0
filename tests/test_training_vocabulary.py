import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from training.vocabulary import VocabularyError, trim_vocabulary

KEPT = ["오늘 기분 좋 다!", "우리 팀 친구", "혼자 싫 다 😊", "\u1100\u1161\u1102\u1161", "a b"]


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
def test_kept_texts_keep_their_tokens_and_their_fp32_states(family, tiny_bases, tmp_path):
    counts = trim_vocabulary(tiny_bases[family], tmp_path / "trimmed")
    assert counts["pieces_after"] < counts["pieces_before"]
    old, new = (
        Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tiny_bases[family], tmp_path / "trimmed")
    )
    before, after = (AutoModel.from_pretrained(folder).eval() for folder in (tiny_bases[family], tmp_path / "trimmed"))
    for text in KEPT[:3] + KEPT[4:]:
        first, second = old.encode(text), new.encode(text)
        assert first.tokens == second.tokens
        with torch.inference_mode():
            states = [
                model(input_ids=torch.tensor([encoding.ids]), attention_mask=torch.ones(1, len(encoding.ids)).long())[0]
                for model, encoding in ((before, first), (after, second))
            ]
        assert torch.equal(*states)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_decomposed_hangul_is_composed_first(family, tiny_bases, tmp_path):
    trim_vocabulary(tiny_bases[family], tmp_path / "trimmed")
    tokenizer = Tokenizer.from_file(str(tmp_path / "trimmed" / "tokenizer.json"))
    assert tokenizer.encode(KEPT[3]).ids == tokenizer.encode("\uac00\ub098").ids


def test_every_id_in_the_tokenizer_is_renumbered(tiny_bases, tmp_path):
    trim_vocabulary(tiny_bases["distilbert"], tmp_path / "trimmed")
    document = json.loads((tmp_path / "trimmed" / "tokenizer.json").read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert document["post_processor"]["sep"] == ["[SEP]", vocabulary["[SEP]"]]
    assert all(token["id"] == vocabulary[token["content"]] for token in document["added_tokens"])
    config = json.loads((tmp_path / "trimmed" / "config.json").read_text("utf-8"))
    assert (config["vocab_size"], config["pad_token_id"]) == (len(vocabulary), vocabulary["[PAD]"])


def test_pieces_of_the_training_texts_and_of_scripts_asked_for_stay(tiny_bases, tmp_path):
    trim_vocabulary(tiny_bases["bert"], tmp_path / "trimmed", ["bonjour"], ("HANGUL", "CYRILLIC"))
    vocabulary = Tokenizer.from_file(str(tmp_path / "trimmed" / "tokenizer.json")).get_vocab()
    assert {"▁bonjour", "мир"} <= set(vocabulary)
    assert "日本" not in vocabulary


def test_another_kind_of_tokenizer_is_refused(tiny_bases, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_bases["bert"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    document = json.loads((source / "tokenizer.json").read_text("utf-8"))
    document["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    (source / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(VocabularyError, match="expected Unigram without byte fallback or WordPiece"):
        trim_vocabulary(source, tmp_path / "trimmed")
