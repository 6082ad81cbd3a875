"""Datasets of the Hugging Face Hub that have a name here, as input files."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from oneb.data.formats import BIN_HEADER_BYTES
from oneb.data.hub import fetch, list_files
from oneb.data.sources import READY_TOKENS, SOURCES, HubDataset, InputFile
from oneb.errors import OnebError
from oneb.units import format_count

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def hub_inputs(source: str, pattern: str, *, tokenizer: str, n_tokens: int, retokenize: bool,
               say: Callable[[str], None]) -> tuple[list[InputFile], str, str]:
    """The files of a source, the source in words, and its revision.

    Ready tokens where there are enough, unless ``retokenize``.

    Args:
        source: a key of ``SOURCES``, or owner/name[@revision], whose files match ``pattern``.

    Raises:
        OnebError: for another name; what ``list_files`` raises.
    """
    ready = READY_TOKENS.get(source)
    if ready is not None and tokenizer == "gpt2" and not retokenize:
        try:
            files = hub_files(ready, say)
        except OnebError as error:
            say(f"no ready tokens ({str(error).splitlines()[0][:200]}); tokenizing the text instead")
        else:
            held = sum(max(0, file.size - BIN_HEADER_BYTES) // 2 for file in files[0])
            if held >= n_tokens:
                return files
            say(f"{ready.repo} holds {format_count(held)} tokens, fewer than --tokens; tokenizing the text instead")
    if source in SOURCES:
        return hub_files(SOURCES[source], say)
    match = _REPOSITORY.fullmatch(source)
    if match is None:
        raise OnebError(f"--source {source!r} is not known; wanted {', '.join(SOURCES)}, or owner/name of a dataset on "
                        "the Hugging Face Hub")
    return hub_files(HubDataset(match[1], match[2] or "main", pattern), say)


def hub_files(dataset: HubDataset, say: Callable[[str], None]) -> tuple[list[InputFile], str, str]:
    """The files of a dataset, it in words, and the commit."""
    found = list_files(dataset, say)
    files = [InputFile(file.path, file.size, file.sha256 or file.revision, file.sha256,
                       partial(fetch, dataset, file, say), remote=True) for file in found]
    revision = found[0].revision
    return files, f"{dataset.repo}@{revision} {dataset.pattern}", revision
