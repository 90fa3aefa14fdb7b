#!/usr/bin/env python3
"""Makes hashed.json anew: what the program fits on a few texts, and the embeddings that it gives.

    tests/make_hashed.py path/of/anchorage
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

TEXTS = [
    "Alba Renwick is a pharmacist who lives in Delmare. The profession of Alba is that of a pharmacist.",
    "Bodo, the carpenter of Ostrava: BODO bodo BoDo!",
    "42 is not 4.2, nor 1,042; x² + ½ = ⅷ",
    "Größe, größe, GRÖSSE (Åsa-Łukasz) 北京大学!",
    "ΟΔΟΣ, οδος and οδός: Σ Σίσυφος",
    "İstanbul, Iğdır; ǅ ﬁn ẞ",
    "हिन्दी में कुछ शब्द, ⓐⓑⒸ",
    "--- *** ---\x1c-- \x85 ***",
    "a",
    "don't foo_bar co-op e\u0301te\u0301 𝒜𐐀",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u200b🎉 👩‍👧",
]

# The frequencies are those of every second text: the others have features that none of them has.
CONFIG = """
run.dir = "run"
corpus = { prepared = "prepared", files = ["texts.jsonl"], vocab_size = 260, window = 512, seq_len = 64 }
embed = { kind = "hashed", dim = 64, seed = 9223372036854775807, char_weight = 0.7, sample_windows = 6 }
tree = { branching = [2] }
anchor = { d_model = 32, n_layers = 1, n_heads = 2, head_width = 16, ffn_width = 32, max_seq_len = 64 }
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        (folder / "config.toml").write_text(CONFIG)
        subprocess.run([pathlib.Path(sys.argv[1]).resolve(), "prepare", "config.toml"], cwd=folder, check=True)
        rows = np.fromfile(folder / "prepared/embeddings.bin", "<f4").reshape(len(TEXTS), 64)
        raw = (folder / "prepared/embedder.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    idf = np.frombuffer(raw[begin:], "<f4")
    values, counts = np.unique(idf, return_counts=True)
    # All of the table but for these has the commonest value, that of no text.
    made = {
        "metadata": json.loads(raw[8:begin])["__metadata__"],
        "unseen": float(values[counts.argmax()]),
        "idf": [[float(v), np.flatnonzero(idf == v).tolist()] for v in np.delete(values, counts.argmax())],
        "texts": TEXTS,
        # 9 digits are those of a float32.
        "rows": [[float(f"{value:.9g}") for value in row] for row in rows],
    }
    path = pathlib.Path(__file__).with_name("hashed.json")
    path.write_text(json.dumps(made, separators=(",", ":")).replace(',"', ',\n"').replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main()
