"""Distillation: fine-tuned teachers in, a smaller student's checkpoint out.

The student is the lowest layers of the same base: of six layers these learn
far more here than every second one (Sajjad et al. 2020,
https://arxiv.org/abs/2004.03844, found the same of BERT's kin). It is
fine-tuned as ever, on targets that are part label, part the teachers' own
probability (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Texts without
labels, on which no teacher was trained, have the teachers' word alone; they are
made freely: the sentences of longer texts, and pairs of texts joined.

    python -m training.distill --teachers .local/build/teacher --layers 6 --output .local/build/student
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from training.examples import Dataset, Examples, demand_dataset
from training.files import read_json
from training.finetune import finetune, make_parser
from training.metrics import sigmoid
from training.model import load_checkpoint, predict_logits

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+")


def soften(dataset: Dataset, teachers: list[Path], trust: float, unlabelled: int, seed: int) -> Dataset:
    """The data with softer targets in `train`, and `unlabelled` texts more that the teachers alone label.

    A target is `trust` times the teachers' probability, of their mean logits, and the rest the label.
    """
    train = dataset.train
    texts = make_unlabelled(train, unlabelled, seed)
    checkpoints = [load_checkpoint(folder) for folder in teachers]
    logits = np.mean([predict_logits(checkpoint, train.texts + texts) for checkpoint in checkpoints], axis=0)
    known, free = np.split(sigmoid(logits), [len(train)])  # [B, L] each
    targets = np.concatenate([trust * known + (1 - trust) * train.targets, free]).astype(np.float32)
    softened = Examples(train.texts + texts, targets, train.sources + ["unlabelled"] * len(texts))
    return replace(dataset, train=softened)


def make_unlabelled(train: Examples, count: int, seed: int) -> list[str]:
    """At most `count` new texts out of those at hand: sentences of longer ones, half at most, and pairs joined."""
    random = np.random.default_rng(seed)
    sentences = [part for text in train.texts for part in _SENTENCE_END.split(text) if part.strip() and part != text]
    pairs = random.integers(len(train), size=(count, 2))
    joined = [f"{train.texts[a]} {train.texts[b]}" for a, b in pairs]
    made = [str(sentence) for sentence in random.permutation(sentences)[: count // 2]]
    return list(dict.fromkeys(made + joined))[:count]


def main() -> None:
    """Distil the teachers and print what it took."""
    parser = make_parser("Distil fine-tuned teachers into a smaller student.")
    parser.add_argument("--teachers", default=".local/build/teacher", help="comma-separated checkpoint folders")
    parser.add_argument("--trust", type=float, default=0.5, help="how much the teachers' word counts beside a label")
    parser.add_argument("--unlabelled", type=int, default=0, help="texts made of the others that teachers alone label")
    parser.set_defaults(layers=6, output=Path(".local/build/student"))
    options = parser.parse_args()
    teachers = [Path(folder) for folder in options.teachers.split(",")]
    dataset = demand_dataset(options.data)
    softened = soften(dataset, teachers, options.trust, options.unlabelled, options.seed)
    finetune(options.base, softened, options.output, options)
    print(read_json(options.output / "training.json")["resources"])


if __name__ == "__main__":
    main()
