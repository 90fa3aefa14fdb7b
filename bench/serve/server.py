"""The parts of bench/serve that ask a server: a run with a bank of 1 GB, made once."""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import time

from common import forget

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENS = 40

ROWS = {
    "route_fetch_share": (0.01, "<="),
    "memory_overhead": (1.10, "<="),
    "cold_first_token_s": (1.5, "<="),
    "overload_sent": (1.8, ">="),
    "overload_goodput": (0.9, ">="),
    "overload_p99": (2.0, "<="),
    "overload_refusal_ms": (100, "<="),
    "overload_errors": (0, "=="),
}


def made(bench):
    """The folder of the run; its questions as prompts."""
    folder = bench.args.folder
    run = os.path.join(folder, "run")
    program = os.path.abspath(bench.program("anchorage"))
    if not os.path.exists(os.path.join(folder, "made")):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(HERE, "run.toml")) as file, open(os.path.join(folder, "run.toml"), "w") as to:
            to.write(file.read())
        quick = ["--set", "memory.width=[32, 8]", "--set", "train.steps=4", "--set", "train.save_every=4"]
        for command in (
            ["corpus", "facts", "facts"],
            ["train", "run.toml", *(quick if bench.args.quick else [])],
        ):
            subprocess.run([program, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        open(os.path.join(folder, "made"), "w").close()
    with open(os.path.join(folder, "facts", "questions.jsonl")) as file:
        prompts = [json.loads(line) for line in file]
    return run, [question.get("prompt") or question["question"] for question in prompts]


@contextlib.contextmanager
def serving(bench, run, *options):
    """A server on a port of its own; its address."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [os.path.abspath(bench.program("anchorage")), "serve", run, "--listen", f"127.0.0.1:{port}", *options]
    process = subprocess.Popen(command, cwd=bench.args.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    os.set_blocking(process.stderr.fileno(), False)
    try:
        yield port, process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(port, process, patience=60):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {process.stderr.read()}")
        with contextlib.suppress(OSError):
            if asyncio.run(ask(port, "GET", "/ready"))[0] == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"no server on port {port} after {patience} s")


async def ask(port, method, path, body=None, first_byte=False):
    """Status and body of one request on a connection of its own; with `first_byte`, until the body begins."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status = int(head.split()[1])
        if first_byte:
            await reader.readuntil(b"data: ")
            return status, None
        text = await reader.read()
        if "transfer-encoding: chunked" in head.lower():
            text = unchunked(text)
        return status, text
    finally:
        writer.close()


def unchunked(data):
    whole = b""
    while data:
        size, data = data.split(b"\r\n", 1)
        n = int(size, 16)
        whole, data = whole + data[:n], data[n + 2:]
    return whole


def completion(prompt, memory, n=TOKENS):
    return {"model": "run", "prompt": prompt, "max_tokens": n, "temperature": 0, "memory": memory, "ignore_eos": True}


def complete(port, prompt, memory, n=TOKENS):
    status, text = asyncio.run(ask(port, "POST", "/v1/completions", completion(prompt, memory, n)))
    if status != 200:
        raise RuntimeError(f"{status}: {text[:300]}")
    return json.loads(text)


def requests(bench):
    """One request at a time, with memory, held as int8, and without in turn."""
    run, prompts = made(bench)
    prompts = prompts[:: max(1, len(prompts) // 16)][:16]
    with serving(bench, run, "--set", "memory.placement.dtype=\"int8\"") as (port, process):
        wait_until_ready(port, process)
        for prompt in prompts:
            for memory in ("auto", "off"):
                complete(port, prompt, memory)
        for _ in range(bench.args.rounds):
            shares, seconds = [], {"auto": [], "off": []}
            for prompt in prompts:
                for memory in ("auto", "off"):
                    began = time.monotonic()
                    timing = complete(port, prompt, memory)["anchorage"]["timing"]
                    seconds[memory].append(time.monotonic() - began)
                    if memory == "auto":
                        generation = timing["prefill_ms"] + timing["decode_ms"]
                        shares.append((timing["route_ms"] + timing["fetch_ms"]) / generation)
            bench.note("route_fetch_share", statistics.median(shares))
            bench.note("memory_overhead", statistics.median(seconds["auto"]) / statistics.median(seconds["off"]))
    bench.told.append(f"  server: {TOKENS} tokens {1e3 * statistics.median(seconds['auto']):.0f} ms with memory, "
                      f"{1e3 * statistics.median(seconds['off']):.0f} ms without")


def cold(bench):
    """From the start of the process to the first token of a text that fetches memory; files not in the cache."""
    run, prompts = made(bench)
    complete_streaming = {**completion(prompts[0], "auto"), "stream": True}
    for _ in range(bench.args.rounds):
        forget(run)
        began = time.monotonic()
        with serving(bench, run) as (port, process):
            while True:
                try:
                    status, _ = asyncio.run(ask(port, "POST", "/v1/completions", complete_streaming, first_byte=True))
                    if status == 200:
                        break
                except (OSError, asyncio.IncompleteReadError):
                    pass
                if process.poll() is not None or time.monotonic() - began > 60:
                    raise RuntimeError("the server did not begin")
                time.sleep(0.01)
            bench.note("cold_first_token_s", time.monotonic() - began)


def overload(bench):
    """Peak: as many requests at once as the engine runs. Overload: twice the rate that was then served, whatever
    comes back."""
    run, prompts = made(bench)
    at_once, seconds = 16, 4 if bench.args.quick else 12
    limits = ["--set", f"serve.engine.max_sequences={at_once}", "--set", f"serve.engine.max_waiting={at_once // 2}"]
    with serving(bench, run, *limits) as (port, process):
        wait_until_ready(port, process)
        for prompt in prompts[:at_once]:
            complete(port, prompt, "auto")
        for i in range(bench.args.rounds):
            peak = asyncio.run(closed(port, prompts, at_once, seconds))
            over = asyncio.run(opened(port, prompts, 2 * peak["rate"], seconds))
            bench.note("overload_sent", over["sent"] / peak["rate"])
            bench.note("overload_goodput", over["rate"] / peak["rate"])
            bench.note("overload_p99", percentile(over["served"], 99) / percentile(peak["served"], 99))
            bench.note("overload_refusal_ms", 1e3 * percentile(over["refused"] or [0], 50))
            bench.note("overload_errors", over["errors"] + peak["errors"])
            told = (f"  overload: peak {peak['rate']:.1f} requests/s (99 % {1e3 * percentile(peak['served'], 99):.0f} ms), sent "
                    f"{over['sent']:.1f}/s, served {over['rate']:.1f}/s (99 % {1e3 * percentile(over['served'], 99):.0f} ms), "
                    f"refused {len(over['refused'])}, {over['errors']} errors")
            bench.say(f"round {i + 1}:{told}")
    bench.told.append(told)


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * p / 100))]


class Clients:
    """Connections that are kept, so that asking takes little of the processors that answer."""

    def __init__(self, port, prompts):
        self.port, self.idle = port, []
        bodies = [json.dumps(completion(prompt, "auto")).encode() for prompt in prompts]
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        self.requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]

    async def one(self, i, to):
        began = time.monotonic()
        try:
            connection = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = connection
            writer.write(self.requests[i % len(self.requests)])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            self.idle.append(connection)
            took = time.monotonic() - began
            if head.startswith(b"http/1.1 200") and json.loads(body)["usage"]["completion_tokens"] == TOKENS:
                to["served"].append(took)
                to["ends"].append(time.monotonic())
            elif head.startswith(b"http/1.1 429"):
                to["refused"].append(took)
            else:
                to["errors"] += 1
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError):
            to["errors"] += 1


def new():
    return {"served": [], "refused": [], "ends": [], "errors": 0}


async def closed(port, prompts, n, seconds):
    """`n` clients, each with one request at a time."""
    to, end, clients = new(), time.monotonic() + seconds, Clients(port, prompts)
    began = time.monotonic()

    async def client(i):
        while time.monotonic() < end:
            await clients.one(i, to)
            i += n

    await asyncio.gather(*(client(i) for i in range(n)))
    to["rate"] = steady(to, began, end)
    return to


async def opened(port, prompts, rate, seconds):
    """Requests at this rate, each on its own."""
    to, tasks, clients = new(), [], Clients(port, prompts)
    began = time.monotonic()
    n = int(rate * seconds)
    for i in range(n):
        await asyncio.sleep(max(0.0, began + i / rate - time.monotonic()))
        tasks.append(asyncio.create_task(clients.one(i, to)))
    sent = time.monotonic()
    await asyncio.gather(*tasks)
    to["sent"] = n / (sent - began)
    to["rate"] = steady(to, began, sent)
    return to


def steady(to, began, end):
    """Requests served a second, once those that begin together have spread."""
    began += (end - began) / 4
    return sum(1 for at in to["ends"] if began < at <= end) / (end - began)
