"""Jobs of several processes against one process, on this machine."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

CONFIG = """
[run]
dir = "run"
[corpus]
prepared = "prepared"
files = ["facts/corpus.jsonl"]
validation_files = ["facts/validation.jsonl"]
id_key = "id"
vocab_size = 2048
tokenizer_sample_mib = 4
window = 128
seq_len = 256
validation_permille = 0
[tree]
branching = [8, 8]
[anchor]
d_model = 256
n_layers = 6
n_heads = 4
head_width = 64
ffn_width = 1024
max_seq_len = 256
[memory]
width = [64, 32]
[train]
phase = "joint"
steps = {steps}
batch_size = 16
micro_batch = 4
warmup_steps = 2
log_every = 1
save_every = {save_every}
validate_sequences = 4
[collective]
patience_s = 60
"""

# Of the job of which a shard is killed: a small model, and a bank of 3.2 GB of weights and 6.4 GB of moments, of
# which those of the blocks that were updated are there.
LARGE_BANK = [
    "corpus.prepared=prepared-large",
    "tree.branching=[16, 16]",
    "memory.width=[64, 1024]",
    "anchor.n_layers=4",
    "anchor.ffn_width=256",
    "train.batch_size=8",
]

PARTS = ("throughput", "recovery")
TARGETS = {
    "tokens_2_workers_2_shards": (">=", 0.85),
    "tokens_2_workers": None,
    "prefetch_stall": ("<=", 0.05),
    "recovery_vs_restart": ("<=", 0.3),
}


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder, self.n_runs = args, folder, 0
        self.figures, self.told = {}, []

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def command(self, *words):
        return [self.args.program, *map(str, words)]

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def prepare(self):
        self.save_every = 4 if self.args.quick else 16
        with open(self.path("run.toml"), "w") as file:
            file.write(CONFIG.format(steps=3 * self.save_every, save_every=self.save_every))
        quiet = {"cwd": self.folder, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(self.command("corpus", "facts", "facts", "--set", "families=64"), **quiet)
        subprocess.run(self.command("prepare", "run.toml"), **quiet)
        self.large = [] if self.args.quick else [word for setting in LARGE_BANK for word in ("--set", setting)]
        subprocess.run(self.command("prepare", "run.toml", *self.large), **quiet)

    def begin(self, *words):
        """Starts a run in a folder of its own; returns that and the process."""
        self.n_runs += 1
        name = f"run{self.n_runs}"
        command = self.command(*words, "--set", f"run.dir={name}")
        log = open(self.path(f"{name}.log"), "w")
        process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        return name, process

    def lines(self, name):
        with contextlib.suppress(FileNotFoundError):
            with open(self.path(name, "metrics.jsonl")) as file:
                return [json.loads(line) for line in file if line.endswith("\n")]
        return []

    def run(self, *words):
        """The metrics of a whole run."""
        name, process = self.begin(*words)
        if process.wait() != 0:
            with open(self.path(f"{name}.log")) as log:
                raise RuntimeError(f"{words}: {log.read()[-500:]}")
        return self.lines(name)

    def throughput(self):
        """Tokens a second without the first steps, saves included, and the part of a step that waits for blocks."""

        def tokens_per_s(lines):
            first, last = lines[3], lines[-1]
            return (last["tokens_seen"] - first["tokens_seen"]) / (last["seconds"] - first["seconds"])

        def stall(lines):
            times = [line["time"] for line in lines[3:]]
            return sum(t["fetch_ms"] for t in times) / sum(sum(t.values()) for t in times)

        shapes = {
            "one": ["train", "run.toml"],
            "tokens_2_workers": ["up", "run.toml", "--workers", 2],
            "tokens_2_workers_2_shards": ["up", "run.toml", "--workers", 2, "--shards", 2],
        }
        for i in range(self.args.rounds):
            order = list(shapes)[i % 3 :] + list(shapes)[: i % 3]
            runs = {shape: self.run(*shapes[shape]) for shape in order}
            if len({run[-1]["loss"] for run in runs.values()}) > 1:
                raise RuntimeError(f"the runs differ: losses {[run[-1]['loss'] for run in runs.values()]}")
            rates = {shape: tokens_per_s(run) for shape, run in runs.items()}
            for shape in shapes:
                if shape != "one":
                    self.figures.setdefault(shape, []).append(rates[shape] / rates["one"])
            self.figures.setdefault("prefetch_stall", []).append(stall(runs["tokens_2_workers_2_shards"]))
            self.say(f"round {i + 1}: " + ", ".join(f"{shape} {rate:.0f} tokens/s" for shape, rate in rates.items()))

    def recovery(self):
        """From the kill of a shard to the first step that is done anew, against the job begun anew from the same
        checkpoint: from its command to its first step."""
        for i in range(self.args.rounds):
            shape = ["up", "run.toml", "--workers", 2, "--shards", 8, *self.large]
            name, job = self.begin(*shape)
            save_every = self.save_every
            self.wait_for(job, lambda: len(self.lines(name)) >= save_every + 2)
            start = time.monotonic()
            os.kill(self.child(job.pid, b"--shard\0001\0"), signal.SIGKILL)
            self.wait_for_step_after(job, name, save_every)
            recovered = time.monotonic() - start
            # The same loss without anyone who takes the place: all end, and the job is begun anew.
            self.wait_for(job, lambda: len(self.lines(name)) >= 2 * save_every + 2)
            start = time.monotonic()
            self.kill(job)
            again = subprocess.Popen(
                self.command(*shape, "--set", f"run.dir={name}"),
                cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            self.wait_for_step_after(again, name, 2 * save_every)
            restarted = time.monotonic() - start
            self.kill(again)
            shutil.rmtree(self.path(name))
            self.figures.setdefault("recovery_vs_restart", []).append(recovered / restarted)
            self.say(f"round {i + 1}: a shard killed {recovered:.2f} s, the job begun anew {restarted:.2f} s")

    def wait_for(self, job, condition):
        while not condition():
            if job.poll() is not None:
                raise RuntimeError(f"the job ended with {job.returncode}")
            time.sleep(0.002)

    def wait_for_step_after(self, job, name, checkpoint):
        """A job goes back: its lines after the checkpoint go, and come again."""
        self.wait_for(job, lambda: len(self.lines(name)) <= checkpoint)
        self.wait_for(job, lambda: len(self.lines(name)) > checkpoint)

    def child(self, pid, marks):
        """The process of a job whose command line holds `marks`."""
        for child in self.children(pid):
            with open(f"/proc/{child}/cmdline", "rb") as command:
                if marks in command.read():
                    return child
        raise RuntimeError(f"no process with {marks}")

    def children(self, pid):
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]

    def kill(self, job):
        """Ends a job and all its processes at once."""

        def is_running(pid):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0] != "Z"
            return False

        processes = self.children(job.pid)
        for process in [job.pid, *processes]:
            os.kill(process, signal.SIGKILL)
        job.wait()
        while any(map(is_running, processes)):
            time.sleep(0.002)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    args = parser.parse_args()
    failed = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        bench = Bench(args, folder)
        bench.prepare()
        for part in args.only.split(","):
            try:
                getattr(bench, part)()
            except (RuntimeError, OSError, KeyError, ValueError) as error:
                failed[part] = f"{type(error).__name__}: {error}"
                bench.say(f"{part} failed: {failed[part]}")
    rows = {}
    for key, target in TARGETS.items():
        if key not in bench.figures:
            continue
        value = statistics.median(bench.figures[key])
        row = {"value": round(value, 4)}
        if target:
            sign, limit = target
            row |= {"target": limit, "ok": value >= limit if sign == ">=" else value <= limit}
            print(f"  {key:<30}{value:8.4f}   target {sign} {limit}   {'ok' if row['ok'] else 'missed'}")
        else:
            print(f"  {key:<30}{value:8.4f}")
        rows[key] = row
    if args.json:
        print(json.dumps({"rounds": args.rounds, "quick": args.quick, "failed": failed, **rows}))
    sys.exit(1 if failed else 0)


main()
