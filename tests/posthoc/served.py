#!/usr/bin/env python3
"""A run on a checkpoint as anchorage serves it, against that checkpoint in transformers with the run's bank attached.

    tests/posthoc/served.py ANCHORAGE RUN MODEL BANK

ANCHORAGE is the program, RUN a run whose frozen anchor is MODEL, a Hugging Face folder with a tokenizer.json, and BANK
what `anchorage bank export RUN BANK --hand-over` wrote. Texts are scored without memory, with the generic path and with
those of a few leaves. Answers by a line of JSON, and fails when a log-probability is further apart than --tolerance.
Needs torch, transformers, and what clients/python needs, which is taken from this tree: grpcio and protobuf.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "clients/python/src"))

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from anchorage import BankFile
from anchorage.torch import attach

TEXTS = [
    "Psychology is the study of behavior and mental processes. Memory is stored in the brain.",
    "The Moon orbits the Earth, and both of them orbit the Sun once a year.",
]
#: Seconds a server may take to read a run.
PATIENCE = 120


def path_of(leaf, branching):
    """The clusters above a leaf and it: "2/17"."""
    below = [math.prod(branching[level + 1 :]) for level in range(len(branching))]
    return "/".join(str(leaf // n) for n in below)


def begun(tokenizer, text, ends):
    """The tokens of a text behind the one that begins texts, or where there is none behind the end of another."""
    plain, marked = (tokenizer.encode(text, add_special_tokens=mark).ids for mark in (False, True))
    return marked if marked != plain else [ends[0] if isinstance(ends, list) else ends, *plain]


@contextlib.contextmanager
def served(program, run):
    """The address of `run` while it is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen([program, "serve", run, "--listen", at])
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"http://{at}/ready").close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    sys.exit(f"error: {run}: expected a server at {at}, found none")
                time.sleep(0.2)
        yield f"http://{at}"
    finally:
        server.terminate()
        server.wait()


def scored(address, text, path):
    """Log-probabilities of the tokens of `text` but its first, and the path they were scored with."""
    body = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0, "memory": path}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        logprobs = json.load(answer)["choices"][0]["logprobs"]
    # The last token is a new one.
    return logprobs["token_logprobs"][1:-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("anchorage", "run", "model", "bank"):
        parser.add_argument(name)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()

    bank = BankFile(args.bank)
    n_leaves = math.prod(bank.spec.branching)
    leaves = sorted({0, n_leaves // 2, n_leaves - 1})
    paths = ["off", "generic", *(path_of(leaf, bank.spec.branching) for leaf in leaves)]
    tokenizer = Tokenizer.from_file(f"{args.model}/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    apart, changes, n = 0.0, 0.0, 0
    with served(args.anchorage, args.run) as address, torch.inference_mode():
        for text in TEXTS:
            ids = torch.tensor([begun(tokenizer, text, model.config.eos_token_id)])
            of_next = lambda: torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[1:, 0]
            plain = of_next()
            for path in paths:
                memory = None if path == "off" else bank.retrieve(path=path)
                with attach(model, [memory], kind=bank.spec.kind):
                    expected = of_next()
                found = torch.tensor(scored(address, text, path))
                apart = max(apart, (found - expected).abs().max().item())
                changes = max(changes, (expected - plain).abs().max().item())
                n += len(found)
    print(json.dumps({"paths": paths, "tokens": n, "max_abs": apart, "memory_changes": changes}))
    if apart > args.tolerance:
        sys.exit(f"error: log-probabilities {apart:.1e} apart, expected at most {args.tolerance:.0e}")


main()
