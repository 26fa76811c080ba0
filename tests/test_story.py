"""The whole story with the real gcloud against a loopback stand-in: deploy to refresh to rollback.

`make story` runs this file and shows what happens.
"""

import io
import json
import shlex
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import requests
from cloud import PROJECT, REGION, run_cloud

from training.files import write_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BUCKET, DATA = f"{PROJECT}-needs", f"gs://{PROJECT}-needs/needs/data"
LABELS = [{"name": "소속감", "id": "belonging"}, {"name": "즐거움", "id": "enjoyment"}]
SUBMIT = "gcloud builds submit --project MY-PROJECT --region asia-northeast3 --ignore-file=.gcloudignore-build"
PLAIN_DEPLOY = next(line for line in README.splitlines() if line.startswith("gcloud functions deploy"))
ROLLBACK = ".venv/bin/python -m build.rollback --model-uri gs://MY-PROJECT-needs/needs --to previous"
FOLLOW_SECONDS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed"),
]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    with run_cloud(tmp_path_factory.mktemp("cloud"), ROOT / ".venv") as cloud:
        yield cloud


def write_texts(path: Path, first: int, count: int, *, wrong: bool = False) -> Path:
    """Texts in which a word gives each need away; or the other need, where they are wrong."""
    lines = []
    for i in range(first, first + count):
        expressed = [[], ["소속감"], ["즐거움"], ["소속감", "즐거움"]][i % 4]
        words = ["우리 팀" if "소속감" in expressed else "혼자", "좋 다" if "즐거움" in expressed else "싫 다"]
        needs = [label["name"] for label in LABELS if (label["name"] in expressed) != wrong]
        lines.append(json.dumps({"text": f"오늘 {' '.join(words)} {'정말 ' * (i // 4 % 5)}{i}", "needs": needs}))
    path.write_text("\n".join(lines), "utf-8")
    return path


def parameters(tiny_bases) -> str:
    """For a tiny encoder."""
    return f"_BASE=dir:{tiny_bases['bert']},_EPOCHS=1,_STUDENT_LAYERS=0,_TORCH_INDEX=none,_MAX_FLIPS=1,_MAX_F1_LOSS=1"


def ask(address: str) -> tuple[int, dict]:
    answer = requests.post(address, json={"text": "오늘 우리 팀 좋 다"}, timeout=60)
    return answer.status_code, answer.json()


def follow(address: str, release: str) -> None:
    """Until the function answers with a release."""
    deadline = time.monotonic() + FOLLOW_SECONDS
    while (found := ask(address)[1].get("release")) != release:
        assert time.monotonic() < deadline, f"expected {release}, found {found}"
        time.sleep(0.2)


def current(cloud) -> dict:
    return json.loads(cloud.read_object(BUCKET, "needs/current.json"))


def last_build(cloud) -> tuple[str, str]:
    """How the newest build ended, and what it said."""
    cloud.wait()
    build = list(cloud.builds.values())[-1]
    return build["status"], cloud.log_of(build)


def rights_of(cloud, part: str) -> set[tuple[str, str]]:
    """Where an account has which roles."""
    member = f"serviceAccount:needs-{part}@{PROJECT}.iam.gserviceaccount.com"
    return {
        (where, binding["role"].removeprefix("roles/"))
        for where, policy in cloud.policies.items()
        for binding in policy["bindings"]
        if member in binding["members"]
    }


def as_in_readme(command: str, *more: str) -> list[str]:
    """A command that stands in the README, for this project, and options more. `test_readme` knows of these calls."""
    assert f"{command}\n" in README
    return [*shlex.split(command.replace("MY-PROJECT", PROJECT)), *more]


def say(line: str) -> None:
    print(f"\n### {line}", flush=True)


