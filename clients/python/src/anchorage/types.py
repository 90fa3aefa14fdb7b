"""What a server answers.

Shapes: L layers, R memory width of a level, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._proto import retrieval_pb2 as pb
from .errors import InvalidArgument, ProtocolError

#: The index of a level's generic cluster.
GENERIC = 2**32 - 1

#: One index a level, coarse to fine.
Path = tuple[int, ...]


def parse_path(text: str) -> Path:
    """The indices of "3/49/790", or of a prefix of a path; none of ""."""
    try:
        return tuple(int(part) for part in text.split("/")) if text else ()
    except ValueError:
        raise InvalidArgument(f"path {text!r}: expected indices such as '3/49/790'") from None


def format_path(path: Sequence[int]) -> str:
    """The inverse of `parse_path`; "generic" of the generic path."""
    if path and all(index == GENERIC for index in path):
        return "generic"
    return "/".join(str(index) for index in path)


@dataclass(frozen=True)
class Route:
    """A path for a text or an embedding."""

    path: Path
    #: Squared L2 distance to the centroid of its leaf.
    distance: float
    #: Cosine to the centroid of its leaf, -1 to 1.
    score: float


@dataclass(frozen=True)
class Spec:
    """The sizes of a bank; lists are by level, coarse to fine."""

    n_layers: int
    d_model: int
    #: 0 is a level without memory.
    width: tuple[int, ...]
    branching: tuple[int, ...]
    #: "ffn", "lora_qk", "lora_vo", "lora_ffn" or "kv": what the parameters are.
    kind: str = "ffn"
    #: The layers that have memory, of the n_layers of the model; empty from a server that has it in all of them.
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """The parameters of one cluster."""

    level: int
    index: int
    #: (L, 3, R, D) of FFN memory, L being the layers with memory; of other kinds as retrieval.proto says.
    shape: tuple[int, ...]
    #: "f32", "bf16" or "int8": as it came.
    dtype: str
    #: As it came, little-endian.
    data: bytes | bytearray = field(repr=False)

    def numpy(self) -> NDArray[np.float32]:
        """The numbers, of FFN memory [L, 3, R, D]: for each layer M1, M2 and M3, in rows of D. float32 are not copied."""
        if self.dtype == "f32":
            return np.frombuffer(self.data, "<f4").reshape(self.shape)
        if self.dtype == "bf16":
            upper = np.frombuffer(self.data, "<u2").astype(np.uint32) << 16
            return upper.view(np.float32).reshape(self.shape)
        scales, values = self.int8()
        rows = values.reshape(scales.size, -1).astype(np.float32) * scales.reshape(-1, 1)
        return rows.astype(np.float32, copy=False).reshape(self.shape)

    def int8(self) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Of int8, not copied: the scales, of FFN memory [L, 3, R], and the integers, [L, 3, R, D].

        Of other kinds there is a scale for every so many numbers, in their order.
        """
        if self.dtype != "int8":
            raise InvalidArgument(f"block of dtype {self.dtype}, expected int8")
        *rows, _ = self.shape
        n = (len(self.data) - int(np.prod(self.shape))) // 4
        scales = np.frombuffer(self.data, "<f4", count=n)
        if n == int(np.prod(rows)):
            scales = scales.reshape(rows)
        return scales, np.frombuffer(self.data, np.int8, offset=4 * n).reshape(self.shape)


@dataclass(frozen=True)
class Retrieved:
    """Blocks of a bank as it is after a step."""

    bank: str
    step: int
    spec: Spec
    #: Of a text or a path; None of blocks, and when everything is blocked.
    path: Path | None
    dtype: str
    #: Of a text or a path: coarse to fine. Else as asked for.
    blocks: list[Block]
    #: Blocked prefixes of paths that were nearer.
    blocked: list[str]
    #: Of what the bank belongs to, and of its spec.
    hashes: dict[str, str]

    @property
    def levels(self) -> dict[int, NDArray[np.float32]]:
        """The numbers of a path's blocks by level, each [L, 3, R, D]."""
        return {block.level: block.numpy() for block in self.blocks}


@dataclass(frozen=True)
class Term:
    """A word that is commoner in a cluster than beside it."""

    term: str
    #: 1 over its rank.
    weight: float


@dataclass(frozen=True)
class Cluster:
    """A cluster in short."""

    #: Indices from level 0 down; empty of the root.
    path: Path
    n_windows: int
    #: Of all windows, 0 to 1.
    share: float
    terms: list[Term]
    #: Steps that updated its block; None when the bank does not tell.
    updates: int | None
    #: Times that its block was fetched for a request.
    fetches: int


@dataclass(frozen=True)
class Example:
    """A text of a cluster."""

    title: str
    text: str
    #: Squared distance to the centroid.
    distance: float


@dataclass(frozen=True)
class Explained:
    """What a cluster is about."""

    cluster: Cluster
    #: Nearest first.
    examples: list[Example]
    #: The clusters below that hold documents.
    children: list[Cluster]


@dataclass(frozen=True)
class Bank:
    """A bank that is served."""

    name: str
    step: int
    source: str
    #: "f32", "bf16" or "int8": how the server holds its blocks.
    dtype: str
    n_parameters: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class Info:
    """What is served."""

    spec: Spec
    #: SHA-256 of the tree, in hex.
    tree: str
    embedding_dim: int
    banks: list[Bank]
    #: What a bank must have.
    hashes: dict[str, str]


_DTYPES: dict[int, str] = {pb.DTYPE_F32: "f32", pb.DTYPE_BF16: "bf16", pb.DTYPE_INT8: "int8"}


def dtype_of(found: int) -> str:
    """The name of a dtype that is told."""
    if found not in _DTYPES:
        raise ProtocolError(f"dtype {found}, expected one of {sorted(_DTYPES)}")
    return _DTYPES[found]


def dtype_to(name: str | None) -> int:
    """What a request names; None leaves it to the server."""
    if name is None:
        return pb.DTYPE_UNSPECIFIED
    for number, known in _DTYPES.items():
        if known == name:
            return number
    raise InvalidArgument(f"dtype {name!r}, expected one of {sorted(_DTYPES.values())}, or None for as it is held")


def spec_of(message: Any) -> Spec:
    """A spec as it came."""
    return Spec(
        message.n_layers,
        message.d_model,
        tuple(message.width),
        tuple(message.branching),
        message.kind or "ffn",
        tuple(message.layers),
    )


def cluster_of(message: Any) -> Cluster:
    """A cluster as it came."""
    return Cluster(
        path=parse_path(message.path),
        n_windows=message.n_windows,
        share=message.share,
        terms=[Term(term.term, term.weight) for term in message.terms],
        updates=message.updates if message.HasField("updates") else None,
        fetches=message.fetches,
    )
