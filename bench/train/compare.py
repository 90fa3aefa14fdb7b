"""Runs both sides of bench/train in turn and tells how they compare."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))

# Row, numerator, denominator, figure, target and which side of it is good.
ROWS = [
    ("f32_step_vs_eager", "ours", "eager", "step_s", 0.50, "<="),
    ("f32_step_vs_compile", "ours", "compile", "step_s", 0.55, "<="),
    ("peak_memory_vs_eager", "ours", "eager", "peak_mb", 0.35, "<="),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ours")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="small,medium")
    args = parser.parse_args()
    threads = ["--threads", str(args.threads)]
    torch = [sys.executable, os.path.join(HERE, "torch_step.py")]
    result = {"machine": machine(), "rounds": args.rounds, "threads": args.threads}
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([args.ours, folder, "--make", size], check=True)
            programs = {
                "ours": [args.ours, folder, *threads],
                "eager": [*torch, folder, *threads],
                "compile": [*torch, folder, *threads, "--compile"],
                "bf16": [*torch, folder, *threads, "--bf16"],
            }
            result[size] = compare(size, programs, args)
    if args.json:
        print(json.dumps(result))


def compare(size, programs, args):
    runs = {name: [] for name in programs}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MIMALLOC_PURGE_DELAY": "-1"}
    for round_ in range(args.rounds):
        for name, command in programs.items():
            command = [*command, "--steps", str(args.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            runs[name].append(json.loads(output.stdout.splitlines()[-1]))
            print(f"{size}, round {round_ + 1}: {name} {runs[name][-1]['step_s'] * 1e3:.0f} ms", file=sys.stderr)
    check_losses(runs)
    rows = {}
    print(f"\n{size}: {runs['ours'][0]['parameters']:,} parameters, {args.threads} threads, {machine()}")
    for name, lines in runs.items():
        step = statistics.median(line["step_s"] for line in lines)
        peak = statistics.median(line["peak_mb"] for line in lines)
        print(f"  {name:<10} {step * 1e3:8.1f} ms a step {peak:8.0f} MB at most")
    for key, ours, peer, figure, target, sense in ROWS:
        ratio = statistics.median(a[figure] / b[figure] for a, b in zip(runs[ours], runs[peer]))
        ok = ratio <= target if sense == "<=" else ratio >= target
        rows[key] = {"value": round(ratio, 3), "target": target, "ok": ok}
        print(f"  {key:<24} {ratio:6.3f}   target {sense} {target}   {'ok' if ok else 'missed'}")
    return rows


def check_losses(runs):
    """The same weights, tokens and optimizer: in f32 the losses agree, or the times compare nothing."""
    for name in ("eager", "compile"):
        for ours, theirs in zip(runs["ours"][0]["losses"], runs[name][0]["losses"]):
            if abs(ours / theirs - 1) > 1e-4:
                sys.exit(f"losses differ: ours {runs['ours'][0]['losses']}, {name} {runs[name][0]['losses']}")


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


main()
