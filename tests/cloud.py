"""A loopback stand-in for the Google APIs that `gcloud` calls for this project: small, in memory, for tests only.

What it is told to do, it does: a deploy unpacks the archive that arrived,
installs its requirements into an empty environment and starts functions-framework
as the buildpack would; a build unpacks its source and runs the steps of the config
that arrived; a bucket is fake-gcs-server. Only access rights are noted, not enforced.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import requests
from google.cloud.devtools.cloudbuild_v1 import Build
from google.protobuf.json_format import ParseDict

from build import local

PROJECT, REGION = "needs-test", "asia-northeast3"
NOW = "2026-01-01T00:00:00.000000Z"
HOP_HEADERS = {"transfer-encoding", "connection", "content-length", "content-encoding"}
RUN_HOST = "run.test"
"""gcloud puts the region before the host of Cloud Run, so it is reached through a proxy: this server."""


class Missing(Exception):
    """Answered as 404."""


class Conflict(Exception):
    """Answered as 409."""


@dataclass
class Cloud:
    """What was made so far, by the name that the API gives it."""

    root: Path
    storage: str
    """fake-gcs-server's address."""
    venv: Path
    """What a build finds installed, as a build image would have it: `make install` has nothing to do."""
    address: str = ""
    stack: ExitStack = field(default_factory=ExitStack)
    accounts: dict[str, dict] = field(default_factory=dict)
    policies: dict[str, dict] = field(default_factory=dict)
    buckets: dict[str, dict] = field(default_factory=dict)
    """Buckets' settings, which fake-gcs-server does not keep."""
    enabled: set[str] = field(default_factory=set)
    functions: dict[str, dict] = field(default_factory=dict)
    services: dict[str, dict] = field(default_factory=dict)
    builds: dict[str, dict] = field(default_factory=dict)
    triggers: dict[str, dict] = field(default_factory=dict)
    jobs: dict[str, dict] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)
    """The archive that each image was built from."""
    custom_jobs: dict[str, dict] = field(default_factory=dict)
    operations: dict[str, dict] = field(default_factory=dict)
    environments: dict[str, Path] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    """The function at each address."""
    threads: list[threading.Thread] = field(default_factory=list)
    calls: list[tuple[str, str, dict]] = field(default_factory=list)
    """Every call but the storage's own: method, path, body."""

    def environment(self) -> dict[str, str]:
        """What points the real gcloud here, and nowhere else."""
        token, config = self.root / "token", self.root / "gcloud"
        token.write_text("not a token")
        config.mkdir(exist_ok=True)
        names = (
            "CLOUDFUNCTIONS CLOUDBUILD CLOUDSCHEDULER STORAGE SERVICEUSAGE CLOUDRESOURCEMANAGER IAM ARTIFACTREGISTRY"
        )
        overrides = {
            f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": f"{self.address}/" for name in [*names.split(), "AIPLATFORM"]
        }
        return {
            **{name: value for name, value in os.environ.items() if not re.match("CLOUDSDK_|_[A-Z]", name)},
            **overrides,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_RUN": f"http://{RUN_HOST}/",
            "CLOUDSDK_CONFIG": str(config),
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(token),
            "CLOUDSDK_CORE_PROJECT": PROJECT,
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
            "HTTP_PROXY": self.address,
            "NO_PROXY": "127.0.0.1",
            "STORAGE_EMULATOR_HOST": self.storage,
            "RETRY_SECONDS": "0",
        }

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """A command with the real gcloud pointed here; it must end well."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def read_object(self, bucket: str, name: str) -> bytes:
        answer = requests.get(
            f"{self.storage}/storage/v1/b/{bucket}/o/{name.replace('/', '%2F')}?alt=media", timeout=60
        )
        answer.raise_for_status()
        return answer.content

    # Functions and services

    def install(self, folder: Path) -> Path:
        """The Python of an environment that holds the folder's requirements.txt and nothing else; one for each lock."""
        lock = (folder / "requirements.txt").read_text("utf-8")
        if lock not in self.environments:
            place = self.root / f"environment-{len(self.environments)}"
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            python = place / "bin" / "python"
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"], check=True)
            self.environments[lock] = python
        return self.environments[lock]

    def start(self, archive: bytes, target: str, settings: dict[str, str]) -> str:
        """Unpack an archive and serve it; returns the address."""
        folder = self.root / f"function-{uuid.uuid4().hex[:8]}"
        zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
        python = self.install(folder)
        port = local.free_port()
        server = [str(python.with_name("functions-framework")), "--target", target, "--source", "main.py"]
        command = [*server, "--host", "127.0.0.1", "--port", str(port)]
        environment = {"PATH": os.environ["PATH"], "STORAGE_EMULATOR_HOST": self.storage, "PORT": str(port), **settings}
        environment["CACHE_DIR"] = str(folder / "cache")
        process = subprocess.Popen(command, cwd=folder, env=environment)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)
        address = f"http://127.0.0.1:{port}"
        self.processes[address] = process
        for _ in range(600):
            try:
                requests.get(f"{address}/health", timeout=1)
                return address
            except requests.RequestException:
                assert process.poll() is None, "the function did not start"
                time.sleep(0.05)
        raise AssertionError("the function did not answer")

    # Builds

    def start_build(self, build: dict) -> dict:
        """Check a build against the API's own schema, and begin it."""
        ParseDict(build, Build.pb(Build()))
        made = {**build, "id": str(uuid.uuid4()), "projectId": PROJECT, "status": "WORKING", "createTime": NOW}
        made["name"] = f"projects/{PROJECT}/locations/{REGION}/builds/{made['id']}"
        made["logUrl"] = f"{self.address}/log/{made['id']}"
        self.builds[made["id"]] = made
        thread = threading.Thread(target=self._run_build, args=(made,))
        self.threads.append(thread)
        thread.start()
        return {
            "name": f"operations/build/{PROJECT}/{made['id']}",
            "metadata": {
                "@type": "type.googleapis.com/google.devtools.cloudbuild.v1.BuildOperationMetadata",
                "build": made,
            },
        }

    def _run_build(self, build: dict) -> None:
        work = self.root / f"workspace-{build['id']}"
        work.mkdir()
        (work / ".venv").symlink_to(self.venv)
        (work / ".venv" / ".installed").touch()
        if "storageSource" in build.get("source", {}):
            source = build["source"]["storageSource"]
            archive = self.read_object(source["bucket"], source["object"])
            with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
                packed.extractall(work, filter="data")
        values = {"PROJECT_ID": PROJECT, "BUILD_ID": build["id"], "LOCATION": REGION}
        for name, value in build.get("substitutions", {}).items():
            values[name] = local.substitute(value, values)
        for step in build["steps"]:
            environment = {**self.environment(), **values}
            step["status"] = self._run_step(step, work, environment)
            if step["status"] != "SUCCESS":
                break
        build["finishTime"] = NOW
        build["status"] = step["status"]  # the last act: gcloud waits for it

    def _run_step(self, step: dict, work: Path, environment: dict[str, str]) -> str:
        with (self.root / f"{work.name}.log").open("a") as log:
            print(f"--- {step['id']}", file=log, flush=True)
            done = subprocess.run(["bash", "-c", step["script"]], cwd=work, env=environment, stdout=log, stderr=log)
        return "SUCCESS" if done.returncode == 0 else "FAILURE"

    def wait(self) -> None:
        """Until all builds have ended."""
        for thread in self.threads:
            thread.join()
        self.threads.clear()

    def log_of(self, build: dict) -> str:
        """What a build's steps said."""
        return (self.root / f"workspace-{build['id']}.log").read_text("utf-8")

    def fire(self, job: str) -> requests.Response:
        """What Cloud Scheduler does when a job is due."""
        target = self.jobs[job]["httpTarget"]
        path = urlsplit(target["uri"]).path
        return requests.request(target["httpMethod"], self.address + path, data=b"{}", timeout=60)


