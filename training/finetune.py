"""Fine-tuning: a base encoder and labelled texts in, a checkpoint out.

Binary cross-entropy on the logits, one independent decision a label, on
multi-hot or soft targets. The head starts as a linear probe of the untouched
encoder, not at random (Kumar et al. 2022, https://arxiv.org/abs/2202.10054):
E5's mean vectors differ little from text to text, and under a random head an
epoch passed before the loss moved at all. By default the embeddings and the
lowest third of the layers stay as they are, as in the study that this project
follows: they hold what the base knows of the language, and some thousand texts would
only wear it off.
Against over-fitting, a share of each text's tokens is left out anew every time
it is seen (word dropout, Iyyer et al. 2015, https://aclanthology.org/P15-1162).
At the end
the n-grams of `training.wide` are put beside the encoder.
transformers' Trainer does the loop: an interrupted run goes on where it was, and
several processes share each batch under `accelerate launch -m training.finetune`.

    python -m training.finetune --base .local/build/trimmed --output .local/build/checkpoint
"""

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from training.examples import Dataset, Examples, demand_dataset
from training.files import read_json, write_json
from training.metrics import sigmoid, summarize_scores
from training.model import (
    DEFAULT_MAX_TOKENS,
    Checkpoint,
    encode,
    encoder_layers,
    new_checkpoint,
    pad,
    parameter_counts,
    predict,
    predict_logits,
    save_checkpoint,
)
from training.wide import fit_ngrams, spell_pieces

STRATEGIES = ("partial", "lora", "full")
PARAMETERS = ("strategy", "layers", "frozen_layers", "epochs", "learning_rate", "batch_size", "token_dropout")
PARAMETERS += ("trust", "unlabelled")
"""The options that a release's provenance names; the last two are those of `training.distill`."""
HEAD_RATE = 10
"""The head learns this many times faster than the pretrained layers."""
LORA_RANK = 16
PROBE_ROWS = 2000
PROBE_C = 0.02
"""Inverse strength of the probe's L2 penalty, on standardized features."""
BUCKET_BATCHES = 50
"""Texts are sorted by length within this many batches, and the batches then shuffled; 1 does not sort."""
PATIENCE = 2
"""Epochs without a better macro-F1 on validation after which training ends."""
KIB = 1024 if sys.platform != "darwin" else 1
"""ru_maxrss counts KiB on Linux, bytes on macOS."""


def finetune(base: Path, dataset: Dataset, output: Path, options: argparse.Namespace) -> Checkpoint:
    """Train on `dataset.train`, keep the epoch with the best macro-F1 on `dataset.validation`.

    Writes the checkpoint folder `output` and `output/training.json` (metrics by
    epoch, peak memory, CPU and wall time, parameters). The same seed, data and
    machine give the same weights.
    """
    started = time.monotonic(), time.process_time()
    checkpoint = new_checkpoint(base, dataset.labels, options.max_tokens, options.seed, options.layers)
    train = dataset.train.part(options.rows or len(dataset.train), options.seed)
    fit_head(checkpoint, train.part(PROBE_ROWS, options.seed))
    checkpoint.model.encoder = adapt(checkpoint.model.encoder, options.strategy, options.frozen_layers)
    state = output.with_name(output.name + "-training")
    varied = _Varied(checkpoint, train, options.token_dropout)
    trainer = _BucketTrainer(
        _BucketSampler(varied.lengths(), options.batch_size, options.bucket_batches, options.seed),
        model=checkpoint.model,
        args=_training_arguments(state, len(train), options),
        train_dataset=varied,
        eval_dataset=sorted(_to_items(checkpoint, dataset.validation), key=lambda item: len(item["input_ids"])),
        data_collator=_collate,
        compute_metrics=_macro_f1,
        optimizers=(_optimizer(checkpoint.model, options.learning_rate), None),
        callbacks=[EarlyStoppingCallback(PATIENCE)],
    )
    digest = hash_examples(dataset)
    trainer.train(resume_from_checkpoint=_resumable(trainer, state, base, digest, options))
    checkpoint.model.cpu()
    resources = parameter_counts(checkpoint.model)
    if options.strategy == "lora":
        checkpoint.model.encoder = checkpoint.model.encoder.merge_and_unload()
    add_wide_branch(checkpoint, train, dataset.validation)
    if trainer.is_world_process_zero():
        checkpoint.provenance |= {"trained_texts": len(train), "all_texts": len(dataset.train)}
        checkpoint.provenance |= {name: value for name, value in vars(options).items() if name in PARAMETERS}
        save_checkpoint(checkpoint, output)
        resources |= _resources(*started)
        noted = {"resources": resources, "texts": digest, "history": trainer.state.log_history}
        write_json(output / "training.json", noted)
        shutil.rmtree(state)  # there to go on from, and no longer needed
    trainer.accelerator.wait_for_everyone()
    return checkpoint


