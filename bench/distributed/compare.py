"""Jobs of several processes against one process, what they move, and a bank on disks, on this machine."""

import argparse
import contextlib
import json
import os
import re
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

# Of the job whose bytes are counted: nothing is held out, so that all that is fetched is trained on, and one worker
# has every step in one micro-batch.
COUNTED = ["corpus.prepared=prepared-counted", "corpus.validation_files=[]", "train.batch_size=16",
           "train.micro_batch=16", "train.save_every=0", "anchor.n_layers=2"]

# The 160M configuration of arXiv 2510.02375 on the clusters of the small corpus: sizes for `plan`, nothing is trained.
PAPER = ["corpus.prepared=prepared-paper", "corpus.seq_len=64", "tree.branching=[16, 16, 16]", "anchor.d_model=512",
         "anchor.n_layers=35", "anchor.n_heads=12", "anchor.head_width=32", "anchor.ffn_width=2048",
         "memory.width=[256, 64, 16]", "memory.push_dtype=bf16", "train.batch_size=1024", "train.micro_batch=2"]

# A shard of the bank of that configuration, 4.6 billion parameters.
BANK = """
[bank]
name = "bench"
seed = 7
world_size = 1
hashes = {{}}
[bank.spec]
kind = "ffn"
n_layers = 35
d_model = 512
width = [256, 64, 16, 0]
branching = [16, 16, 16, 16]
[bank.adamw]
schedule = {{ peak = 1e-3, floor = 1e-3, warmup_steps = 0, total_steps = 0 }}
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
[serve]
listen = "127.0.0.1:0"
[offload]
dir = {dir}
host_mib = {host_mib}
"""

