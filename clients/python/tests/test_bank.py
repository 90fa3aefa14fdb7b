"""Banks and trees in files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from files import bank, safetensors, tree

from anchorage import GENERIC, BankFile, InvalidArgument, NotFound, Spec, Tree
from anchorage.bank import layers_of

FFN = {"kind": "ffn", "n_layers": 2, "d_model": 4, "width": [3, 0, 2], "branching": [2, 3, 2]}
SHAPES = [[2, 3, 3, 4], [], [2, 3, 2, 4]]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    bank(tmp_path / "bank.safetensors", FFN, SHAPES)
    (tmp_path / "spec.json").write_text(json.dumps(FFN))
    tree(tmp_path / "tree.safetensors", [2, 3, 2], 5)
    return tmp_path


def test_blocks_of_a_path(folder: pathlib.Path) -> None:
    found = BankFile(folder).retrieve(path="1/4/9")
    assert found.spec == Spec(2, 4, (3, 0, 2), (2, 3, 2), "ffn", (0, 1))
    assert (found.path, found.dtype) == ((1, 4, 9), "f32")
    assert [(block.level, block.index, block.shape) for block in found.blocks] == [
        (0, 1, (2, 3, 3, 4)),
        (2, 9, (2, 3, 2, 4)),
    ]
    raw = (folder / "bank.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    numbers = np.frombuffer(raw[begin:], "<f4")
    np.testing.assert_array_equal(found.blocks[0].numpy().ravel(), numbers[72:144])
    np.testing.assert_array_equal(found.blocks[1].numpy().ravel(), numbers[3 * 72 + 9 * 48 :][:48])
    generic = BankFile(folder).retrieve(path="generic", levels=[2])
    assert generic.path == (GENERIC,) * 3
    np.testing.assert_array_equal(generic.blocks[0].numpy().ravel(), numbers[-48:])


def test_bf16_and_specs_elsewhere(tmp_path: pathlib.Path) -> None:
    values = np.arange(3 * 2 * 3 * 1 * 4, dtype="<f4").reshape(3, 2, 3, 1, 4)
    halves = (values.view("<u4") >> 16).astype("<u2")
    safetensors(tmp_path / "bank.safetensors", {"level0": halves})
    # By the shapes alone.
    found = BankFile(tmp_path / "bank.safetensors")
    assert found.spec == Spec(2, 4, (1,), (2,), "ffn")
    np.testing.assert_array_equal(found.retrieve(path=[1]).blocks[0].numpy(), values[1])
    # In the file.
    spec = {"kind": "lora_qk", "n_layers": 6, "d_model": 4, "width": [1], "branching": [2], "layers": "late"}
    safetensors(tmp_path / "other.safetensors", {"level0": values}, {"spec": json.dumps(spec)})
    assert BankFile(tmp_path / "other.safetensors").spec == Spec(6, 4, (1,), (2,), "lora_qk", (4, 5))
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 7, "spec": dict(spec, layers=[3])}))
    named = BankFile(tmp_path / "bank.safetensors", spec=tmp_path / "manifest.json")
    assert named.spec == Spec(6, 4, (1,), (2,), "lora_qk", (3,))
    pairs = np.zeros((3, 5, 2, 7, 4), "<f4")
    safetensors(tmp_path / "kv.safetensors", {"level0": pairs})
    assert BankFile(tmp_path / "kv.safetensors").spec == Spec(5, 0, (7,), (2,), "kv")


def test_layers_are_a_third_or_a_list() -> None:
    assert layers_of("middle", 35) == tuple(range(11, 23))
    assert layers_of("early", 2) == (0,) and layers_of("late", 24) == tuple(range(16, 24))
    assert layers_of([0, 3], 4) == (0, 3) and layers_of("uniform", 3) == (0, 1, 2)
    with pytest.raises(InvalidArgument, match="layers 'deep', expected uniform"):
        layers_of("deep", 3)


def test_routes_are_the_nearest_leaves(tmp_path: pathlib.Path) -> None:
    centroids = tree(tmp_path / "tree.safetensors", [2, 3, 2], 5)
    found = Tree(tmp_path / "tree.safetensors")
    assert (found.branching, found.dim) == ((2, 3, 2), 5)
    # The last cluster of each level is empty, and with it what is below: 3 of 6 at level 1, 5 of 12 leaves.
    leaves = [leaf for leaf in range(12) if leaf != 11 and leaf // 2 != 5 and leaf // 6 != 1]
    for seed in range(20):
        query = np.random.default_rng(seed).standard_normal(5).astype(np.float32)
        distances = {leaf: float(((centroids[2][leaf] - query) ** 2).sum()) for leaf in leaves}
        routes = found.route(query, beam=12)
        assert [route.path[2] for route in routes] == sorted(distances, key=lambda leaf: distances[leaf])
        best = routes[0]
        assert best.path == (best.path[2] // 6, best.path[2] // 2, best.path[2])
        assert best.distance == pytest.approx(distances[best.path[2]])
        lengths = np.linalg.norm(centroids[2][best.path[2]]) * np.linalg.norm(query)
        assert best.score == pytest.approx(float(centroids[2][best.path[2]] @ query / lengths), abs=1e-6)
        # Greedy: the nearest child each time.
        cluster = 0
        for level, branching in enumerate(found.branching):
            children = [cluster * branching + child for child in range(branching)]
            held = [child for child in children if child != len(centroids[level]) - 1]
            cluster = min(held, key=lambda child: float(((centroids[level][child] - query) ** 2).sum()))
        assert found.route(query, beam=1)[0].path[2] == cluster


def test_texts_are_embedded_and_routed(folder: pathlib.Path) -> None:
    asked: list[list[str]] = []

    def embed(texts: Any) -> Any:
        asked.append(list(texts))
        return [np.random.default_rng(len(text)).standard_normal(5) for text in texts]

    source = BankFile(folder, embed=embed, beam=2)
    texts = ["a", "bb", "ccc"]
    found = list(source.retrieve_each(texts, batch=2))
    assert asked == [["a", "bb"], ["ccc"]]
    assert [memory.path for memory in found] == [routes[0].path for routes in source.route(texts)]
    assert source.retrieve("bb").path == found[1].path
    assert [len(routes) for routes in source.route(texts, n=1)] == [1, 1, 1]
    with pytest.raises(InvalidArgument, match="found not an embedder"):
        BankFile(folder).retrieve("a")
    with pytest.raises(InvalidArgument, match=r"embeddings: expected \[1, 5\], found the shape \[1, 4\]"):
        BankFile(folder, embed=lambda texts: np.zeros((len(texts), 4))).retrieve("a")


def test_what_does_not_fit_is_refused(folder: pathlib.Path) -> None:
    source = BankFile(folder)
    with pytest.raises(InvalidArgument, match="path '1/4': expected 3 indices, found 2"):
        source.retrieve(path="1/4")
    with pytest.raises(NotFound, match="cluster 2 of level 0, expected one below 2"):
        source.retrieve(path=[2, 4, 9])
    with pytest.raises(InvalidArgument, match="a text or a path"):
        source.retrieve()
    other = dict(FFN, branching=[2, 3, 4])
    (folder / "spec.json").write_text(json.dumps(other))
    with pytest.raises(InvalidArgument, match="level2 of 13 blocks, expected 25 by the spec"):
        BankFile(folder)
    (folder / "spec.json").write_text(json.dumps(dict(FFN, width=[3, 1, 2])))
    with pytest.raises(InvalidArgument, match=r"expected the tensors \['level0', 'level1', 'level2'\], found"):
        BankFile(folder)
    (folder / "spec.json").write_text(json.dumps(FFN))
    tree(folder / "tree.safetensors", [2, 2, 3], 5)
    with pytest.raises(InvalidArgument, match=r"a bank of \(2, 3, 2\), expected \(2, 2, 3\) as of the tree"):
        BankFile(folder)
    with pytest.raises(InvalidArgument, match="expected a tree"):
        Tree(folder / "bank.safetensors")
    raw = (folder / "bank.safetensors").read_bytes()
    (folder / "bank.safetensors").write_bytes(raw[:-1])
    with pytest.raises(InvalidArgument, match=f"expected {len(raw)} bytes, as its header says, found {len(raw) - 1}"):
        BankFile(folder)
    (folder / "bank.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidArgument, match="expected a safetensors file"):
        BankFile(folder)
