"""Runs both sides of bench/serve in turn and tells how they compare."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import Bench, Program, chosen, machine, table  # noqa: E402
import server  # noqa: E402

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


class Serve(Bench):
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
    parts = chosen(parser, args.only, PARTS)
    bench = Serve(args)
    with contextlib.ExitStack() as stack:
        args.folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        bench.run(parts)
    rows = tell(bench)
    if args.json:
        about = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "quick": args.quick}
        print(json.dumps({**about, "failed": bench.failed, **rows}))
    sys.exit(1 if bench.failed else 0)


def tell(bench):
    print(f"\n{versions()}\n{bench.args.rounds} rounds, {machine()}")
    print("\n".join(bench.told))
    return table(ROWS, bench.figures, worst=("_errors", "_error"), failed=bench.failed)


def versions():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))


main()
