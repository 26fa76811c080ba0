import subprocess

import numpy as np
import pytest
import torch

from training.bases import fetch_base
from training.examples import read_dataset
from training.files import read_json, write_json
from training.finetune import _Varied, adapt, finetune, parse_options
from training.model import encode, encoder_layers, load_checkpoint, load_encoder, new_checkpoint, predict_logits

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tiny_bases, tmp_path):
    fetch_base(f"dir:{tiny_bases['bert']}", tmp_path / "base", tmp_path)
    return tmp_path / "base"


def train(base, data, output, seed, *others):
    options = parse_options(["--epochs", "1", "--seed", str(seed), "--max-tokens", "64", *others])
    return finetune(base, read_dataset(data), output, options)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(base, tiny_data, tmp_path):
    runs = [train(base, tiny_data, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    heads = [run.model.head.weight for run in runs]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_checkpoint_is_written_with_what_it_took(base, tiny_data, tmp_path):
    trained = train(base, tiny_data, tmp_path / "out", 1)
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(loaded.model.head.weight, trained.model.head.weight)
    resources = read_json(tmp_path / "out" / "training.json")["resources"]
    assert resources["peak_memory_bytes"] > 1e8
    assert 0 < resources["trainable_parameters"] == resources["total_parameters"]  # full


def test_two_processes_of_accelerate_give_what_one_gives(base, tiny_data, tmp_path):
    config = read_json(base / "config.json")
    write_json(
        base / "config.json", config | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    )
    options = ["--base", base, "--data", tiny_data, "--epochs", "2", "--token-dropout", "0", "--max-tokens", "64"]
    launches = {"one": ["python", "-m"], "two": ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m"]}
    for name, (program, *rest) in launches.items():
        command = [f".venv/bin/{program}", *rest, "training.finetune", *options, "--output", tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    texts = read_dataset(tiny_data).test.texts
    logits = [predict_logits(load_checkpoint(tmp_path / name), texts) for name in launches]
    histories = [read_json(tmp_path / name / "training.json")["history"] for name in launches]
    metrics = [[row["eval_macro_f1"] for row in history if "eval_macro_f1" in row] for history in histories]
    assert metrics[0] == pytest.approx(metrics[1])
    assert len(metrics[0]) == 2
    difference = float(np.abs(logits[0] - logits[1]).max())
    assert difference < 1e-3, f"largest difference of logits: {difference}"


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
def test_the_embeddings_and_the_lowest_layers_stay_as_they_are(tiny_bases, family):
    encoder = load_encoder(tiny_bases[family])
    encoder = adapt(encoder, "partial", 1)
    learning = [
        any(p.requires_grad for p in part.parameters()) for part in (encoder.embeddings, *encoder_layers(encoder))
    ]
    assert learning == [False, False, True]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
def test_lora_learns_little_and_is_merged_into_the_encoder(tiny_bases, tiny_data, family, tmp_path):
    fetch_base(f"dir:{tiny_bases[family]}", tmp_path / "base", tmp_path)
    trained = train(tmp_path / "base", tiny_data, tmp_path / "out", 1, "--strategy", "lora")
    loaded = load_checkpoint(tmp_path / "out")
    before = load_encoder(tmp_path / "base").state_dict()
    assert set(loaded.model.encoder.state_dict()) == set(before)
    assert not all(torch.equal(before[name], value) for name, value in trained.model.encoder.state_dict().items())
    resources = read_json(tmp_path / "out" / "training.json")["resources"]
    assert resources["trainable_parameters"] < resources["total_parameters"] / 2


def test_a_dropped_token_is_another_each_time_and_never_the_first_or_last(base, tiny_data):
    dataset = read_dataset(tiny_data)
    checkpoint = new_checkpoint(base, dataset.labels, 64, seed=1)
    items = _Varied(checkpoint, dataset.train, token_dropout=0.5)
    (whole,) = encode(checkpoint, dataset.train.texts[:1])
    seen = [items[0]["input_ids"] for _ in range(10)]
    assert len({tuple(ids) for ids in seen}) > 5
    assert {(ids[0], ids[-1]) for ids in seen} == {(whole[0], whole[-1])}
