"""Data: a folder or an address in Cloud Storage in, a checked folder out, in one place for every later step.

    python -m build.data --data gs://bucket/texts --output .local/build/data

A scheduled build learns from what lies at the address when it runs: put a file
of new texts beside the others, or a new version in an old one's place
(`training.examples` says what a folder holds).
"""

import argparse
import shutil
from pathlib import Path

from build.publish import Bucket, PublishError
from training.examples import DataError, describe_dataset, read_dataset
from training.files import replace_folder

SUFFIXES = (".json", ".jsonl", ".csv")


def fetch_data(data: str, output: Path) -> None:
    """Copy the data files of a folder, or of the objects right under a gs:// address, into `output`.

    Raises DataError where there are none or they cannot be used; `output` is then as it was.
    """
    with replace_folder(output) as new:
        if data.startswith("gs://"):
            bucket = Bucket(data)
            for name in [name for name in bucket.list() if "/" not in name and name.endswith(SUFFIXES)]:
                content, _ = bucket.read(name)
                (new / name).write_bytes(content or b"")
        elif Path(data).is_dir():
            for path in [path for path in sorted(Path(data).iterdir()) if path.suffix in SUFFIXES]:
                shutil.copyfile(path, new / path.name)
        if not any(new.iterdir()):
            raise DataError(f"{data}: expected labels.json and texts there, found neither; put them there")
        print(describe_dataset(read_dataset(new)))


def main() -> None:
    """Fetch and check the data, and print what is in it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", default="training/data", help="a folder, or gs://bucket/prefix")
    parser.add_argument("--output", type=Path, default=Path(".local/build/data"))
    args = parser.parse_args()
    try:
        fetch_data(args.data, args.output)
    except (DataError, PublishError) as error:
        raise SystemExit(f"The data cannot be used:\n{error}") from None


if __name__ == "__main__":
    main()