PARTS = ("throughput", "recovery", "bytes", "disk_bank")
TARGETS = {
    "tokens_2_workers_2_shards": (">=", 0.85),
    "tokens_2_workers": None,
    "prefetch_stall": ("<=", 0.05),
    "recovery_vs_restart": ("<=", 0.3),
    "bytes_vs_unique": ("==", 1.0),
    "bytes_vs_naive": ("<=", 0.1),
    "disk_bank_growth": ("<=", 1.05),
    "disk_bank_peak_gib": None,
    "disk_bank_rows_gib": None,
}
MEETS = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b}


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder, self.n_runs = args, folder, 0
        self.figures, self.told = {}, []

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def command(self, *words):
        return [os.path.join(self.args.programs, "anchorage"), *map(str, words)]

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def prepare(self, *settings):
        """Writes the corpus and the configuration if they are not there, and prepares it with these settings."""
        quiet = {"cwd": self.folder, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.save_every = 4 if self.args.quick else 16
        if not os.path.exists(self.path("run.toml")):
            with open(self.path("run.toml"), "w") as file:
                file.write(CONFIG.format(steps=3 * self.save_every, save_every=self.save_every))
            subprocess.run(self.command("corpus", "facts", "facts", "--set", "families=64"), **quiet)
        words = [word for setting in settings for word in ("--set", setting)]
        subprocess.run(self.command("prepare", "run.toml", *words), **quiet)
        return words

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

        self.prepare()
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
        large = self.prepare(*([] if self.args.quick else LARGE_BANK))
        for i in range(self.args.rounds):
            shape = ["up", "run.toml", "--workers", 2, "--shards", 8, *large]
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

    def plan(self, steps, *words):
        """What `anchorage plan` counts in the batches of so many steps."""
        command = self.command("plan", "run.toml", "--site", self.args.site, "--simulate", steps, "--json", *words)
        done = subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def bytes(self):
        """Bytes that a worker's client has counted against the different blocks of each of its steps, and against
        one path for each sequence where a step has 1,024 of them."""
        words = self.prepare(*COUNTED)
        steps = 3 * self.save_every
        name, process = self.begin("up", "run.toml", "--workers", 1, "--shards", 2, *words)
        if process.wait() != 0:
            raise RuntimeError(f"the job ended with {process.returncode}")
        with open(self.path(name, "logs", "worker-0.log")) as log:
            moved = re.search(r"(\d+) bytes of blocks fetched, (\d+) bytes pushed, 0 requests", log.read())
        shape = ["--workers", 1, "--shards", 2, *words]
        before, all_steps = ((n, self.plan(n, *shape)) for n in (steps - 1, steps))
        total = lambda plan, key: round(plan[0] * plan[1][key])
        # The update is checked before the save at the end: the last step's blocks are fetched once more.
        fetched = 2 * total(all_steps, "fetched_bytes") - total(before, "fetched_bytes")
        expected = fetched + total(all_steps, "pushed_bytes")
        self.figures["bytes_vs_unique"] = [sum(map(int, moved.groups())) / expected]
        self.say(f"{steps} steps: {moved[1]} bytes fetched, {moved[2]} pushed, {expected} expected in all")

        words, workers = self.prepare(*PAPER), 8
        shape = ["--workers", workers, "--shards", 8, *words]
        for levels in ([], [0, 1]):
            plan = self.plan(4 if self.args.quick else 20, *shape, "--set", f"memory.replicated={levels}")
            share = (plan["fetched_bytes"] + plan["pushed_bytes"]) / plan["naive_bytes"]
            unique = [round(level["unique"], 1) for level in plan["levels"]]
            self.say(f"levels {levels} replicated: {share:.4f} of one path for each sequence; blocks {unique}")
        self.figures["bytes_vs_naive"] = [share]

    def disk_bank(self):
        """Resident memory of two shards of 4.6 billion parameters while random paths are trained: after the last step
        against the 100th, by when their part of memory is full."""
        steps, every, host_mib = (60, 10, 512) if self.args.quick else (1000, 100, 2048)
        with open(self.path("bank.toml"), "w") as file:
            file.write(BANK.format(dir=json.dumps(self.path("rows")), host_mib=host_mib))
        logs, shards = [self.path(f"shard{i}.log") for i in range(2)], []
        try:
            for i, log in enumerate(logs):
                program = os.path.join(self.args.programs, "anchorage-shard")
                command = [program, "bank.toml", "--shard", str(i), "--of", "2", "--log", "json"]
                with open(log, "w") as file:
                    shards.append(subprocess.Popen(command, cwd=self.folder, stdout=file, stderr=file))
            addresses = [self.address(shard, log) for shard, log in zip(shards, logs)]
            load = [os.path.join(self.args.programs, "examples", "load"), "paths", "--shards", ",".join(addresses)]
            sizes = ["--layers", "35", "--width", "256,64,16,0", "--branching", "16,16,16,16"]
            driver = subprocess.Popen(
                [*load, *sizes, "--steps", str(steps), "--every", str(every)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            looks = []
            for line in driver.stdout:
                now, peak = map(sum, zip(*(self.memory_gib(shard.pid) for shard in shards)))
                looks.append(now)
                told = json.loads(line)
                rows = told["row_bytes"] / 2**30
                self.say(
                    f"step {told['step']}: {rows:.2f} GiB of rows, resident {now:.2f} GiB, at most {peak:.2f} so far; "
                    f"{told['seen_again']} blocks were as a step had left them"
                )
                driver.stdin.write("\n")
                driver.stdin.flush()
            if driver.wait() != 0 or len(looks) != steps // every:
                raise RuntimeError(f"the driver ended with {driver.returncode}")
        finally:
            for shard in shards:
                shard.kill()
                shard.wait()
        self.figures["disk_bank_growth"] = [looks[-1] / looks[0]]
        self.figures["disk_bank_peak_gib"], self.figures["disk_bank_rows_gib"] = [peak], [rows]

    def address(self, shard, log):
        """Where a shard serves."""

        def found():
            with open(log) as file:
                return re.search(r'"grpc":"([^"]+)"', file.read())

        self.wait_for(shard, found)
        return found()[1]

    def memory_gib(self, pid):
        """Resident memory of a process, now and at most so far."""
        with open(f"/proc/{pid}/status") as file:
            status = file.read()
        return [int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 2**20 for key in ("VmRSS", "VmHWM")]

    def wait_for(self, job, condition):
        while not condition():
            if job.poll() is not None:
                raise RuntimeError(f"the process ended with {job.returncode}")
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
    parser.add_argument("--programs", required=True, help="the folder with the built programs")
    parser.add_argument("--site", default=os.path.abspath("cluster/h100.toml"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    args = parser.parse_args()
    failed = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        bench = Bench(args, folder)
        for part in args.only.split(","):
            try:
                getattr(bench, part)()
            except (RuntimeError, OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
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
            row |= {"target": limit, "ok": MEETS[sign](value, limit)}
            print(f"  {key:<30}{value:8.4f}   target {sign} {limit}   {'ok' if row['ok'] else 'missed'}")
        else:
            print(f"  {key:<30}{value:8.4f}")
        rows[key] = row
    if args.json:
        print(json.dumps({"rounds": args.rounds, "quick": args.quick, "failed": failed, **rows}))
    sys.exit(1 if failed else 0)


main()
