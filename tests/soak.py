"""The long proofs: load, refreshes, hostile requests, cold start; into `.local/soak.json`.

Each takes what it is to be run on and how long, and returns what it measured;
the command fails where that breaks a bound. `tests/test_soak.py` runs them at a
hundredth of their length.

    make soak
"""

import argparse
import http.client
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import hypothesis.strategies as st
import numpy as np
import onnx
import requests
from hypothesis import HealthCheck, given, settings
from known import LABELS, write_manifest
from onnx import helper, numpy_helper
from proxy import run_proxy

from build import local
from build.publish import FILES, Bucket, promote, publish
from function.manifest import MODEL
from training.examples import read_dataset
from training.files import write_json

ROOT = Path(__file__).parent.parent
RESULT = Path(".local/soak.json")
JSON = {"Content-Type": "application/json"}
BOUNDS: dict[str, Callable[[dict], bool]] = {
    "load: nothing wrong, nothing lost": lambda f: f["load"]["wrong"] == f["load"]["lost"] == 0,
    "load: a rate without a refusal": lambda f: f["load"]["highest_calm_rate"] > 0,
    "load: p99 at most 3 times the unloaded one": lambda f: f["load"]["p99_ratio"] <= 3,
    "load: memory at most 1.05 times": lambda f: f["load"]["memory"]["growth"] <= 1.05,
    "load: memory at most 160 MB": lambda f: f["load"]["memory"]["most_mb"] <= 160,
    "refreshes: every answer is one release's": lambda f: f["refreshes"]["wrong"] == 0,
    "refreshes: memory at most 1.05 times": lambda f: f["refreshes"]["memory"]["growth"] <= 1.05,
    "hostile: only answers of the contract": lambda f: f["hostile"]["count_wrong"] == 0,
    "cold start: at most 3 times hello": lambda f: f["cold_start"]["times_hello"] <= 3,
    "cold start: at least 12 times faster than plain": lambda f: f["cold_start"]["times_faster_than_plain"] >= 12,
    "cold start: distant within 2 s": lambda f: f["cold_start"]["distant_seconds"] <= 2,
    "cold start: at most 3 round trips": lambda f: f["cold_start"]["distant_round_trips"] <= 3,
}
CLIENTS = 64
TEXTS = 50
SETTLE_SECONDS = 0.5


# --- what is asked -----------------------------------------------------------------------------------------------


def post(address: str, body: bytes, headers: dict[str, str] = JSON, chunked: bool = False) -> tuple[int, str, bytes]:
    """Status, content type and body of one request on a connection of its own."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    try:
        content = (body[at : at + 7] for at in range(0, len(body), 7)) if chunked else body
        connection.request("POST", "/", content, headers, encode_chunked=chunked)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read()
    finally:
        connection.close()


def ask(address: str, text: str) -> tuple[int, dict]:
    """Status and answer to a text."""
    status, _, content = post(address, json.dumps({"text": text}).encode())
    return status, json.loads(content)


def percentile(values: list[float], share: float) -> float:
    """The value that a share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# --- memory --------------------------------------------------------------------------------------------------------


