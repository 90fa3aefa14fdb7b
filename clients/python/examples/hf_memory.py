#!/usr/bin/env python3
"""Adds fetched memory to a Hugging Face model, and continues texts with it and without.

    pip install 'anchorage-client[examples]'
    python hf_memory.py --server 127.0.0.1:7800 --model path/or/name "Jupiter is" "The heart pumps"

The model must be the anchor that the served memory was trained with: as many layers, and as wide.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchorage import Client, Error, format_path
from anchorage.torch import attach


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="what is continued, and what memory is fetched by")
    parser.add_argument("--server", default="127.0.0.1:7800", help="host:port of retrieval.v1")
    parser.add_argument("--token", help="a bearer token")
    parser.add_argument("--model", required=True, help="a folder or a name that transformers loads")
    parser.add_argument("--pattern", default="mlp", help="last name of the FFN modules, a regular expression")
    parser.add_argument("--new-tokens", type=int, default=40)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()

    with Client(args.server, token=args.token) as client:
        spec = client.info().spec
        expected = (model.config.num_hidden_layers, model.config.hidden_size)
        if (spec.n_layers, spec.d_model) != expected:
            print(
                f"memory of {spec.n_layers} layers and d_model {spec.d_model}, expected {expected[0]} and {expected[1]}",
                file=sys.stderr,
            )
            return 1
        memories = list(client.retrieve_each(args.texts))

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
    except Error as error:
        sys.exit(f"error: {error}")
