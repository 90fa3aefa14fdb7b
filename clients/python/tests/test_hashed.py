"""The hashed embedder, before what the program gives."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from files import bank, safetensors, tree

from anchorage import BankFile, Hashed, InvalidArgument
from anchorage._letters import LOWER, WORD

FORMAT = "anchorage.hashed.v1"
OPTIONS = {"dim": 64, "seed": 0, "char_weight": 1.0}


@pytest.fixture(scope="module")
def reference() -> Any:
    """By make_hashed.py."""
    return json.loads(pathlib.Path(__file__).with_name("hashed.json").read_text())


def saved(path: pathlib.Path, reference: Any) -> pathlib.Path:
    """The embedder of the reference."""
    idf = np.full(1 << 18, reference["unseen"], "<f4")
    for value, buckets in reference["idf"]:
        idf[buckets] = value
    safetensors(path, {"idf": idf}, reference["metadata"])
    return path


def written(path: pathlib.Path, options: Mapping[str, Any], idf: Any = None) -> pathlib.Path:
    """An embedder that fitted no text."""
    idf = np.full(1 << 18, 1e-3, "<f4") if idf is None else idf
    safetensors(path, {"idf": idf}, {FORMAT: json.dumps({"options": options, "n_texts": 1})})
    return path


def test_rows_are_those_of_the_program(tmp_path: pathlib.Path, reference: Any) -> None:
    hashed = Hashed(saved(tmp_path / "embedder.safetensors", reference))
    found = hashed(reference["texts"])
    assert (found.dtype.str, found.shape, hashed.dim) == ("<f4", (len(reference["texts"]), 64), 64)
    np.testing.assert_allclose(found, reference["rows"], rtol=0, atol=1e-6)
    # Of a text whatever is beside it.
    np.testing.assert_array_equal(hashed(reference["texts"][3:4]), found[3:4])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_letters_are_those_of_rust() -> None:
    """The digests are of letters and lower cases by which the program's embeddings of "a" + letter + "b" come out."""
    letters = [char for char in map(chr, range(0x110000)) if WORD.fullmatch(char)]
    lower = [char.translate(LOWER).lower() for char in letters]
    assert digest("".join(letters)) == "f609f2c72e846c1e9c9590213c6592db3756532017edc49ceda86459d706d170"
    assert digest("".join(lower)) == "1becfc2c4bcb748d35ca5640421de947ff697c512f792a247b76ce37e1a4406a"


def test_texts_without_words_are_the_first_axis(tmp_path: pathlib.Path) -> None:
    hashed = Hashed(written(tmp_path / "embedder.safetensors", OPTIONS))
    assert hashed([]).shape == (0, 64)
    np.testing.assert_array_equal(hashed(["", " \n"]), np.eye(1, 64).repeat(2, axis=0))
    assert hashed(["--"])[0, 0] != 1


def test_a_word_touches_one_position_of_each_slice(tmp_path: pathlib.Path) -> None:
    row = Hashed(written(tmp_path / "embedder.safetensors", dict(OPTIONS, dim=512, char_weight=0)))(["newt"])
    slices = row.reshape(16, 32)
    assert ((slices != 0).sum(1) == 1).all()
    np.testing.assert_allclose(np.abs(slices).max(1), 0.25, atol=1e-6)


def test_a_folder_has_its_embedder(tmp_path: pathlib.Path, reference: Any) -> None:
    spec = {"kind": "ffn", "n_layers": 1, "d_model": 2, "width": [1, 1], "branching": [4, 4]}
    bank(tmp_path / "bank.safetensors", spec, [[1, 3, 1, 2]] * 2)
    tree(tmp_path / "tree.safetensors", [4, 4], 64)
    embed = Hashed(saved(tmp_path / "embedder.safetensors", reference))
    texts = reference["texts"]
    routes = BankFile(tmp_path).route(texts)
    assert routes == BankFile(tmp_path, embed=embed).route(texts)
    assert len({found[0].path for found in routes}) > 1
    # What is given goes before.
    alike = BankFile(tmp_path, embed=lambda texts: np.ones((len(texts), 64))).route(texts)
    assert len({found[0].path for found in alike}) == 1
    tree(tmp_path / "tree.safetensors", [4, 4], 5)
    with pytest.raises(InvalidArgument, match=r"embeddings: expected \[1, 5\], found the shape \[1, 64\]"):
        BankFile(tmp_path).retrieve("a")


def test_what_is_no_embedder_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "embedder.safetensors"
    idf = np.ones(1 << 18, "<f4")
    safetensors(path, {"idf": idf}, {"anchorage.hashed.v2": "{}"})
    with pytest.raises(InvalidArgument, match=rf"{path}: expected an embedder \({FORMAT}\), found \['anchorage.hashed"):
        Hashed(path)
    safetensors(path, {"idf": idf}, {FORMAT: '{"options":{"dim":64}}'})
    with pytest.raises(InvalidArgument, match="expected options with dim, seed and char_weight as"):
        Hashed(path)
    for dim in (0, 100, 4112):
        with pytest.raises(InvalidArgument, match=f"dim: expected a multiple of 16 from 16 to 4096, found {dim}"):
            Hashed(written(path, dict(OPTIONS, dim=dim)))
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match=f"char_weight: expected a finite number from 0, found {weight}"):
            Hashed(written(path, dict(OPTIONS, char_weight=weight)))
    with pytest.raises(InvalidArgument, match=r"idf: expected \[262144\], found the shape \[262143\]"):
        Hashed(written(path, OPTIONS, idf[1:]))
    with pytest.raises(InvalidArgument, match="expected the tensor idf of F32, found U64"):
        Hashed(written(path, OPTIONS, idf.astype("<u8")))
    for bad in (np.nan, np.inf, 0):
        idf[5] = bad
        with pytest.raises(InvalidArgument, match=f"idf: expected finite positive numbers, found {float(bad)} at 5"):
            Hashed(written(path, OPTIONS, idf))
