#!/usr/bin/env python3
"""A bank attached to a model of transformers, against the logits that anchorage has with the same memory.

    tests/posthoc/attached.py MODEL BANK REFERENCE [PATH…]

MODEL is a Hugging Face folder, BANK a folder with bank.safetensors and spec.json, or such a file. REFERENCE is a
safetensors file with `tokens` [B, T] (integers) and `logits` [B, T, V] (f32), and in its metadata `paths`, those of the
rows with spaces between ("3/49 generic off"), unless they are given: one for each row, or one for all. Without paths
all rows are without memory. Answers by a line of JSON, and fails when logits are further apart than --tolerance. Needs
torch, transformers, and what clients/python needs, which is taken from this tree: grpcio and protobuf.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "clients/python/src"))

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from anchorage import BankFile
from anchorage.torch import attach


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("bank")
    parser.add_argument("reference")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()

    with safe_open(args.reference, "pt") as file:
        tokens, expected = file.get_tensor("tokens").long(), file.get_tensor("logits")
        paths = args.paths or ((file.metadata() or {}).get("paths") or "off").split()
    bank = BankFile(args.bank)
    memories = [None if path == "off" else bank.retrieve(path=path) for path in paths]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        plain = model(input_ids=tokens).logits
        with attach(model, memories, kind=bank.spec.kind):
            found = model(input_ids=tokens).logits
        restored = torch.equal(model(input_ids=tokens).logits, plain)
    apart = (found - expected).abs().max().item()
    answer = {
        "kind": bank.spec.kind,
        "paths": paths,
        "max_abs": apart,
        "std_of_logits": round(expected.std().item(), 3),
        "memory_changes": (found - plain).abs().max().item(),
        "plain_again": restored,
    }
    print(json.dumps(answer))
    if apart > args.tolerance:
        sys.exit(f"error: logits {apart:.1e} apart, expected at most {args.tolerance:.0e}")


main()
