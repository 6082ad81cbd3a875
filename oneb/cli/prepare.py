"""``python3 prepare_fineweb.py``: text, or ready tokens, to a token file."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser
from oneb.cli.progress_line import ProgressLine
from oneb.errors import OnebError
from oneb.units import format_count, format_duration, parse_count

if TYPE_CHECKING:
    from oneb.data.prepare import Prepared
    from oneb.data.sources import InputFile

_PACKAGES = ("numpy", "tiktoken", "pyarrow", "huggingface_hub")
_SOURCE, _SOURCE_FILES, _TOKENIZER, _TEXT_COLUMN = "fineweb-edu", "*.parquet", "gpt2", "text"
_OF_THE_HUB = ("source", "source_files", "retokenize")
_OF_MAKING = ("input", *_OF_THE_HUB, "tokens", "text_column", "workers", "force")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``prepare_fineweb.py``."""
    parser = OptionParser(
        prog="prepare_fineweb.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make FineWeb-Edu, or text of your own, into one .npy file for training.",
        epilog="examples:\n"
               "  python3 prepare_fineweb.py --tokens 100M --output fineweb_100m.npy\n"
               "  python3 prepare_fineweb.py --tokens 1B --output fineweb_1b.npy\n"
               "  python3 prepare_fineweb.py --input books/ notes.jsonl.gz --output mine.npy\n"
               "  python3 prepare_fineweb.py --verify mine.npy\n\n"
               "1B tokens take 2 GB of disk. Beside X.npy appear X.npy.meta, which says what X.npy holds,\n"
               "X.npy.idx.npy, where its documents begin, and X.npy.sources.json: keep them together.\n"
               "Stopped or killed at any moment, the same command continues.")
    parser.add_argument("--output", type=Path, metavar="X.npy", help="the token file to write")
    parser.add_argument("--tokens", type=parse_count, metavar="N",
                        help="exactly so many tokens: 100M, 1B, 5000000. Default with --input: all there is; "
                             "without --input it must be given")
    parser.add_argument("--input", nargs="+", metavar="PATH",
                        help="read these instead of --source: .parquet, .jsonl(.gz, .zst), .txt (a .txt is one "
                             "document) or .bin (ready GPT-2 tokens) files, folders or globs of them")
    # Most have no default, so that one that nobody would read is noticed.
    parser.add_argument("--source", metavar="NAME",
                        help="dataset on the Hugging Face Hub: fineweb-edu, fineweb, or owner/name[@revision] of one "
                             f"with parquet files (default: {_SOURCE})")
    parser.add_argument("--source-files", metavar="PATTERN",
                        help=f"the files of an owner/name (default: {_SOURCE_FILES}; * also crosses folders)")
    parser.add_argument("--retokenize", action="store_true", default=None,
                        help="tokenize text also where the Hub has the tokens ready (default: take these)")
    parser.add_argument("--tokenizer", metavar="NAME",
                        help="gpt2: 50257 ids; bytes: 257 ids; or the path of a Hugging Face tokenizer.json "
                             f"(default: {_TOKENIZER}; with --verify what X.npy.meta says)")
    parser.add_argument("--text-column", metavar="NAME",
                        help=f"where parquet and JSON documents keep their text (default: {_TEXT_COLUMN})")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes (default: one a core, if there is memory and work for so many)")
    parser.add_argument("--force", action="store_true", default=None,
                        help="replace --output if it exists (default: refuse)")
    parser.add_argument("--verify", type=Path, metavar="X.npy",
                        help="make nothing: read X.npy again, compare it with what is said of it, decode samples")
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done (also when the input held fewer tokens than asked), 2 a user's mistake, 130 Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    _require_packages()
    line = ProgressLine(sys.stderr)
    try:
        if arguments.verify is not None:
            _verify(arguments.verify, arguments.tokenizer, line)
        else:
            _prepare(arguments, line)
    except KeyboardInterrupt:
        line.close()
        print(f"\nstopped before {arguments.output or arguments.verify} was done"
              + ("; run the same command again, and it continues" if arguments.output else ""), file=sys.stderr)
        return 130
    finally:
        line.close()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """That no option contradicts another, or would be read by nobody."""
    def given(names: Sequence[str]) -> str:
        return ", ".join("--" + name.replace("_", "-") for name in names if getattr(arguments, name) is not None)

    if (arguments.output is None) == (arguments.verify is None):
        raise OnebError("wanted either --output X.npy, to make it, or --verify X.npy")
    if arguments.verify is not None and (making := given(_OF_MAKING)):
        raise OnebError(f"--verify only reads {arguments.verify}; {making}: for --output")
    if arguments.input and (of_the_hub := given(_OF_THE_HUB)):
        raise OnebError(f"--input takes files of this machine, {of_the_hub} those of the Hugging Face Hub; "
                        "wanted one of the two")
    if arguments.source_files is not None and "/" not in (arguments.source or ""):
        raise OnebError(f"--source-files {arguments.source_files} needs --source owner/name; "
                        f"{arguments.source or _SOURCE} has files of its own")
    if arguments.workers is not None and arguments.workers < 1:
        raise OnebError(f"--workers {arguments.workers}: wanted at least 1")
    for name in ("source", "source_files", "tokenizer", "text_column"):
        if getattr(arguments, name) == "":
            raise OnebError(f"{given([name])} is empty; leave it out, or give it a value")
    if "" in (arguments.input or ()):
        raise OnebError("--input is empty; wanted a file, a folder or a glob ('.' is this folder)")


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise OnebError(f"this Python ({sys.executable}) lacks {', '.join(missing)}. Install with: "
                        "bash quickstart.sh, or python3 -m pip install -r requirements_runtime.txt")


