"""The table against the peers: a checkpoint, its exported models and a release in, medians and ratios out.

Every engine is a process of its own (`build.engines`) with the same weights,
the same windows of 16 to 128 tokens and the same number of threads. They are
asked in turn, one run each, so that whatever else the machine does falls on all
alike; a figure is the median of its runs, a ratio that of two medians. Flips are
the decisions on the validation split that differ from PyTorch's.

    python -m build.bench               the engines that are installed
    python -m build.bench --peers       optimum-onnx and OpenVINO too, in environments of their own
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import DistilBertConfig, DistilBertModel

from build.ask import post
from build.export import trace
from build.exported import FP32, PLAIN, read_windows
from build.local import run_bucket, run_function
from training.examples import read_dataset
from training.files import write_json
from training.metrics import HALF, sigmoid
from training.model import Checkpoint, NeedsClassifier, load_checkpoint, save_checkpoint
from training.wide import WideBranch

LENGTHS = (16, 32, 64, 128)
TEXTS_A_REQUEST = (1, 8, 32)
OURS, EAGER = "ours, INT8", "PyTorch eager"
ENVIRONMENTS = {
    "optimum": ["optimum-onnx[onnxruntime]==0.1.0", "torch==2.13.0"],
    "openvino": ["openvino==2026.4.1", "nncf==3.4.0"],
}
"""What each peer needs: optimum-onnx pins an older transformers than ours."""
DISTILBERT_PIECES = 119_547
PAUSE_SECONDS = 0.03
"""Between two engines, in which the one before stops spinning; in 3 ms some did not."""


class BenchError(RuntimeError):
    """An engine did not start or answer."""


@dataclass
class Engine:
    """One row of the table."""

    name: str
    kind: str
    path: Path
    python: str = sys.executable
    deep_alone: bool = False
    """Its logits lack the wide branch's."""
    same_weights: bool = True
    times: dict[int, list[float]] = field(default_factory=dict)
    """Milliseconds by length in tokens."""
    flips: float | None = None
    peak_mb: float = 0.0
    process: subprocess.Popen[str] = field(init=False)

    def run(self, ids: np.ndarray) -> tuple[float, np.ndarray]:
        """Milliseconds and float32 [L] logits of int64 [1, T] ids; the first run waits until the engine has loaded."""
        asked, answers = self.process.stdin, self.process.stdout
        with suppress(BrokenPipeError):  # it has ended
            print(json.dumps(ids.tolist()), file=asked, flush=True)
        line = answers.readline() if answers else ""
        if not line:
            raise BenchError(f"{self.name}: expected an answer, found the process ended; its lines above say why")
        answer = json.loads(line)
        return answer["ms"], np.array(answer["logits"], np.float32)

    @contextmanager
    def started(self, threads: int) -> Iterator["Engine"]:
        """The engine's process, which loads while others do."""
        command = [self.python, "build/engines.py", self.kind, str(self.path), str(threads)]
        environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            yield self
        finally:
            self.process.terminate()
            self.process.communicate()

    def peak_megabytes(self) -> float:
        """The most that its process has held; 0 where there is no /proc."""
        status = Path(f"/proc/{self.process.pid}/status")
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
        return int(found[1]) * 1024 / 1e6 if found else 0.0

    def median(self, length: int) -> float:
        """Milliseconds a run of `length` tokens."""
        return float(np.median(self.times[length]))


def make_distilbert(labels: int, checkpoint: Checkpoint, folder: Path) -> None:  # pragma: no cover, as `main`
    """A checkpoint of DistilBERT-multilingual's architecture with random weights, and its ONNX file."""
    encoder = DistilBertModel._from_config(  # type: ignore[no-untyped-call]
        DistilBertConfig(vocab_size=DISTILBERT_PIECES), attn_implementation="eager", dtype=torch.float32
    )
    model = NeedsClassifier(encoder, labels).eval()
    made = Checkpoint(model, checkpoint.tokenizer, checkpoint.labels, "", checkpoint.max_tokens, {})
    save_checkpoint(made, folder)
    trace(made, folder / PLAIN)


