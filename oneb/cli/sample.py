"""``oneb sample``: text from a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from oneb.cli.guard import reports_mistakes
from oneb.cli.options import OptionParser
from oneb.errors import OnebError


def build_parser() -> argparse.ArgumentParser:
    """The options of ``oneb sample``."""
    parser = OptionParser(prog="oneb sample", description="Generate text from a checkpoint.")
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint (best.pt, last.pt), or a run directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="new tokens at most (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X",
                        help="0 takes the likeliest token each time (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, metavar="N",
                        help="sample among the N likeliest tokens; 0 = all (default 50)")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="samples (default 1)")
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="seed of the first sample (default 1337)")
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2, bytes or a tokenizer.json (default: what the "
                        "training data's .meta said)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="(default auto)")
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Print samples; returns the exit code."""
    args = build_parser().parse_args(argv)
    faults = [text for bad, text in (
        (args.tokens < 1, f"--tokens {args.tokens} must be at least 1"),
        (args.temperature < 0, f"--temperature {args.temperature} must not be negative"),
        (args.top_k < 0, f"--top-k {args.top_k} must not be negative; 0 samples from the whole vocabulary"),
        (args.num < 1, f"--num {args.num} must be at least 1"),
    ) if bad]
    if faults:
        raise OnebError("; ".join(faults))
    import torch

    from oneb.use.generate import generate, load_trained, stream_text

    path = args.ckpt / "best.pt" if args.ckpt.is_dir() else args.ckpt
    trained = load_trained(path, args.device, args.tokenizer)
    model, tokenizer = trained.model, trained.tokenizer
    prompt = [tokenizer.eot, *tokenizer.encode(args.prompt)]
    if len(prompt) >= model.config.max_seq_len:
        raise OnebError(f"--prompt has {len(prompt)} tokens, and the model's longest context is "
                        f"{model.config.max_seq_len}; give a shorter one")
    print(f"[{path}: {model.config.variant}, step {trained.step:,}, {trained.tokens:,} tokens]")
    for number in range(args.num):
        new = generate(model, torch.tensor(prompt), max_new_tokens=args.tokens, temperature=args.temperature,
                       top_k=args.top_k, seed=args.seed + number, vocab_size=tokenizer.vocab_size, eot=tokenizer.eot)
        print(f"\n{args.prompt}", end="", flush=True)
        for text in stream_text(tokenizer, new):
            print(text, end="", flush=True)
        print()
    return 0