def _prepare(arguments: argparse.Namespace, line: ProgressLine) -> None:
    from oneb.data.prepare import check_output, default_workers, prepare
    from oneb.data.workers import usable_workers

    if arguments.tokens is None and not arguments.input:
        raise OnebError(f"--source {arguments.source or _SOURCE} needs --tokens (it holds billions); "
                        "for instance --tokens 100M")
    check_output(arguments.output, arguments.tokens, force=bool(arguments.force))
    files, source, revision = _files(arguments, line.say)
    workers = arguments.workers or default_workers(files, arguments.tokens, usable_workers())
    started = time.monotonic()
    done = prepare(files, arguments.tokenizer or _TOKENIZER, arguments.output, source=source, revision=revision,
                   n_tokens=arguments.tokens, text_column=arguments.text_column or _TEXT_COLUMN, n_workers=workers,
                   force=bool(arguments.force), say=line.say, progress=line.update)
    line.close()
    _report(done, time.monotonic() - started)


def _files(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[InputFile], str, str | None]:
    """The input, where it comes from in words, and its revision."""
    from oneb.data.sources import describe, local_inputs

    if arguments.input:
        files = local_inputs(arguments.input, say)
        return files, describe(files), None
    from oneb.data.hub_sources import hub_inputs

    return hub_inputs(arguments.source or _SOURCE, arguments.source_files or _SOURCE_FILES, say=say,
                      tokenizer=arguments.tokenizer or _TOKENIZER, n_tokens=arguments.tokens,
                      retokenize=bool(arguments.retokenize))


def _report(done: Prepared, seconds: float) -> None:
    tokens, documents = done.sidecar.tokens, done.sidecar.documents
    assert tokens is not None
    rate = f", {done.text_bytes / 1e6:.0f} MB of text" if done.text_bytes else ""
    print(f"wrote {done.path}: {tokens} tokens ({format_count(tokens)}) of {documents} documents "
          f"in {format_duration(seconds)}{rate}")
    skipped = done.skipped
    if str(skipped):
        print(f"left out documents: {skipped}")
    if skipped.mended:
        print(f"warning: {skipped.mended} documents were not valid UTF-8; what could not be read is U+FFFD now",
              file=sys.stderr)
    if skipped.damaged:
        places = "".join(f"\n  {place}" for place in skipped.examples)
        print(f"warning: damaged in {skipped.damaged} place{'s' * (skipped.damaged > 1)}, and not read on from there; "
              f"copy these files again if you can:{places}", file=sys.stderr)
    if done.short_by:
        print(f"warning: the input held {tokens} tokens, {done.short_by} fewer than the "
              f"{tokens + done.short_by} asked for; the file is whole, but shorter", file=sys.stderr)


def _verify(path: Path, tokenizer: str | None, line: ProgressLine) -> None:
    from oneb.data.formats import open_file
    from oneb.data.sidecar import read_sidecar
    from oneb.data.tokenizer import known_tokenizer, load_tokenizer
    from oneb.data.verify import fits, samples, unsaid, verify

    found = verify(path, line.read)
    line.close()
    print(f"{path}: {found.tokens} tokens of {len(found.lengths)} documents are what {path}.meta says")
    sidecar = read_sidecar(path)
    assert sidecar is not None
    if missing := unsaid(sidecar):
        print(f"warning: it does not say {', '.join(missing)}, so that was not compared", file=sys.stderr)
    if tokenizer is not None:
        known = load_tokenizer(tokenizer)
        if not fits(known, sidecar, len(found.counts)):
            raise OnebError(f"the file is right, but {known.name} is not the tokenizer that made it; give that one")
    else:
        try:
            known = known_tokenizer(sidecar.encoding or "unknown")
        except OnebError as error:  # the file is right all the same
            print(f"  no samples: {error}")
            return
    for place, text in samples(open_file(path, "auto"), known, 3, 64):
        print(f"  from token {place}: {text!r}")


if __name__ == "__main__":
    sys.exit(main())
