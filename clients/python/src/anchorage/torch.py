"""Fetched memory in a PyTorch model: y += (silu(x M1ᵀ) ⊙ (x M2ᵀ)) M3 beside each layer's FFN.

Shapes: B rows of a batch, T positions, D d_model, R memory width of all levels together, U different memories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .types import Block, Retrieved

__all__ = ["Attached", "attach", "ffn_modules"]

#: The blocks of one path: what a client has retrieved, blocks, or None for no memory.
Memory = Retrieved | Sequence[Block] | None


def ffn_modules(model: nn.Module, pattern: str = "mlp") -> list[nn.Module]:
    """The modules whose last name matches the regular expression as a whole, in the order of the model."""
    matches = re.compile(pattern).fullmatch
    return [module for name, module in model.named_modules() if name and matches(name.rsplit(".", 1)[-1])]


class Attached:
    """Memory that is attached to a model until `remove`, or until its `with` ends."""

    def __init__(self, modules: Sequence[nn.Module], memories: Sequence[Memory], scale: float) -> None:
        self._modules = list(modules)
        self._scale = scale
        self._weights: list[tuple[Tensor, ...]] | None = None
        self._rows: list[int] = []
        self._n_layers = 0
        self._cache: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self.set(memories)
        self._handles = [
            module.register_forward_hook(self._hook(layer), with_kwargs=True)
            for layer, module in enumerate(self._modules)
        ]

    def set(self, memories: Sequence[Memory]) -> None:
        """Takes these memories instead, one for each row of the batches to come; one alone is for all rows."""
        if not memories:
            raise ValueError("memories: expected one for each row of a batch, or one for all, found none")
        unique: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        places: dict[tuple[object, ...], int] = {}
        rows: list[int] = []
        for row, memory in enumerate(memories):
            blocks = memory.blocks if isinstance(memory, Retrieved) else list(memory or [])
            if not blocks:
                rows.append(-1)
                continue
            key = _key(memory, blocks)
            if key not in places:
                places[key] = len(unique)
                unique.append(self._joined(row, blocks))
            rows.append(places[key])
        shapes = {array.shape for array in unique}
        if len(shapes) > 1:
            raise ValueError(f"memories: expected one shape [L, 3, R, D], found {sorted(shapes)}")
        # [U, L, 3, R, D], kept on the CPU; a layer's part is moved to where its module computes.
        self._stacked = torch.from_numpy(np.stack(unique)) if unique else None
        self._rows, self._cache = rows, {}

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._cache = {}

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _joined(self, row: int, blocks: Sequence[Block]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The blocks of a path beside each other: [L, 3, R, D]."""
        n_layers, d_models = len(self._modules), {block.shape[-1] for block in blocks}
        for block in blocks:
            if block.shape[0] != n_layers:
                raise ValueError(
                    f"memory of row {row}: expected {n_layers} layers, as many as modules of the model, "
                    f"found {block.shape[0]}"
                )
        if len(d_models) != 1:
            raise ValueError(f"memory of row {row}: expected blocks of one d_model, found {sorted(d_models)}")
        return np.concatenate([block.numpy() for block in blocks], axis=2)

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            added = self._added(layer, x)
            if added is None:
                return None
            y = y + added.to(y.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _weights_of(self, layer: int, x: Tensor) -> Tensor | None:
        """[U, 3, R, D] of a layer, where `x` is."""
        if self._stacked is None:
            return None
        key = (layer, x.device, x.dtype)
        if key not in self._cache:
            weights = self._stacked[:, layer]
            if weights.shape[-1] != x.shape[-1]:
                raise ValueError(f"memory of d_model {weights.shape[-1]}, expected {x.shape[-1]} as of the model")
            self._cache[key] = weights.to(x.device, x.dtype)
        return self._cache[key]

    def _added(self, layer: int, x: Tensor) -> Tensor | None:
        """What the memory adds to each row of `x`, [B, …, D]."""
        weights = self._weights_of(layer, x)
        if weights is None:
            return None
        if len(self._rows) == 1:
            return self._scale * _ffn(x, weights[0])
        rows = self._rows_of(x.shape[0])
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        picked = [row for row, place in enumerate(rows) if place >= 0]
        if len(picked) == len(rows):
            return (self._scale * _ffn(flat, weights[rows])).reshape(x.shape)
        # Rows without memory get nothing, rather than a product with zeros.
        added = torch.zeros_like(flat)
        added[picked] = self._scale * _ffn(flat[picked], weights[[rows[row] for row in picked]])
        return added.reshape(x.shape)

    def _rows_of(self, n_rows: int) -> list[int]:
        """The memory of each row; of a batch that was repeated row by row, as beams are, each for all repeats."""
        n = len(self._rows)
        if n_rows % n != 0:
            raise ValueError(f"batch of {n_rows} rows, expected {n}, one for each memory, or a multiple")
        return [place for place in self._rows for _ in range(n_rows // n)]


def attach(
    model: nn.Module, memories: Sequence[Memory] | Retrieved, *, pattern: str = "mlp", scale: float = 1.0
) -> Attached:
    """Adds memory to the FFNs of a model: one memory for each row of its batches, or one for all rows.

    The FFNs are the modules whose last name `pattern` matches, one a layer, in order; their input is [B, T, D], as a
    decoder's is. Fails with both numbers when memory and model have different numbers of layers, and when a batch is
    of another width or of other rows.
    """
    modules = ffn_modules(model, pattern)
    if not modules:
        raise ValueError(f"pattern {pattern!r}: expected it to name the FFN of each layer, found no such module")
    return Attached(modules, [memories] if isinstance(memories, Retrieved) else list(memories), scale)


def _key(memory: Memory, blocks: Sequence[Block]) -> tuple[object, ...]:
    """The same for memories that hold the same numbers, as far as that is known without a look at them."""
    if isinstance(memory, Retrieved):
        ids = tuple((block.level, block.index) for block in blocks)
        return (memory.bank, memory.step, memory.dtype, tuple(sorted(memory.hashes.items())), ids)
    return tuple(id(block.data) for block in blocks)


def _ffn(x: Tensor, weights: Tensor) -> Tensor:
    """(silu(x M1ᵀ) ⊙ (x M2ᵀ)) M3, of weights [3, R, D] for all rows, or [B, 3, R, D] for rows x [B, T, D]."""
    m1, m2, m3 = weights.unbind(-3)
    hidden: Tensor = functional.silu(x @ m1.mT) * (x @ m2.mT)
    return hidden @ m3
