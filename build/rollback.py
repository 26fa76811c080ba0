"""Rollback: an older release in, a promotion of it out; the running functions follow.

    python -m build.rollback --model-uri gs://bucket/needs
    python -m build.rollback --model-uri gs://bucket/needs --to previous

The first lists the releases, the second promotes the one that was served
before; `--to` takes the name of another that was, and with `--force REASON`
that of one which the gate refused.
"""

import argparse
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from build.publish import Bucket, PublishError, list_promotions, list_verdicts, promote, read_current
from function.errors import ReleaseRefused

REASON_CHARACTERS = 160


def list_releases(bucket: Bucket) -> list[dict]:
    """Every whole release, oldest first.

    A row has `release`, `promoted` (when, each time), `refused` (why), `served` and `forced` (why).
    """
    current, _ = read_current(bucket)
    whole = [name.split("/")[1] for name in bucket.list("releases/") if name.endswith("/manifest.json")]
    promotions = list_promotions(bucket)
    refused = {verdict["release"]: verdict["reason"] for verdict in list_verdicts(bucket)}
    return [
        {
            "release": release,
            "promoted": [pointer["promoted"] for pointer in promotions if pointer["release"] == release],
            "refused": refused.get(release, ""),
            "served": current is not None and current["release"] == release,
            "forced": next((p["forced"] for p in promotions if p["release"] == release and "forced" in p), ""),
        }
        for release in whole
    ]


def make_table(releases: list[dict]) -> Table:
    """The releases for a terminal."""
    table = Table("release", "promoted", "")
    for row in releases:
        table.add_row(row["release"], "\n".join(when[:19] for when in row["promoted"]), _describe(row))
    return table


def _describe(row: Mapping[str, str]) -> str:
    if row["served"]:
        said = "[bold]served[/]"
    elif row["refused"]:
        said = f"refused: {row['refused'][:REASON_CHARACTERS]}"
    else:
        said = ""
    return f"{said} (forced: {row['forced']})" if row["forced"] else said


def main() -> None:
    """List the releases, or promote an older one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model-uri", required=True, help="gs://bucket/prefix")
    parser.add_argument("--to", help="a release, or previous: the one that was served before")
    parser.add_argument("--force", default="", metavar="REASON", help="promote one that was never served")
    args = parser.parse_args()
    try:
        bucket = Bucket(args.model_uri)
        if not args.to:
            console.print(make_table(list_releases(bucket)))
            return
        current, _ = read_current(bucket)
        release = current["previous"] if args.to == "previous" and current else args.to
        if not release:
            raise PublishError("--to previous: expected an earlier promotion, found none; name a release")
        served = any(pointer["release"] == release for pointer in list_promotions(bucket))
        if not served and not args.force:
            raise PublishError(f"--to {release}: expected one that was served before, found none; give --force REASON")
        pointer = promote(bucket, release, forced=args.force)
    except (PublishError, ReleaseRefused) as error:
        raise SystemExit(str(error)) from None
    print(
        f"current: {pointer['release']}, sequence {pointer['sequence']}; running functions follow at their next check"
    )


console = Console(width=160)

if __name__ == "__main__":
    main()
