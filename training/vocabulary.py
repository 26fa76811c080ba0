"""Vocabulary trimming: a model folder in, the same model with a smaller vocabulary out.

Kept are the pieces of the scripts asked for and every piece that the given texts
use; the rest are dropped. The kept are renumbered in their old order and keep
their embedding rows: a text whose tokens were all kept gets the same tokens and
bit-identical fp32 logits. (The idea is
Abdaoui et al. 2020, "Load What You Need", https://arxiv.org/abs/2010.05609.)
A Unigram piece can only lose to another piece of the same text, and WordPiece
takes the longest piece that fits, so removing pieces of other scripts changes
neither's choice. NFC normalization is put before the tokenizer's own.

    python -m training.vocabulary --input .local/build/base --output .local/build/trimmed --data training/data
"""

import argparse
import json
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training.examples import read_dataset
from training.files import read_json, replace_folder, write_json

DEFAULT_SCRIPTS = ("HANGUL", "ASCII", "SYMBOLS")
SYMBOL_CATEGORIES = ("P", "S", "Z", "Cf", "Mn", "Me")
"""Punctuation, symbols and emoji, spaces, joiners and variation selectors."""
METASPACE, CONTINUATION = "▁", "##"
LANGUAGE_MODEL_HEADS = ("cls.predictions.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "lm_head.")


class VocabularyError(ValueError):
    """The tokenizer cannot be trimmed as asked."""


def trim_vocabulary(
    source: Path, output: Path, texts: Iterable[str] = (), scripts: tuple[str, ...] = DEFAULT_SCRIPTS
) -> dict:
    """Write `source`'s model and tokenizer to `output` with only the pieces of `scripts` and `texts`.

    A script is the first word of its characters' Unicode names (HANGUL, LATIN,
    CJK, HIRAGANA, CYRILLIC, …), or ASCII or SYMBOLS: the single characters of
    those. Returns the counts `pieces_before` and `pieces_after`. Raises
    VocabularyError for a kind of tokenizer whose tokens could change.
    """
    tokenizer = read_json(source / "tokenizer.json")
    pieces = _list_pieces(tokenizer)
    used = _special_pieces(tokenizer) | _find_used(tokenizer, texts)
    keep = [i for i, (piece, _) in enumerate(pieces) if piece in used or _is_of(piece, scripts)]
    keep = sorted({*keep, *_lowest_score(pieces, tokenizer)})
    config = read_json(source / "config.json")
    with replace_folder(output) as new:
        for path in source.iterdir():
            if path.is_file() and path.name not in ("config.json", "model.safetensors", "tokenizer.json"):
                shutil.copyfile(path, new / path.name)
        write_json(new / "tokenizer.json", _renumber_tokenizer(tokenizer, pieces, keep))
        write_json(new / "config.json", _renumber_config(config, keep))
        _slice_embedding(source / "model.safetensors", new / "model.safetensors", keep)
    return {"pieces_before": len(pieces), "pieces_after": len(keep)}


def _list_pieces(tokenizer: dict) -> list[tuple[str, float]]:
    """Pieces by id, with their Unigram scores (0 for WordPiece)."""
    model = tokenizer["model"]
    if model["type"] == "Unigram" and not model.get("byte_fallback"):
        return [(piece, score) for piece, score in model["vocab"]]
    if model["type"] == "WordPiece":
        pieces = sorted(model["vocab"].items(), key=lambda item: item[1])
        if [i for _, i in pieces] == list(range(len(pieces))):
            return [(piece, 0.0) for piece, _ in pieces]
    raise VocabularyError(
        "tokenizer: expected Unigram without byte fallback or WordPiece with contiguous ids, "
        f"found {model['type']}; use a DistilBERT, BERT or XLM-R family model"
    )


def _special_pieces(tokenizer: dict) -> set[str]:
    model = tokenizer["model"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    known = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else set(model["vocab"])
    if not special <= known:
        raise VocabularyError(
            f"tokenizer: expected every added token in the vocabulary, found {sorted(special - known)} beside it; "
            "save the tokenizer with them in its vocabulary"
        )
    special |= {model["unk_token"]} if model["type"] == "WordPiece" else {model["vocab"][model["unk_id"]][0]}
    return special


def _find_used(tokenizer: dict, texts: Iterable[str]) -> set[str]:
    engine = Tokenizer.from_str(json.dumps(_add_nfc(tokenizer)))
    return {piece for text in texts for piece in engine.encode(text).tokens}


def _is_of(piece: str, scripts: tuple[str, ...]) -> bool:
    characters = piece.removeprefix(CONTINUATION).replace(METASPACE, "")
    return all(_script(character) in scripts for character in characters) and (
        len(characters) <= 1 or not {"ASCII", "SYMBOLS"} & {_script(character) for character in characters}
    )


def _script(character: str) -> str:
    if character.isascii():
        return "ASCII"
    if unicodedata.category(character).startswith(SYMBOL_CATEGORIES):
        return "SYMBOLS"
    return unicodedata.name(character, "NONE").split()[0]


def _lowest_score(pieces: list[tuple[str, float]], tokenizer: dict) -> list[int]:
    """The piece that the score of unknown characters is derived from: without it that score would move."""
    if tokenizer["model"]["type"] != "Unigram":
        return []
    return [min(range(len(pieces)), key=lambda i: pieces[i][1])]


def _renumber_tokenizer(tokenizer: dict, pieces: list[tuple[str, float]], keep: list[int]) -> dict:
    ids = {pieces[old][0]: new for new, old in enumerate(keep)}
    model = dict(tokenizer["model"])
    if model["type"] == "Unigram":
        model["unk_id"] = keep.index(model["unk_id"])
        model["vocab"] = [list(pieces[old]) for old in keep]
    else:
        model["vocab"] = ids
    return {
        **_add_nfc(tokenizer),
        "model": model,
        "added_tokens": [{**token, "id": ids[token["content"]]} for token in tokenizer["added_tokens"]],
        "post_processor": _renumber_post_processor(tokenizer["post_processor"], ids),
    }


def _add_nfc(tokenizer: dict) -> dict:
    """The tokenizer with NFC first, and without cutting or padding: the function makes windows."""
    own = tokenizer["normalizer"]
    normalizers = own["normalizers"] if own and own["type"] == "Sequence" else [own] if own else []
    if {"type": "NFC"} not in normalizers:
        normalizers = [{"type": "NFC"}, *normalizers]
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    return {**tokenizer, "normalizer": normalizer, "truncation": None, "padding": None}


def _renumber_post_processor(processor: dict | None, ids: dict[str, int]) -> dict | None:
    if processor is None:
        return None
    processor = dict(processor)
    if processor["type"] == "Sequence":
        processor["processors"] = [_renumber_post_processor(part, ids) for part in processor["processors"]]
    for end in ("sep", "cls"):  # BertProcessing, RobertaProcessing: ["[SEP]", 102]
        if end in processor:
            processor[end] = [processor[end][0], ids[processor[end][0]]]
    if "special_tokens" in processor:  # TemplateProcessing
        processor["special_tokens"] = {
            name: {**token, "ids": [ids[piece] for piece in token["tokens"]]}
            for name, token in processor["special_tokens"].items()
        }
    return processor


def _renumber_config(config: dict, keep: list[int]) -> dict:
    new = {old: new for new, old in enumerate(keep)}
    fixed = {
        key: new.get(value) if isinstance(value, int) else value
        for key, value in config.items()
        if key.endswith("_token_id")
    }
    if config["model_type"] == "xlm-roberta" and fixed.get("pad_token_id") != config.get("pad_token_id"):
        raise VocabularyError("tokenizer: expected <pad> to keep its id, since XLM-R counts positions from it")
    return {**config, **fixed, "vocab_size": len(keep)}


def _slice_embedding(source: Path, output: Path, keep: list[int]) -> None:
    tensors = {name: tensor for name, tensor in load_file(source).items() if not name.startswith(LANGUAGE_MODEL_HEADS)}
    names = [name for name in tensors if name.endswith("embeddings.word_embeddings.weight")]
    if len(names) != 1:
        raise VocabularyError(
            f"{source}: expected one tensor named *embeddings.word_embeddings.weight, found {names}; "
            "use a DistilBERT, BERT or XLM-R family model"
        )
    tensors[names[0]] = tensors[names[0]][keep].contiguous()  # [V, H] -> [kept, H]
    save_file(tensors, output, metadata={"format": "pt"})


def main() -> None:
    """Trim a model folder's vocabulary to the scripts that the texts use."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--input", type=Path, default=Path(".local/build/base"))
    parser.add_argument("--output", type=Path, default=Path(".local/build/trimmed"))
    parser.add_argument(
        "--scripts", default=",".join(DEFAULT_SCRIPTS), help="comma-separated first words of Unicode names"
    )
    parser.add_argument("--data", type=Path, help="a data folder; the pieces of its training texts are kept too")
    args = parser.parse_args()
    prefix = read_json(args.input / "base.json")["prefix"]
    texts = [prefix + text for text in read_dataset(args.data).train.texts] if args.data else [prefix]
    try:
        counts = trim_vocabulary(args.input, args.output, texts, tuple(args.scripts.upper().split(",")))
    except VocabularyError as error:
        raise SystemExit(str(error)) from None
    print("vocabulary: {pieces_before} pieces before, {pieces_after} after".format(**counts))


if __name__ == "__main__":
    main()
