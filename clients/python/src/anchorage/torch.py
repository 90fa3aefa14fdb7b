"""Fetched memory in a PyTorch model. Of kind ffn, y += (f(x M1ᵀ) ⊙ (x M2ᵀ)) M3 beside each layer's FFN, f being its
activation; of a lora kind, W + 2·BA; of kind kv, more pairs of keys and values with a softmax of their own.

Shapes: B rows of a batch, T positions, R memory width of all levels together, U different memories.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import _parts
from ._parts import Formula, Part
from .bank import BankFile, Embed
from .types import Block, Retrieved

__all__ = ["Attached", "Source", "attach", "ffn_modules"]

#: The blocks of one path: what a client has retrieved, blocks, or None for no memory.
Memory = Retrieved | Sequence[Block] | None
#: Of a part, its arrays, [R, width] each.
_Arrays = list[NDArray[np.float32]]


class Source(Protocol):
    """Where the memory of texts and paths comes from: a `Client` or a `BankFile`."""

    def retrieve(self, text: str | None = None, *, path: str | Sequence[int] | None = None) -> Retrieved:
        """The blocks of a text or of a path."""
        ...


def ffn_modules(model: nn.Module, pattern: str = "mlp") -> list[nn.Module]:
    """The modules whose last name matches the regular expression as a whole, in the order of the model."""
    return [module for _, module in _parts.ffn_modules(model, pattern)]


class Attached:
    """Memory that is attached to a model until `remove`, or until its `with` ends."""

    def __init__(
        self,
        layers: Sequence[Sequence[Part]],
        kind: str,
        memories: Sequence[Memory],
        scale: float,
        source: Source | None,
    ) -> None:
        """`layers` are the parts of each layer of the model that has memory of this kind, or may have."""
        self._layers, self._kind, self._scale, self._source = layers, kind, scale, source
        self._rows: list[int] = []
        self._places: list[Part] = []
        self._handles: list[Any] = []
        self._stacked: list[list[Tensor]] = []
        self._cache: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        self.set(memories)

    def set(self, memories: Sequence[Memory] | Retrieved) -> None:
        """Takes these memories instead, one for each row of the batches to come; one alone is for all rows."""
        memories = [memories] if isinstance(memories, Retrieved) else list(memories)
        if not memories:
            raise ValueError("memories: expected one for each row of a batch, or one for all, found none")
        places = [part for layer in self._memory_layers(memories) for part in self._layers[layer]]
        unique: list[list[_Arrays]] = []
        known: dict[tuple[object, ...], int] = {}
        rows: list[int] = []
        for row, memory in enumerate(memories):
            blocks = memory.blocks if isinstance(memory, Retrieved) else list(memory or [])
            if not blocks:
                rows.append(-1)
                continue
            key = _key(memory, blocks)
            if key not in known:
                known[key] = len(unique)
                width = memory.spec.width if isinstance(memory, Retrieved) else ()
                unique.append(self._joined(row, blocks, places, width))
            rows.append(known[key])
        shapes = {tuple(array.shape for arrays in memory for array in arrays) for memory in unique}
        if len(shapes) > 1:
            found = sorted(shape[0][0] for shape in shapes)
            raise ValueError(f"memories: expected one width of all levels together, found {found}")
        # Of each part and array [U, R, width], kept on the CPU; they are moved to where their module computes.
        self._stacked = [
            [torch.from_numpy(np.stack(arrays)) for arrays in zip(*of_part)] for of_part in zip(*unique)
        ]
        self._rows, self._cache = rows, {}
        self._install(places)

    def fetch(self, texts: Sequence[str] | None = None, *, paths: Sequence[str | Sequence[int]] | None = None) -> None:
        """Takes the memories of texts or of paths from where the first came from, one for each row."""
        if self._source is None:
            raise ValueError("expected a server or a bank that memories come from, found none: attach one")
        self.set(_fetched(self._source, texts, paths))

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        _forget_compiled()
        self._handles, self._places, self._cache = [], [], {}

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _memory_layers(self, memories: Sequence[Memory]) -> list[int]:
        """The layers that have memory, of those of the model."""
        n_layers = len(self._layers)
        found: list[int] | None = None
        for row, memory in enumerate(memories):
            if not isinstance(memory, Retrieved):
                continue
            spec = memory.spec
            if spec.n_layers != n_layers:
                raise ValueError(
                    f"memory of row {row}: expected {n_layers} layers, as many as the model has, found {spec.n_layers}"
                )
            if spec.kind != self._kind:
                raise ValueError(f"memory of row {row}: expected kind {self._kind}, found {spec.kind}")
            layers = list(spec.layers) or list(range(n_layers))
            if found is not None and layers != found:
                raise ValueError(f"memory of row {row}: expected the layers {found}, found {layers}")
            found = layers
        return list(range(n_layers)) if found is None else found

    def _install(self, places: list[Part]) -> None:
        if places == self._places:
            return
        self.remove()
        self._places = places
        for index, part in enumerate(places):
            self._handles += part.install(self._add(index))
        _forget_compiled()

    def _joined(
        self, row: int, blocks: Sequence[Block], places: Sequence[Part], width: Sequence[int]
    ) -> list[_Arrays]:
        """Of each part its arrays, the blocks of a path beside each other. `width` is that of each level, if known."""
        if self._kind == "ffn":
            widths = self._ffn_widths(row, blocks, len(places))
        else:
            widths = [part.widths for part in places]
        unit = sum(width for arrays in widths for width in arrays)
        by_block: list[list[_Arrays]] = []
        for block in blocks:
            numbers = block.numpy().ravel()
            r = width[block.level] if width else len(numbers) // unit
            if not r or r * unit != len(numbers):
                raise ValueError(
                    f"memory of row {row}: block {block.level}/{block.index} of {len(numbers)} numbers, expected "
                    f"{r or 'some'} times {unit}, as of memory of kind {self._kind} in this model"
                )
            by_block.append(_cut(numbers, widths, r))
        return [[np.concatenate(arrays) for arrays in zip(*part)] for part in zip(*by_block)]

    def _ffn_widths(self, row: int, blocks: Sequence[Block], n_layers: int) -> list[tuple[int, ...]]:
        """[D, D, D] of each layer. What D is, the modules tell when they run."""
        d_models = {block.shape[-1] for block in blocks}
        for block in blocks:
            if block.shape[0] != n_layers:
                raise ValueError(
                    f"memory of row {row}: expected {n_layers} layers, as many as modules of the model, "
                    f"found {block.shape[0]}"
                )
        if len(d_models) != 1:
            raise ValueError(f"memory of row {row}: expected blocks of one d_model, found {sorted(d_models)}")
        return [(d_models.pop(),) * 3] * n_layers

    def _weights_of(self, part: int, x: Tensor) -> list[Tensor]:
        """The arrays of a part, [U, R, width] each, where `x` is."""
        key = (part, x.device, x.dtype)
        if key not in self._cache:
            self._cache[key] = [array.to(x.device, x.dtype) for array in self._stacked[part]]
        return self._cache[key]

    def _add(self, part: int) -> Callable[[Formula, Sequence[Tensor]], Tensor | None]:
        def add(formula: Formula, inputs: Sequence[Tensor]) -> Tensor | None:
            """What memory adds, of inputs [B, …, width]."""
            if not self._stacked:
                return None
            weights = self._weights_of(part, inputs[0])
            if len(self._rows) == 1:
                return self._scale * formula(inputs, [array[0] for array in weights])
            n_rows, *positions = inputs[0].shape[:-1]
            rows = self._rows_of(n_rows)
            flat = [x.reshape(n_rows, -1, x.shape[-1]) for x in inputs]
            picked = [row for row, place in enumerate(rows) if place >= 0]
            places = [rows[row] for row in picked]
            of_row = [array[places] for array in weights]
            if len(picked) == len(rows):
                added = self._scale * formula(flat, of_row)
            else:
                # Rows without memory get nothing, rather than a product with zeros.
                found = self._scale * formula([x[picked] for x in flat], of_row)
                added = torch.zeros((n_rows, *found.shape[1:]), dtype=found.dtype, device=found.device)
                added[picked] = found
            return added.reshape(n_rows, *positions, added.shape[-1])

        return add

    def _rows_of(self, n_rows: int) -> list[int]:
        """The memory of each row; of a batch that was repeated row by row, as beams are, each for all repeats."""
        n = len(self._rows)
        if n_rows % n != 0:
            raise ValueError(f"batch of {n_rows} rows, expected {n}, one for each memory, or a multiple")
        return [place for place in self._rows for _ in range(n_rows // n)]


def attach(
    model: nn.Module,
    memories: Sequence[Memory] | Retrieved | Source | str | pathlib.Path,
    *,
    texts: Sequence[str] | None = None,
    paths: Sequence[str | Sequence[int]] | None = None,
    embed: Embed | None = None,
    kind: str | None = None,
    pattern: str = "mlp",
    activation: Callable[[Tensor], Tensor] | None = None,
    scale: float = 1.0,
) -> Attached:
    """Adds memory to a model: one memory for each row of its batches, or one for all rows.

    `memories` are those, or where the memory of `texts` or `paths`, one a row, comes from: a client, a `BankFile`, or
    the path of one, which is opened with `embed`. `kind` is that of blocks which come without a spec; FFN memory
    without it. FFNs are the modules whose last name `pattern` matches, one a layer, in order, with inputs [B, T, D] as
    a decoder's; `activation` is used instead of theirs.

    Fails with both numbers when memory and model have different numbers of layers or other widths, and when a batch
    is of other rows.
    """
    source: Source | None = None
    if isinstance(memories, (str, pathlib.Path)):
        source = BankFile(memories, embed=embed)
    elif not isinstance(memories, (Retrieved, Sequence)):
        source = memories
    if source is not None:
        taken: Sequence[Memory] = _fetched(source, texts, paths)
    elif texts is None and paths is None:
        taken = [memories] if isinstance(memories, Retrieved) else list(memories)  # type: ignore[arg-type]
    else:
        raise ValueError("texts and paths: expected a client or a bank to fetch their memory from")
    told = next((memory.spec.kind for memory in taken if isinstance(memory, Retrieved)), None)
    kind = kind or told or "ffn"
    return Attached(_parts.parts_of(model, kind, pattern, activation), kind, taken, scale, source)


def _fetched(
    source: Source, texts: Sequence[str] | None, paths: Sequence[str | Sequence[int]] | None
) -> list[Retrieved]:
    if (texts is None) == (paths is None):
        raise ValueError("expected texts or paths, one for each row of a batch, or one for all")
    if texts is not None:
        return [source.retrieve(text) for text in texts]
    return [source.retrieve(path=path) for path in paths or ()]


def _key(memory: Memory, blocks: Sequence[Block]) -> tuple[object, ...]:
    """The same for memories that hold the same numbers, as far as that is known without a look at them."""
    if isinstance(memory, Retrieved):
        ids = tuple((block.level, block.index) for block in blocks)
        return (memory.bank, memory.step, memory.dtype, tuple(sorted(memory.hashes.items())), ids)
    return tuple(id(block.data) for block in blocks)


def _forget_compiled() -> None:
    """Has compiled models compiled again: torch does not look whether hooks came or went."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _cut(numbers: NDArray[np.float32], widths: Sequence[Sequence[int]], r: int) -> list[_Arrays]:
    """A block of R rows into the arrays of its parts."""
    parts: list[_Arrays] = []
    start = 0
    for of_part in widths:
        arrays: _Arrays = []
        for width in of_part:
            arrays.append(numbers[start : start + r * width].reshape(r, width))
            start += r * width
        parts.append(arrays)
    return parts
