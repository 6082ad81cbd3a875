"""Print the requirements, one a line, that the running Python does not meet.

python scripts/missing_requirements.py requirements_runtime.txt …
"""

import importlib.metadata
import sys
from pathlib import Path

# pip is what would install them, so its own reader of versions is at hand; other packages may not be.
from pip._vendor.packaging.requirements import Requirement


def is_met(requirement: Requirement) -> bool:
    """Whether an installed distribution satisfies the requirement, or it is none on this machine."""
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def main(paths: list[str]) -> None:
    """Print what is missing."""
    lines = (line.partition("#")[0].strip() for path in paths for line in Path(path).read_text().splitlines())
    for line in filter(None, lines):
        if not is_met(Requirement(line)):
            print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