def list_engines(checkpoint: Path, onnx: Path) -> list[Engine]:
    """The rows that need nothing installed beside the project."""
    return [
        Engine(OURS, "served", onnx),
        Engine(EAGER, "torch", checkpoint),
        Engine("PyTorch compiled", "torch-compiled", checkpoint),
        Engine("ONNX Runtime fp32", "onnxruntime", onnx / PLAIN),
        Engine("ONNX Runtime fp32, fused", "onnxruntime", onnx / FP32),
    ]


def list_distilbert(folder: Path) -> list[Engine]:  # pragma: no cover, as `main`
    """The architecture of the published study's model, which has other weights."""
    return [
        Engine("DistilBERT-multilingual, PyTorch eager", "torch", folder, same_weights=False),
        Engine("DistilBERT-multilingual, ONNX Runtime fp32", "onnxruntime", folder / PLAIN, same_weights=False),
    ]


def list_peers(checkpoint: Path, onnx: Path, pythons: dict[str, str]) -> list[Engine]:
    """The peers; `pythons` names the Python of each one's environment."""
    return [
        Engine("optimum-onnx, default INT8", "optimum", checkpoint, pythons["optimum"], deep_alone=True),
        Engine("OpenVINO fp32", "openvino", onnx / PLAIN, pythons["openvino"]),
        Engine("OpenVINO, INT8 weights", "openvino-weights", onnx / PLAIN, pythons["openvino"]),
        Engine("OpenVINO, NNCF INT8", "openvino-nncf", onnx / PLAIN, pythons["openvino"]),
    ]


