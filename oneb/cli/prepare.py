"""``python3 prepare_fineweb.py``: text to a token file."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser
from oneb.errors import OnebError
from oneb.units import format_count, format_duration, parse_count

if TYPE_CHECKING:
    from oneb.data.prepare import Prepared
    from oneb.data.sources import Skipped

_PACKAGES = ("numpy", "tiktoken", "pyarrow", "huggingface_hub", "tqdm")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``prepare_fineweb.py``."""
    parser = OptionParser(
        prog="prepare_fineweb.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Tokenize FineWeb-Edu, or text of your own, into one .npy file for training.",
        epilog="examples:\n"
               "  python3 prepare_fineweb.py --tokens 100M --output fineweb_100m.npy\n"
               "  python3 prepare_fineweb.py --tokens 1B --output fineweb_1b.npy\n"
               "  python3 prepare_fineweb.py --input books/ notes.jsonl.gz --output mine.npy\n\n"
               "1B tokens take 2 GB of disk. Beside X.npy appears X.npy.meta, which says what X.npy holds:\n"
               "keep the two together.")
    parser.add_argument("--output", required=True, type=Path, metavar="X.npy",
                        help="the token file to write")
    parser.add_argument("--tokens", type=parse_count, metavar="N",
                        help="exactly so many tokens: 100M, 1B, 5000000. Default with --input: all there is; "
                             "without --input it must be given")
    parser.add_argument("--input", nargs="+", metavar="PATH",
                        help="read these instead of --source: .parquet, .jsonl, .jsonl.gz or .txt files "
                             "(a .txt is one document), folders or globs of them")
    parser.add_argument("--source", default="fineweb-edu", choices=["fineweb-edu"],
                        help="dataset to stream from the Hugging Face Hub "
                             "(default: %(default)s, its 10B-token sample)")
    parser.add_argument("--tokenizer", default="gpt2", choices=["gpt2", "bytes"],
                        help="gpt2: 50257 ids; bytes: 257 ids (default: %(default)s)")
    parser.add_argument("--text-column", default="text", metavar="NAME",
                        help="where parquet and JSON documents keep their text (default: %(default)s)")
    parser.add_argument("--force", action="store_true",
                        help="replace --output if it exists (default: refuse)")
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done (also when the input held fewer tokens than asked), 2 a user's mistake, 130 Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    _require_packages()
    try:
        _prepare(arguments)
    except KeyboardInterrupt:
        print(f"\nstopped before {arguments.output} was done", file=sys.stderr)
        return 130
    return 0


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise OnebError(f"this Python ({sys.executable}) lacks {', '.join(missing)}. Install with: "
                        "bash quickstart.sh, or python3 -m pip install -r requirements_runtime.txt")


def _prepare(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from oneb.data.prepare import check_output, prepare
    from oneb.data.sources import Skipped
    from oneb.data.tokenizer import load_tokenizer

    if arguments.tokens is None and not arguments.input:
        raise OnebError(f"--source {arguments.source} needs --tokens (its sample holds 10B); "
                        "for instance --tokens 100M")
    check_output(arguments.output, arguments.tokens, force=arguments.force)
    skipped = Skipped()
    documents, source = _documents(arguments, skipped)
    tokenizer = load_tokenizer(arguments.tokenizer)
    started, text_bytes = time.monotonic(), 0
    with tqdm(total=arguments.tokens, unit="tok", unit_scale=True, dynamic_ncols=True) as bar:
        def progress(new_tokens: int, new_bytes: int) -> None:
            nonlocal text_bytes
            text_bytes += new_bytes
            text_rate = text_bytes / 1e6 / (time.monotonic() - started)
            bar.set_postfix_str(f"{text_rate:.1f} MB/s of text", refresh=False)
            bar.update(new_tokens)

        done = prepare(documents, tokenizer, arguments.output, source=source, n_tokens=arguments.tokens,
                       force=arguments.force, progress=progress)
    _report(done, skipped, time.monotonic() - started)


def _documents(arguments: argparse.Namespace, skipped: Skipped) -> tuple[Iterator[str], str]:
    """The documents, and where they come from in words."""
    from oneb.data.sources import SOURCES, file_documents, find_inputs, hub_documents

    if arguments.input:
        files = find_inputs(arguments.input)
        return (file_documents(files, arguments.text_column, skipped),
                f"{len(files)} local files, {files[0].name} first")
    dataset = SOURCES[arguments.source]
    return (hub_documents(dataset, arguments.text_column, skipped),
            f"{dataset.repo}@{dataset.revision} {dataset.pattern}")


def _report(done: Prepared, skipped: Skipped, seconds: float) -> None:
    tokens, documents = done.sidecar.tokens, done.sidecar.documents
    print(f"wrote {done.path}: {tokens} tokens ({format_count(tokens)}) of {documents} documents "
          f"in {format_duration(seconds)}")
    if str(skipped):
        print(f"left out documents: {skipped}")
    if done.short_by:
        print(f"warning: the input held {tokens} tokens, {done.short_by} fewer than the "
              f"{tokens + done.short_by} asked for; the file is whole, but shorter", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
