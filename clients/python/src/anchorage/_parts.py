"""Where memory is added in the layers of a model, and how.

A block is one part after another: layer by layer, and in each the parts of its kind. A part is made of arrays of R rows
each, R being the memory width of a level; levels of a path lie beside each other, as more rows.

Shapes: B rows of a batch, T positions, D d_model, H heads of queries, G of keys and values, K their width, I and O
widths that a matrix leads from and to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: What LoRA memory is multiplied by: W + 2·BA.
LORA_ALPHA = 2.0

KINDS = ("ffn", "lora_qk", "lora_vo", "lora_ffn", "kv")

#: By kind: the matrices that have LoRA memory, in the order of a block.
_LORA = {
    "lora_qk": ("q_proj", "k_proj"),
    "lora_vo": ("v_proj", "o_proj"),
    "lora_ffn": ("gate_proj", "up_proj", "down_proj"),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

#: What memory adds, of inputs whose first dimension is B and of weights that are of all rows, or of each.
Formula = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
#: Calls a formula with the memory of each row; None where no row has any.
Add = Callable[[Formula, Sequence[Tensor]], "Tensor | None"]


class Part:
    """A place of a layer."""

    def __init__(self, name: str, widths: Sequence[int]) -> None:
        self.name = name
        #: Of the rows of its arrays; 0 is not known here.
        self.widths = tuple(widths)

    def install(self, add: Add) -> list[Any]:
        """Hooks that add; they are removed by their `remove`."""
        raise NotImplementedError


class FfnPart(Part):
    """y += (f(x M1ᵀ) ⊙ (x M2ᵀ)) M3 beside an FFN, before the norm after it that some models have."""

    def __init__(self, name: str, module: nn.Module, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__(name, (0, 0, 0))
        self._module = module
        # As the FFN's own; what has none is a SwiGLU.
        own: Callable[[Tensor], Tensor] = getattr(module, "act_fn", functional.silu)
        self._activation = own if activation is None else activation

    def install(self, add: Add) -> list[Any]:
        def formula(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
            (x,), (m1, m2, m3) = inputs, weights
            if m1.shape[-1] != x.shape[-1]:
                raise ValueError(f"memory of d_model {m1.shape[-1]}, expected {x.shape[-1]} as of the model")
            hidden: Tensor = self._activation(x @ m1.mT) * (x @ m2.mT)
            return hidden @ m3

        return [self._module.register_forward_hook(_beside(formula, add), with_kwargs=True)]


class LoraPart(Part):
    """y += α (x Aᵀ) Bᵀ beside a linear layer; B is stored transposed."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, (int(_attribute(module, "in_features")), int(_attribute(module, "out_features"))))
        self._module = module

    def install(self, add: Add) -> list[Any]:
        def formula(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
            (x,), (a, b) = inputs, weights
            return LORA_ALPHA * ((x @ a.mT) @ b)

        return [self._module.register_forward_hook(_beside(formula, add), with_kwargs=True)]


class KvPart(Part):
    """A softmax over R pairs of keys and values, added to what the attention gives to its output projection.

    Queries are those after the norm that some models have, and before they are turned by their positions.
    """

    def __init__(self, name: str, attention: nn.Module) -> None:
        kv_width = int(_attribute(attention.get_submodule("k_proj"), "out_features"))
        super().__init__(name, (kv_width, kv_width))
        self._attention = attention
        self._head = int(_attribute(attention, "head_dim"))
        self._scale = float(getattr(attention, "scaling", self._head**-0.5))
        self._queries: Tensor | None = None

    def install(self, add: Add) -> list[Any]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._queries = output

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            mixed, queries, self._queries = args[0], self._queries, None
            if queries is None:
                raise ValueError(f"{self.name}: its output projection ran before its queries were made")
            added = add(self._formula, (self._normed(queries),))
            return None if added is None else (mixed + added.to(mixed.dtype).reshape(mixed.shape), *args[1:])

        make, use = self._attention.get_submodule("q_proj"), self._attention.get_submodule("o_proj")
        return [make.register_forward_hook(keep), use.register_forward_pre_hook(before)]

    def _normed(self, queries: Tensor) -> Tensor:
        """[B, T, H·K], after the norm over each head, or over all of them."""
        norm = getattr(self._attention, "q_norm", None)
        if not isinstance(norm, nn.Module):
            return queries
        by_head = queries.reshape(*queries.shape[:-1], -1, self._head)
        whole = next(norm.parameters()).numel() == queries.shape[-1] != self._head
        normed: Tensor = norm(queries) if whole else norm(by_head).flatten(-2)
        return normed

    def _formula(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        (queries,), (keys, values) = inputs, weights
        head, n_kv = self._head, keys.shape[-1] // self._head
        by_head = queries.reshape(*queries.shape[:-1], n_kv, -1, head)  # [B, T, G, H/G, K]
        # Of all rows, or of each: [.., R, G, K].
        keys, values = (pairs.reshape(*pairs.shape[:-1], n_kv, head) for pairs in (keys, values))
        rows = "b" if keys.dim() == 4 else ""
        scores = torch.einsum(f"btghk,{rows}rgk->btghr", by_head, keys) * self._scale
        weights_of = scores.float().softmax(-1).to(values.dtype)
        return torch.einsum(f"btghr,{rows}rgk->btghk", weights_of, values).flatten(-3)


def parts_of(
    model: nn.Module, kind: str, pattern: str, activation: Callable[[Tensor], Tensor] | None
) -> list[list[Part]]:
    """The parts of a kind in each layer of the model, in the order of a block."""
    if kind not in KINDS:
        raise ValueError(f"memory of kind {kind!r}, expected one of {', '.join(KINDS)}")
    decoder = decoder_of(model)
    if kind == "ffn":
        return [[FfnPart(name, module, activation)] for name, module in ffn_modules(decoder, pattern)]
    if kind == "kv":
        return [[KvPart(name, module)] for name, module in attention_modules(decoder)]
    names = _LORA[kind]
    modules = ffn_modules(decoder, pattern) if kind == "lora_ffn" else attention_modules(decoder)
    found: list[list[Part]] = []
    for name, module in modules:
        children = dict(module.named_children())
        if missing := [child for child in names if child not in children]:
            raise ValueError(f"{name}: expected {', '.join(names)} for memory of kind {kind}, found no {missing[0]}")
        found.append([LoraPart(f"{name}.{child}", children[child]) for child in names])
    return found


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of a model of transformers, of one that also sees images too; any other model itself."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else model
    return decoder if isinstance(decoder, nn.Module) else model


def ffn_modules(model: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """The modules whose last name matches the regular expression as a whole, by their names, in order."""
    matches = re.compile(pattern).fullmatch
    found = [(name, module) for name, module in model.named_modules() if name and matches(name.rsplit(".", 1)[-1])]
    if not found:
        raise ValueError(f"pattern {pattern!r}: expected it to name the FFN of each layer, found no such module")
    return found


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that have q_proj, k_proj, v_proj and o_proj, by their names, in order."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if set(_ATTENTION) <= {child for child, _ in module.named_children()}
    ]
    if not found:
        raise ValueError(f"expected an attention with {', '.join(_ATTENTION)} in each layer, found no such module")
    return found


def _beside(formula: Formula, add: Add) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    """A hook that adds to what a module answers to its input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        added = add(formula, (x,))
        if added is None:
            return None
        y = y + added.to(y.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


def _attribute(module: nn.Module, name: str) -> Any:
    value = getattr(module, name, None)
    if value is None:
        raise ValueError(f"{type(module).__name__}: expected {name}, found none")
    return value
