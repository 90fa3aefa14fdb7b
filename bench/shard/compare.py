"""Runs both sides of bench/shard in turn and tells how they compare."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import Bench, Program, chosen, forget, machine, table  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
PARTS = ("fetch", "push", "wire", "memory", "save", "first", "overload")

# A block has 14 layers of 3 matrices of 512, so 21,504 numbers, for each of its memory width.
UNIT = 14 * 3 * 512
N_BLOCKS = 64
# Megabytes of a block, and its memory width; the order is that of the levels.
WIDTHS = {"6.9": 80, "1.72": 20, "1.0": 12, "0.43": 5}
CLIENTS = (1, 8)
WAYS = ("bulk", "grpc", "raw", "tonic", "redis", "grpcio")

# Fetches at once of the shard that is asked for too much: two a core. More of them displace each other's bytes from the
# cache, which are 6.9 MB each.
FETCHES = 4

# Most milliseconds that a refusal may take.
REFUSAL_MS = 10


def fetch_rows():
    """Row, (target, which side of it is good), and the figure of one round."""

    def ratio(figure, ours, peer):
        return lambda runs: figure(runs[ours]) / figure(runs[peer])

    rate = lambda run: run["requests"] / run["seconds"]
    cpu = lambda run: (run["client_cpu_s"] + run["server_cpu_s"]) / run["bytes"]
    tail = lambda way: lambda runs: runs[way]["p99_ms"] / runs[way]["p50_ms"]
    for size in reversed(WIDTHS):
        for n in CLIENTS:
            rows = {
                "grpc_vs_tonic": (1.3, ">=", ratio(rate, "grpc", "tonic")),
                "grpc_vs_grpcio": (1.5, ">=", ratio(rate, "grpc", "grpcio")),
                "bulk_vs_redis": (1.2 if n == 1 else 1.6, ">=", ratio(rate, "bulk", "redis")),
                "bulk_vs_raw": (0.95, ">=", ratio(rate, "bulk", "raw")),
                "bulk_cpu_vs_raw": (1.1, "<=", ratio(cpu, "bulk", "raw")),
                "bulk_p99_vs_p50": (3, "<=", tail("bulk")),
                "grpc_p99_vs_p50": (None, "", tail("grpc")),
            }
            for key, row in rows.items():
                yield f"{key}_{size}MB_{n}", (size, n), row


# Rows of the other parts: target (None: reported only) and which side of it is good.
ROWS = {
    **{f"adamw_{dtype}_{size}MB": (1.2, ">=") for dtype in ("bf16", "f32") for size in ("1.0", "6.9")},
    "wire_blocks_bulk": (1, "=="),
    "wire_blocks_grpc": (1, "=="),
    "wire_socket_bulk": (None, ""),
    "wire_socket_grpc": (None, ""),
    "memory_share": (1, "<="),
    "save_vs_safetensors": (0.9, ">="),
    "save_stall_share": (0.05, "<="),
    "first_query_s": (1, "<="),
    "first_query_cached_s": (None, ""),
    **{
        f"overload_{way}_{row}": target
        for way in ("bulk", "grpc")
        for row, target in {
            "sent": (1.8, ">="),
            "goodput": (0.9, ">="),
            "goodput_vs_closed_loop": (None, ""),
            "refusal_ms": (REFUSAL_MS, "<="),
            "health_ms": (100, "<="),
            "errors": (0, "=="),
        }.items()
    },
}


class Shard(Bench):
    def load(self, what, widths, branchings, *rest):
        """Our side, of a bank of these levels."""
        sizes = [",".join(str(number) for number in numbers) for numbers in (widths, branchings)]
        return Program(self.args.load, what, "--width", sizes[0], "--branching", sizes[1], *rest)

    def python(self, script, *rest):
        return Program(sys.executable, os.path.join(HERE, script), *rest)

    def fetch(self):
        widths, branching = list(WIDTHS.values()), [N_BLOCKS, 1, 1, 1]
        lens = ",".join(str(width * UNIT) for width in widths)
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            ours = enter(self.load("serve", widths, branching))
            rust = enter(Program(self.args.peers, "serve", "--lens", lens))
            grpcio = enter(self.python("grpcio_peer.py", "serve", "--lens", lens))
            redis, url = enter(redis_server())
            at, at_rust, at_grpcio = ours.answer()["address"], rust.answer(), grpcio.answer()["address"]
            with Program(self.args.peers, "fill", url, "--lens", lens) as fill:
                fill.answer()
            peer = lambda way, address, pid: Program(
                self.args.peers, "fetch", way, address, "--lens", lens, "--server-pid", pid
            )
            clients = {
                "bulk": self.load("fetch", widths, branching, at, "--bulk", "--server-pid", ours.pid),
                "grpc": self.load("fetch", widths, branching, at, "--server-pid", ours.pid),
                "raw": peer("raw", at_rust["raw"], rust.pid),
                "tonic": peer("tonic", at_rust["tonic"], rust.pid),
                "redis": peer("redis", url, redis.pid),
                "grpcio": self.python("grpcio_peer.py", "fetch", "--address", at_grpcio, "--server-pid", grpcio.pid),
            }
            for client in clients.values():
                enter(client)
            runs = [self.fetch_round(clients, i) for i in range(self.args.rounds)]
        for key, point, (_, _, figure) in fetch_rows():
            self.figures[key] = [figure(run[point]) for run in runs]
        self.tell_fetches(runs)

    def fetch_round(self, clients, i):
        # A way's neighbours change by the round.
        order = WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]
        points = {(size, n): {} for size in WIDTHS for n in CLIENTS}
        for (size, n), runs in points.items():
            for way in order:
                runs[way] = clients[way].ask(list(WIDTHS).index(size), n, self.args.seconds)
            rates = ", ".join(f"{way} {runs[way]['requests'] / runs[way]['seconds']:.0f}/s" for way in WAYS)
            self.say(f"round {i + 1}, {size} MB, {n} clients: {rates}")
        return points

    def tell_fetches(self, runs):
        self.told.append(f"  {'fetch':<22}{'GB/s':>8}{'CPU us/MiB: client':>20}{'server':>8}{'p50 ms':>9}{'p99 ms':>9}")
        middle = lambda figure: statistics.median(figure)
        for size, n in sorted(runs[0], key=lambda point: (float(point[0]), point[1])):
            for way in WAYS:
                seen = [run[size, n][way] for run in runs]
                per_mib = lambda key: middle(s[key] / s["bytes"] * 2**20 * 1e6 for s in seen)
                self.told.append(
                    f"  {size + ' MB x ' + str(n) + ' ' + way:<22}{middle(s['bytes'] / s['seconds'] / 1e9 for s in seen):8.2f}"
                    f"{per_mib('client_cpu_s'):20.0f}{per_mib('server_cpu_s'):8.0f}"
                    f"{middle(s['p50_ms'] for s in seen):9.2f}{middle(s['p99_ms'] for s in seen):9.2f}"
                )

    # Updates.

    def push(self):
        """One step of each side in turn, many times, since how fast memory is changes here by the minute."""
        for dtype in ("bf16", "f32"):
            for size in ("1.0", "6.9"):
                width = WIDTHS[size]
                # Beyond any cache: 64 M parameters, and gradients and moments beside.
                n_blocks = -(-self.args.parameters // (width * UNIT))
                bf16 = ["--bf16"] if dtype == "bf16" else []
                torch = ["push", "--len", width * UNIT, "--blocks", n_blocks, *bf16]
                with self.load("push", [width], [n_blocks], *bf16) as ours, self.python("torch_peer.py", *torch) as peer:
                    pairs = []
                    for _ in range(6 * self.args.rounds + 5):
                        # The other side's threads spin for some milliseconds before they sleep.
                        time.sleep(0.03)
                        mine = ours.ask()
                        time.sleep(0.03)
                        pairs.append((mine, peer.ask()))
                mine, theirs = pairs[-1]
                if abs(mine["mean"] / theirs["mean"] - 1) > 1e-5:
                    raise RuntimeError(f"the sides do not do the same: mean weight {mine['mean']}, {theirs['mean']}")
                for mine, theirs in pairs[5:]:
                    self.note(f"adamw_{dtype}_{size}MB", theirs["seconds"] / mine["seconds"])
                per_s = [mine["parameters"] / statistics.median(p[side]["seconds"] for p in pairs[5:]) for side in (0, 1)]
                self.told.append(
                    f"  push {dtype} {size} MB: {per_s[0] / 1e6:.0f} M parameters/s, torch {per_s[1] / 1e6:.0f} M ({n_blocks} blocks)"
                )
                self.say(self.told[-1])

    # What is counted.

    def wire(self):
        with self.load("wire", [20, 12, 5], [4, 4, 4]) as program:
            line = program.answer()
        unique = line["unique_bytes"]
        self.told.append(f"  wire: a batch of {unique / 1e6:.0f} MB of blocks, {line['paths_bytes'] / 1e6:.0f} MB path by path")
        for way in ("bulk", "grpc"):
            self.note(f"wire_blocks_{way}", line[way]["received_bytes"] / unique)
            self.note(f"wire_socket_{way}", line[way]["socket_bytes"] / unique)

    def memory(self):
        """1 GB of weights, all of them updated; and what a server may use beside them."""
        widths, branching = [80, 12], [64, 9]
        if self.args.quick:
            branching = [8, 9]
        with self.load("serve", widths, branching, "--trained") as server:
            told = server.answer()
            steps = ["--steps", 20 if self.args.quick else 60]
            with self.load("train", widths, branching, told["address"], *steps) as train:
                trained = train.answer()
            with open(f"/proc/{server.pid}/status") as file:
                peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        state = 3 * told["weight_bytes"]
        self.note("memory_share", peak / (1.05 * state + 100e6))
        self.told.append(
            f"  memory: {peak / 1e6:.0f} MB at most, weights and moments {state / 1e6:.0f} MB, after {trained['steps']} steps"
            f" that updated {trained['updated_blocks']} of {trained['blocks']} blocks"
        )

    # Files.

    def save(self):
        """1 GB of weights and moments. Both sides make the files durable, by fsync of them and of their folder: a
        checkpoint that is gone after a power cut is none. Ours has checksums of every block and every file."""
        n_blocks = 16 if self.args.quick else 330
        width = WIDTHS["1.0"]
        with self.folder() as folder:
            own, other = (os.path.join(folder, name) for name in ("ours", "theirs"))
            os.mkdir(own), os.mkdir(other)
            torch = ["save", "--len", width * UNIT, "--blocks", n_blocks, "--folder", other]
            with self.load("save", [width], [n_blocks], own) as ours, self.python("torch_peer.py", *torch) as peer:
                for i in range(self.args.rounds + 1):
                    mine, theirs = ours.ask(), peer.ask()
                    if i > 0:
                        self.note("save_vs_safetensors", theirs["seconds"] / mine["seconds"])
                        self.note("save_stall_share", mine["stall"] / mine["seconds"])
                        self.say(f"save: ours {mine['seconds']:.2f} s, safetensors {theirs['seconds']:.2f} s")
        self.told.append(
            f"  save, fsync on both sides: {mine['bytes'] / 1e6:.0f} MB in {mine['seconds']:.2f} s, "
            f"safetensors {theirs['bytes'] / 1e6:.0f} MB in {theirs['seconds']:.2f} s (the last of {self.args.rounds})"
        )

    def first(self):
        """From the start of a read-only server's process to the first block in another one; once with the files
        dropped from the system's cache, once from it."""
        widths, branching = [80, 12], [4 if self.args.quick else 64, 9]
        with self.folder() as folder:
            with self.load("make", widths, branching, folder) as make:
                made = make.answer()
            self.told.append(f"  first query of a bank with {made['weight_bytes'] / 1e6:.0f} MB of weights")
            os.sync()
            with self.load("first", widths, branching, "--bulk") as client:
                for _ in range(self.args.rounds):
                    for key in ("first_query_s", "first_query_cached_s"):
                        if key == "first_query_s":
                            forget(folder)
                        start = time.monotonic()
                        with self.load("serve", widths, branching, "--mapped", folder) as server:
                            client.ask(server.answer()["address"])
                            self.note(key, time.monotonic() - start)

    # Too many requests.

    def overload(self):
        """The largest blocks: smaller ones fit the system's buffers, so that a fetch is over before another begins."""
        widths, branching = [WIDTHS["6.9"]], [N_BLOCKS]
        small, large = (self.load("serve", widths, branching, "--fetches", n) for n in (FETCHES, 64))
        with small, large:
            address, roomy_address = small.answer()["address"], large.answer()["address"]
            for i in range(self.args.rounds):
                for way in ("bulk", "grpc"):
                    rest = [address, "--pid", small.pid, "--roomy-address", roomy_address, "--roomy-pid", large.pid]
                    rest += ["--level", 0, "--seconds", 2 * self.args.seconds]
                    with self.load("overload", widths, branching, *rest, *(["--bulk"] if way == "bulk" else [])) as program:
                        line = program.answer()
                    health = line["health"]
                    self.note(f"overload_{way}_sent", line["sent_per_s"] / line["peak_per_s"])
                    self.note(f"overload_{way}_goodput", line["goodput_per_s"] / line["peak_per_s"])
                    self.note(f"overload_{way}_goodput_vs_closed_loop", line["goodput_per_s"] / line["closed_loop_per_s"])
                    self.note(f"overload_{way}_refusal_ms", line["refusal_p50_ms"])
                    self.note(f"overload_{way}_health_ms", health["worst_ms"] if health["serving"] else 1e6)
                    self.note(f"overload_{way}_errors", line["errors"])
                    told = (
                        f"  overload {way}: peak {line['peak_per_s']:.0f}/s of 64 clients ({line['closed_loop_per_s']:.0f}/s of 8 that wait), sent {line['sent_per_s']:.0f}/s, served "
                        f"{line['goodput_per_s']:.0f}/s (median {line['served_p50_ms']:.1f} ms), refused "
                        f"{line['refused_per_s']:.0f}/s (median {line['refusal_p50_ms']:.2f} ms, 99 % {line['refusal_p99_ms']:.1f} ms), "
                        f"health {health['p50_ms']:.1f} ms, {line['errors']} errors {line['first_error'] or ''}; processors of "
                        f"shard and clients for each served {line['server_cpu_ms']:.2f} and {line['client_cpu_ms']:.2f} ms, at the peak "
                        f"{line['peak_server_cpu_ms']:.2f} and {line['peak_client_cpu_ms']:.2f} ms; curve "
                        + ", ".join(f"{rate['offered_per_s']:.0f}: {rate['goodput_per_s']:.0f}" for rate in line["curve"])
                    )
                    self.say(f"round {i + 1}:{told}")
                    if i == self.args.rounds - 1:
                        self.told.append(told)

    def folder(self):
        return tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"))