def adapt(encoder: nn.Module, strategy: str, frozen_layers: int | None) -> nn.Module:
    """The encoder as the strategy lets it learn.

    `partial` keeps the embeddings and the lowest layers, a third unless told,
    as they are; `lora` keeps everything and learns low-rank additions to each
    linear layer (Hu et al. 2021, https://arxiv.org/abs/2106.09685); `full`
    learns all.
    """
    if strategy == "partial":
        layers = encoder_layers(encoder)
        frozen = len(layers) // 3 if frozen_layers is None else frozen_layers
        for part in (encoder.embeddings, *layers[:frozen]):
            part.requires_grad_(False)
    if strategy == "lora":
        from peft import LoraConfig, get_peft_model  # 2 s that the other strategies need not wait

        return get_peft_model(encoder, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"))
    return encoder


def fit_head(checkpoint: Checkpoint, train: Examples) -> None:
    """Set the head to a logistic regression of each label on the encoder's pooled states.

    A label that `train` never or always expresses gets no weights and its base rate as bias.
    """
    features = predict(checkpoint, train.texts, checkpoint.model.pool)  # [B, H]
    mean, spread = features.mean(0), features.std(0) + 1e-6
    standard = (features - mean) / spread
    for i, target in enumerate(train.targets.T >= 0.5):
        weights, bias = np.zeros(len(mean)), math.log((target.sum() + 1) / ((~target).sum() + 1))
        if target.any() and not target.all():
            probe = LogisticRegression(C=PROBE_C, max_iter=1000).fit(standard, target)
            weights, bias = probe.coef_[0] / spread, probe.intercept_[0]
        with torch.no_grad():
            checkpoint.model.head.weight[i] = torch.from_numpy(weights)
            checkpoint.model.head.bias[i] = float(bias - weights @ mean)


def add_wide_branch(checkpoint: Checkpoint, train: Examples, validation: Examples) -> None:
    """Fit n-grams on `train`, and on `validation` how much they and the encoder's logits count."""
    deep = predict_logits(checkpoint, validation.texts)
    branch = fit_ngrams(encode(checkpoint, train.texts), train.targets, spell_pieces(checkpoint.tokenizer))
    ngrams = predict(checkpoint, validation.texts, branch.score)
    branch.weigh(deep, ngrams, validation.targets)
    checkpoint.model.wide = branch
    together = predict_logits(checkpoint, validation.texts)
    for name, logits in (("encoder alone", deep), ("with n-grams", together)):
        found = summarize_scores(sigmoid(logits), validation.targets)["macro_f1"]
        print(f"validation macro-F1, {name}: {found:.4f}")


class _Varied(TorchDataset[dict]):
    """Texts' token ids and targets; some tokens are left out, others each time."""

    def __init__(self, checkpoint: Checkpoint, examples: Examples, token_dropout: float):
        self._items, self._token_dropout = _to_items(checkpoint, examples), token_dropout

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict:
        item = self._items[i]
        kept = torch.rand(len(item["input_ids"])) >= self._token_dropout  # the Trainer seeds and restores torch's
        kept[0] = kept[-1] = True
        return {**item, "input_ids": [token for token, keep in zip(item["input_ids"], kept, strict=True) if keep]}

    def lengths(self) -> list[int]:
        """The tokens of each text, before any is left out."""
        return [len(item["input_ids"]) for item in self._items]


class _BucketSampler(Sampler[int]):
    """Random batches of texts of like length: little padding to compute, and no order by length to learn."""

    def __init__(self, lengths: list[int], batch_size: int, bucket_batches: int, seed: int):
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0
        self._bucket = batch_size * bucket_batches

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, so that a resumed run goes on in the same order."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self))
        size = self._batch_size
        buckets = [order[at : at + self._bucket] for at in range(0, len(order), self._bucket)]
        sorted_ = [i for bucket in buckets for i in sorted(bucket, key=lambda i: self._lengths[i])]
        batches = [sorted_[at : at + size] for at in range(0, len(sorted_), size)]
        last = [batches.pop()] if len(batches[-1]) < size else []  # a short batch must stay the last
        random.shuffle(batches)
        return (int(i) for batch in batches + last for i in batch)


class _BucketTrainer(Trainer):
    def __init__(self, sampler: _BucketSampler, **rest):
        super().__init__(**rest)
        self._sampler = sampler

    def _get_train_sampler(self, train_dataset: _Varied | None = None) -> _BucketSampler:
        return self._sampler


def _optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    body = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [
        {"params": body, "lr": learning_rate},
        {"params": model.head.parameters(), "lr": learning_rate * HEAD_RATE},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def _training_arguments(state: Path, texts: int, options: argparse.Namespace) -> TrainingArguments:
    steps = math.ceil(texts / options.batch_size * options.epochs)
    return TrainingArguments(
        output_dir=str(state),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=max(1, options.batch_size // int(os.environ.get("WORLD_SIZE", "1"))),
        per_device_eval_batch_size=32,
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        seed=options.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="macro_f1",
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )


def _to_items(checkpoint: Checkpoint, examples: Examples) -> list[dict]:
    ids = encode(checkpoint, examples.texts)
    return [{"input_ids": row, "labels": target} for row, target in zip(ids, examples.targets, strict=True)]


def _collate(items: list[dict]) -> dict[str, torch.Tensor]:
    labels = torch.from_numpy(np.stack([item["labels"] for item in items]))  # [B, L]
    return {**pad([item["input_ids"] for item in items]), "labels": labels}


def _macro_f1(prediction: EvalPrediction) -> dict[str, float]:
    summary = summarize_scores(sigmoid(prediction.predictions), prediction.label_ids)
    return {"macro_f1": summary["macro_f1"], "micro_f1": summary["micro_f1"]}


def hash_examples(dataset: Dataset) -> str:
    """The sha256 of all that is trained and chosen on, texts and targets."""
    digest = hashlib.sha256()
    for examples in (dataset.train, dataset.validation):
        digest.update(json.dumps(examples.texts).encode() + np.ascontiguousarray(examples.targets).tobytes())
    return digest.hexdigest()


def _resumable(trainer: Trainer, state: Path, base: Path, digest: str, options: argparse.Namespace) -> str | None:
    """The last state of an interrupted run with the very same options, base and texts, if there is one."""
    wanted = {name: str(value) for name, value in sorted(vars(options).items())}
    wanted |= {"base_revision": read_json(base / "base.json")["revision"], "texts": digest}
    noted = state / "options.json"
    same = noted.exists() and read_json(noted) == wanted
    last = get_last_checkpoint(str(state)) if same else None
    trainer.accelerator.wait_for_everyone()  # all have read it
    if trainer.is_world_process_zero():
        write_json(noted, wanted)
    if last:
        print(f"going on from {last}")
    return last


def _resources(wall_start: float, cpu_start: float) -> dict[str, float]:
    return {
        "wall_seconds": round(time.monotonic() - wall_start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
    }


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line that `training.distill` shares; the defaults suit the sample data."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", type=Path, default=Path(".local/build/trimmed"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--output", type=Path, default=Path(".local/build/checkpoint"))
    parser.add_argument("--strategy", choices=STRATEGIES, default="full")
    parser.add_argument("--layers", type=int, default=0, help="keep the base's lowest N; 0 is all")
    parser.add_argument("--frozen-layers", type=int, help="with partial: the lowest N; a third unless told")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=0, help="train on a random part of this many texts; 0 is all")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--token-dropout", type=float, default=0.1, help="share of tokens left out in training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bucket-batches", type=int, default=BUCKET_BATCHES, help="sort lengths within; 1: do not")
    parser.add_argument("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of one run."""
    return make_parser("Fine-tune a base encoder on labelled texts.").parse_args(arguments)


def main() -> None:
    """Fine-tune and print what it took."""
    options = parse_options()
    dataset = demand_dataset(options.data)
    finetune(options.base, dataset, options.output, options)
    print(read_json(options.output / "training.json")["resources"])


if __name__ == "__main__":
    main()
