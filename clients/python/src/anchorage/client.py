"""The client of `retrieval.v1`."""

from __future__ import annotations

import itertools
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import ArrayLike

from ._proto import retrieval_pb2 as pb
from ._proto.retrieval_pb2_grpc import RetrievalServiceStub
from .errors import Error, InvalidArgument, ProtocolError, of_status
from .types import (
    GENERIC,
    Bank,
    Block,
    Example,
    Explained,
    Info,
    Retrieved,
    Route,
    cluster_of,
    dtype_of,
    dtype_to,
    parse_path,
    spec_of,
)

_T = TypeVar("_T")

#: Metadata of a refusal: milliseconds after which to come back, or a negative number for never.
_HINT = "grpc-retry-pushback-ms"
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
#: A piece is at most 1 MiB; a head of many blocks may be longer.
_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class Tls:
    """PEM files: the authority of the server, and the client's own certificate and key where it asks for them."""

    ca: str | pathlib.Path
    cert: str | pathlib.Path | None = None
    key: str | pathlib.Path | None = None

    def _credentials(self) -> grpc.ChannelCredentials:
        def read(path: str | pathlib.Path | None) -> bytes | None:
            return None if path is None else pathlib.Path(path).read_bytes()

        if (self.cert is None) != (self.key is None):
            raise InvalidArgument(f"tls: expected a certificate and its key, found {self.cert} and {self.key}")
        return grpc.ssl_channel_credentials(read(self.ca), read(self.key), read(self.cert))


@dataclass(frozen=True)
class Retry:
    """How often a call is tried that is refused for the moment. The pauses double, and are never shorter than the
    server's hint."""

    tries: int = 6
    first_seconds: float = 0.05
    most_seconds: float = 5.0
    #: Of the pauses, which no two clients should share.
    random: Random = field(default_factory=Random, compare=False, repr=False)

    def pause(self, n_failures: int, hint_ms: int | None) -> float | None:
        """Seconds to wait after so many failures, from 1; None for no more tries."""
        if n_failures >= self.tries or (hint_ms is not None and hint_ms < 0):
            return None
        pause = min(self.first_seconds * float(2 ** (n_failures - 1)), self.most_seconds)
        return max(pause * (0.5 + self.random.random() / 2), (hint_ms or 0) / 1000)


