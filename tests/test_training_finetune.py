import pytest
import torch

from training.bases import fetch_base
from training.examples import read_dataset
from training.files import read_json
from training.finetune import finetune, freeze, parse_options
from training.model import encoder_layers, load_checkpoint, load_encoder

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tiny_bases, tmp_path):
    fetch_base(f"dir:{tiny_bases['bert']}", tmp_path / "base", tmp_path)
    return tmp_path / "base"


def train(base, data, output, seed):
    options = parse_options(["--epochs", "1", "--seed", str(seed), "--max-tokens", "64"])
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
    assert 0 < resources["trainable_parameters"] < resources["total_parameters"]


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert"])
def test_the_embeddings_and_the_lowest_layers_stay_as_they_are(tiny_bases, family):
    encoder = load_encoder(tiny_bases[family])
    freeze(encoder, "partial", 1)
    learning = [
        any(p.requires_grad for p in part.parameters()) for part in (encoder.embeddings, *encoder_layers(encoder))
    ]
    assert learning == [False, False, True]
