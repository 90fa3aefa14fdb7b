#!/usr/bin/env python3
"""Adds fetched memory to a Hugging Face model, and continues texts with it and without.

    pip install 'anchorage-client[examples]'
    python hf_memory.py --server 127.0.0.1:7800 --model path/or/name "Jupiter is" "The heart pumps"
    python hf_memory.py --bank folder --path 3/49 --model path/or/name "Jupiter is"

The model must be the anchor that the memory was trained with: as many layers, and as wide.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchorage import BankFile, Client, Error, Retrieved, format_path
from anchorage.torch import attach


def fetched(args: argparse.Namespace) -> list[Retrieved]:
    """The memory of each text, or of the path that was given for all."""
    if args.bank:
        bank = BankFile(args.bank)
        if args.path:
            return [bank.retrieve(path=args.path)] * len(args.texts)
        return list(bank.retrieve_each(args.texts))
    with Client(args.server, token=args.token) as client:
        if args.path:
            return [client.retrieve(path=args.path)] * len(args.texts)
        return list(client.retrieve_each(args.texts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="what is continued, and what memory is fetched by")
    parser.add_argument("--server", default="127.0.0.1:7800", help="host:port of retrieval.v1")
    parser.add_argument("--token", help="a bearer token")
    parser.add_argument("--bank", help="a folder with bank.safetensors, or such a file, instead of a server")
    parser.add_argument("--path", help="of all texts, such as 3/49 or generic, instead of one for each")
    parser.add_argument("--model", required=True, help="a folder or a name that transformers loads")
    parser.add_argument("--pattern", default="mlp", help="last name of the FFN modules, a regular expression")
    parser.add_argument("--new-tokens", type=int, default=40)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()

    memories = fetched(args)
    batch = tokenizer(args.texts, return_tensors="pt", padding=True)

    def continued() -> list[str]:
        with torch.no_grad():
            tokens = model.generate(
                **batch, max_new_tokens=args.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    plain = continued()
    # Each row of the batch has the memory of its own text.
    with attach(model, memories, pattern=args.pattern):
        with_memory = continued()
    for text, memory, without, with_ in zip(args.texts, memories, plain, with_memory):
        path = format_path(memory.path) if memory.path else "no memory"
        print(f"{text!r} ({path}, step {memory.step} of {memory.bank})\n  without: {without}\n  with:    {with_}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Error, ValueError) as error:
        sys.exit(f"error: {error}")
