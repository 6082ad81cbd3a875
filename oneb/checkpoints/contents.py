"""What a checkpoint's file may hold: looked at before any of it is used, so that nothing in it can surprise.

A checkpoint may come from anywhere. Its pickle is read by torch's ``weights_only`` loader, which runs no code; here is
what that leaves open: archives that unpack to more than they are, values of other types, tensors of other shapes.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneb.accounting import parameter_counts
from oneb.changes import known_options
from oneb.checkpoints.rundir import CheckpointError
from oneb.config import model_from_dict
from oneb.errors import OnebError

# The pickle beside the tensors: some hundred bytes a tensor.
_LARGEST_PICKLE = 2**26
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip file's entry: signature, lengths of its name and its extra field
_END = struct.Struct("<4s16xH")  # of the whole archive: signature, length of its comment
_ALLOWED_NAMES = re.compile(r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")
# Opcodes that name or build objects in ways that torch.save never uses.
_OTHER_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
_MOST_PLAIN_VALUES = 100_000
_AT_LEAST_ONE = {"vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"}
_LONGEST_SEQUENCE = 2**24
_FAULTS_SHOWN = 5


def check_archive(path: Path) -> None:
    """That a file is an uncompressed archive as torch writes them, of tensors and plain containers.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        if fault := _archive_fault(path):
            raise ValueError(fault)
    except Exception as error:  # of zipfile, struct or pickletools, too, which raise nearly anything
        reason = ascii(str(error)[:200])
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}); use an older "
                              "one, or one that oneb wrote") from error


