"""``python -m oneb.train``."""

import sys

from oneb.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