def _operation(name: str, response: dict, metadata: dict | None = None) -> dict:
    return {"name": name, "done": True, "response": response, "metadata": metadata or {}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloud: Cloud

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = self._read_chunks()
        url = urlsplit(self.path)
        path = url.path
        if re.match(r"/(upload/|download/|resumable/)?storage/v1/|/batch/", path) and not OWN.fullmatch(
            f"{self.command} {path}"
        ):
            self._forward(content)
            return
        body = json.loads(content) if content[:1] in (b"{", b"[") else {}
        self.cloud.calls.append((self.command, path, body))
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                try:
                    self._send(200, act(self.cloud, body, parse_qs(url.query), *found.groups()))
                except (Missing, KeyError):
                    self._send_missing()
                except Conflict as conflict:
                    self._send(409, {"error": {"code": 409, "message": str(conflict), "status": "ALREADY_EXISTS"}})
                return
        if self.command == "PUT" and path.startswith("/put/"):
            self.cloud.images[path] = content
            self._send(200, {})
            return
        print("no route:", self.command, self.path, content[:2000], file=sys.stderr)
        self._send_missing()

    def _read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, content: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in (*HOP_HEADERS, "host")}
        answer = requests.request(
            self.command,
            self.cloud.storage + self.path,
            data=content,
            headers=headers,
            timeout=60,
            allow_redirects=False,
        )
        deleted = self.command == "DELETE" and answer.ok  # fake-gcs-server says 200 with "null", the API 204
        self.send_response(204 if deleted else answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        content = b"" if deleted else answer.content
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send(self, status: int, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_missing(self) -> None:
        self._send(404, {"error": {"code": 404, "message": f"{self.path}: not found", "status": "NOT_FOUND"}})

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_):
        pass


# IAM, Service Usage, Resource Manager, Artifact Registry


def enable(cloud: Cloud, body: dict, _: dict, __: str) -> dict:
    cloud.enabled |= set(body["serviceIds"])
    return _operation("operations/enable", {})


def enable_one(cloud: Cloud, _: dict, __: dict, service: str) -> dict:
    cloud.enabled.add(service)
    return _operation("operations/enable", {})


def show_state(_: Cloud, __: dict, ___: dict, project: str, service: str) -> dict:
    return {"name": f"projects/{project}/services/{service}", "state": "ENABLED"}


def show_project(*_) -> dict:
    return {"projectId": PROJECT, "projectNumber": "123456", "name": "projects/123456", "lifecycleState": "ACTIVE"}


def make_account(cloud: Cloud, body: dict, *_) -> dict:
    email = f"{body['accountId']}@{PROJECT}.iam.gserviceaccount.com"
    cloud.accounts[email] = {"name": f"projects/{PROJECT}/serviceAccounts/{email}", "email": email}
    return cloud.accounts[email]


def show_account(cloud: Cloud, _: dict, __: dict, email: str) -> dict:
    return cloud.accounts[email]


def show_default_account(*_) -> dict:
    account = f"projects/{PROJECT}/serviceAccounts/123456-compute@developer.gserviceaccount.com"
    return {"name": f"{HERE}/defaultServiceAccount", "serviceAccountEmail": account}


def show_policy(cloud: Cloud, _: dict, __: dict, resource: str) -> dict:
    return cloud.policies.get(resource, {"version": 1, "etag": "BwU=", "bindings": []})


def set_policy(cloud: Cloud, body: dict, _: dict, resource: str) -> dict:
    cloud.policies[resource] = body.get("policy", body)
    return cloud.policies[resource]


def change_bucket(cloud: Cloud, body: dict, _: dict, name: str) -> dict:
    cloud.buckets[name] = cloud.buckets.get(name, {}) | body
    return show_bucket(cloud, {}, {}, name)


def show_bucket(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    answer = requests.get(f"{cloud.storage}/storage/v1/b/{name}", timeout=60)
    if answer.status_code == 404:
        raise Missing
    return answer.json() | {"projectNumber": "123456"} | cloud.buckets.get(name, {})


def show_repository(*_) -> dict:
    return {"name": f"projects/{PROJECT}/locations/{REGION}/repositories/cloud-run-source-deploy", "format": "DOCKER"}


# Cloud Functions v2: gcloud functions deploy


def show_function(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    return cloud.functions[name]


def list_runtimes(*_) -> dict:
    return {"runtimes": [{"name": "python312", "stage": "GA", "environment": "GEN_2"}]}


def make_upload_address(cloud: Cloud, *_) -> dict:
    place = f"/put/{uuid.uuid4().hex}.zip"
    return {"uploadUrl": cloud.address + place, "storageSource": {"bucket": "put", "object": place}}


def deploy_function(cloud: Cloud, body: dict, query: dict, _: str) -> dict:
    name = query.get("functionId", [body.get("name", "").rpartition("/")[2]])[0]
    if name in cloud.services:
        raise Conflict(f"A Cloud Run service with the name {name} already exists")
    build, settings = body["buildConfig"], body["serviceConfig"]
    archive = cloud.images[build["source"]["storageSource"]["object"]]
    address = cloud.start(archive, build["entryPoint"], settings.get("environmentVariables", {}))
    full = f"projects/{PROJECT}/locations/{REGION}/functions/{name}"
    cloud.functions[name] = {
        **body,
        "name": full,
        "state": "ACTIVE",
        "environment": "GEN_2",
        "url": address,
        "updateTime": NOW,
        "serviceConfig": {**settings, "uri": address, "service": f"projects/{PROJECT}/locations/{REGION}/services/x"},
    }
    metadata = {
        "@type": "type.googleapis.com/google.cloud.functions.v2.OperationMetadata",
        "target": full,
        "stages": [],
    }
    response = {"@type": "type.googleapis.com/google.cloud.functions.v2.Function", **cloud.functions[name]}
    operation = _operation(f"projects/{PROJECT}/locations/{REGION}/operations/{uuid.uuid4().hex}", response, metadata)
    cloud.operations[operation["name"].rpartition("/")[2]] = operation
    return operation


def show_operation(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    return cloud.operations[name]


# Cloud Run: gcloud run deploy --function, run services describe


def submit_image(cloud: Cloud, body: dict, *_) -> dict:
    source, image = body["storageSource"], body["imageUri"]
    cloud.images[image.partition(":")[0]] = cloud.read_object(source["bucket"], source["object"])
    build = {"id": uuid.uuid4().hex, "projectId": PROJECT, "status": "SUCCESS", "logUrl": cloud.address}
    build |= {"name": f"{HERE}/builds/{build['id']}", "images": [image]}
    build["results"] = {"images": [{"name": image, "digest": "sha256:0"}]}
    response = {"@type": "type.googleapis.com/google.devtools.cloudbuild.v1.Build", **build}
    metadata = {"@type": "type.googleapis.com/google.devtools.cloudbuild.v1.BuildOperationMetadata", "build": build}
    operation = _operation(f"{HERE}/operations/{build['id']}", response, metadata)
    cloud.operations[build["id"]] = operation
    return {"buildOperation": operation, "baseImageUri": body["buildpackBuild"].get("baseImage", "")}


def show_service(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    return cloud.services[name]


def list_none(*_) -> dict:
    return {}


def put_service(cloud: Cloud, body: dict, _: dict, name: str = "") -> dict:
    name = name or body["metadata"]["name"]
    template = body["spec"]["template"]
    container = template["spec"]["containers"][0]
    settings = {pair["name"]: pair.get("value", "") for pair in container.get("env", [])}
    target = body["metadata"]["annotations"].get("run.googleapis.com/build-function-target", "needs")
    address = cloud.start(cloud.images[container["image"].partition("@")[0].partition(":")[0]], target, settings)
    ready = "True" if _probe(address, container.get("startupProbe", {})) else "False"
    generation = body["metadata"].get("generation", 0) + 1
    conditions = [
        {"type": kind, "status": ready, "lastTransitionTime": NOW}
        for kind in ("Ready", "ConfigurationsReady", "RoutesReady")
    ]
    for condition in conditions if ready == "False" else []:
        condition |= {"reason": "HealthCheckContainerError", "message": "the start-up probe failed"}
    cloud.services[name] = {
        **body,
        "metadata": {**body["metadata"], "generation": generation, "creationTimestamp": NOW, "resourceVersion": "1"},
        "status": {
            "observedGeneration": generation,
            "conditions": conditions,
            "url": address,
            "address": {"url": address},
            "latestCreatedRevisionName": f"{name}-{generation}",
            "latestReadyRevisionName": f"{name}-{generation}",
            "traffic": [{"revisionName": f"{name}-{generation}", "percent": 100, "latestRevision": True}],
        },
    }
    return cloud.services[name]


def _probe(address: str, probe: dict) -> bool:
    """The start-up probe as Cloud Run makes it."""
    path = probe.get("httpGet", {}).get("path")
    for _ in range(probe.get("failureThreshold", 3)) if path else ():
        try:
            if requests.get(address + path, timeout=probe.get("timeoutSeconds", 1)).ok:
                return True
        except requests.RequestException:
            pass
        time.sleep(0.1)
    return not path


# Vertex AI: a custom job, whose bucket is mounted under /gcs


def make_custom_job(cloud: Cloud, body: dict, *_) -> dict:
    container = body["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    mounted = f"{cloud.root}/bucket/"
    command = [part.replace("/gcs/", mounted) for part in [*container["command"], *container["args"]]]
    command = [part.replace("make install", f"ln -s {cloud.venv} .venv; touch .venv/.installed") for part in command]
    done = subprocess.run(command, env=cloud.environment(), capture_output=True, text=True)
    for path in Path(mounted).rglob("out.tgz"):  # what a mounted bucket would have uploaded
        bucket, _, name = str(path.relative_to(mounted)).partition("/")
        upload = f"{cloud.storage}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name.replace('/', '%2F')}"
        requests.post(upload, data=path.read_bytes(), timeout=60).raise_for_status()
    number = str(len(cloud.custom_jobs) + 1)
    state = "JOB_STATE_FAILED" if done.returncode else "JOB_STATE_SUCCEEDED"
    cloud.custom_jobs[number] = {**body, "name": f"{HERE}/customJobs/{number}", "state": state, "log": done.stderr}
    return {name: value for name, value in cloud.custom_jobs[number].items() if name != "log"}


def show_custom_job(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    return {"name": cloud.custom_jobs[name]["name"], "state": cloud.custom_jobs[name]["state"]}


# Cloud Build and Cloud Scheduler


def submit_build(cloud: Cloud, body: dict, *_) -> dict:
    return cloud.start_build(body)


def show_build(cloud: Cloud, _: dict, __: dict, build: str) -> dict:
    return cloud.builds[build]


def list_builds(cloud: Cloud, *_) -> dict:
    return {"builds": list(reversed(cloud.builds.values()))}


def make_trigger(cloud: Cloud, body: dict, *_) -> dict:
    ParseDict(body.get("build", {}), Build.pb(Build()))
    cloud.triggers[body["name"]] = {**body, "id": str(uuid.uuid4()), "createTime": NOW}
    return cloud.triggers[body["name"]]


def show_trigger(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    return cloud.triggers[name]


def remove_trigger(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    del cloud.triggers[name]
    return {}


def run_trigger(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    trigger = cloud.triggers[name]
    build = json.loads(json.dumps(trigger["build"]))
    build["substitutions"] = {**build.get("substitutions", {}), **trigger.get("substitutions", {})}
    return cloud.start_build(build)


def make_job(cloud: Cloud, body: dict, *_) -> dict:
    name = body["name"].rpartition("/")[2]
    cloud.jobs[name] = {**body, "state": "ENABLED", "scheduleTime": NOW}
    return cloud.jobs[name]


def change_job(cloud: Cloud, body: dict, _: dict, name: str) -> dict:
    cloud.jobs[name] |= body
    return cloud.jobs[name]


def show_job(cloud: Cloud, _: dict, __: dict, name: str) -> dict:
    return cloud.jobs[name]


def list_jobs(cloud: Cloud, *_) -> dict:
    return {"jobs": list(cloud.jobs.values())}


HERE = f"projects/{PROJECT}/locations/{REGION}"
SERVICES = f"/apis/serving.knative.dev/v1/namespaces/{PROJECT}/services"
STORAGE = re.compile(r"/(resumable/)?(upload/|download/)?storage/v1/|/batch/")
OWN = re.compile(r"\w+ /storage/v1/b/[^/]+/iam|(GET|PATCH) /storage/v1/b/[^/]+")
"""Of storage's calls, those that fake-gcs-server cannot answer."""
ROUTES = [
    ("GET", r"/storage/v1/b/([^/]+)", show_bucket),
    ("PATCH", r"/storage/v1/b/([^/]+)", change_bucket),
    ("POST", r"/v1/projects/([^/]+)/services:batchEnable", enable),
    ("POST", r"/v1/projects/[^/]+/services/([^/:]+):enable", enable_one),
    ("GET", r"/v1/projects/([^/]+)/services/([^/]+)", show_state),
    ("GET", r"/v[13]/projects/[^/:]+", show_project),
    ("POST", r"/v1/(projects/[^:]+):getIamPolicy", show_policy),
    ("POST", r"/v1/(projects/[^:]+):setIamPolicy", set_policy),
    ("GET", r"/storage/v1/b/([^/]+)/iam", show_policy),
    ("PUT", r"/storage/v1/b/([^/]+)/iam", set_policy),
    ("POST", r"/v1/projects/[^/]+/serviceAccounts", make_account),
    ("GET", r"/v1/projects/[^/]+/serviceAccounts/([^/]+)", show_account),
    ("GET", rf"/v1/{HERE}/defaultServiceAccount", show_default_account),
    ("GET", rf"/v1/{HERE}/repositories/[^/]+", show_repository),
    ("GET", rf"/v2/{HERE}/functions/([^/]+)", show_function),
    ("GET", rf"/v2/{HERE}/runtimes", list_runtimes),
    ("POST", rf"/v2/{HERE}/functions:generateUploadUrl", make_upload_address),
    ("POST", rf"/v2/{HERE}/(functions)", deploy_function),
    ("PATCH", rf"/v2/{HERE}/functions/([^/]+)", deploy_function),
    ("GET", rf"/v[12]/{HERE}/operations/([^/]+)", show_operation),
    ("POST", rf"/v2/{HERE}/builds:submit", submit_image),
    ("GET", rf"{SERVICES}/([^/]+)", show_service),
    ("POST", SERVICES, put_service),
    ("PUT", rf"{SERVICES}/([^/]+)", put_service),
    ("POST", rf"/v1/{HERE}/builds", submit_build),
    ("GET", rf"/v1/{HERE}/builds", list_builds),
    ("GET", rf"/v1/{HERE}/builds/([^/]+)", show_build),
    ("POST", rf"/v1(?:beta1)?/{HERE}/customJobs", make_custom_job),
    ("GET", rf"/v1(?:beta1)?/{HERE}/customJobs/([^/]+)", show_custom_job),
    ("POST", rf"/v1/{HERE}/triggers", make_trigger),
    ("GET", rf"/v1/{HERE}/triggers/([^/:]+)", show_trigger),
    ("DELETE", rf"/v1/{HERE}/triggers/([^/:]+)", remove_trigger),
    ("POST", rf"/v1/{HERE}/triggers/([^/:]+):run", run_trigger),
    ("POST", rf"/v1/{HERE}/jobs", make_job),
    ("GET", rf"/v1/{HERE}/jobs", list_jobs),
    ("GET", rf"/v1/{HERE}/jobs/([^/]+)", show_job),
    ("PATCH", rf"/v1/{HERE}/jobs/([^/]+)", change_job),
]


@contextmanager
def run_cloud(root: Path, venv: Path) -> Iterator[Cloud]:
    """The stand-in until the block ends; what it started is stopped."""
    with local.run_bucket(root / "bucket") as storage:
        cloud = Cloud(root, storage, venv)
        handler = type("Handler", (_Handler,), {"cloud": cloud})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        cloud.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield cloud
        finally:
            cloud.wait()
            cloud.stack.close()
            server.shutdown()
            server.server_close()
            thread.join()