@contextlib.contextmanager
def redis_server():
    """On a port of its own, without files."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
        try:
            wait_for(port)
            yield process, f"redis://127.0.0.1:{port}/"
        finally:
            process.kill()
            process.wait()


def free_port():
    import socket

    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def wait_for(port):
    import socket

    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--load", required=True, help="our side")
    parser.add_argument("--peers", required=True, help="the peers in Rust")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of one point of a fetch")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes and short times, to see that it works")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.seconds = args.seconds or (0.3 if args.quick else 1.0)
    args.parameters = 4_000_000 if args.quick else 64_000_000
    bench = Shard(args)
    bench.run(chosen(parser, args.only, PARTS))
    rows = tell(bench)
    if args.json:
        about = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "quick": args.quick}
        print(json.dumps({**about, "failed": bench.failed, **rows}))
    sys.exit(1 if bench.failed else 0)


def tell(bench):
    print(f"\n{versions()}\n{bench.args.rounds} rounds of {bench.args.seconds} s, {machine()}")
    print("  grpcio: bytes as they are, a process for each client; its server is one interpreter, so one core at most")
    print("\n".join(bench.told))
    targets = {key: row[:2] for key, _, row in fetch_rows()} | ROWS
    return table(targets, bench.figures, worst=("_health_ms", "_errors"), failed=bench.failed)


def versions():
    redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout.split("v=")[1]
    names = ("torch", "grpcio", "safetensors")
    return ", ".join([*(f"{name} {importlib.metadata.version(name)}" for name in names), f"redis {redis.split()[0]}"])


main()
