from pathlib import Path

import numpy as np
import pytest

from build import bench
from build.exported import FP32, PLAIN
from training.examples import read_dataset
from training.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def onnx(released, pipeline) -> Path:
    """What the tiny pipeline exported."""
    steps, _ = pipeline
    return Path(steps[0]["dir"]) / ".local" / "build" / "onnx"


@pytest.fixture
def in_checkout(onnx, monkeypatch):
    monkeypatch.chdir(onnx.parent.parent.parent)


def test_every_engine_gives_the_same_logits_and_ours_nearly(onnx, in_checkout):
    checkpoint = onnx.parent / "checkpoint"
    ids = np.array([[0, 5, 6, 7, 2]])
    found = {}
    for engine in bench.list_engines(checkpoint, onnx):
        with engine.started(threads=1):
            found[engine.name] = engine.run(ids)[1]
    expected = found.pop(bench.EAGER)
    np.testing.assert_allclose(found.pop(bench.OURS), expected, atol=0.3)
    for name, logits in found.items():
        np.testing.assert_allclose(logits, expected, atol=1e-4, err_msg=name)


def test_engines_are_asked_in_turn_and_the_table_has_medians_and_ratios(onnx, in_checkout, tiny_data):
    checkpoint = onnx.parent / "checkpoint"
    engines = [engine for engine in bench.list_engines(checkpoint, onnx) if engine.kind != "torch-compiled"]
    windows = bench.read_windows(onnx, read_dataset(tiny_data).train.texts)
    with bench.ExitStack() as running:
        for engine in engines:
            running.enter_context(engine.started(1))
        bench.measure_latency(engines, windows, lengths=(16, 32), runs=4)
        bench.count_flips(engines, windows[:10], None)
    for engine in engines:
        assert {length: len(times) for length, times in engine.times.items()} == {16: 4, 32: 4}
    assert next(engine.flips for engine in engines if engine.name == bench.EAGER) == 0
    table = bench.make_table(engines, (16, 32))
    assert table.row_count == len(engines)
    assert next(iter(table.columns[1].cells)).endswith("(1.00)")  # ours, in its own unit


def test_an_engine_that_ends_says_which(onnx, in_checkout, tmp_path):
    engine = bench.Engine("broken", "onnxruntime", tmp_path / "none.onnx")
    with pytest.raises(bench.BenchError, match="broken: expected an answer"), engine.started(1):
        engine.run(np.array([[0, 2]]))
    assert engine.process.returncode is not None


def test_a_window_has_its_length_and_its_ends():
    windows = [np.array([[1, *range(10, 20), 2]])] * 30
    made = bench.make_windows(windows, 16, 3)
    assert [ids.shape for ids in made] == [(1, 16)] * 3
    assert all((ids[0, 0], ids[0, -1]) == (1, 2) for ids in made)


def test_fusion_leaves_fewer_nodes(onnx):
    nodes = read_json(onnx / "export.json")["nodes"]
    assert nodes[FP32] < nodes[PLAIN]