def _archive_fault(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(-min(size, _END.size), os.SEEK_END)
        end = file.read()
    # Exactly at both ends, so that every reader finds the same directory of it.
    if len(end) < _END.size or _END.unpack(end) != (b"PK\5\6", 0):
        return "it does not end as an archive"
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if min((entry.header_offset for entry in entries), default=1):
        return "it does not begin as an archive"
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        return "it is compressed"
    if sum(entry.file_size for entry in entries) > size:
        return "its parts are larger than the whole"
    pickles = [entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len({entry.filename for entry in entries}) < len(entries):
        return "it holds not one pickle"
    if pickles[0].file_size > _LARGEST_PICKLE:
        return "its pickle is too large"
    return _pickle_fault(_stored_bytes(path, pickles[0]))


def _stored_bytes(path: Path, entry: zipfile.ZipInfo) -> bytes:
    """An entry as it stands in the file. Its checksum is not looked at: the whole file's hash was."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile("an entry is not where the directory says")
        file.seek(name + extra, 1)
        return file.read(entry.file_size)


def _pickle_fault(data: bytes) -> str:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _OTHER_WAYS:
            return f"its pickle holds the opcode {opcode.name}"
        if opcode.name == "GLOBAL" and not _ALLOWED_NAMES.fullmatch(argument):
            return f"its pickle asks for {argument.replace(' ', '.')}, which is neither a tensor nor a plain container"
    return ""


# ---- types


def check_types(contents: Any, path: Path) -> dict[str, Any]:
    """A checkpoint's contents, each of them of its type; those that an earlier version did not save are None.

    Raises:
        CheckpointError: something is missing, or of another type.
    """
    if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
        raise CheckpointError(f"{path} is not a checkpoint of this program; use one that oneb wrote")
    missing = [name for name in ("step", "tokens", "best_val_loss", "config", "model") if contents.get(name) is None]
    wrong = [name for name, is_right in _TYPES.items() if contents.get(name) is not None
             and not is_right(contents[name])]
    if missing or wrong:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has damaged {', '.join(wrong)}"] * bool(wrong)
        raise CheckpointError(f"{path} {' and '.join(said)}; use an older one, or one that oneb wrote")
    found = {name: contents.get(name) for name in _TYPES}
    found["config"] = known_options(contents["config"])
    if fault := _model_fault(found):
        raise CheckpointError(f"{path} {fault}; use an older one, or one that oneb wrote")
    return found


def _model_fault(contents: dict[str, Any]) -> str:
    """That there can be no model of the shape it names, or that it would be of another size than the tensors.

    One may be made before they meet. Padding rows of the embedding are not counted, hence "at least".
    """
    shape = contents["config"]["model"]
    if any(type(value) is int and (value < 0 or value < 1 and name in _AT_LEAST_ONE) for name, value in shape.items()):
        return "names a model of no shape"
    if shape.get("max_seq_len", 0) > _LONGEST_SEQUENCE:
        return f"names a model for sequences of {shape['max_seq_len']:,} tokens"
    try:
        expected = sum(parameter_counts(model_from_dict(shape)).values())
    except OnebError:  # fallback: of another version, which is heard of where the model is needed
        return ""
    there = sum(tensor.numel() for tensor in contents["model"].values())
    return "" if expected <= there else f"names a model of {expected:,} parameters and holds {there:,}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _is_count(v) and v > 0 for k, v in value.items())


def _is_tensor(value: Any) -> bool:
    # Exactly that class: a subclass may answer otherwise.
    return type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _is_tensor(v) for k, v in value.items())


def _is_optimizer(value: Any) -> bool:
    return (isinstance(value, dict) and set(value) == {"kind", "n_updates", "state"} and isinstance(value["kind"], str)
            and _is_count(value["n_updates"]) and isinstance(value["state"], dict)
            and all(isinstance(name, str) and _are_tensors(state) for name, state in value["state"].items()))


def _is_scaler(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("enabled")) is not bool:
        return False
    numbers = {name: entry for name, entry in value.items() if name != "enabled"}
    if set(numbers) != {"scale", "good_steps", "skipped_steps"} or not _are_tensors(numbers):
        return False
    if any(tensor.ndim for tensor in numbers.values()):
        return False
    scale, *counts = (numbers[name].item() for name in ("scale", "good_steps", "skipped_steps"))
    return type(scale) is float and 0 < scale < math.inf and all(map(_is_count, counts))


def _is_rng(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"cpu", "cuda"} or not isinstance(value["cuda"], (list, tuple)):
        return False
    states = [value["cpu"], *value["cuda"]]
    if not all(_is_tensor(state) and state.dtype is torch.uint8 and state.ndim == 1 for state in states):
        return False
    try:
        torch.Generator().set_state(value["cpu"].clone())
    except RuntimeError:
        return False
    return True


def _is_options(value: Any) -> bool:
    try:
        known_options(value)
    except ValueError:
        return False
    return True


def _is_skips(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_count, pair)) for pair in value)


def _is_plain(value: Any) -> bool:
    """Numbers, text and containers of them; not so many that looking at them takes long, as shared ones may be."""
    waiting, left = [value], _MOST_PLAIN_VALUES
    while waiting and left:
        left -= 1
        entry = waiting.pop()
        if isinstance(entry, dict):
            if not all(isinstance(name, str) for name in entry):
                return False
            entry = list(entry.values())
        if isinstance(entry, (list, tuple)):
            if len(entry) > left:
                return False
            waiting += entry
        elif type(entry) not in (int, float, bool, str, type(None)):
            return False
    return not waiting


_TYPES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "tokens": _is_count,
    "best_val_loss": lambda value: _is_count(value) or type(value) is float and not math.isnan(value),
    "config": _is_options,
    "model": _are_tensors,
    "optimizer": _is_optimizer,
    "scaler": _is_scaler,
    "float8": _are_tensors,
    "rng": _is_rng,
    "fit": lambda value: isinstance(value, (list, tuple)) and all(
        _is_counts(entry) and set(entry) == {"seq_len", "batch_size", "grad_accum"} for entry in value),
    "data_fingerprint": lambda value: isinstance(value, str),
    "encoding": lambda value: isinstance(value, str),
    "made_with": lambda value: isinstance(value, dict) and all(
        isinstance(text, str) for pair in value.items() for text in pair),
    "skips": _is_skips,
    "watch": lambda value: isinstance(value, dict) and _is_plain(value),
    "evaluated_at": lambda value: type(value) is int and -1 <= value < 2**63,
}


# ---- shapes


def tensor_faults(given: Mapping[str, Any], wanted: Mapping[str, Any], *, any_float: bool = False) -> list[str]:
    """How tensors differ from those that they are for, as "what is given: what is wanted"; nested mappings too.

    Args:
        any_float: other floating-point dtypes will do: they are converted.
    """
    faults = [f"{shown_name(name)} is there and has no place" for name in given if name not in wanted]
    for name, want in wanted.items():
        have = given.get(name)
        if isinstance(want, Mapping):
            if not isinstance(have, Mapping):
                faults.append(f"{name} is missing")
            else:
                faults += [f"{name}.{fault}" for fault in tensor_faults(have, want, any_float=any_float)]
        elif not isinstance(have, Tensor):
            faults.append(f"{name} is missing")
        elif have.shape != want.shape or have.dtype != want.dtype and not (any_float and have.is_floating_point()):
            faults.append(f"{name} is {_described(have)}, not {_described(want)}")
    return faults


def shown_name(name: Any) -> str:
    """A name out of a file, for people."""
    return ascii(name)[:80]


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def refuse_faults(path: Path, faults: list[str]) -> None:
    """Raises :class:`CheckpointError` if there are any."""
    if faults:
        more = f", and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        listed = ", ".join(faults[:_FAULTS_SHOWN])
        raise CheckpointError(f"{path} does not fit the model that it says it is of ({listed}{more}); "
                              "use an older one, or one that oneb wrote")