def test_from_nothing_to_a_rollback(cloud, tiny_bases, tmp_path):
    deploy = as_in_readme("build/deploy.sh --project MY-PROJECT", "--refresh-seconds", "1")
    say("deploy from nothing: a private function that has no release yet")
    said = cloud.run(*deploy).stdout
    assert "No release is there yet" in said
    assert ask(cloud.services["needs"]["status"]["url"])[0] == 503
    assert cloud.accounts.keys() == {f"needs-{part}@{PROJECT}.iam.gserviceaccount.com" for part in ("run", "build")}
    assert rights_of(cloud, "run") == {(BUCKET, "storage.objectViewer")}
    assert rights_of(cloud, "build") == {
        (BUCKET, "storage.objectUser"),
        (BUCKET, "storage.legacyBucketReader"),
        (f"projects/{PROJECT}", "logging.logWriter"),
        (f"projects/{PROJECT}", "run.builder"),
    }
    assert cloud.buckets[BUCKET]["versioning"] == {"enabled": True}

    say("a second deploy lets the build train on Vertex AI and deploy")
    cloud.run(*deploy, "--build-may-deploy", "--vertex")
    assert rights_of(cloud, "build") >= {
        (f"projects/{PROJECT}", "run.sourceDeveloper"),
        (f"projects/{PROJECT}", "aiplatform.user"),
    }

    say("first build, submitted from the source: it trains on Vertex AI and deploys")
    own = tmp_path / "path/to/folder"
    own.mkdir(parents=True)
    write_json(own / "labels.json", LABELS)
    write_texts(own / "a.jsonl", 0, 120)
    upload = as_in_readme("gcloud storage cp path/to/folder/* gs://MY-PROJECT-needs/needs/data/")
    cloud.run("bash", "-c", f"cd {tmp_path} && {' '.join(upload)}")
    *submit, substitutions = as_in_readme(f"{SUBMIT} --substitutions=_DATA=gs://MY-PROJECT-needs/needs/data")
    staging = ["--gcs-source-staging-dir", f"gs://{BUCKET}/staging"]
    there = "_TRAIN_ON=vertex,_VERTEX_POLL_SECONDS=1,_DEPLOY=--refresh-seconds 1"
    cloud.run(*submit, *staging, f"{substitutions},{parameters(tiny_bases)},{there}")
    status, log = last_build(cloud)
    assert (status, log.count("skipped: trained on vertex")) == ("SUCCESS", 2)
    (job,) = cloud.custom_jobs.values()
    container = job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    assert "build.local steps finetune,distill" in container["args"][1]
    first = current(cloud)["release"]
    service = cloud.services["needs"]
    probe = service["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
    assert probe["httpGet"]["path"] == "/ready"  # from now on it loads the release
    address = service["status"]["url"]
    process = cloud.processes[address]
    assert ask(address)[1]["release"] == first

    say("a schedule; the job fires, and nothing is new")
    schedule = as_in_readme("build/schedule.sh --project MY-PROJECT", "--set", parameters(tiny_bases))
    for _ in range(2):
        cloud.run(*schedule)
    assert (cloud.jobs["needs-refresh"]["schedule"], cloud.jobs["needs-refresh"]["timeZone"]) == (
        "0 4 * * 1",
        "Asia/Seoul",
    )
    assert rights_of(cloud, "schedule") == {(f"projects/{PROJECT}", "cloudbuild.builds.editor")}
    cloud.fire("needs-refresh")
    status, log = last_build(cloud)
    assert status == "SUCCESS"
    assert f"nothing new: {first}, which is served, was made from the same inputs" in log

    say("new texts; the job fires, and the running process serves what was learned from them")
    cloud.run("gcloud", "storage", "cp", str(write_texts(tmp_path / "b.jsonl", 120, 60)), f"{DATA}/")
    cloud.fire("needs-refresh")
    assert last_build(cloud)[0] == "SUCCESS"
    second = current(cloud)["release"]
    assert (current(cloud)["sequence"], second != first) == (2, True)
    follow(address, second)

    say("wrong labels: the third release is refused, and a second try of it is nothing new")
    write_texts(tmp_path / "train.jsonl", 0, 120, wrong=True)
    write_texts(tmp_path / "validation.jsonl", 120, 40, wrong=True)
    write_texts(tmp_path / "test.jsonl", 160, 40)
    names = ("train", "validation", "test")
    cloud.run("gcloud", "storage", "cp", *(str(tmp_path / f"{name}.jsonl") for name in names), f"{DATA}/")
    cloud.fire("needs-refresh")
    status, log = last_build(cloud)
    assert status == "FAILURE"
    assert "published, not promoted: macro-F1: expected at least 0.5, found" in log
    cloud.fire("needs-refresh")
    status, log = last_build(cloud)
    assert (status, "was refused: macro-F1" in log) == ("SUCCESS", True)
    assert ask(address)[1]["release"] == second

    say("rollback: the function follows, and the schedule does not undo it")
    cloud.run(*as_in_readme(ROLLBACK))
    follow(address, first)
    assert (current(cloud)["sequence"], current(cloud)["previous"]) == (3, second)
    for name in names:
        cloud.run("gcloud", "storage", "rm", f"{DATA}/{name}.jsonl")
    cloud.fire("needs-refresh")
    status, log = last_build(cloud)
    assert (status, f"nothing new: {second}, which was served once" in log) == ("SUCCESS", True)
    assert ask(address)[1]["release"] == first

    say("status")
    said = cloud.run(*as_in_readme("make status MODEL_URI=gs://MY-PROJECT-needs/needs PROJECT=MY-PROJECT")).stdout
    print(said)
    assert f"served: {first}, promotion 3" in said
    assert "refused: macro-F1" in said
    assert "needs-refresh: 0 4 * * 1 (Asia/Seoul), next" in said
    assert cloud.processes[address] is process
    assert process.poll() is None


@pytest.fixture
def bucket_there(cloud):
    """As after a first deploy."""
    requests.post(f"{cloud.storage}/storage/v1/b", json={"name": BUCKET}, timeout=60)


def test_the_plain_functions_deploy_of_the_readme_serves(cloud):
    cloud.run(*as_in_readme(PLAIN_DEPLOY))
    address = cloud.functions["needs-plain"]["serviceConfig"]["uri"]
    assert requests.get(f"{address}/health", timeout=60).json() == {"status": "ok"}
    assert ask(address)[0] == (200 if "needs" in cloud.services else 503)  # the story has made a release


def test_the_function_upload_holds_its_own_files_and_nothing_else(cloud, tmp_path):
    names = {
        name
        for archive in cloud.images.values()
        if archive[:2] == b"PK"
        for name in zipfile.ZipFile(io.BytesIO(archive)).namelist()
        if not name.endswith("/")
    }
    function = {f"function/{path.name}" for path in (ROOT / "function").iterdir() if path.is_file()}
    assert names == {"main.py", "requirements.txt", *function}


@pytest.mark.parametrize(
    ("script", "arguments", "problem"),
    [
        ("deploy", [], "--project: expected the project's id, found none"),
        ("deploy", ["--project", PROJECT, "--memry", "1Gi"], "--memry: expected one of the options"),
        ("deploy", ["--project", PROJECT, "--model-uri", "s3://x"], "--model-uri: expected gs://bucket/prefix"),
        ("deploy", ["--project", PROJECT, "--cpu", "0.5"], "--cpu: expected a whole number"),
        (
            "deploy",
            ["--project", PROJECT, "--threads", "4"],
            "--threads: expected more than 4, which run or wait, found 4",
        ),
        ("schedule", ["--project"], "--project: expected a value after it"),
    ],
)
def test_a_wrong_option_changes_nothing_and_says_why(cloud, script, arguments, problem):
    before = len(cloud.calls)
    done = subprocess.run(
        [f"build/{script}.sh", *arguments], env=cloud.environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, len(cloud.calls)) == (2, before)
    assert problem in done.stderr


def test_a_dry_run_only_reads(cloud):
    before = len(cloud.calls)
    said = cloud.run("build/deploy.sh", "--project", PROJECT, "--service", "other", "--dry-run").stdout
    said += cloud.run("build/schedule.sh", "--project", PROJECT, "--service", "other", "--dry-run").stdout
    assert {method for method, _, _ in cloud.calls[before:]} == {"GET"}
    for command in (
        "service-accounts create other-run",
        "run deploy other",
        "triggers create manual",
        "jobs create http",
    ):
        assert command in said


@pytest.mark.usefixtures("bucket_there")
def test_a_trigger_of_a_connected_repository_is_accepted(cloud):
    cloud.run(
        "build/schedule.sh",
        "--project",
        PROJECT,
        "--service",
        "git",
        "--repo",
        f"projects/{PROJECT}/locations/{REGION}/connections/git/repositories/needs",
    )
    trigger = cloud.triggers["git-refresh"]
    assert "build" not in trigger
    assert "connections/git/repositories/needs" in json.dumps(trigger)


def test_shell_scripts_pass_shellcheck():
    scripts = [*sorted((ROOT / "build").glob("*.sh")), ROOT / ".ci" / "run"]
    done = subprocess.run([".venv/bin/shellcheck", *scripts], capture_output=True, text=True)
    assert done.stdout == ""
