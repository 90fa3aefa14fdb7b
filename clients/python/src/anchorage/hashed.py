"""The embedder that runs have by default: words and their n-grams, hashed into a few hundred dimensions.

Shapes: N texts, D dimension of the embeddings, F features of a text.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ._letters import LOWER, MARKS, WORD
from ._tensors import TensorFile
from .errors import InvalidArgument

__all__ = ["Hashed"]

_FORMAT = "anchorage.hashed.v1"

#: Entries of the table of inverse document frequencies.
_N_BUCKETS = 1 << 18

#: Dimensions that a word and an n-gram touch.
_WORD_POSITIONS, _GRAM_POSITIONS = 16, 4

#: Put around each word; no word contains them.
_START, _END = "\x02", "\x03"

#: Characters of an n-gram, these two counted.
_GRAM_CHARS = np.array([3, 4, 5])

# Of the hashes; their arithmetic is modulo 2^64, as that of arrays of uint64 is.
_WORD_BASIS = 0x9AE16A3B2F90404F
_GRAM_BASIS = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME = 0x100000001B3
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Hashed:
    """TF-IDF over words and character n-grams, as a run keeps it in embedder.safetensors.

    Gives the embeddings that the program gives, to 1e-6.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Reads the table and the options. Fails on another file, and on values out of range."""
        file = TensorFile(pathlib.Path(path))
        header = file.metadata.get(_FORMAT)
        if header is None:
            raise InvalidArgument(f"{path}: expected an embedder ({_FORMAT}), found {sorted(file.metadata)}")
        try:
            options = json.loads(header)["options"]
            self._dim, seed = int(options["dim"]), int(options["seed"])
            self._char_weight = np.float32(options["char_weight"])
        except (KeyError, TypeError, ValueError):
            expected = "options with dim, seed and char_weight"
            raise InvalidArgument(f"{path}: expected {expected} as {_FORMAT}, found {header}") from None
        if self._dim not in range(16, 4097, 16):
            raise InvalidArgument(f"{path}: dim: expected a multiple of 16 from 16 to 4096, found {self._dim}")
        if not 0 <= self._char_weight < math.inf:
            raise InvalidArgument(f"{path}: char_weight: expected a finite number from 0, found {self._char_weight}")
        self._idf = file.array("idf", "F32", "<f4")
        if self._idf.shape != (_N_BUCKETS,):
            raise InvalidArgument(f"{path}: idf: expected {[_N_BUCKETS]}, found the shape {list(self._idf.shape)}")
        bad = np.flatnonzero(~(np.isfinite(self._idf) & (self._idf > 0)))
        if bad.size:
            row = int(bad[0])
            raise InvalidArgument(f"{path}: idf: expected finite positive numbers, found {self._idf[row]} at {row}")
        # Decides the direction of every feature.
        self._projection = _mix(np.array([seed + _GOLDEN & _MASK], np.uint64))

    @property
    def dim(self) -> int:
        """Of the embeddings."""
        return self._dim

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The embeddings, [N, D], of unit norm; those of texts without any word are the first axis."""
        rows = np.zeros((len(texts), self._dim), np.float32)
        for row, text in zip(rows, texts):
            found = self._sum(text).astype(np.float64)
            norm = np.linalg.norm(found)
            if 0 < norm < math.inf:
                row[:] = found / norm
            else:
                row[0] = 1
        return rows

    def _sum(self, text: str) -> NDArray[np.float32]:
        """The features of a text, added up: [D]."""
        total = np.zeros(self._dim, np.float32)
        counts = Counter(_START + word + _END for word in _words(text))
        if not counts:
            return total
        words = list(counts)
        hashes = _mix(np.array([_hash(word) for word in words], np.uint64))
        order = np.argsort(hashes)
        hashes, words = hashes[order], [words[index] for index in order]
        tf = np.float32(1) + np.log(np.array([counts[word] for word in words], np.float32))
        positions, weights = self._directions(hashes, tf, _WORD_POSITIONS)
        if self._char_weight > 0:
            grams, owners = _grams(words)
            roots: NDArray[np.float32] = np.sqrt(np.bincount(owners).astype(np.float32))
            scale = tf * self._char_weight / roots
            of_grams = self._directions(grams, scale[owners], _GRAM_POSITIONS)
            # The rounding of so many float32 shows where thousands are the same, in a word of one letter repeated.
            # They are added in the program's order, therefore: by word, its n-grams after it.
            by_word = np.repeat(np.arange(len(words)), _WORD_POSITIONS), np.repeat(owners, _GRAM_POSITIONS)
            order = np.argsort(np.concatenate(by_word), kind="stable")
            positions = np.concatenate([positions, of_grams[0]])[order]
            weights = np.concatenate([weights, of_grams[1]])[order]
        np.add.at(total, positions, weights)
        return total

    def _directions(
        self, hashes: NDArray[np.uint64], weights: NDArray[np.float32], n_positions: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What features add and where, one position in each of as many equal slices: two of [F * n_positions]."""
        weights = weights * self._idf[hashes >> np.uint64(46)] / np.float32(math.sqrt(n_positions))
        steps = np.array([step * _GOLDEN & _MASK for step in range(1, n_positions // 4 + 1)], np.uint64)
        bits = _mix((hashes ^ self._projection)[:, None] + steps)
        # 16 for a position: 15 choose it, one the sign.
        bits = (bits[:, :, None] >> np.array([0, 16, 32, 48], np.uint64)).reshape(-1, n_positions)
        chosen = (bits & np.uint64(0xFFFF)).astype(np.int64)
        width = self._dim // n_positions
        positions = ((chosen & 0x7FFF) * width >> 15) + width * np.arange(n_positions)
        return positions.ravel(), np.where(chosen & 0x8000, -weights[:, None], weights[:, None]).ravel()


def _words(text: str) -> list[str]:
    """The lower-cased runs of letters and digits or, in a text that has none, the runs of anything but white space."""
    found = WORD.findall(text) or MARKS.findall(text)
    # Cut before they are lower-cased: that may make of a letter one with a mark, which belongs to no word.
    return [word.lower() if word.isascii() else word.translate(LOWER).lower() for word in found]


def _hash(word: str) -> int:
    """FNV-1a, a character at a time."""
    found = _WORD_BASIS
    for char in word:
        found = (found ^ ord(char)) * _PRIME & _MASK
    return found


def _grams(words: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of the n-grams of all words, repeats included, and the word of each: [F], [F]."""
    lengths = np.array([len(word) for word in words])
    owners = np.repeat(np.arange(len(words)), lengths)
    # From each character on to the end of its word.
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(owners))
    longest = int(_GRAM_CHARS[-1])
    padded = "".join(words) + _END * longest
    chars = np.frombuffer(padded.encode("utf-32-le"), "<u4").astype(np.uint64)
    hashes = np.full((len(owners), longest + 1), _GRAM_BASIS)
    for n in range(longest):
        hashes[:, n + 1] = (hashes[:, n] ^ chars[n : n + len(owners)]) * np.uint64(_PRIME)
    # What reaches into the next word is none.
    starts, sizes = np.nonzero(_GRAM_CHARS <= left[:, None])
    return _mix(hashes[starts, _GRAM_CHARS[sizes]]), owners[starts]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
