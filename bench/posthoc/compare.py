"""Runs both sides of bench/posthoc in turn and tells how they compare."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import Program, chosen, machine, table  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
PARTS = ("step", "checkpoint", "bf16")

# Row: target (None: reported only).
ROWS = {
    "frozen_step_vs_lora": 1.10,
    "frozen_memory_vs_lora": 1.15,
    "frozen_memory_vs_lora_without_libraries": None,
    "shared_step_vs_lora": 1.10,
    "shared_memory_vs_lora": 1.15,
    "shared_memory_vs_lora_without_libraries": None,
    "first_loss_difference": 1e-3,
    "lora_ffn_step_vs_lora_ffn": None,
    "lora_ffn_memory_vs_lora_ffn": None,
    "checkpoint_step_vs_lora_checkpoint": None,
    "checkpoint_memory_vs_lora_checkpoint": None,
    "bf16_step_vs_lora_bf16": None,
    "bf16_memory_vs_lora_bf16": None,
}

# Row's beginning: part, ours, peer's.
PAIRS = {
    "frozen": ("step", "memory", "lora"),
    "shared": ("step", "memory shared", "lora"),
    "lora_ffn": ("step", "lora ffn memory", "lora ffn"),
    "checkpoint": ("checkpoint", "memory checkpoint", "lora checkpoint"),
    "bf16": ("bf16", "memory bf16", "lora bf16"),
}
FFN = "gate_proj,up_proj,down_proj"
OURS = {
    "memory": [],
    "memory shared": ["--paths", "shared"],
    "lora ffn memory": ["--kind", "lora_ffn", "--widths", "16", "--paths", "shared"],
    "memory checkpoint": ["--compute", "checkpoint"],
    "memory bf16": ["--compute", "bf16"],
}
PEERS = {
    "lora": [],
    "lora ffn": ["--targets", FFN],
    "lora checkpoint": ["--checkpoint"],
    "lora bf16": ["--bf16"],
}


class Side(Program):
    """A side, which tells what it is and then answers each line by a step."""

    def __init__(self, command, threads):
        super().__init__(*command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        self.first = self.answer()
        self.steps = []

    def step(self):
        self.steps.append(self.ask())

    def seconds(self):
        # The first round warms up.
        return [step["step_s"] for step in self.steps[1:]]

    def peak_mb(self):
        return self.steps[-1]["peak_mb"]


def make(folder, quick):
    """A Llama of random weights, as open models of today are: heads that share keys, a tied output."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    if quick:
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"] // 2,
        head_dim=64,
        vocab_size=8192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return config


def compare(folder, args):
    """All programs of the parts, a step of each in turn."""
    batch, length = (2, 64) if args.quick else (8, 256)
    width = 128 if args.quick else 512
    shape = [folder, "--batch", batch, "--length", length, "--threads", args.threads]
    ours = [os.path.join(args.target, "examples/frozen_step"), *shape]
    peer = [sys.executable, os.path.join(HERE, "peft_peer.py"), *shape]
    # About a tenth of the anchor is fetched.
    widths = ["--widths", ",".join(str(r * width // 512) for r in (192, 48, 12))]
    pairs = {name: pair for name, pair in PAIRS.items() if pair[0] in args.parts}
    names = [name for pair in pairs.values() for name in pair[1:]]
    with contextlib.ExitStack() as stack:
        programs = {}
        for name in dict.fromkeys(names):
            command = [*ours, *widths, *OURS[name]] if name in OURS else [*peer, *PEERS[name]]
            programs[name] = stack.enter_context(Side(command, args.threads))
        for i in range(args.rounds + 1):
            for program in programs.values():
                # The other side's threads spin for some milliseconds before they sleep.
                time.sleep(0.03)
                program.step()
            shown = ", ".join(f"{name} {1e3 * p.steps[-1]['step_s']:.0f}" for name, p in programs.items())
            print(f"round {i}, ms a step: {shown}", file=sys.stderr, flush=True)
    return programs, pairs


def figures(programs, pairs):
    """Of times the median over rounds of the ratio of steps that follow one another."""
    found = {}
    for name, (_, ours, peer) in pairs.items():
        ours, peer = programs[ours], programs[peer]
        ratios = [a / b for a, b in zip(ours.seconds(), peer.seconds(), strict=True)]
        peer_name = pairs[name][2].replace(" ", "_")
        found[f"{name}_step_vs_{peer_name}"] = statistics.median(ratios)
        found[f"{name}_memory_vs_{peer_name}"] = ours.peak_mb() / peer.peak_mb()
        without = [p.peak_mb() - p.first["libraries_mb"] for p in (ours, peer)]
        found[f"{name}_memory_vs_{peer_name}_without_libraries"] = without[0] / without[1]
    firsts = [p.first["first_loss"] for name, p in programs.items() if "bf16" not in name]
    found["first_loss_difference"] = max(firsts) - min(firsts)
    return found


def tell(programs, found, args):
    print(f"\n{versions()}\n{args.threads} threads, {args.rounds} rounds, {machine()}")
    for name, program in programs.items():
        first, step = program.first, 1e3 * statistics.median(program.seconds())
        fetched = f", {first['fetched'] / 1e6:.2f}M a sequence" if "fetched" in first else ""
        print(
            f"  {name:<18} {step:7.1f} ms a step, {program.peak_mb():6.0f} MiB at most, {first['libraries_mb']:4.0f} "
            f"of them libraries; {first['trained'] / 1e6:.2f}M trained{fetched}, {first['frozen'] / 1e6:.2f}M frozen, "
            f"first loss {first['first_loss']:.5f}"
        )
    targets = {key: (target, "<=") for key, target in ROWS.items()}
    return table(targets, {key: [value] for key, value in found.items()})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True, help="folder of our programs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it works")
    parser.add_argument("--folder", help="where the model is made, or was made before")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 15)
    args.parts = chosen(parser, args.only, PARTS)
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        if not os.path.exists(os.path.join(folder, "config.json")):
            make(folder, args.quick)
        programs, pairs = compare(folder, args)
    rows = tell(programs, figures(programs, pairs), args)
    if args.json:
        about = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "quick": args.quick}
        sides = {
            name: {**p.first, "step_s": statistics.median(p.seconds()), "peak_mb": p.peak_mb()}
            for name, p in programs.items()
        }
        print(json.dumps({**about, "programs": sides, **rows}))


def versions():
    names = ("torch", "transformers", "peft")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


main()
