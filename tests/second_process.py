"""A second Python, for what must be set up before torch or Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path


def python(*arguments: str, **environment: str) -> str:
    """What a second Python, started in the repository's root, prints."""
    finished = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
