"""The client against a real server: one that runs at $ANCHORAGE_RETRIEVAL, or is started from the program
$ANCHORAGE_RETRIEVAL_SERVER, which prints its address in its first line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

import anchorage
from anchorage import Client

TEXTS = ["Jupiter is the largest planet.", "The heart pumps blood.", "A fugue has several voices."]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    token = os.environ.get("ANCHORAGE_RETRIEVAL_TOKEN")
    address, program = os.environ.get("ANCHORAGE_RETRIEVAL"), os.environ.get("ANCHORAGE_RETRIEVAL_SERVER")
    if address:
        with Client(address, token=token) as client:
            yield client
    elif program:
        with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stdin is not None
            with Client(server.stdout.readline().strip(), token=token) as client:
                yield client
            # It ends with its input.
            server.stdin.close()
    else:
        pytest.skip("neither ANCHORAGE_RETRIEVAL nor ANCHORAGE_RETRIEVAL_SERVER is set")


def test_what_is_routed_is_what_is_retrieved(client: Client) -> None:
    info = client.info()
    assert info.banks and info.spec.n_layers > 0
    for text, routes in zip(TEXTS, client.route(TEXTS), strict=True):
        assert len(routes[0].path) == len(info.spec.width)
        assert [route.distance for route in routes] == sorted(route.distance for route in routes)
        assert -1.0 <= routes[0].score <= 1.0
        by_text, by_path = client.retrieve(text), client.retrieve(path=routes[0].path)
        assert by_text.path == routes[0].path
        assert (by_text.step, by_text.hashes["tree"]) == (info.banks[0].step, info.tree)
        assert [block.data for block in by_text.blocks] == [block.data for block in by_path.blocks]
        for level, array in by_text.levels.items():
            spec = info.spec
            assert array.shape == (spec.n_layers, 3, spec.width[level], spec.d_model)
            assert np.isfinite(array).all()


def test_dtypes_are_near_each_other(client: Client) -> None:
    exact = client.retrieve(TEXTS[0], dtype="f32")
    for dtype, bound in (("bf16", 2**-8), ("int8", 0.51 / 127)):
        found = client.retrieve(TEXTS[0], dtype=dtype)
        for block, other in zip(exact.blocks, found.blocks, strict=True):
            largest = np.abs(block.numpy()).max(-1, keepdims=True)
            assert (np.abs(block.numpy() - other.numpy()) <= largest * bound + 1e-12).all(), dtype


def test_blocks_by_id_and_the_generic_path(client: Client) -> None:
    path = client.retrieve(TEXTS[0])
    ids = [(block.level, block.index) for block in path.blocks]
    found = client.retrieve(blocks=[*ids, ids[0]])
    assert [block.data for block in found.blocks] == [*(b.data for b in path.blocks), path.blocks[0].data]
    generic = client.retrieve(path="generic")
    assert all(block.index == anchorage.GENERIC for block in generic.blocks)


def test_what_is_blocked_is_passed_over(client: Client) -> None:
    path = client.retrieve(TEXTS[0]).path
    assert path is not None
    top = str(path[0])
    found = client.retrieve(TEXTS[0], blocked=[top])
    assert found.blocked[0] == top and (found.path is None or found.path[0] != path[0])
    with pytest.raises(anchorage.Blocked, match=f"is blocked by {top}"):
        client.retrieve(path=path, blocked=[top])


def test_clusters_are_explained(client: Client) -> None:
    root = client.explain()
    assert sum(child.n_windows for child in root.children) == root.cluster.n_windows
    before = client.explain(root.children[0].path).cluster
    assert before.n_windows == root.children[0].n_windows
    path = client.retrieve(TEXTS[0]).path
    assert path is not None and client.explain(path).cluster.fetches > 0


def test_errors_name_both(client: Client) -> None:
    with pytest.raises(anchorage.NotFound, match="no bank \"other\": expected one of"):
        client.retrieve("a", bank="other")
    with pytest.raises(anchorage.InvalidArgument, match="embedding 0: expected .* numbers, found 1"):
        client.route(embeddings=[[1.0]])
    with pytest.raises(anchorage.NotFound, match="no cluster"):
        client.explain([10**6])
    with pytest.raises(anchorage.InvalidArgument, match="text 0 is empty"):
        client.route([" "])
    with pytest.raises(anchorage.InvalidArgument, match="levels: expected some of the levels"):
        client.retrieve(TEXTS[0], levels=[200])


def test_many_at_once(client: Client) -> None:
    texts = TEXTS * 20
    found = list(client.retrieve_each(texts, at_once=8))
    assert [memory.path for memory in found] == [routes[0].path for routes in client.route_each(texts, batch=7)]
