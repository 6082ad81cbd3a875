"""``oneb data show X.npy``: what is in a token file, as training will read it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser
from oneb.cli.progress_line import ProgressLine
from oneb.config import DATA_FORMATS
from oneb.errors import OnebError
from oneb.units import format_count

if TYPE_CHECKING:
    from oneb.data.reading import TokenFile
    from oneb.data.tokenizer import Tokenizer
    from oneb.data.verify import Statistics

_MANY_ZEROS = 1000


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``oneb data``."""
    parser = OptionParser(prog="oneb data", description="Look into token files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="statistics and decoded samples of a token file")
    show.add_argument("path", type=Path, metavar="X.npy", help="the file; also .bin, .pt or text of integers")
    show.add_argument("--samples", type=int, default=3, metavar="N", help="places to decode (default: %(default)s)")
    show.add_argument("--length", type=int, default=128, metavar="TOKENS",
                      help="tokens decoded at each place (default: %(default)s)")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="of the places (default: %(default)s)")
    show.add_argument("--data-format", default="auto", choices=DATA_FORMATS,
                      help="how tokens are stored (default: %(default)s, by the name's ending)")
    show.add_argument("--tokenizer", metavar="NAME",
                      help="gpt2, bytes or a tokenizer.json; default: what X.npy.meta says")
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 shown, 2 a user's mistake."""
    from oneb.data.sidecar import read_sidecar
    from oneb.data.tokenizer import known_tokenizer, load_tokenizer
    from oneb.data.verify import fits, statistics

    arguments = build_parser().parse_args(argv)
    if arguments.samples < 0 or arguments.length < 1 or arguments.seed < 0:
        raise OnebError(f"--samples {arguments.samples} --length {arguments.length} --seed {arguments.seed}: wanted at "
                        "least 0, 1 and 0")
    tokens = _open(arguments.path, arguments.data_format)
    sidecar = read_sidecar(arguments.path)
    encoding = sidecar.encoding if sidecar else None
    tokenizer, trouble = None, []
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    elif encoding:
        try:
            tokenizer = known_tokenizer(encoding)
        except OnebError as error:  # ids and documents can be counted all the same
            trouble.append(str(error))
    eot = sidecar.eot if sidecar and sidecar.eot is not None else tokenizer.eot if tokenizer else None
    with contextlib.closing(ProgressLine(sys.stderr)) as line:
        found = statistics(tokens, eot, line.read)
    print(f"{arguments.path}: {found.tokens} tokens ({format_count(found.tokens)})")
    if sidecar is not None and sidecar.tokens not in (None, found.tokens):
        trouble.append(f"{arguments.path}.meta says {sidecar.tokens} tokens: it is of another file, and training "
                       "refuses the two")
    if tokenizer is not None and not fits(tokenizer, sidecar, len(found.counts)):
        trouble.append(f"{tokenizer.name} is not the tokenizer that made this file, so nothing is decoded")
        tokenizer = None
    if sidecar is not None:
        facts = {"encoding": sidecar.encoding, "from": sidecar.source, "revision": sidecar.revision}
        print("  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    else:
        print("  no .meta beside it" + ("" if tokenizer else ": name its --tokenizer to see documents and text"))
    for sentence in trouble:
        print(f"  warning: {sentence}")
    _print_ids(found, tokenizer)
    if eot is not None:
        _print_documents(found)
    if tokenizer is not None:
        _print_samples(arguments, tokens, tokenizer)
    return 0


def _open(path: Path, data_format: str) -> TokenFile:
    from oneb.data.formats import open_file
    from oneb.data.tokens import files_of_folder

    if path.is_dir():
        names = [file.name for file in files_of_folder(path, data_format)]
        raise OnebError(f"{path} is a folder; wanted one of its files: {', '.join(names[:5])}"
                        + (f" (of {len(names)})" if len(names) > 5 else ""))
    return open_file(path, data_format)


def _print_ids(found: Statistics, tokenizer: Tokenizer | None) -> None:
    import numpy as np

    used = np.flatnonzero(found.counts)
    shares = found.counts[used] / found.tokens
    size = f" of {tokenizer.vocab_size}" if tokenizer else ""
    print(f"  ids: {len(used)}{size} occur, the largest is {used[-1]}; "
          f"entropy {float(-(shares * np.log(shares)).sum()):.3f} nats a token, the loss of a model that knows "
          "only how often each occurs")
    top = used[np.argsort(-found.counts[used], kind="stable")][:10]
    names = (repr(tokenizer.decode([token])) if tokenizer else str(token) for token in top.tolist())
    print("  most frequent: " + ", ".join(f"{name} {found.counts[token] / found.tokens:.1%}"
                                          for name, token in zip(names, top, strict=True)))
    if found.longest_zeros >= _MANY_ZEROS:
        print(f"  warning: {found.longest_zeros} ids 0 in a row: a part of this file was perhaps never written")


def _print_documents(found: Statistics) -> None:
    import numpy as np

    lengths = found.lengths
    tenth, half, ninety = np.percentile(lengths, (10, 50, 90)).astype(int)
    cut = "" if len(found.ends) and found.ends[-1] == found.tokens else ", the last one cut"
    print(f"  documents: {len(lengths)}{cut}; tokens in one: mean {lengths.mean():.0f}, median {half}, "
          f"10% below {tenth}, 10% above {ninety}, longest {lengths.max()}")


def _print_samples(arguments: argparse.Namespace, tokens: TokenFile, tokenizer: Tokenizer) -> None:
    from oneb.data.verify import samples

    for place, text in samples(tokens, tokenizer, arguments.samples, arguments.length, arguments.seed):
        print(f"\n--- tokens {place} to {place + arguments.length}")
        print(text)


if __name__ == "__main__":
    sys.exit(main())
