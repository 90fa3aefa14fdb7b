"""Blocks over grpcio: a server of unary calls, or clients that fetch one block after another.

Requests and replies are bytes as they are, so nothing is copied for protobuf. Clients are processes with a channel
each, since threads of one would share its interpreter; the server is one process and has one.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

N_BLOCKS = 64
METHOD = "/block.Blocks/Get"
# Not shared with other channels, and for as large messages as there are.
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.optimization_target", "throughput"),
]


def block(length, index):
    """As in examples/load/closed_loop.rs."""
    return ((index * 31 + np.arange(length) * 7) & 255).astype("<f4")


def serve(lens):
    blocks = [[block(length, index).tobytes() for index in range(N_BLOCKS)] for length in lens]

    def get(request, context):
        return blocks[request[0]][request[1]]

    handlers = {"Get": grpc.unary_unary_rpc_method_handler(get)}
    server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("block.Blocks", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}"}), flush=True)
    sys.stdin.read()
    server.stop(0)


def client(pipe, address, place):
    """Fetches when told, and answers with latencies, bytes, end and CPU time."""
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        get = channel.unary_unary(METHOD)
        while (told := pipe.recv()) is not None:
            level, start, seconds = told
            index, times, n_bytes = 7 * place, [], 0
            for _ in range(4):
                get(bytes([level, index % N_BLOCKS]))
                index += 1
            time.sleep(max(0, start - time.monotonic()))
            cpu = time.process_time()
            while (begin := time.monotonic()) < start + seconds:
                reply = get(bytes([level, index % N_BLOCKS]))
                if np.frombuffer(reply, "<f4", 1)[0] != (index % N_BLOCKS * 31) & 255:
                    raise ValueError(f"block {index % N_BLOCKS} is not what it should be")
                times.append(time.monotonic() - begin)
                n_bytes += len(reply)
                index += 1
            pipe.send((times, n_bytes, time.monotonic(), time.process_time() - cpu))


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def fetch(address, server_pid):
    # Each is a process that knows nothing of this one: grpc does not outlive a fork.
    spawn = multiprocessing.get_context("spawn")
    clients = []
    for place in range(8):
        pipe, end = spawn.Pipe()
        spawn.Process(target=client, args=(end, address, place), daemon=True).start()
        end.close()
        clients.append(pipe)
    for line in sys.stdin:
        level, n, seconds = line.split()
        # By then they have warmed up.
        start = time.monotonic() + 0.3
        chosen = clients[: int(n)]
        for pipe in chosen:
            pipe.send((int(level), start, float(seconds)))
        time.sleep(max(0, start - time.monotonic()))
        server = cpu_s(server_pid)
        answers = [pipe.recv() for pipe in chosen]
        server = cpu_s(server_pid) - server
        times = sorted(t for answer in answers for t in answer[0])
        at = lambda share: times[min(int(len(times) * share), len(times) - 1)] * 1e3
        figures = {
            "requests": len(times),
            "seconds": max(answer[2] for answer in answers) - start,
            "bytes": sum(answer[1] for answer in answers),
            "client_cpu_s": sum(answer[3] for answer in answers),
            "server_cpu_s": server,
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
        }
        print(json.dumps(figures), flush=True)
    for pipe in clients:
        pipe.send(None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["serve", "fetch"])
    parser.add_argument("--lens")
    parser.add_argument("--address")
    parser.add_argument("--server-pid")
    args = parser.parse_args()
    if args.what == "serve":
        serve([int(length) for length in args.lens.split(",")])
    else:
        fetch(args.address, args.server_pid)


if __name__ == "__main__":
    main()