def make_environments(folder: Path) -> dict[str, str]:  # pragma: no cover, as `main`
    """A virtual environment for each peer, made once; returns their Pythons."""
    pythons = {}
    for name, packages in ENVIRONMENTS.items():
        python, done = folder / name / "bin" / "python", folder / name / ".installed"
        if not done.exists() or done.read_text() != "\n".join(packages):
            venv.create(folder / name, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            done.write_text("\n".join(packages))
        pythons[name] = str(python)
    return pythons


def make_windows(windows: list[np.ndarray], length: int, count: int) -> list[np.ndarray]:
    """`count` int64 [1, length] windows of real texts, one after another, between a window's own first and last ids."""
    first, last = windows[0][0, :1], windows[0][0, -1:]
    room = length - 2
    body = np.resize(np.concatenate([ids[0, 1:-1] for ids in windows]), count * room)  # few texts come round again
    return [np.concatenate([first, body[at * room : (at + 1) * room], last])[None] for at in range(count)]


def measure_latency(
    engines: list[Engine], windows: list[np.ndarray], lengths: Sequence[int] = LENGTHS, runs: int = 60
) -> None:
    """Fill each engine's times, asking all in turn, in another order each time."""
    order = np.random.default_rng(0)
    with tqdm(total=runs * len(lengths), desc="latency", leave=False) as progress:
        for length in lengths:
            inputs = make_windows(windows, length, 5)
            for engine in engines:
                engine.times[length] = []
                for ids in inputs:
                    engine.run(ids)  # shapes seen, caches warm
            for i in range(runs):
                for engine in (engines[k] for k in order.permutation(len(engines))):  # no one's neighbour is always one
                    time.sleep(PAUSE_SECONDS)
                    engine.times[length].append(engine.run(inputs[i % len(inputs)])[0])
                progress.update()


def count_flips(engines: list[Engine], windows: list[np.ndarray], wide: WideBranch | None) -> None:
    """Fill each engine's share of decisions at 0.5 that are not PyTorch's."""

    def decide(engine: Engine) -> np.ndarray:
        logits = np.stack([engine.run(ids)[1] for ids in tqdm(windows, engine.name, leave=False)])  # [B, L]
        if engine.deep_alone and wide:
            for row, ids in zip(logits, windows, strict=True):
                tensor = torch.from_numpy(ids)
                row[:] = wide(torch.from_numpy(row[None]), tensor, torch.ones_like(tensor))[0].numpy()
        return sigmoid(logits) >= HALF

    same = [engine for engine in engines if engine.same_weights]
    expected = decide(next(engine for engine in same if engine.name == EAGER))
    for engine in same:
        engine.flips = float((decide(engine) != expected).mean())


def make_table(engines: list[Engine], lengths: Sequence[int] = LENGTHS) -> Table:
    """Median milliseconds, and in brackets how many times as long as ours."""
    ours = next(engine for engine in engines if engine.name == OURS)
    table = Table("", *(f"{length} tokens" for length in lengths), "flips", "peak MB")
    for engine in engines:
        cells = [f"{engine.median(n):.1f} ms ({engine.median(n) / ours.median(n):.2f})" for n in lengths]
        table.add_row(
            engine.name, *cells, "" if engine.flips is None else f"{engine.flips:.2%}", f"{engine.peak_mb:.0f}"
        )
    return table


def measure_throughput(texts: list[str], requests: int) -> dict[int, float]:  # pragma: no cover, as `main`
    """Texts a second through the function over HTTP, one request after another, by texts a request."""
    with run_bucket() as bucket, run_function(bucket) as address:
        post(address, {"text": texts[0]})
        times: dict[int, list[float]] = {size: [] for size in TEXTS_A_REQUEST}
        for i in tqdm(range(requests), "requests", leave=False):
            for size in TEXTS_A_REQUEST:
                chosen = [texts[(i * size + k) % len(texts)] for k in range(size)]
                started = time.perf_counter()
                post(address, {"texts": chosen})
                times[size].append((time.perf_counter() - started) / size)
    return {size: float(1 / np.median(values)) for size, values in times.items()}


def main() -> None:  # pragma: no cover, `make bench`: minutes, on a real release; its parts are tested on a tiny one
    """Print the table, and write it to .local/bench.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--onnx", type=Path, default=Path(".local/build/onnx"))
    parser.add_argument("--data", type=Path, default=Path("training/data"))
    parser.add_argument("--peers", action="store_true", help="make environments for optimum-onnx and OpenVINO too")
    parser.add_argument("--runs", type=int, default=60, help="of each engine at each length")
    parser.add_argument("--threads", type=int, default=1, help="of each engine; 1 is what a default deploy has")
    parser.add_argument("--requests", type=int, default=20, help="over HTTP for each size; 0 leaves that out")
    args = parser.parse_args()
    texts = read_dataset(args.data).validation.texts
    windows = read_windows(args.onnx, texts)
    checkpoint_folder = Path(json.loads((args.onnx / "export.json").read_text("utf-8"))["checkpoint"])
    checkpoint = load_checkpoint(checkpoint_folder)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        distilbert = Path(scratch) / "distilbert"
        make_distilbert(len(checkpoint.labels), checkpoint, distilbert)
        write_json(args.onnx / "windows.json", [ids.tolist() for ids in windows])
        engines = list_engines(checkpoint_folder, args.onnx) + list_distilbert(distilbert)
        if args.peers:
            engines += list_peers(checkpoint_folder, args.onnx, make_environments(Path(".local/peers")))
        for engine in engines:
            running.enter_context(engine.started(args.threads))
        measure_latency(engines, windows, runs=args.runs)
        count_flips(engines, windows, getattr(checkpoint.model, "wide", None))
        for engine in engines:
            engine.peak_mb = engine.peak_megabytes()
    console.print(make_table(engines))
    rows = {e.name: {"ms": {n: e.median(n) for n in LENGTHS}, "flips": e.flips, "peak_mb": e.peak_mb} for e in engines}
    found: dict = {"engines": rows}
    if args.requests:
        found["texts_a_second"] = measure_throughput(texts, args.requests)
        rates = ", ".join(f"{rate:.0f} at {size}" for size, rate in found["texts_a_second"].items())
        console.print(f"texts a second over HTTP, by texts a request: {rates}")
    write_json(Path(".local/bench.json"), found)


if __name__ == "__main__":
    main()
