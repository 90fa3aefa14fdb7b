"""The client against a server that answers as a test tells it."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import anchorage
from anchorage import Client, Retry, Route, Tls, format_path, parse_path
from anchorage._proto import retrieval_pb2 as pb

from fake import GENERIC_PATH, Fake, serving, values


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def address(fake: Fake) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, token="read-0123456789abcdef", sleep=lambda seconds: None) as client:
        yield client


def test_routes_of_texts_and_embeddings(client: Client, fake: Fake) -> None:
    assert client.route(["a", "abc"]) == [[Route((1, 4, 9), 1.0, 0.5)], [Route((1, 4, 9), 3.0, 0.5)]]
    assert fake.metadata["authorization"] == "Bearer read-0123456789abcdef"
    assert client.route(embeddings=np.eye(2, dtype=np.float64), n=1)[1][0].distance == 1.0
    assert fake.requests[-1].n == 1
    found = list(client.route_each(("x" * i for i in range(1, 6)), batch=2))
    assert [routes[0].distance for routes in found] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [len(request.texts) for request in fake.requests[-3:]] == [2, 2, 1]
    with pytest.raises(anchorage.InvalidArgument, match="expected a list of texts, found one text"):
        client.route("a text")  # type: ignore[arg-type]
    with pytest.raises(anchorage.InvalidArgument, match=r"expected \[N, D\], found the shape \[2\]"):
        client.route(embeddings=[1.0, 2.0])


def test_blocks_of_a_path_are_arrays_by_level(client: Client, fake: Fake) -> None:
    found = client.retrieve(path="1/4/9")
    assert (found.bank, found.step, found.path, found.dtype) == ("default", 290, (1, 4, 9), "f32")
    # Level 1 has no memory.
    assert [(block.level, block.index) for block in found.blocks] == [(0, 1), (2, 9)]
    for level, index in ((0, 1), (2, 9)):
        np.testing.assert_array_equal(found.levels[level], values(level, index))
    assert client.retrieve(path=[1, 4, 9]).blocks[1].data == found.blocks[1].data
    assert client.retrieve(path="generic").path == GENERIC_PATH
    only = client.retrieve("text", bank="b", levels=[2], blocked=["0"], dtype="bf16")
    assert (only.bank, only.dtype) == ("b", "bf16")
    request = fake.requests[-1]
    assert (list(request.levels), list(request.blocked), request.text) == ([2], ["0"], "text")
    blocks = client.retrieve(blocks=[(2, 3), (0, 0), (2, 3)])
    assert blocks.path is None and [block.index for block in blocks.blocks] == [3, 0, 3]


def test_each_dtype_is_read_as_it_was_meant(client: Client) -> None:
    exact = values(2, 5)
    (block,) = client.retrieve(blocks=[(2, 5)], dtype="bf16").blocks
    assert block.numpy().dtype == np.float32
    np.testing.assert_allclose(block.numpy(), exact, rtol=2**-8)
    assert not (block.numpy().view(np.uint32) & 0xFFFF).any()
    (block,) = client.retrieve(blocks=[(2, 5)], dtype="int8").blocks
    scales, integers = block.int8()
    assert scales.shape == exact.shape[:-1] and integers.dtype == np.int8
    np.testing.assert_allclose(block.numpy(), exact, atol=float(scales.max()) * 0.51)
    with pytest.raises(anchorage.InvalidArgument, match="'fp4', expected one of"):
        client.retrieve("a", dtype="fp4")
    with pytest.raises(anchorage.InvalidArgument, match="of dtype f32, expected int8"):
        client.retrieve(blocks=[(2, 5)]).blocks[0].int8()
    with pytest.raises(anchorage.InvalidArgument, match="expected a text, a path or blocks"):
        client.retrieve("a", path="1/4/9")


def test_each_text_of_an_iterable_in_order(client: Client) -> None:
    found = client.retrieve_each(("x" * i for i in range(1, 12)), at_once=3)
    assert [memory.path for memory in found] == [(1, 4, i) for i in range(1, 12)]
    # One that is left early ends.
    assert next(client.retrieve_each(["a", "b", "c", "d"], at_once=2)).path == (1, 4, 1)


def test_clusters_and_what_is_served(client: Client, fake: Fake) -> None:
    found = client.explain("1/4")
    assert (found.cluster.path, found.cluster.updates, found.children[0].updates) == ((1, 4), None, 3)
    assert (found.cluster.terms[0].term, found.examples[0].title) == ("star", "document 1")
    assert client.explain((1,)).cluster.path == (1,) and client.explain().cluster.path == ()
    info = client.info()
    assert (info.spec.width, info.banks[0].dtype, info.embedding_dim) == ((4, 0, 2), "bf16", 2)


def test_a_call_is_tried_again_no_sooner_than_the_server_says(fake: Fake, address: str) -> None:
    slept: list[float] = []
    with Client(address, retry=Retry(tries=4, first_seconds=0.1), sleep=slept.append) as client:
        busy, gone = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
        fake.refusals = [(busy, "64 of 64 requests are in use", 700), (gone, "no", None), (busy, "again", 5)]
        assert client.retrieve("a").step == 290
        assert slept[0] == 0.7
        # Twice and four times the first, less up to half.
        assert 0.1 <= slept[1] <= 0.2 and 0.2 <= slept[2] <= 0.4
        fake.refusals = [(busy, "64 of 64 requests are in use", 1)] * 4
        with pytest.raises(anchorage.Busy, match="64 of 64 requests are in use"):
            client.info()
        assert not fake.refusals and len(slept) == 6
        # Told never to come back.
        fake.refusals = [(busy, "no more", -1), (busy, "not asked", None)]
        with pytest.raises(anchorage.Busy, match="no more"):
            client.info()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, anchorage.InvalidArgument),
        (grpc.StatusCode.NOT_FOUND, anchorage.NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, anchorage.Blocked),
        (grpc.StatusCode.UNAUTHENTICATED, anchorage.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, anchorage.PermissionDenied),
        (grpc.StatusCode.DEADLINE_EXCEEDED, anchorage.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, anchorage.ServerError),
    ],
)
def test_errors_have_kinds_and_are_not_tried_again(
    client: Client, fake: Fake, address: str, code: grpc.StatusCode, kind: type[anchorage.Error]
) -> None:
    fake.refusals = [(code, "expected 1, found 2", None)]
    with pytest.raises(kind, match=f"{address}: expected 1, found 2 .{code.name}."):
        client.info()
    assert len(fake.requests) == 1


def test_nobody_there() -> None:
    with Client("127.0.0.1:1", retry=Retry(tries=2), sleep=lambda seconds: None) as client:
        with pytest.raises(anchorage.Unavailable):
            client.info()


def test_pieces_that_are_not_what_the_head_says(client: Client, fake: Fake) -> None:
    other = pb.RetrieveResponse(piece=pb.RetrievePiece(block=7, payload=b"x"))
    for spoil, message in (
        (lambda parts: parts[1:], "expected a head, found none"),
        (lambda parts: [], "expected a head, found none"),
        (lambda parts: parts[:-1], "expected 384 bytes of block 2/9, found 300"),
        (lambda parts: [parts[0], *parts[2:]], "expected bytes from 0 on, of 768, found bytes 100 to 200 of block 0"),
        (lambda parts: [parts[0], other], "expected pieces of 2 blocks, found one of block 7"),
        (lambda parts: [parts[0], parts[0]], "expected pieces of 2 blocks, found one of block 0"),
    ):
        fake.spoil = spoil
        with pytest.raises(anchorage.ProtocolError, match=message):
            client.retrieve(path="1/4/9")


def test_paths_as_text() -> None:
    assert (parse_path("3/49/790"), parse_path("")) == ((3, 49, 790), ())
    assert (format_path((3, 49)), format_path(GENERIC_PATH), format_path(())) == ("3/49", "generic", "")
    with pytest.raises(anchorage.InvalidArgument, match="path '3/x': expected indices"):
        parse_path("3/x")


def test_certificates(fake: Fake, tmp_path: pathlib.Path) -> None:
    """The server asks for the client's too."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl")
    ca, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    make = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", key, "-out", ca, "-days", "1"], check=True, capture_output=True)
    pem = (key.read_bytes(), ca.read_bytes())
    server = grpc.ssl_server_credentials([pem], root_certificates=ca.read_bytes(), require_client_auth=True)
    with serving(fake, server) as address:
        with Client(address, tls=Tls(ca, ca, key)) as client:
            assert client.info().tree == "a"
        for tls in (None, Tls(ca)):
            with Client(address, tls=tls, retry=Retry(tries=1)) as client:
                with pytest.raises(anchorage.Unavailable):
                    client.info()
    with pytest.raises(anchorage.InvalidArgument, match="expected a certificate and its key"):
        Client("127.0.0.1:1", tls=Tls(ca, ca))