@contextmanager
def watch_memory(address: str) -> Iterator[list[float]]:
    """Resident megabytes of the function's worker, five times a second."""
    samples, stop = [], threading.Event()

    def sample() -> None:
        while not stop.wait(0.2):
            samples.append(local.resident_megabytes(address))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def compare_tenths(samples: list[float]) -> dict[str, float]:
    """Mean memory over the first and the last tenth, and the most."""
    tenth = max(1, len(samples) // 10)
    first, last = statistics.mean(samples[:tenth]), statistics.mean(samples[-tenth:])
    return {"first_mb": first, "last_mb": last, "growth": last / first, "most_mb": max(samples)}


# --- load ----------------------------------------------------------------------------------------------------------


def run_load(address: str, texts: list[str], rate: float, seconds: float) -> list[tuple[str, int, dict, float]]:
    """Open loop: requests begin at their time, whether others were answered or not.

    Returns text, status, answer and seconds since the time it was due; a lost request has status 0.
    """
    start = time.monotonic() + 0.1

    def send(i: int) -> tuple[str, int, dict, float]:
        due, text = start + i / rate, texts[i % len(texts)]
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            status, answer = ask(address, text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            status, answer = 0, {"lost": repr(error)}
        return text, status, answer, time.monotonic() - due

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(send, range(int(rate * seconds))))


def prove_load(address: str, texts: list[str], seconds: float) -> dict:
    """Twice the highest rate that is calm, for `seconds`."""
    expected = {text: ask(address, text)[1] for text in texts}
    unloaded = []
    for text in texts * 6:
        began = time.monotonic()
        ask(address, text)
        unloaded.append(time.monotonic() - began)
    calm = percentile(unloaded, 0.99)
    highest, rate = 0.0, 0.05 / statistics.median(unloaded)

    def is_calm() -> bool:
        done = run_load(address, texts, rate, max(len(texts) / rate, seconds / 100))  # every text at least once
        return percentile([took for *_, took in done], 0.99) <= 2 * calm and {status for _, status, *_ in done} == {200}

    while is_calm() or is_calm():  # a hiccup of the machine is no limit of the function
        highest, rate = rate, rate * 1.15
    time.sleep(SETTLE_SECONDS)
    with watch_memory(address) as memory:
        done = run_load(address, texts, 2 * (highest or rate), seconds)
    accepted = [took for _, status, _, took in done if status == 200]
    return {
        "unloaded_p99_ms": 1000 * calm,
        "highest_calm_rate": highest,
        "rate": 2 * (highest or rate),
        "requests": len(done),
        "accepted": len(accepted),
        "shed": sum(status == 503 for _, status, *_ in done),
        "lost": sum(status not in (200, 503) for _, status, *_ in done),
        "wrong": sum(status == 200 and answer != expected[text] for text, status, answer, _ in done),
        "accepted_p99_ms": 1000 * percentile(accepted, 0.99),
        "p99_ratio": percentile(accepted, 0.99) / calm,
        "memory": compare_tenths(memory),
    }


# --- refreshes -----------------------------------------------------------------------------------------------------


def shift_logits(model: bytes, by: float) -> bytes:
    """The same model with every logit higher: another release of the same size, with answers of its own."""
    document = onnx.load_from_string(model)
    graph = document.graph
    last = next(node for node in graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "unshifted"
    graph.initializer.append(numpy_helper.from_array(np.array(by, np.float32), "shift"))
    graph.node.append(helper.make_node("Add", ["unshifted", "shift"], ["logits"]))
    return document.SerializeToString()


def publish_pair(uri: str, folder: Path, shape: dict) -> list[str]:
    """Two releases of the model in `folder`, the second with shifted logits; the first is made current."""
    bucket, releases = Bucket(uri), []
    for by in (0.0, 1.0):
        new = folder.with_name(f"{folder.name}-{by}")
        new.mkdir()
        for name in FILES:
            (new / name).write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
        (new / MODEL).write_bytes(shift_logits((folder / MODEL).read_bytes(), by))
        verified = {"thresholds": [0.5] * len(shape["labels"]), "flips": 0.0, "logit_difference": 0.0}
        made = {"provenance": {"base": "soak"}, **shape}
        write_json(new / "metrics.json", {"export": made, "verification": verified, "quantization": {"recipe": "none"}})
        releases.append(publish(bucket, new, write_manifest(new)))
    promote(bucket, releases[0])
    return releases


def prove_refreshes(address: str, uri: str, releases: list[str], texts: list[str], count: int) -> dict:
    """`count` refreshes under load, the two releases taking turns; each answer must be one release's own."""
    bucket, expected = Bucket(uri), {}
    for release in releases:
        turn(address, bucket, release)
        expected |= {(release, text): ask(address, text)[1] for text in texts}
    found, stop = [], threading.Event()

    def ask_on(seed: int) -> None:
        choose = random.Random(seed)
        while not stop.is_set():
            text = choose.choice(texts)
            try:
                status, answer = ask(address, text)
            except (OSError, http.client.HTTPException, ValueError) as error:
                status, answer = 0, {"lost": repr(error)}
            found.append(status == 200 and answer == expected.get((answer.get("release"), text)))

    threads = [threading.Thread(target=ask_on, args=(seed,)) for seed in range(2)]
    with watch_memory(address) as memory:
        for thread in threads:
            thread.start()
        try:
            for release in itertools.islice(itertools.cycle(releases), count):
                turn(address, bucket, release)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    return {"refreshes": count, "answers": len(found), "wrong": found.count(False), "memory": compare_tenths(memory)}


def turn(address: str, bucket: Bucket, release: str) -> None:
    """Promote a release and wait until it is served."""
    promote(bucket, release)
    deadline = time.monotonic() + 30
    while requests.get(f"{address}/ready", timeout=30).json()["release"] != release:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{release}: expected it to be served within 30 s")


# --- hostile requests ----------------------------------------------------------------------------------------------

ODD = [
    "\x00",
    "\ud800",
    "\udfff",
    "각",
    "\u1100\u1161\u11a8",
    "👨\u200d👩\u200d👧",
    "🇰🇷",
    "\u202e\u200f",
    "\ufeff",
    "'",
    '"',
]
TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(ODD), min_size=1, max_size=20).map("".join),
    st.characters().map(str),
    st.sampled_from(["가", "👍🏽", "\u1100\u1161", " ", "친구야 "]).flatmap(
        lambda unit: st.sampled_from([1, 4999, 5000, 5001]).map(lambda size: (unit * size)[:size])
    ),
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), TEXT),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
MEMBERS = ["text", "texts", "instances", "calls", "threshold", "explain", "other"]
BODY = st.one_of(
    st.binary(max_size=60),
    VALUE.map(json.dumps).map(str.encode),
    st.dictionaries(st.sampled_from(MEMBERS), VALUE, max_size=3).map(json.dumps).map(str.encode),
    TEXT.map(lambda text: json.dumps({"text": text}).encode()),
    TEXT.map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.lists(TEXT, max_size=5).map(lambda texts: json.dumps({"texts": texts}).encode()),
    st.lists(st.lists(st.none() | TEXT, max_size=2), max_size=5).map(
        lambda calls: json.dumps({"calls": calls}).encode()
    ),
    st.integers(1, 50_000).map(lambda depth: b'{"text":' + b"[" * depth),
    st.integers(1, 6_000).map(lambda digits: b'{"text": "a", "threshold": ' + b"9" * digits + b"}"),
    TEXT.map(lambda text: f'{{"text": {json.dumps(text)}, "text": "나"}}'.encode()),
)
KIND = st.sampled_from(
    [JSON] * 6 + [{"Content-Type": kind} for kind in ("text/html", "application/json; charset=utf-16", "\u00e9", "")]
)


