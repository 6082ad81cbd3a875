"""Command-line options <-> configuration, both ways, from the fields of :mod:`oneb.config`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from oneb.config import Config, sections, whole_or_auto
from oneb.errors import OnebError
from oneb.presets import DEFAULT_SIZE, SIZES, resolve
from oneb.schedules import format_seq_schedule
from oneb.units import parse_count

_TITLES = {
    "model": "model",
    "optim": "optimizer",
    "data": "data",
    "train": "training",
    "run": "run directory and checkpoints",
    "log": "logging",
}


class OptionParser(argparse.ArgumentParser):
    """Mistakes in one line, without the usage of eighty options, and with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            flags = [action.option_strings[0] for action in self._actions if action.option_strings]
            meant = [difflib.get_close_matches(word.split("=")[0], flags, 1) for word in message.split()
                     if word.startswith("--")]
            message += "".join(f"; did you mean {match[0]}?" for match in meant if match)
        self.exit(2, f"error: {message} (--help lists every option)\n")


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as an argparse type: what it says of a text it refuses is shown beside the option's name."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except OnebError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parsed.__name__ = parse.__name__.replace("_", " ")  # argparse names it when it meets a ValueError
    return parsed


count = argument(parse_count)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of a run. Nothing has an argparse default: the namespace holds what was given, no more."""
    for name, cls in sections().items():
        group = parser.add_argument_group(_TITLES[name])
        if name == "model":
            group.add_argument("--size", choices=tuple(SIZES), default=argparse.SUPPRESS,
                               help=f"shape preset; explicit widths win (default {DEFAULT_SIZE})")
        for field in dataclasses.fields(cls):
            _add_option(group, field)
        if name == "train":
            group.add_argument("--train-seq-len", type=int, default=argparse.SUPPRESS, metavar="TOKENS",
                               help="train at this length where --seq-schedule says nothing (default 1024)")
            group.add_argument("--target-tokens", type=count, default=argparse.SUPPRESS, metavar="COUNT",
                               help="train on this many tokens, e.g. 10B: solves for --steps under the schedule")


def _add_option(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    meta = field.metadata
    default = field.default
    if field.name == "phases":
        default = format_seq_schedule(default)
    text = meta["help"].replace("%", "%%")
    widths = ("n_kv_heads", "sem_dim", "geo_dim", "attn_dim")  # their defaults depend on the variant
    if default is not None and "(default" not in text and field.name not in widths:
        shown = {True: "on", False: "off"}.get(default, default) if meta["type"] is bool else default
        text += f" (default {shown})"
    arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    if meta["type"] is bool:
        group.add_argument(meta["flag"], action=argparse.BooleanOptionalAction, **arguments)
    elif meta["choices"]:
        group.add_argument(meta["flag"], choices=meta["choices"], **arguments)
    else:
        bare = {"nargs": "?", "const": meta["bare"]} if meta["bare"] else {}
        group.add_argument(meta["flag"], type=argument(meta["type"]), metavar=_metavar(meta), **bare, **arguments)
    if meta["negated"]:
        group.add_argument(_negation(meta["flag"]), action="store_const", const=meta["negated"], dest=field.name,
                           default=argparse.SUPPRESS, help=f"same as {meta['flag']} {meta['negated']}")


def _negation(flag: str) -> str:
    return "--no-" + flag.removeprefix("--")


def _metavar(meta: Any) -> str:
    names = {int: "N", float: "X", whole_or_auto: "N", parse_count: "COUNT"}
    return names.get(meta["type"], meta["flag"].rsplit("-", 1)[-1].upper())


def config_from_args(args: argparse.Namespace) -> Config:
    """The configuration that parsed options describe.

    Raises:
        ConfigErrors: every fault of the options, together.
    """
    return resolve(vars(args))


def config_to_args(config: Config) -> list[list[str]]:
    """The options that describe ``config``, one list a section: parsing them gives the same configuration back."""
    lines = []
    implied = _implied(config)
    for name in sections():
        section = getattr(config, name)
        words: list[str] = []
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value is None or field.name in implied:
                continue
            flag = field.metadata["flag"]
            if isinstance(value, bool):
                words.append(flag if value else _negation(flag))
            else:
                text = format_seq_schedule(value) if field.name == "phases" else str(value)
                # argparse takes a word that begins with a dash for an option, unless it is joined to its own.
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
        lines.append(words)
    return lines


def _implied(config: Config) -> set[str]:
    """Fields that others fix, and that the command line therefore does not take: widths, by the variant, and such."""
    batch = {"grad_accum"} if config.train.batch_tokens is not None else set()
    return batch | {
        "decoupled": {"n_kv_heads"},
        "bottleneck": {"n_kv_heads", "sem_dim", "geo_dim"},
        "baseline": {"n_kv_heads", "sem_dim", "geo_dim", "attn_dim"},
    }.get(config.model.variant, {"sem_dim", "geo_dim", "attn_dim"})


def shell_command(words: Sequence[Sequence[str]]) -> str:
    """A command over several lines, quoted so that pasting it into a shell runs exactly these words."""
    return " \\\n  ".join(shlex.join(line) for line in words if line)
