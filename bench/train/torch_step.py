"""PyTorch's side of bench/train: the anchor of crates/anchor, written as a PyTorch user would write it."""

import argparse
import json
import resource
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, a, f = config["d_model"], config["n_heads"] * config["head_width"], config["ffn_width"]
        self.n_heads, self.eps = config["n_heads"], config["norm_eps"]
        self.attention_norm = nn.Parameter(torch.ones(d))
        self.ffn_norm = nn.Parameter(torch.ones(d))
        self.query_norm = nn.Parameter(torch.ones(a))
        self.key_norm = nn.Parameter(torch.ones(a))
        self.query, self.key, self.value = (nn.Linear(d, a, bias=False) for _ in range(3))
        self.attention_output = nn.Linear(a, d, bias=False)
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def norm(self, x, gain):
        return F.rms_norm(x, gain.shape, gain, self.eps)

    def forward(self, x, cos, sin, memory):
        b, t, _ = x.shape
        h = self.norm(x, self.attention_norm)
        heads = lambda y: y.view(b, t, self.n_heads, -1).transpose(1, 2)
        q = rope(heads(self.norm(self.query(h), self.query_norm)), cos, sin)
        k = rope(heads(self.norm(self.key(h), self.key_norm)), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, heads(self.value(h)), is_causal=True)
        x = x + self.attention_output(mixed.transpose(1, 2).reshape(b, t, -1))
        h = self.norm(x, self.ffn_norm)
        y = x + self.down(F.silu(self.gate(h)) * self.up(h))
        # Each sequence's own block, gathered: [B, 3, R, D].
        for block in memory:
            w1, w2, w3 = block.unbind(1)
            hidden = F.silu(torch.bmm(h, w1.transpose(1, 2))) * torch.bmm(h, w2.transpose(1, 2))
            y = y + torch.bmm(hidden, w3)
        return y


def rope(x, cos, sin):
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Anchor(nn.Module):
    def __init__(self, config, len_):
        super().__init__()
        self.eps = config["norm_eps"]
        self.embedding = nn.Parameter(torch.empty(config["vocab_size"], config["d_model"]))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["n_layers"]))
        self.final_norm = nn.Parameter(torch.ones(config["d_model"]))
        half = config["head_width"] // 2
        rate = config["rope_base"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(len_, dtype=torch.float64), rate)
        # Fetched memory: per level all blocks [U, L, 3, R, D], and each sequence's.
        self.memory, self.block_of_sequence = nn.ParameterList(), []
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, tokens, targets):
        x = F.embedding(tokens, self.embedding)
        for i, block in enumerate(self.blocks):
            memory = [level[which, i] for level, which in zip(self.memory, self.block_of_sequence)]
            x = block(x, self.cos, self.sin, memory)
        x = F.rms_norm(x, self.final_norm.shape, self.final_norm, self.eps)
        logits = F.linear(x, self.embedding)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def load(self, path):
        with safe_open(path, "pt") as file, torch.no_grad():
            self.embedding.copy_(file.get_tensor("token_embedding"))
            self.final_norm.copy_(file.get_tensor("final_norm"))
            for i, block in enumerate(self.blocks):
                get = lambda name: file.get_tensor(f"layers.{i}.{name}")
                for name in ("attention_norm", "ffn_norm", "query_norm", "key_norm"):
                    getattr(block, name).copy_(get(name))
                for name in ("query", "key", "value", "attention_output"):
                    getattr(block, name).weight.copy_(get(name))
                gate, up, down = get("ffn")
                block.gate.weight.copy_(gate)
                block.up.weight.copy_(up)
                block.down.weight.copy_(down.T)

    def load_memory(self, folder, kind, config, batch):
        d, layers = config["d_model"], len(self.blocks)
        for level, width in enumerate([d // 4, d // 16, d // 64]):
            values = np.fromfile(f"{folder}/memory-{kind}-{level}.bin", dtype="<f4")
            blocks = torch.from_numpy(values.reshape(-1, layers, 3, width, d))
            self.memory.append(nn.Parameter(blocks))
            self.block_of_sequence.append(torch.arange(batch) % len(blocks))


def clip_blocks(memory, largest):
    """Each block's gradient to a norm of at most `largest`, as the bank does."""
    for level in memory:
        norm = level.grad.flatten(1).norm(dim=1)
        scale = (largest / norm).clamp(max=1.0)
        level.grad.mul_(scale.view(-1, 1, 1, 1, 1))


def answer_updates(own, optimizer, largest):
    """Per line of input, clips and updates all parameters: prints the seconds of the update and those of both."""
    for p in own:
        p.grad = p.detach() * 1e-3 + 1e-3
    for _ in sys.stdin:
        began = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(own, largest, foreach=True)
        before_update = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        print(end - before_update, end - began, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--memory", choices=["different", "shared"])
    parser.add_argument("--only", choices=["updates"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with open(f"{args.folder}/bench.json") as file:
        bench = json.load(file)
    train, config = bench["train"], bench["anchor"]
    b, t = bench["batch"], bench["len"]
    tokens = np.fromfile(f"{args.folder}/tokens.bin", dtype="<u4").reshape(-1, b, t + 1).astype(np.int64)
    tokens = torch.from_numpy(tokens)
    anchor = Anchor(config, t)
    anchor.load(f"{args.folder}/anchor.safetensors")
    own = list(anchor.parameters())
    if args.memory:
        anchor.load_memory(args.folder, args.memory, config, b)
    groups = [
        {"params": [p for p in own if p.dim() > 1]},
        {"params": [p for p in own if p.dim() == 1], "weight_decay": 0.0},
    ]
    if args.memory:
        rate, decay = train["memory_learning_rate"], train["memory_weight_decay"]
        groups.append({"params": list(anchor.memory), "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(
        groups,
        lr=train["learning_rate"],
        betas=(train["beta1"], train["beta2"]),
        eps=train["eps"],
        weight_decay=train["weight_decay"],
        fused=True,
    )
    if args.only:
        return answer_updates(own, optimizer, train["clip"])
    model = torch.compile(anchor) if args.compile else anchor
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16)
    losses, times = [], []
    for step in range(args.steps):
        batch = tokens[step % len(tokens)]
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        began = time.perf_counter()
        with context:
            loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, train["clip"], foreach=True)
        clip_blocks(anchor.memory, train["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
        losses.append(loss.item())
    warm = min(3, args.steps - 1)
    print(json.dumps({
        "step_s": statistics.median(times[warm:]),
        "parameters": sum(p.numel() for p in own),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "losses": losses,
    }))


main()
