"""Runs both sides of bench/train in turn and tells how they compare."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import machine  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))

# By how much losses may differ from PyTorch's, relative; and those of products in bf16 from those in f32.
LOSS_TOLERANCE = 1e-4
BF16_TOLERANCE = 5e-3


def ratio(figure, ours, peer):
    return lambda runs: runs[ours][figure] / runs[peer][figure]


def of_ideal(runs):
    """Tokens per second with memory, over those that its FLOPs leave of the speed without."""
    plain, memory = runs["ours"], runs["memory"]
    return plain["step_s"] * memory["flops"] / plain["flops"] / memory["step_s"]


def of_peak(name, precision):
    return lambda runs: runs[name]["flops"] / runs[name]["step_s"] / runs["peak " + precision]["flops_per_s"]


# Row, figure of one round, target (None: reported only) and which side of it is good.
ROWS = [
    ("f32_step_vs_eager", ratio("step_s", "ours", "eager"), 0.50, "<="),
    ("f32_step_vs_compile", ratio("step_s", "ours", "compile"), 0.55, "<="),
    ("bf16_step_vs_torch_bf16", ratio("step_s", "ours bf16", "torch bf16"), 0.80, "<="),
    ("peak_memory_vs_eager", ratio("peak_mb", "ours", "eager"), 0.35, "<="),
    ("memory_tokens_vs_flop_ideal", of_ideal, 0.95, ">="),
    ("memory_tokens_vs_torch_bmm", ratio("step_s", "torch memory", "memory"), 1.0, ">="),
    ("shared_memory_tokens_vs_torch_bmm", ratio("step_s", "torch shared", "memory shared"), 1.3, ">="),
    ("adamw_parameters_per_s_vs_torch", lambda runs: runs["updates"][0], 1.2, ">="),
    ("clip_and_adamw_vs_torch", lambda runs: runs["updates"][1], 1.2, ">="),
    ("loader_wait_share", lambda runs: runs["loader"]["data_share"], 0.01, "<="),
    ("f32_flops_of_peak", of_peak("ours", "f32"), None, ""),
    ("bf16_flops_of_peak", of_peak("ours bf16", "bf16"), None, ""),
    ("checkpoint_step_vs_kept", ratio("step_s", "checkpoint", "ours"), None, ""),
    ("checkpoint_peak_memory_vs_kept", ratio("peak_mb", "checkpoint", "ours"), None, ""),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ours")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--loss-steps", type=int, default=200, help="steps whose losses are compared at the end")
    args = parser.parse_args()
    result = {"machine": machine(), "rounds": args.rounds, "threads": args.threads}
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([args.ours, folder, "--make", size], check=True)
            result[size] = compare(size, folder, args)
    if args.json:
        print(json.dumps(result))


def programs(folder, args):
    ours = [args.ours, folder, "--threads", str(args.threads)]
    torch = [sys.executable, os.path.join(HERE, "torch_step.py"), folder, "--threads", str(args.threads)]
    steps = ["--steps", str(args.steps)]
    return {
        "ours": [*ours, *steps],
        "eager": [*torch, *steps],
        "compile": [*torch, *steps, "--compile"],
        "ours bf16": [*ours, *steps, "--compute", "bf16"],
        "torch bf16": [*torch, *steps, "--bf16"],
        "memory": [*ours, *steps, "--memory", "different"],
        "torch memory": [*torch, *steps, "--memory", "different"],
        "memory shared": [*ours, *steps, "--memory", "shared"],
        "torch shared": [*torch, *steps, "--memory", "shared"],
        "checkpoint": [*ours, *steps, "--compute", "checkpoint"],
        "loader": [*ours, *steps, "--data", "corpus"],
        "peak f32": [*ours, "--peak", "f32"],
        "peak bf16": [*ours, "--peak", "bf16"],
    }


def run(command, args):
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def updates(commands, args):
    """How many times as fast our AdamW is, without and with clipping: one update of each side in turn, many times,
    since how fast memory is changes here by the minute."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    sides = [subprocess.Popen([*commands[name], "--only", "updates"], **pipes) for name in ("ours", "eager")]

    def ask(side):
        # The other side's threads spin for some milliseconds before they sleep.
        time.sleep(0.03)
        side.stdin.write("\n")
        side.stdin.flush()
        return [float(word) for word in side.stdout.readline().split()]

    pairs = [[ask(side) for side in sides] for _ in range(70)][10:]
    for side in sides:
        side.communicate()
    return [statistics.median(theirs[i] / ours[i] for ours, theirs in pairs) for i in (0, 1)]


def compare(size, folder, args):
    commands = programs(folder, args)
    rounds = []
    for i in range(args.rounds):
        rounds.append({})
        for name, command in commands.items():
            rounds[-1][name] = run(command, args)
            step = rounds[-1][name].get("step_s")
            if step:
                print(f"{size}, round {i + 1}: {name} {step * 1e3:.0f} ms", file=sys.stderr)
        rounds[-1]["updates"] = updates(commands, args)
    for ours, theirs in (("ours", "eager"), ("ours", "compile"), ("memory", "torch memory"), ("memory shared", "torch shared")):
        check_losses(rounds[0], ours, theirs)
    check_losses(rounds[0], "checkpoint", "ours")
    check_losses(rounds[0], "ours bf16", "ours", BF16_TOLERANCE)
    parameters = rounds[0]["ours"]["parameters"]
    print(f"\n{size}: {parameters:,} parameters, {args.threads} threads, {args.rounds} rounds, {machine()}")
    for name in commands:
        if "step_s" in rounds[0][name]:
            step, peak = (statistics.median(r[name][key] for r in rounds) for key in ("step_s", "peak_mb"))
            print(f"  {name:<14} {step * 1e3:8.1f} ms a step {peak:8.0f} MB at most")
    rows = {}
    for key, figure, target, sense in ROWS:
        value = statistics.median(figure(r) for r in rounds)
        rows[key] = row = {"value": round(value, 4)}
        if target is not None:
            row.update(target=target, ok=value <= target if sense == "<=" else value >= target)
        told = f"   target {sense} {target}   {'ok' if row['ok'] else 'missed'}" if target is not None else ""
        print(f"  {key:<34} {value:7.3f}{told}")
    worst = equal_losses(commands, args)
    rows["loss_difference"] = {"value": worst, "target": LOSS_TOLERANCE, "ok": worst <= LOSS_TOLERANCE}
    print(f"  losses of {args.loss_steps} steps against eager: at most {worst:.1e} apart, relative")
    return rows


def check_losses(runs, ours, theirs, tolerance=LOSS_TOLERANCE):
    """The same weights, tokens and optimizer: the losses agree, or the times compare nothing."""
    for a, b in zip(runs[ours]["losses"], runs[theirs]["losses"], strict=True):
        if abs(a / b - 1) > tolerance:
            sys.exit(f"losses differ: {ours} {runs[ours]['losses']}, {theirs} {runs[theirs]['losses']}")


def equal_losses(commands, args):
    """The largest relative difference of the losses of many steps."""
    ours, theirs = (
        run([*commands[name], "--steps", str(args.loss_steps)], args)["losses"] for name in ("ours", "eager")
    )
    return max(abs(a / b - 1) for a, b in zip(ours, theirs))


main()
