"""``python -m oneb``: the ``oneb`` command, installed or not."""

import sys

from oneb.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
