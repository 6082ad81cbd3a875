#!/usr/bin/env python3
"""Make a token file for training: `python3 prepare_fineweb.py --tokens 100M --output fineweb_100m.npy`."""
import sys

from oneb.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
