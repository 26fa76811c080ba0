"""Status: a bucket, and the project's builds and schedule where one is named, in; what is served and what comes, out.

python -m build.status --model-uri gs://bucket/needs --project my-project --region asia-northeast3
"""

import argparse
import json
import subprocess

from rich.console import Console
from rich.table import Table

from build.publish import Bucket, PublishError, read_current
from build.rollback import list_releases, make_table
from function.errors import ReleaseRefused

BUILDS = 5


def show_status(model_uri: str) -> None:
    """Print the release that is served, and all others with what became of them."""
    bucket = Bucket(model_uri)
    current, _ = read_current(bucket)
    if current is None:
        console.print(f"{bucket.uri}: nothing is served yet; `make demo` here, or a build in the cloud, makes one")
    else:
        since = f"promotion {current['sequence']}, since {current['promoted'][:19]}"
        console.print(f"served: [bold]{current['release']}[/], {since}")
    if releases := list_releases(bucket):
        console.print(make_table(releases))


def show_builds(project: str, region: str) -> None:
    """Print the last builds."""
    builds = _ask("builds", "list", f"--project={project}", f"--region={region}", f"--limit={BUILDS}")
    table = Table("build", "began", "status", "")
    for build in builds:
        failed = next((step["id"] for step in build.get("steps", []) if step.get("status") == "FAILURE"), "")
        why = f"step {failed}" if failed else ""
        table.add_row(build["id"], build.get("createTime", "")[:19], build["status"], why)
    console.print(table)


def show_schedule(project: str, region: str) -> None:
    """Print when the next refresh is due, and the others."""
    jobs = _ask("scheduler", "jobs", "list", f"--project={project}", f"--location={region}")
    for job in jobs:
        name, due = job["name"].rpartition("/")[2], job.get("scheduleTime", "unknown")[:19]
        console.print(f"{name}: {job['schedule']} ({job.get('timeZone', 'UTC')}), next {due}, {job.get('state', '')}")
    if not jobs:
        console.print("no refresh is scheduled; build/schedule.sh makes one")


def _ask(*command: str) -> list[dict]:
    done = subprocess.run(["gcloud", *command, "--format=json"], capture_output=True, text=True)
    if done.returncode:
        raise PublishError(f"gcloud {' '.join(command[:2])}: expected exit code 0, found: {done.stderr.strip()}")
    found: list[dict] = json.loads(done.stdout or "[]")
    return found


def main() -> None:
    """Print the status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model-uri", required=True, help="gs://bucket/prefix")
    parser.add_argument("--project", help="whose builds and schedule to show too")
    parser.add_argument("--region", default="asia-northeast3")
    args = parser.parse_args()
    try:
        show_status(args.model_uri)
        if args.project:
            show_builds(args.project, args.region)
            show_schedule(args.project, args.region)
    except (PublishError, ReleaseRefused) as error:
        raise SystemExit(str(error)) from None


console = Console(width=160)

if __name__ == "__main__":
    main()
