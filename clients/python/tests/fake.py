"""A server of retrieval.v1 that answers what a test tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from anchorage import GENERIC
from anchorage._proto import retrieval_pb2 as pb
from anchorage._proto.retrieval_pb2_grpc import RetrievalServiceServicer, add_RetrievalServiceServicer_to_server

N_LAYERS, D_MODEL, WIDTH, BRANCHING = 2, 8, (4, 0, 2), (2, 3, 2)


def values(level: int, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The numbers of a block."""
    shape = (N_LAYERS, 3, WIDTH[level], D_MODEL)
    seed = 1000 * level + min(index, 999)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encoded(array: np.ndarray[Any, np.dtype[np.float32]], dtype: int) -> bytes:
    """As the server sends it."""
    if dtype == pb.DTYPE_BF16:
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    if dtype == pb.DTYPE_INT8:
        scales = np.abs(array).max(-1) / np.float32(127)
        return scales.astype("<f4").tobytes() + np.rint(array / scales[..., None]).astype(np.int8).tobytes()
    return array.astype("<f4").tobytes()


class Fake(RetrievalServiceServicer):
    """Refuses as often as told before it answers; `spoil` may change what is sent of a retrieval."""

    def __init__(self) -> None:
        self.refusals: list[tuple[grpc.StatusCode, str, int | None]] = []
        self.spoil: Callable[[list[Any]], list[Any]] = lambda parts: parts
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}

    def _begin(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.refusals:
            code, message, hint = self.refusals.pop(0)
            if hint is not None:
                context.set_trailing_metadata([("grpc-retry-pushback-ms", str(hint))])
            context.abort(code, message)

    def Route(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        inputs = [float(len(text)) for text in request.texts] + [sum(row.values) for row in request.embeddings]
        path = pb.Path(indices=[1, 4, 9])
        return pb.RouteResponse(
            inputs=[pb.Routes(routes=[pb.Route(path=path, distance=x, score=0.5)]) for x in inputs]
        )

    def Retrieve(self, request: Any, context: Any) -> Iterator[Any]:
        self._begin(request, context)
        dtype = request.dtype or pb.DTYPE_F32
        path = list(request.path.indices) if request.WhichOneof("what") == "path" else [1, 4, len(request.text) % 12]
        if request.WhichOneof("what") == "blocks":
            ids = [(block.level, block.index) for block in request.blocks.ids]
        else:
            ids = [(level, index) for level, index in enumerate(path) if WIDTH[level]]
        spec = pb.Spec(n_layers=N_LAYERS, d_model=D_MODEL, width=WIDTH, branching=BRANCHING)
        head = pb.RetrieveHead(bank=request.bank or "default", step=290, spec=spec, dtype=dtype, hashes={"tree": "a"})
        if request.WhichOneof("what") != "blocks":
            head.path.indices.extend(path)
        pieces = []
        for place, (level, index) in enumerate(ids):
            data = encoded(values(level, index), dtype)
            shape = [N_LAYERS, 3, WIDTH[level], D_MODEL]
            head.blocks.append(pb.BlockHead(id=pb.BlockId(level=level, index=index), shape=shape, bytes=len(data)))
            for start in range(0, len(data), 100):
                piece = pb.RetrievePiece(block=place, offset=start, payload=data[start : start + 100])
                pieces.append(pb.RetrieveResponse(piece=piece))
        yield from self.spoil([pb.RetrieveResponse(head=head), *pieces])

    def Explain(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        cluster = pb.Cluster(
            path="/".join(map(str, request.prefix)), n_windows=30, share=0.5, terms=[pb.Term(term="star", weight=1.0)]
        )
        child = pb.Cluster(path="1/4", updates=3, fetches=2)
        example = pb.Example(title="document 1", text="A star.", distance=0.25)
        return pb.ExplainResponse(cluster=cluster, examples=[example], children=[child])

    def Info(self, request: Any, context: Any) -> Any:
        self._begin(request, context)
        spec = pb.Spec(n_layers=N_LAYERS, d_model=D_MODEL, width=WIDTH, branching=BRANCHING)
        bank = pb.Bank(name="default", step=290, source="runs/x", dtype=pb.DTYPE_BF16, n_parameters=7)
        return pb.InfoResponse(spec=spec, tree="a", embedding_dim=2, banks=[bank], hashes={"tree": "a"})


@contextmanager
def serving(fake: Fake, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """The address of a fake on loopback."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_RetrievalServiceServicer_to_server(fake, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


GENERIC_PATH = (GENERIC, GENERIC, GENERIC)
