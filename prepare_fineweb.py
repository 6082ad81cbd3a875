#!/usr/bin/env python3
"""Make a token file for training: `python3 prepare_fineweb.py --tokens 100M --output fineweb_100m.npy`."""
import os
import sys

if __name__ == "__main__":  # what processes that begin anew load again stays short
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads: nothing here needs them

    from oneb.cli.prepare import main

    sys.exit(main())
