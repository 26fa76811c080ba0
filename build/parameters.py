"""Parameters: the build's substitutions in, an error for each that is unknown or empty out.

Cloud Build lets a trigger start a build with substitutions that cloudbuild.yaml
does not know, and with empty ones, so the pipeline's first step looks for
itself. It runs before anything is installed: the standard library only. The
environment is read from standard input, because a wrapper around `python3` may
add to its own.

    env -0 | python3 build/parameters.py
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

PIPELINE = Path("cloudbuild.yaml")
PARAMETER = re.compile(r"^  (_[A-Z0-9_]+): *(.*?)(?:  +#.*)?$", re.MULTILINE)
NOT_INPUTS = {"_MODEL_URI", "_DATA", "_SOURCE", "_SERVICE_ACCOUNT", "_TORCH_INDEX", "_DEPLOY", "_FORCE"}
NOT_INPUTS |= {"_LAUNCH", "_TRAIN_ON", "_VERTEX_MACHINE", "_VERTEX_POLL_SECONDS"}
"""What a model does not depend on; of the data it is the content that counts."""
CHOICES = {"_TRAIN_ON": ("build", "vertex"), "_STRATEGY": ("partial", "lora", "full")}


def read_defaults(pipeline: Path = PIPELINE) -> dict[str, str]:
    """Every parameter that cloudbuild.yaml knows, with its default."""
    return {name: value.strip('"') for name, value in PARAMETER.findall(pipeline.read_text("utf-8"))}


def find_problems(given: Mapping[str, str], defaults: Mapping[str, str]) -> list[str]:
    """One line for each parameter that is unknown, empty where its default is not, or none of its choices."""
    known = ", ".join(defaults)
    unknown = [name for name in sorted(given) if re.fullmatch(r"_[A-Z][A-Z0-9_]*", name) and name not in defaults]
    problems = [f"{name}: expected one of {known}, found an unknown name; mend the name" for name in unknown]
    for name, default in defaults.items():
        value = given.get(name, default)
        if default and not value.strip():
            problems.append(f"{name}: expected a value such as {default}, found none; leave it out for the default")
        elif value not in CHOICES.get(name, (value,)):
            problems.append(f"{name}: expected one of {', '.join(CHOICES[name])}, found {value}; name one of them")
    return problems


def model_parameters(given: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """The parameters that a release depends on."""
    return {name: given.get(name, default) for name, default in defaults.items() if name not in NOT_INPUTS}


def main() -> None:
    """Check the environment on standard input; a build begins here."""
    given = dict(pair.partition("=")[::2] for pair in sys.stdin.read().split("\0"))
    problems = find_problems(given, read_defaults())
    if problems:
        raise SystemExit("\n".join(problems))
    for left_over in (Path(".local/build") / name for name in ("nothing-new", "inputs.json", "gate.json")):
        left_over.unlink(missing_ok=True)
    print(f"{len(read_defaults())} parameters, all known")


if __name__ == "__main__":
    main()