def prove_hostile(address: str, count: int) -> dict:
    """Generated requests; each must get an answer of the contract."""
    found: dict[int, int] = {}
    wrong: list[str] = []

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(BODY, KIND, st.booleans())
    def send(body: bytes, headers: dict[str, str], chunked: bool) -> None:
        status, kind, answer = post(address, body, headers, chunked)
        found[status] = found.get(status, 0) + 1
        told = status < 500 and kind.startswith("application/") and b"Traceback" not in answer and json.loads(answer)
        if not told:
            wrong.append(f"{status} {kind} to {body[:200]!r}")

    send()
    return {"requests": sum(found.values()), "by_status": found, "wrong": wrong[:10], "count_wrong": len(wrong)}


# --- cold start ----------------------------------------------------------------------------------------------------


FIRST = {"text": "오늘은 하루 종일 마음이 불안하고 지쳤다."}


def fresh(folder: Path) -> Path:
    """A cache that nothing was kept in."""
    return folder / f"cache-{uuid.uuid4().hex}"


def measure_first_answer(
    source: str, environment: dict[str, str], prefix: list[str], body: dict, log: Path | None = None
) -> tuple[float, float]:
    """Seconds from a functions-framework process's start to its first answer, and megabytes resident after it."""
    port = local.free_port()
    framework = str(Path(sys.executable).with_name("functions-framework"))
    command = [*prefix, framework, "--target", "needs", "--source", source, "--host", "127.0.0.1", "--port", str(port)]
    stderr = (log or Path(os.devnull)).open("w")
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=stderr)
    try:
        while time.monotonic() < began + 120:
            try:
                status, _, _ = post(f"http://127.0.0.1:{port}", json.dumps(body).encode())
            except OSError:
                time.sleep(0.002)
                continue
            if status == 200:
                took = time.monotonic() - began
                return took, local.resident_megabytes(f"http://127.0.0.1:{port}")
        raise TimeoutError(f"{source}: expected an answer within 120 s")
    finally:
        process.terminate()
        process.wait(15)
        stderr.close()


