"""The classifier: encoder, masked mean pooling, linear head, wide branch; and its checkpoint on disk.

A checkpoint is a folder: the encoder as `save_pretrained` writes it,
`head.safetensors`, `wide.safetensors`, `tokenizer.json` and `checkpoint.json` (labels, prefix,
max_tokens, where it came from). What `…ForSequenceClassification.save_pretrained`
writes is read as well, with its own pooling and head, labels from its config.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from training.examples import Label
from training.files import read_json, replace_folder, write_json
from training.wide import WideBranch

DEFAULT_MAX_TOKENS = 256
PREDICT_BATCH = 16


class NeedsClassifier(nn.Module):
    """Logits for L labels out of the mean of the encoder's token states, and of n-grams once these are fitted."""

    def __init__(self, encoder: nn.Module, labels: int, wide: WideBranch | None = None):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, labels)
        self.wide = wide

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """int64 [B, T] ids and mask to float32 [B, L] logits, and the loss where targets [B, L] are given.

        Without a mask nothing is padding.
        """
        logits = self.head(self.pool(input_ids, attention_mask))  # [B, H] -> [B, L]
        if self.wide:
            logits = self.wide(logits, input_ids, attention_mask)
        loss = None if labels is None else nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def pool(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """float32 [B, H]: the mean of each text's token states, its padding left out."""
        given = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # fusion looks for a mask
        hidden = self.encoder(input_ids=input_ids, attention_mask=given).last_hidden_state  # [B, T, H]
        if attention_mask is None:
            return hidden.mean(1)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        return (hidden * mask).sum(1) / mask.sum(1)


@dataclass
class Checkpoint:
    """A model with all that is needed to turn a text into logits."""

    model: nn.Module
    tokenizer: Tokenizer
    labels: list[Label]
    prefix: str
    max_tokens: int
    provenance: dict
    """How it was made: base, revision, strategy, seed, … as far as known."""


def load_encoder(folder: Path) -> nn.Module:
    """An encoder without its pooler, with attention written out, so that an exporter can fuse it."""
    without = {} if AutoConfig.from_pretrained(folder).model_type == "distilbert" else {"add_pooling_layer": False}
    return AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **without)


def encoder_of(model: nn.Module) -> PreTrainedModel:
    """The encoder of a classifier, ours or a `…ForSequenceClassification`."""
    return model.encoder if hasattr(model, "encoder") else model.base_model


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's layers from the lowest, in BERT, XLM-R and DistilBERT alike."""
    stack = encoder.transformer if hasattr(encoder, "transformer") else encoder.encoder
    return stack.layer


def keep_layers(encoder: nn.Module, count: int) -> None:
    """Leave the encoder its lowest `count` layers, in place; 0 or as many as it has leaves all."""
    layers = encoder_layers(encoder)
    if not 0 <= count <= len(layers):
        raise ValueError(f"layers: expected 0 (all) to {len(layers)}, found {count}; the base has no more")
    del layers[count or len(layers) :]
    encoder.config.num_hidden_layers = len(layers)  # DistilBERT's n_layers goes by this name too


def new_checkpoint(base: Path, labels: list[Label], max_tokens: int, seed: int, layers: int = 0) -> Checkpoint:
    """A base encoder (a folder of `training.bases`), its lowest `layers` or all, under a new, random head."""
    torch.manual_seed(seed)
    known = read_json(base / "base.json")
    model = NeedsClassifier(load_encoder(base), len(labels))
    keep_layers(model.encoder, layers)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    return Checkpoint(model, tokenizer, labels, known["prefix"], max_tokens, {**known, "seed": seed})


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint that `load_checkpoint` reads; the folder is replaced as a whole."""
    with replace_folder(folder) as new:
        checkpoint.model.encoder.save_pretrained(new)
        for name in ("head", "wide"):
            if part := getattr(checkpoint.model, name):
                save_file(part.state_dict(), new / f"{name}.safetensors")
        checkpoint.tokenizer.save(str(new / "tokenizer.json"))
        write_json(
            new / "checkpoint.json",
            {
                "labels": [asdict(label) for label in checkpoint.labels],
                "prefix": checkpoint.prefix,
                "max_tokens": checkpoint.max_tokens,
                "provenance": checkpoint.provenance,
            },
        )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, ours or a `…ForSequenceClassification` folder, in evaluation mode.

    Raises ValueError where it is neither.
    """
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        raise ValueError(f"{folder}: expected tokenizer.json, found none; save the model's fast tokenizer there")
    if (folder / "checkpoint.json").exists():
        known = read_json(folder / "checkpoint.json")
        labels = [Label(**label) for label in known["labels"]]
        model: nn.Module = NeedsClassifier(load_encoder(folder), len(labels))
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
        if (folder / "wide.safetensors").exists():
            state = load_file(folder / "wide.safetensors")
            model.wide = WideBranch(len(labels), state["spelling"])
            model.wide.load_state_dict(state)
        rest = known["prefix"], known["max_tokens"], known["provenance"]
    else:
        model, labels = _load_sequence_classifier(folder)
        limit = min(DEFAULT_MAX_TOKENS, model.config.max_position_embeddings)
        rest = "", limit, {"base": f"dir:{folder.name}", "strategy": "none: a checkpoint of one's own"}
    return Checkpoint(model.eval(), Tokenizer.from_file(str(tokenizer)), labels, *rest)


def _load_sequence_classifier(folder: Path) -> tuple[nn.Module, list[Label]]:
    config = AutoConfig.from_pretrained(folder)
    kinds = getattr(config, "architectures", None) or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(
            f"{folder}: expected checkpoint.json or a …ForSequenceClassification config, found {kinds}; "
            "save the fine-tuned model with save_pretrained"
        )
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    names = [config.id2label[i] for i in range(config.num_labels)]
    ids = [name.lower() if re.fullmatch(r"\w+", name, re.ASCII) else f"label_{i}" for i, name in enumerate(names)]
    return model, [Label(*pair) for pair in zip(names, ids, strict=True)]


def encode(checkpoint: Checkpoint, texts: list[str]) -> list[list[int]]:
    """Token ids of each text with its prefix, cut to `max_tokens` with the closing token kept."""
    ids = [encoding.ids for encoding in checkpoint.tokenizer.encode_batch([checkpoint.prefix + t for t in texts])]
    limit = checkpoint.max_tokens
    return [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in ids]


def predict_logits(checkpoint: Checkpoint, texts: list[str]) -> np.ndarray:
    """float32 [B, L] logits from PyTorch."""
    return predict(checkpoint, texts, lambda **batch: checkpoint.model(**batch).logits)


def predict(checkpoint: Checkpoint, texts: list[str], run: Callable[..., torch.Tensor]) -> np.ndarray:
    """float32 [B, …]: what `run` makes of each text, in batches of like length, in evaluation mode."""
    ids = encode(checkpoint, texts)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    checkpoint.model.eval()
    with torch.inference_mode():
        rows = [order[at : at + PREDICT_BATCH] for at in range(0, len(order), PREDICT_BATCH)]
        parts = [run(**pad([ids[i] for i in batch])).numpy() for batch in tqdm(rows, "predict", leave=False)]
    return np.concatenate(parts)[np.argsort(order)]


def pad(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """int64 [B, T] `input_ids` (0 in the padding, which the mask hides) and `attention_mask`."""
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]), "attention_mask": mask}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Trainable and total parameters."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "trainable_parameters": sum(n for n, trainable in counts if trainable),
        "total_parameters": sum(n for n, _ in counts),
    }
