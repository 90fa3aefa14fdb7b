"""Runs both sides of bench/serve in turn and tells how they compare."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import server

HERE = os.path.dirname(os.path.abspath(__file__))
PARTS = ("decode", "server", "cold", "overload")

# Row: target (None: reported only) and which side of it is good.
ROWS = {
    "decode_1_vs_transformers": (1.0, ">="),
    "decode_16_vs_transformers": (1.0, ">="),
    "decode_1_vs_torch": (None, ""),
    "decode_16_vs_torch": (None, ""),
    "paths_16_vs_none_int8": (0.75, ">="),
    "paths_16_vs_none_bf16": (None, ""),
    "paths_16_vs_none_f32": (None, ""),
    "paths_16_vs_torch_bmm_int8": (1.2, ">="),
    "paths_16_vs_torch_bmm_bf16": (None, ""),
    "paths_16_vs_torch_bmm_f32": (1.2, ">="),
    "shared_16_vs_none_int8": (None, ""),
    "memory_1_vs_none_int8": (None, ""),
    "logits_error": (1e-3, "<="),
    **server.ROWS,
}

# Our ways of a step of 16 sequences, and PyTorch's.
OURS = ("none", "different-int8", "different-bf16", "different-f32", "shared-int8")
PEERS = ("none", "different", "transformers")


class Program:
    """A program that answers lines by lines of JSON. It ends when its input does, and is killed if it does not."""

    def __init__(self, *command):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.command = [str(part) for part in command]
        self.process = subprocess.Popen(self.command, **pipes)

    def ask(self, *words):
        self.process.stdin.write(" ".join(str(word) for word in words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Bench:
    def __init__(self, args):
        self.args = args
        self.figures, self.failed, self.told = {}, {}, []

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def note(self, key, value):
        self.figures.setdefault(key, []).append(value)

    def program(self, name):
        return os.path.join(self.args.target, name)

    # Steps.

    def decode(self):
        """Steps behind a context, the same tokens and weights on both sides; the two processes take turns."""
        size, context, steps = ("small", 64, 8) if self.args.quick else ("160m", 128, 16)
        decode = self.program("examples/decode")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([decode, folder, "--make", size], check=True)
            ours = Program(decode, folder, "--threads", 2)
            peer = Program(sys.executable, os.path.join(HERE, "torch_decode.py"), folder, 2)
            with ours, peer:
                for i in range(self.args.rounds + 1):
                    runs = {}
                    for batch in (1, 16):
                        for what in OURS if batch == 16 else ("none", "shared-int8"):
                            runs[batch, what] = ours.ask(what, batch, context, steps)
                        for what in PEERS if batch == 16 else ("none", "transformers"):
                            runs[batch, "torch " + what] = peer.ask(what, batch, context, steps)
                    if i > 0:
                        self.decoded(runs, i)
        self.told.append(f"  decode: {size}, behind {context} tokens, {steps} steps; ms of the last round's step")
        self.told.append("    " + ", ".join(f"{what} x {n} {1e3 * middle(run):.1f}" for (n, what), run in runs.items()))

    def decoded(self, runs, i):
        ratio = lambda n, ours, peer: middle(runs[n, peer]) / middle(runs[n, ours])
        for n in (1, 16):
            self.note(f"decode_{n}_vs_transformers", ratio(n, "none", "torch transformers"))
            self.note(f"decode_{n}_vs_torch", ratio(n, "none", "torch none"))
        for dtype in ("int8", "bf16", "f32"):
            self.note(f"paths_16_vs_none_{dtype}", ratio(16, f"different-{dtype}", "none"))
            self.note(f"paths_16_vs_torch_bmm_{dtype}", ratio(16, f"different-{dtype}", "torch different"))
        self.note("shared_16_vs_none_int8", ratio(16, "shared-int8", "none"))
        self.note("memory_1_vs_none_int8", ratio(1, "shared-int8", "none"))
        pairs = [((1, "none"), (1, "torch none")), ((16, "different-f32"), (16, "torch different"))]
        for ours, theirs in pairs:
            both = zip(runs[ours]["logits"], runs[theirs]["logits"])
            self.note("logits_error", max(abs(a - b) for a, b in both))
        shown = ", ".join(f"{what} x {n} {1e3 * middle(run):.1f}" for (n, what), run in runs.items())
        self.say(f"round {i}, ms a step: {shown}")

    def server(self):
        server.requests(self)

    def cold(self):
        server.cold(self)

    def overload(self):
        server.overload(self)


def middle(run):
    return statistics.median(run["seconds"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True, help="folder of our programs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes and short times, to see that it works")
    parser.add_argument("--folder", help="where the served run is made, or was made before")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    bench = Bench(args)
    with contextlib.ExitStack() as stack:
        args.folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        for part in parts:
            start = time.monotonic()
            try:
                getattr(bench, part)()
            except (RuntimeError, OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
                bench.failed[part] = f"{type(error).__name__}: {error}"
                bench.say(f"{part} failed: {bench.failed[part]}")
            bench.say(f"{part}: {time.monotonic() - start:.0f} s")
    rows = tell(bench, parts)
    if args.json:
        about = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "quick": args.quick}
        print(json.dumps({**about, "failed": bench.failed, **rows}))
    sys.exit(1 if bench.failed else 0)


def tell(bench, parts):
    print(f"\n{versions()}\n{bench.args.rounds} rounds, {machine()}")
    print("\n".join(bench.told))
    rows = {}
    for key, (target, sense) in ROWS.items():
        if key not in bench.figures:
            continue
        # Of what must not happen at all, the worst round counts.
        worst = key.endswith(("_errors", "_error"))
        value = (max if worst else statistics.median)(bench.figures[key])
        rows[key] = row = {"value": round(value, 6)}
        if target is not None:
            good = {"<=": value <= target, ">=": value >= target, "==": value == target}[sense]
            row.update(target=target, ok=bool(good))
        told = f"   target {sense} {target}   {'ok' if row['ok'] else 'missed'}" if target is not None else ""
        print(f"  {key:<30} {value:10.4f}{told}")
    for part in parts:
        if part in bench.failed:
            print(f"  {part:<30} failed: {bench.failed[part]}")
    missed = [key for key, row in rows.items() if row.get("ok") is False]
    print(f"  {len(rows)} rows, {len(missed)} missed: {', '.join(missed)}")
    return rows


def versions():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


main()
