"""Embeds texts again and again with sentence-transformers, by the protocol of crates/bert/examples/embed.rs:

    st_peer.py FOLDER TEXTS.jsonl [--threads N] [--batch N]

Each line of the standard input is answered by one of JSON: the seconds that embedding all texts once took, their
bytes and their number. `write PATH` writes the embeddings as f32 as well.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("texts")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--batch", type=int, default=32)
arguments = parser.parse_args()

torch.set_num_threads(arguments.threads)
with open(arguments.texts, encoding="utf-8") as lines:
    texts = [json.loads(line)["text"] for line in lines]
n_bytes = sum(len(text.encode()) for text in texts)
model = SentenceTransformer(arguments.folder, device="cpu")
for line in sys.stdin:
    start = time.perf_counter()
    rows = model.encode(
        texts, batch_size=arguments.batch, normalize_embeddings=True, show_progress_bar=False
    )
    seconds = time.perf_counter() - start
    if line.startswith("write "):
        np.asarray(rows, dtype="<f4").tofile(line.removeprefix("write ").strip())
    print(json.dumps({"seconds": seconds, "bytes": n_bytes, "documents": len(texts)}), flush=True)
