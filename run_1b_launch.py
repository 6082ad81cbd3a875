#!/usr/bin/env python3
"""Plan a ~1B-parameter pretraining run and, with --run, start it. See `--help` and docs/LAUNCH_1B.md."""

import sys

from oneb.cli.launch import main

if __name__ == "__main__":
    sys.exit(main())
