"""Memory from files, without a server: a bank that `anchorage bank export` wrote, and the cluster tree it belongs to.

Shapes: N clusters of a level, D dimension of the embeddings.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._tensors import TensorFile
from .errors import InvalidArgument, NotFound
from .hashed import Hashed
from .types import GENERIC, Block, Path, Retrieved, Route, Spec, format_path, parse_path

__all__ = ["BankFile", "Embed", "Tree"]

#: Embeddings of texts, [N, D]: those that the tree was made with.
Embed = Callable[[Sequence[str]], ArrayLike]

_DTYPES = {"F32": ("f32", 4), "BF16": ("bf16", 2)}


class Tree:
    """A cluster tree, as a run keeps it in tree.safetensors."""

    def __init__(self, path: str | pathlib.Path) -> None:
        """Reads all centroids."""
        file = TensorFile(pathlib.Path(path))
        if file.metadata.get("format") != "anchorage.tree.v1":
            raise InvalidArgument(f"{path}: expected a tree (anchorage.tree.v1), found {file.metadata.get('format')}")
        #: By level, coarse to fine.
        self.branching = tuple(int(part) for part in file.metadata["branching"].split(","))
        n_levels = range(len(self.branching))
        self._centroids = [file.array(f"level{level}.centroids", "F32", "<f4") for level in n_levels]
        self._counts = [file.array(f"level{level}.counts", "U64", "<u8") for level in n_levels]

    @property
    def dim(self) -> int:
        """Of the embeddings that it routes."""
        return int(self._centroids[0].shape[1])

    def route(self, embedding: ArrayLike, *, beam: int = 4) -> list[Route]:
        """The leaves that a beam of so many clusters a level ends with, nearest first; a beam of 1 is greedy."""
        query = np.asarray(embedding, np.float32)
        if query.shape != (self.dim,) or not np.isfinite(query).all():
            raise InvalidArgument(f"embedding: expected {self.dim} finite numbers, found the shape {list(query.shape)}")
        if beam < 1:
            raise InvalidArgument(f"beam: expected at least 1, found {beam}")
        parents: NDArray[np.int64] = np.zeros(1, np.int64)
        distances: NDArray[np.float32] = np.zeros(1, np.float32)
        for centroids, counts, branching in zip(self._centroids, self._counts, self.branching):
            children = (parents[:, None] * branching + np.arange(branching)).ravel()
            children = children[counts[children] > 0]
            found = ((centroids[children] - query) ** 2).sum(1, dtype=np.float32)
            # Of equal distances the lower index comes first.
            order = np.lexsort((children, found))[:beam]
            parents, distances = children[order], found[order]
        return [self._of_leaf(int(leaf), float(d), query) for leaf, d in zip(parents, distances)]

    def _of_leaf(self, leaf: int, distance: float, query: NDArray[np.float32]) -> Route:
        indices = [leaf]
        for branching in reversed(self.branching[1:]):
            indices.append(indices[-1] // branching)
        centroid = self._centroids[-1][leaf]
        lengths = float(np.linalg.norm(centroid) * np.linalg.norm(query))
        score = float(centroid @ query) / lengths if lengths > 0 else 0.0
        return Route(tuple(reversed(indices)), distance, score)


class BankFile:
    """A bank in one safetensors file, and the way to its blocks. Blocks are read when they are asked for."""

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        spec: Spec | str | pathlib.Path | None = None,
        tree: Tree | str | pathlib.Path | None = None,
        embed: Embed | None = None,
        beam: int = 4,
    ) -> None:
        """`path` is the file, or a folder with `bank.safetensors` and what else there is of `spec.json`,
        `tree.safetensors` and `embedder.safetensors`.

        The spec is that of the file's metadata, of `spec.json`, or of a checkpoint's manifest that is named; without
        all of them, that of FFN or KV memory in all layers, by the shapes. `embed` is what the tree was made with, by
        default the `Hashed` of the folder; texts are routed by it and the tree, by a beam of so many clusters a level.
        """
        file = pathlib.Path(path)
        if file.is_dir():
            beside, file = file, file / "bank.safetensors"
            tree = beside / "tree.safetensors" if tree is None and (beside / "tree.safetensors").exists() else tree
            if embed is None and (beside / "embedder.safetensors").exists():
                embed = Hashed(beside / "embedder.safetensors")
        else:
            beside = file.parent
        self._file = TensorFile(file)
        if spec is None and "spec" not in self._file.metadata and (beside / "spec.json").exists():
            spec = beside / "spec.json"
        self.spec = spec if isinstance(spec, Spec) else self._spec_of(spec)
        self.tree = tree if tree is None or isinstance(tree, Tree) else Tree(tree)
        self._embed, self._beam = embed, beam
        self._check()

    def retrieve(
        self, text: str | None = None, *, path: str | Sequence[int] | None = None, levels: Sequence[int] = ()
    ) -> Retrieved:
        """The blocks of a text, or of a path ("3/49/790", "generic" or indices), of all levels or of these."""
        if (text is None) == (path is None):
            raise InvalidArgument("expected a text or a path")
        if text is not None:
            return next(self.retrieve_each([text], levels=levels))
        return self._of_path(self._indices(path if path is not None else ()), levels)

    def retrieve_each(
        self, texts: Iterable[str], *, batch: int = 64, levels: Sequence[int] = ()
    ) -> Iterator[Retrieved]:
        """The blocks of each text, in order; `batch` texts are embedded together."""
        texts = list(texts)
        for start in range(0, len(texts), batch):
            for routes in self.route(texts[start : start + batch]):
                yield self._of_path(routes[0].path, levels)

    def route(self, texts: Sequence[str], *, n: int = 0) -> list[list[Route]]:
        """The paths of texts, nearest first; at most `n` of each, 0 for as many as the beam is wide."""
        if self.tree is None or self._embed is None:
            missing = "a tree" if self.tree is None else "an embedder"
            raise InvalidArgument(f"{self._file.path}: texts are routed by a tree and an embedder, found not {missing}")
        embeddings = np.asarray(self._embed(texts), np.float32)
        if embeddings.shape != (len(texts), self.tree.dim):
            expected = [len(texts), self.tree.dim]
            raise InvalidArgument(f"embeddings: expected {expected}, found the shape {list(embeddings.shape)}")
        return [self.tree.route(row, beam=self._beam)[: n or None] for row in embeddings]

    def _of_path(self, path: Path, levels: Sequence[int]) -> Retrieved:
        blocks = [
            self._block(level, index)
            for level, index in enumerate(path)
            if self.spec.width[level] and (not levels or level in levels)
        ]
        dtype = blocks[0].dtype if blocks else "f32"
        return Retrieved(str(self._file.path), 0, self.spec, path, dtype, blocks, [], {})

    def _block(self, level: int, index: int) -> Block:
        n_blocks = math.prod(self.spec.branching[: level + 1])
        row = n_blocks if index == GENERIC else index
        if not 0 <= row <= n_blocks or (row == n_blocks and index != GENERIC):
            raise NotFound(f"{self._file.path}: cluster {index} of level {level}, expected one below {n_blocks}")
        name = f"level{level}"
        shape = tuple(self._file.tensors[name]["shape"][1:])
        dtype, n_bytes = _DTYPES[self._file.tensors[name]["dtype"]]
        size = math.prod(shape) * n_bytes
        return Block(level, index, shape, dtype, self._file.bytes(name, row * size, (row + 1) * size))

    def _indices(self, path: str | Sequence[int]) -> Path:
        n_levels = len(self.spec.width)
        if path == "generic":
            return (GENERIC,) * n_levels
        indices = parse_path(path) if isinstance(path, str) else tuple(path)
        if len(indices) != n_levels:
            raise InvalidArgument(f"path {format_path(indices)!r}: expected {n_levels} indices, found {len(indices)}")
        return indices

    def _spec_of(self, path: str | pathlib.Path | None) -> Spec:
        if path is not None:
            found = json.loads(pathlib.Path(path).read_text())
            # A manifest of a checkpoint has it among other things.
            return _spec_from(found.get("spec", found))
        if "spec" in self._file.metadata:
            return _spec_from(json.loads(self._file.metadata["spec"]))
        return self._spec_by_shapes()

    def _spec_by_shapes(self) -> Spec:
        shapes = {name: list(tensor["shape"]) for name, tensor in self._file.tensors.items()}
        n_levels = 1 + max((int(name[5:]) for name in shapes if name[5:].isdigit()), default=0)
        if set(shapes) != {f"level{level}" for level in range(n_levels)}:
            raise InvalidArgument(f"{self._file.path}: no spec, and no memory at every level to tell it by")
        firsts = [shape[1:] for _, shape in sorted(shapes.items())]
        kinds = {shape[1] if len(shape) == 4 else 0 for shape in firsts}
        if kinds not in ({3}, {2}):
            raise InvalidArgument(f"{self._file.path}: no spec, and shapes of neither FFN nor KV memory: {shapes}")
        counts = [1] + [shapes[f"level{level}"][0] - 1 for level in range(n_levels)]
        return Spec(
            n_layers=firsts[0][0],
            d_model=firsts[0][3] if kinds == {3} else 0,
            width=tuple(shape[2] for shape in firsts),
            branching=tuple(below // above for above, below in zip(counts, counts[1:])),
            kind="ffn" if kinds == {3} else "kv",
        )

    def _check(self) -> None:
        """Fails on tensors that are not those of the spec, and on a tree of another."""
        spec, path = self.spec, self._file.path
        expected = {f"level{level}" for level, width in enumerate(spec.width) if width}
        if set(self._file.tensors) != expected:
            found = sorted(self._file.tensors)
            raise InvalidArgument(f"{path}: expected the tensors {sorted(expected)}, found {found}")
        for name in sorted(expected):
            tensor, rows = self._file.tensors[name], math.prod(spec.branching[: int(name[5:]) + 1]) + 1
            if tensor["dtype"] not in _DTYPES:
                raise InvalidArgument(f"{path}: {name} of {tensor['dtype']}, expected one of {sorted(_DTYPES)}")
            if tensor["shape"][0] != rows:
                raise InvalidArgument(f"{path}: {name} of {tensor['shape'][0]} blocks, expected {rows} by the spec")
        if self.tree is not None and self.tree.branching != spec.branching:
            raise InvalidArgument(f"{path}: a bank of {spec.branching}, expected {self.tree.branching} as of the tree")


def layers_of(layers: str | Sequence[int], n_layers: int) -> tuple[int, ...]:
    """The layers that have memory: of "uniform", all; of "early", "middle" and "late", a third, rounded up."""
    third = -(-n_layers // 3)
    starts = {"early": 0, "middle": (n_layers - third) // 2, "late": n_layers - third}
    if layers == "uniform":
        return tuple(range(n_layers))
    if isinstance(layers, str):
        if layers not in starts:
            raise InvalidArgument(f"layers {layers!r}, expected uniform, early, middle, late or a list")
        return tuple(range(starts[layers], starts[layers] + third))
    return tuple(layers)


def _spec_from(spec: Mapping[str, Any]) -> Spec:
    """A spec as a bank's manifest has it."""
    n_layers = int(spec["n_layers"])
    return Spec(
        n_layers=n_layers,
        d_model=int(spec["d_model"]),
        width=tuple(spec["width"]),
        branching=tuple(spec["branching"]),
        kind=str(spec["kind"]),
        layers=layers_of(spec.get("layers", "uniform"), n_layers),
    )