class Client:
    """A server of memory. May be used by several threads; close it, or use it in a `with`."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float = 60.0,
        retry: Retry | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`address` is "host:port". `timeout` is the seconds that one try of a call may take."""
        # Tries are counted here, where the server's hint is minded.
        options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", _MESSAGE_BYTES)]
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, tls._credentials(), options)
        self._stub: Any = RetrievalServiceStub(self._channel)
        self._address = address
        self._metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        self._timeout = timeout
        self._retry = Retry() if retry is None else retry
        self._sleep = sleep

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def route(
        self, texts: Sequence[str] | None = None, *, embeddings: ArrayLike | None = None, n: int = 0
    ) -> list[list[Route]]:
        """The paths of texts, or of embeddings [N, D], best first; at most `n` of each, 0 for as many as the server's
        router names."""
        if isinstance(texts, str):
            raise InvalidArgument("texts: expected a list of texts, found one text")
        request = pb.RouteRequest(texts=texts or [], n=n)
        if embeddings is not None:
            rows = np.asarray(embeddings, np.float32)
            if rows.ndim != 2:
                raise InvalidArgument(f"embeddings: expected [N, D], found the shape {list(rows.shape)}")
            request.embeddings.extend(pb.Embedding(values=row) for row in rows)
        response = self._call(lambda: self._stub.Route(request, **self._options()))
        expected = len(request.texts) + len(request.embeddings)
        if len(response.inputs) != expected:
            raise ProtocolError(f"{self._address}: routes of {len(response.inputs)} inputs, expected {expected}")
        return [
            [Route(tuple(route.path.indices), route.distance, route.score) for route in routes.routes]
            for routes in response.inputs
        ]

    def route_each(self, texts: Iterable[str], *, batch: int = 64, n: int = 0) -> Iterator[list[Route]]:
        """The paths of each text, in order, `batch` texts a request."""
        if batch < 1:
            raise InvalidArgument(f"batch: expected at least 1, found {batch}")
        texts = iter(texts)
        while some := list(itertools.islice(texts, batch)):
            yield from self.route(some, n=n)

    def retrieve(
        self,
        text: str | None = None,
        *,
        path: str | Sequence[int] | None = None,
        blocks: Sequence[tuple[int, int]] | None = None,
        bank: str = "",
        dtype: str | None = None,
        levels: Sequence[int] = (),
        blocked: Sequence[str] = (),
    ) -> Retrieved:
        """The blocks of a text, of a path ("3/49/790", "generic" or indices), or of clusters (level, index).

        `bank` is the default one when it is empty. `dtype` is "f32", "bf16" or "int8", None for as the server holds
        them. Of a text or a path, `levels` are those wanted, and `blocked` prefixes of paths not to be used.
        """
        if sum(what is not None for what in (text, path, blocks)) != 1:
            raise InvalidArgument("expected a text, a path or blocks")
        request = pb.RetrieveRequest(bank=bank, dtype=dtype_to(dtype), levels=levels, blocked=blocked)  # type: ignore[arg-type]
        if text is not None:
            request.text = text
        elif path is not None:
            request.path.indices.extend(self._indices(path))
        else:
            ids = [pb.BlockId(level=level, index=index) for level, index in blocks or []]
            request.blocks.CopyFrom(pb.BlockIds(ids=ids))
        return self._call(lambda: self._received(self._stub.Retrieve(request, **self._options())))

    def retrieve_each(
        self,
        texts: Iterable[str],
        *,
        at_once: int = 4,
        bank: str = "",
        dtype: str | None = None,
        levels: Sequence[int] = (),
        blocked: Sequence[str] = (),
    ) -> Iterator[Retrieved]:
        """The blocks of each text, in order, `at_once` requests at a time."""
        if at_once < 1:
            raise InvalidArgument(f"at_once: expected at least 1, found {at_once}")
        with ThreadPoolExecutor(at_once) as pool:
            pending: deque[Future[Retrieved]] = deque()
            try:
                for text in texts:
                    ask = {"bank": bank, "dtype": dtype, "levels": levels, "blocked": blocked}
                    pending.append(pool.submit(self.retrieve, text, **ask))  # type: ignore[arg-type]
                    if len(pending) == at_once:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def explain(self, path: str | Sequence[int] = ()) -> Explained:
        """What the cluster of a path, or of a prefix of one, is about; of none, the whole tree."""
        indices = parse_path(path) if isinstance(path, str) else tuple(path)
        response = self._call(lambda: self._stub.Explain(pb.ExplainRequest(prefix=indices), **self._options()))
        return Explained(
            cluster=cluster_of(response.cluster),
            examples=[Example(found.title, found.text, found.distance) for found in response.examples],
            children=[cluster_of(child) for child in response.children],
        )

    def info(self) -> Info:
        """What is served."""
        response = self._call(lambda: self._stub.Info(pb.InfoRequest(), **self._options()))
        return Info(
            spec=spec_of(response.spec),
            tree=response.tree,
            embedding_dim=response.embedding_dim,
            banks=[
                Bank(bank.name, bank.step, bank.source, dtype_of(bank.dtype), bank.n_parameters, dict(bank.hashes))
                for bank in response.banks
            ],
            hashes=dict(response.hashes),
        )

    def _indices(self, path: str | Sequence[int]) -> Sequence[int]:
        if path == "generic":
            return [GENERIC] * len(self.info().spec.width)
        return parse_path(path) if isinstance(path, str) else path

    def _options(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "metadata": self._metadata}

    def _call(self, call: Callable[[], _T]) -> _T:
        """What a call answers, tried again while it is refused for the moment."""
        for n_failures in itertools.count(1):
            try:
                return call()
            except grpc.RpcError as error:
                pause = self._retry.pause(n_failures, _hint(error)) if error.code() in _TRANSIENT else None
                if pause is None:
                    raise of_status(self._address, error) from error
                self._sleep(pause)
        raise AssertionError("not reached")

    def _received(self, responses: Iterable[Any]) -> Retrieved:
        """A retrieval put together. Fails on pieces that are not what the head says."""
        responses = iter(responses)
        first = next(responses, None)
        if first is None or first.WhichOneof("part") != "head":
            raise self._wrong("a head", "none")
        head = first.head
        data = [bytearray(block.bytes) for block in head.blocks]
        filled = [0] * len(data)
        for response in responses:
            piece = response.piece
            if response.WhichOneof("part") != "piece" or piece.block >= len(data):
                raise self._wrong(f"pieces of {len(data)} blocks", f"one of block {piece.block}")
            begin, end = filled[piece.block], filled[piece.block] + len(piece.payload)
            if piece.offset != begin or end > len(data[piece.block]):
                place = f"bytes {piece.offset} to {piece.offset + len(piece.payload)} of block {piece.block}"
                raise self._wrong(f"bytes from {begin} on, of {len(data[piece.block])}", place)
            data[piece.block][begin:end] = piece.payload
            filled[piece.block] = end
        dtype = dtype_of(head.dtype)
        blocks = []
        for block, bytes_, n in zip(head.blocks, data, filled):
            size = n_bytes(tuple(block.shape), dtype)
            if not n == len(bytes_) == size:
                raise self._wrong(f"{size} bytes of block {block.id.level}/{block.id.index}", f"{n}")
            blocks.append(Block(block.id.level, block.id.index, tuple(block.shape), dtype, bytes_))
        return Retrieved(
            bank=head.bank,
            step=head.step,
            spec=spec_of(head.spec),
            path=tuple(head.path.indices) if head.HasField("path") else None,
            dtype=dtype,
            blocks=blocks,
            blocked=list(head.blocked),
            hashes=dict(head.hashes),
        )

    def _wrong(self, expected: str, found: str) -> Error:
        return ProtocolError(f"{self._address}: expected {expected}, found {found}")


def n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a block of this shape."""
    numbers = int(np.prod(shape, dtype=np.int64))
    return {"f32": 4 * numbers, "bf16": 2 * numbers, "int8": numbers + 4 * (numbers // max(shape[-1], 1))}[dtype]


def _hint(error: grpc.RpcError) -> int | None:
    """Milliseconds that the server asks to wait."""
    for key, value in error.trailing_metadata() or ():
        if key == _HINT:
            try:
                return int(value)
            except ValueError:
                # As gRPC has it: what is no number means never.
                return -1
    return None
