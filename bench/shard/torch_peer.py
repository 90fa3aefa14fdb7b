"""What a shard does beside its network, in PyTorch: the update of blocks by gradients in bytes, and a save.

Answers each line of its input by one line of JSON.
"""

import argparse
import json
import os
import sys
import time

import numpy as np
import torch
from safetensors.torch import save_file


def answer_lines(answer):
    for _ in sys.stdin:
        print(json.dumps(answer()), flush=True)


def number(length, index):
    """As in examples/load/closed_loop.rs."""
    return torch.from_numpy(((index * 31 + np.arange(length) * 7) & 255).astype("f4"))


def moment(length):
    """As in examples/load/bank.rs."""
    return torch.full((length,), 1 / 1024)


def gradient(length, index, dtype):
    """As in examples/load/push.rs, in the bytes that come off the wire."""
    values = torch.from_numpy((((index * 13 + np.arange(length) * 37) & 255) / 256 - 0.5).astype("f4"))
    return bytearray(values.to(dtype).view(torch.uint8).numpy().tobytes())


def push(args):
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    blocks = [torch.nn.Parameter(number(args.len, index)) for index in range(args.blocks)]
    received = [gradient(args.len, index, dtype) for index in range(args.blocks)]
    optimizer = torch.optim.AdamW(blocks, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    # The shard's blocks have been updated once.
    for block in blocks:
        optimizer.state[block] = {"step": torch.tensor(1.0), "exp_avg": moment(args.len), "exp_avg_sq": moment(args.len)}
    if args.bf16:
        for block in blocks:
            block.grad = torch.empty(args.len)

    def step():
        start = time.monotonic()
        for block, raw in zip(blocks, received):
            values = torch.frombuffer(raw, dtype=dtype)
            # Into arrays that are there, as .float() would have to make new ones; f32 is used where it lies.
            if args.bf16:
                block.grad.copy_(values)
            else:
                block.grad = values
        optimizer.step()
        seconds = time.monotonic() - start
        return {"seconds": seconds, "mean": float(blocks[0].detach().double().abs().mean())}

    answer_lines(step)


def save(args):
    """The same bytes, in as many tensors: weights and both moments of every block."""
    kinds = ("weights", "m", "v")
    tensors = {
        f"{kind}.{index}": number(args.len, index) if kind == "weights" else moment(args.len)
        for kind in kinds
        for index in range(args.blocks)
    }
    path = os.path.join(args.folder, "bank.safetensors")

    def written():
        start = time.monotonic()
        save_file(tensors, path)
        for name in (path, args.folder):
            handle = os.open(name, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        seconds = time.monotonic() - start
        n_bytes = os.path.getsize(path)
        os.remove(path)
        return {"seconds": seconds, "bytes": n_bytes}

    answer_lines(written)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["push", "save"])
    parser.add_argument("--len", type=int, required=True, help="numbers of a block")
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder")
    args = parser.parse_args()
    {"push": push, "save": save}[args.what](args)


main()