def measure_seconds(command: list[str]) -> float:
    """How long a command takes."""
    began = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began


def read_parts(log: Path) -> dict[str, float]:
    """The milliseconds that the parts of a load took, from the function's own log."""
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return next(entry["milliseconds"] for entry in entries if entry["message"].endswith(" loaded"))


def upload_plain_checkpoint(folder: Path) -> None:
    """DistilBERT-multilingual's architecture with random weights, and a tokenizer of its kind, into the bucket."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(119542))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    config = DistilBertConfig(vocab_size=119547, num_labels=len(LABELS))
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    bucket = Bucket(f"gs://{local.BUCKET}/plain")
    for path in folder.iterdir():
        bucket.write(path.name, path.read_bytes(), generation=0)


def prove_cold_start(bucket: str, uri: str, runs: int, folder: Path) -> dict:
    """Medians of first answers, the three functions in turn, and ours before a distant bucket on one CPU."""
    upload_plain_checkpoint(folder / "plain")
    ours = {"MODEL_URI": uri, "STORAGE_EMULATOR_HOST": bucket}
    twins = str(ROOT / "tests" / "twins")
    our_main, parts = str(ROOT / "main.py"), list[dict[str, float]]()

    def measure_ours(settings: dict[str, str], prefix: list[str]) -> tuple[float, float]:
        log = folder / "cold.log"
        took = measure_first_answer(our_main, {**settings, "CACHE_DIR": str(fresh(folder))}, prefix, FIRST, log)
        parts.append(read_parts(log))
        return took

    kinds: dict[str, Callable[[], tuple[float, float]]] = {
        "hello": lambda: measure_first_answer(f"{twins}/hello.py", {}, [], {}),
        "ours": lambda: measure_ours(ours, []),
        "plain": lambda: measure_first_answer(f"{twins}/plain.py", {**ours, "BUCKET": local.BUCKET}, [], FIRST),
    }
    took: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, measure in kinds.items():
            took[kind].append(measure())
    medians = {kind: statistics.median(seconds for seconds, _ in values) for kind, values in took.items()}
    memory = {kind: statistics.median(megabytes for _, megabytes in values) for kind, values in took.items()}
    loads = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    bare = [measure_seconds([sys.executable, "-c", "pass"]) for _ in range(runs)]
    distant, rounds = [], []
    for _ in range(max(1, runs // 3)):
        with run_proxy(bucket, delay_seconds=0.025, bytes_per_second=50e6) as proxy:
            distant.append(measure_ours({**ours, "STORAGE_EMULATOR_HOST": proxy.address}, ["taskset", "-c", "0"])[0])
            rounds.append(proxy.count_in_a_row())
    return {
        "runs": runs,
        **{f"{kind}_seconds": value for kind, value in medians.items()},
        **{f"{kind}_mb": value for kind, value in memory.items()},
        "times_hello": medians["ours"] / medians["hello"],
        "times_faster_than_plain": medians["plain"] / medians["ours"],
        "interpreter_ms": 1000 * statistics.median(bare),
        "framework_ms": 1000 * (medians["hello"] - statistics.median(bare)),
        "load_ms": loads,
        "distant_seconds": statistics.median(distant),
        "distant_round_trips": max(rounds),
    }


# --- all of them ---------------------------------------------------------------------------------------------------


def copy_current(folder: Path) -> dict:
    """The release that is current in the embedded bucket, and what its manifest says of the model."""
    kept = local.BUCKET_FOLDER / local.BUCKET / "needs"
    pointer = kept / "current.json"
    if not pointer.exists():
        raise SystemExit("soak: expected a release in the embedded bucket, found none; make release first")
    release = kept / "releases" / json.loads(pointer.read_text("utf-8"))["release"]
    manifest = json.loads((release / "manifest.json").read_text("utf-8"))
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((release / name).read_bytes())
    labels = [{key: label[key] for key in ("name", "id")} for label in manifest["labels"]]
    return {"labels": labels, "max_tokens": manifest["max_tokens"], "prefix": manifest["prefix"]}


@contextmanager
def use_bucket(address: str) -> Iterator[None]:
    """Clients of this process ask this server."""
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    os.environ["STORAGE_EMULATOR_HOST"] = address
    try:
        yield
    finally:
        os.environ.pop("STORAGE_EMULATOR_HOST")
        if before:
            os.environ["STORAGE_EMULATOR_HOST"] = before


def run_proofs(folder: Path, shape: dict, texts: list[str], share: float, only: str = "") -> dict:
    """Each proof at a share of its full length, on a bucket and function processes of its own."""
    with local.run_bucket(folder / "bucket") as bucket, use_bucket(bucket):
        uri = f"gs://{local.BUCKET}/soak"
        releases = publish_pair(uri, folder / "release", shape)
        common = {"MODEL_URI": uri, "THREADS": "64", "GUNICORN_LOG_LEVEL": "critical"}

        @contextmanager
        def run(**others: str) -> Iterator[str]:
            environment = {**common, "CACHE_DIR": str(fresh(folder)), **others}
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(cores)})  # the function inherits this core
            try:
                with (
                    (folder / "log").open("a") as log,
                    local.run_function(bucket, environment=environment, stderr=log) as address,
                ):
                    os.sched_setaffinity(0, {max(cores)})  # and is asked from another
                    yield address
            finally:
                os.sched_setaffinity(0, cores)

        def load() -> dict:
            with run() as address:
                return prove_load(address, texts, 600 * share)

        def refreshes() -> dict:
            with run(REFRESH_SECONDS="0.01", MAX_QUEUE="8") as address:
                return prove_refreshes(address, uri, releases, texts[:5], int(1000 * share))

        def hostile() -> dict:
            with run(MAX_QUEUE="8") as address:
                return prove_hostile(address, int(10_000 * share))

        def cold_start() -> dict:
            return prove_cold_start(bucket, uri, max(1, round(9 * share)), folder)

        proofs = {"load": load, "refreshes": refreshes, "hostile": hostile, "cold_start": cold_start}
        done = {}
        for name, proof in proofs.items():
            if only in ("", name):
                began = time.monotonic()
                done[name] = proof() | {"took_seconds": time.monotonic() - began}
                print(name, json.dumps(done[name], indent=1), flush=True)
        return done


def main() -> None:
    """Run the proofs on the release that is current here."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the full length")
    parser.add_argument("--only", default="", help="load, refreshes, hostile or cold_start")
    args = parser.parse_args()
    texts = read_dataset(Path("training/data")).test.texts[:TEXTS]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = copy_current(folder / "release")
        found = run_proofs(folder, shape, texts, args.share, args.only)
    known = json.loads(RESULT.read_text()) if RESULT.exists() and args.only else {}
    write_json(RESULT, {**known, **found})
    broken = [
        name for name, holds in BOUNDS.items() if name.split(":")[0].replace(" ", "_") in found and not holds(found)
    ]
    if broken:
        raise SystemExit(f"soak: expected every bound to hold, found broken: {'; '.join(broken)}; see {RESULT}")


if __name__ == "__main__":
    main()
