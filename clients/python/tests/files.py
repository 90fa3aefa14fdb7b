"""Files such as the program writes."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_NAMES = {"<f4": "F32", "<u2": "BF16", "<u8": "U64"}


def safetensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """A file of these tensors; numbers of u2 are the upper halves of f32."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, array in tensors.items():
        dtype = _NAMES[array.dtype.str]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def bank(path: pathlib.Path, spec: Mapping[str, Any], block_shapes: list[list[int]], seed: int = 1) -> None:
    """What `anchorage bank export` writes: a tensor a level, the generic block last. Levels may have no memory."""
    rng, tensors = np.random.default_rng(seed), {}
    for level, shape in enumerate(block_shapes):
        n_blocks = math.prod(spec["branching"][: level + 1]) + 1
        if shape:
            tensors[f"level{level}"] = (0.3 * rng.standard_normal((n_blocks, *shape))).astype("<f4")
    safetensors(path, tensors)


def tree(path: pathlib.Path, branching: list[int], dim: int, seed: int = 2) -> list[np.ndarray[Any, Any]]:
    """A tree of random centroids, the last cluster of each level empty; the centroids by level."""
    rng, centroids, counts, n = np.random.default_rng(seed), [], [], 1
    for branch in branching:
        n *= branch
        centroids.append(rng.standard_normal((n, dim)).astype("<f4"))
        counts.append(np.array([9] * (n - 1) + [0], "<u8"))
    tensors = {f"level{level}.counts": array for level, array in enumerate(counts)}
    tensors |= {f"level{level}.centroids": array for level, array in enumerate(centroids)}
    metadata = {"format": "anchorage.tree.v1", "branching": ",".join(map(str, branching))}
    safetensors(path, tensors, metadata)
    return centroids
