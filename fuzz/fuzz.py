#!/usr/bin/env python3
"""Coverage-guided fuzzing of one parser: `python fuzz/fuzz.py TARGET --seconds N`. Needs `pip install atheris`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> None:
    """Fuzz until the time is over or something is found, which is written to ``crash-*`` in the current folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a name in targets.py")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what reached new code (default: none is kept)")
    parser.add_argument("--input", type=Path, help="run this file once instead, to see a finding again")
    args = parser.parse_args()
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="oneb_fuzz", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        # libFuzzer ends its process without a word to Python, so it gets one of its own.
        if (child := os.fork()) == 0:
            tempfile.tempdir = folder
            _fuzz(parser, args, Path(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _fuzz(parser: argparse.ArgumentParser, args: argparse.Namespace, temporary: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["oneb", "numpy.lib", "zipfile", "json"]):
        import targets
    if args.target not in targets.targets():
        parser.error(f"there is no target {args.target}; there are {', '.join(targets.targets())}")
    target = targets.targets()[args.target]
    if args.input:
        print("accepted" if targets.accepts(target, args.input.read_bytes()) else "refused", flush=True)
        return
    corpus = args.corpus or temporary / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    words = temporary / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in (b"\0\0", *target.words)))  # none is an error
    longest = max(4096, 2 * max(map(len, target.seeds)))

    def run(content: bytes) -> None:
        targets.accepts(target, content)

    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={args.seconds}", f"-max_len={longest}",
                   f"-dict={words}", "-timeout=20", "-rss_limit_mb=3000", "-print_final_stats=1"], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
