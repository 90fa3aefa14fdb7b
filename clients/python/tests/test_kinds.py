"""Memory of every kind in tiny models of each family, against the same models with other weights."""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from files import bank, tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from anchorage import BankFile, Block, Retrieved, Spec  # noqa: E402
from anchorage.torch import attach  # noqa: E402

L, D, F, H, G, K, V = 3, 24, 40, 4, 2, 8, 48
WIDTH, BRANCHING = (3, 2), (2, 2)
LORA = {
    "lora_qk": [("self_attn.q_proj", (D, H * K)), ("self_attn.k_proj", (D, G * K))],
    "lora_vo": [("self_attn.v_proj", (D, G * K)), ("self_attn.o_proj", (H * K, D))],
    "lora_ffn": [("mlp.gate_proj", (D, F)), ("mlp.up_proj", (D, F)), ("mlp.down_proj", (F, D))],
}
SIZES: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=G,
    head_dim=K,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    attn_implementation="eager",
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 12, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 12, "sliding_window": 4}),
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True}),
}


def made(family: str) -> Any:
    kind, more = FAMILIES[family]
    # Qwen2 has no width of heads of its own.
    sizes = dict(SIZES, hidden_size=H * K) if family == "qwen2" else dict(SIZES)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.float().eval()


def widths_of(model: Any, kind: str) -> list[tuple[int, ...]]:
    d = model.config.hidden_size
    if kind == "ffn":
        return [(d, d, d)]
    if kind == "kv":
        return [(G * K, G * K)]
    return [(d if i == D else i, d if o == D else o) for _, (i, o) in LORA[kind]]


def retrieved(model: Any, kind: str, seed: int, layers: tuple[int, ...] = (0, 1, 2)) -> Retrieved:
    """A path of two levels, and of other shapes than FFN memory the numbers alone."""
    d, blocks = model.config.hidden_size, []
    unit = sum(width for widths in widths_of(model, kind) for width in widths)
    for level, width in enumerate(WIDTH):
        shape = (len(layers), 3, width, d) if kind == "ffn" else (len(layers), unit * width)
        numbers = 0.3 * np.random.default_rng(10 * seed + level).standard_normal(shape)
        blocks.append(Block(level, seed, shape, "f32", numbers.astype("<f4").tobytes()))
    spec = Spec(L, d, WIDTH, BRANCHING, kind, layers)
    return Retrieved("default", 1, spec, (0, seed), "f32", blocks, [], {})


def arrays(model: Any, kind: str, memory: Retrieved, index: int) -> list[list[Any]]:
    """Of the index-th layer with memory its arrays by part, levels beside each other, cut as the program does."""
    found: list[list[list[Any]]] = []
    for block, r in zip(memory.blocks, WIDTH):
        numbers, start = torch.from_numpy(block.numpy().reshape(len(memory.spec.layers), -1)[index].copy()), 0
        parts = []
        for widths in widths_of(model, kind):
            parts.append([])
            for width in widths:
                parts[-1].append(numbers[start : start + r * width].reshape(r, width))
                start += r * width
        found.append(parts)
    return [[torch.cat(both) for both in zip(*parts)] for parts in zip(*found)]


def merged(model: Any, kind: str, memory: Retrieved) -> Any:
    """A model of its own that has FFN or LoRA memory in its weights."""
    other = copy.deepcopy(model)
    for index, number in enumerate(memory.spec.layers):
        layer, parts = other.model.layers[number], arrays(model, kind, memory, index)
        if kind == "ffn":
            m1, m2, m3 = parts[0]
            mlp = layer.mlp
            for name, more, axis in [("gate_proj", m1, 0), ("up_proj", m2, 0), ("down_proj", m3.T, 1)]:
                linear = getattr(mlp, name)
                linear.weight = torch.nn.Parameter(torch.cat([linear.weight.detach(), more], axis))
        else:
            for (name, _), (a, b) in zip(LORA[kind], parts):
                weight = layer.get_submodule(name).weight
                weight.data += 2 * b.T @ a
    return other


def tokens(rows: int) -> Any:
    return torch.randint(4, V, (rows, 9), generator=torch.Generator().manual_seed(3))


def logits(model: Any, rows: Any) -> Any:
    with torch.no_grad():
        return model(rows).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ffn", *LORA])
def test_memory_is_more_weights(family: str, kind: str) -> None:
    model, rows = made(family), tokens(4)
    plain = logits(model, rows)
    memories = [retrieved(model, kind, 1), None, retrieved(model, kind, 2), retrieved(model, kind, 1)]
    with attach(model, memories, kind=kind):
        found = logits(model, rows)
    for row, memory in enumerate(memories):
        if memory is None:
            assert torch.equal(found[row], plain[row])
            continue
        expected = logits(merged(model, kind, memory), rows[row : row + 1])[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
        assert (expected - plain[row]).abs().max() > 1e-2
    assert torch.equal(logits(model, rows), plain)


@pytest.mark.parametrize("kind", ["ffn", *LORA, "kv"])
def test_some_layers(kind: str) -> None:
    model, rows = made("llama"), tokens(2)
    late = retrieved(model, kind, 3, layers=(2,))
    with attach(model, late):
        found = logits(model, rows)
    if kind != "kv":
        torch.testing.assert_close(found, logits(merged(model, kind, late), rows), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, logits(model, rows))
    # Other layers are taken when others are set.
    both = retrieved(model, kind, 4, layers=(0, 1))
    with attach(model, late) as attached:
        attached.set(both)
        again = logits(model, rows)
    with attach(model, [both]):
        assert torch.equal(logits(model, rows), again)


def kv_of_row(model: Any, layer: int, x: Any, memory: Retrieved) -> Any:
    """What KV memory adds to a row, [T, H·K], head by head and position by position, in double precision."""
    attention = model.model.layers[layer].self_attn
    keys, values = (pairs.double() for pairs in arrays(model, "kv", memory, layer)[0])
    with torch.no_grad():
        queries = attention.q_proj(x).reshape(len(x), H, K)
        queries = (attention.q_norm(queries) if hasattr(attention, "q_norm") else queries).double()
    added = torch.zeros(len(x), H, K, dtype=torch.float64)
    for t in range(len(x)):
        for h in range(H):
            place = slice(h // (H // G) * K, (h // (H // G) + 1) * K)
            weights = (keys[:, place] @ queries[t, h] * attention.scaling).softmax(0)
            added[t, h] = weights @ values[:, place]
    return added.reshape(len(x), H * K)


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_memory_is_a_softmax_of_its_own(family: str) -> None:
    model, rows = made(family), tokens(3)
    attention, seen = model.model.layers[0].self_attn, []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"])

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)

    def mixed(memories: Any) -> Any:
        """What the first layer's attention gives to its output projection."""
        with attach(model, memories, kind="kv"):
            # After the memory's, whose hook changes it.
            last = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            logits(model, rows)
            last.remove()
        return seen.pop()

    memories = [retrieved(model, "kv", 1), None, retrieved(model, "kv", 2)]
    plain, found = mixed([None]), mixed(memories)
    x = seen[0]
    for row, memory in enumerate(memories):
        expected = 0 if memory is None else kv_of_row(model, 0, x[row], memory)
        torch.testing.assert_close(found[row].double(), plain[row].double() + expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["ffn", *LORA, "kv"])
def test_generation_with_a_cache_is_the_same(family: str, kind: str) -> None:
    model, rows = made(family), tokens(2)
    with attach(model, [retrieved(model, kind, 1), retrieved(model, kind, 2)]):
        with torch.no_grad():
            said = model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
        best = logits(model, said)[:, 8:-1].argmax(-1)
    assert torch.equal(best, said[:, 9:])


@pytest.mark.parametrize("kind", ["lora_qk", "kv"])
def test_what_adds_nothing_changes_nothing(kind: str) -> None:
    model, rows = made("gemma3"), tokens(2)
    memory = retrieved(model, kind, 1)
    widths = widths_of(model, kind)
    for block, r in zip(memory.blocks, WIDTH):
        numbers, start = block.numpy().reshape(L, -1).copy(), 0
        for first, second in widths:
            numbers[:, start + r * first : start + r * (first + second)] = 0
            start += r * (first + second)
        object.__setattr__(block, "data", numbers.tobytes())
    with attach(model, memory):
        found = logits(model, rows)
    torch.testing.assert_close(found, logits(model, rows), rtol=0, atol=0)


def test_a_bank_in_a_folder(tmp_path: pathlib.Path) -> None:
    model, rows = made("llama"), tokens(2)
    unit = sum(width for widths in widths_of(model, "lora_vo") for width in widths)
    spec = {"kind": "lora_vo", "n_layers": L, "d_model": D, "width": [2, 1], "branching": [2, 2], "layers": [1]}
    bank(tmp_path / "bank.safetensors", spec, [[1, 2 * unit], [1, unit]])
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    tree(tmp_path / "tree.safetensors", [2, 2], 5)

    def embed(texts: Any) -> Any:
        return [np.random.default_rng(len(text)).standard_normal(5) for text in texts]

    texts = ["one", "another"]
    source = BankFile(tmp_path, embed=embed)
    with attach(model, list(source.retrieve_each(texts))):
        expected = logits(model, rows)
    with attach(model, tmp_path, texts=texts, embed=embed) as attached:
        assert torch.equal(logits(model, rows), expected)
        attached.fetch(paths=["generic"])
        generic = logits(model, rows)
    with attach(model, source, paths=["generic", "generic"]):
        torch.testing.assert_close(logits(model, rows), generic, rtol=1e-5, atol=1e-5)
    assert not torch.equal(generic, expected)
    with pytest.raises(ValueError, match="expected texts or paths"):
        attach(model, source)
    with pytest.raises(ValueError, match="expected a client or a bank"):
        attach(model, [None], texts=texts)


def test_a_decoder_beside_another_model() -> None:
    text = dict(SIZES, query_pre_attn_scalar=12, sliding_window=4)
    vision = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1)
    vision |= dict(image_size=8, patch_size=4)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=V - 1, boi_token_index=V - 2
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.config.hidden_size = D
    plain = logits(model, tokens(1))
    for kind in ("ffn", "lora_ffn", "kv"):
        with attach(model, retrieved(model, kind, 1)):
            assert not torch.equal(logits(model, tokens(1)), plain)


def test_memory_that_does_not_fit_is_refused() -> None:
    model = made("llama")
    with pytest.raises(ValueError, match="memory of row 1: expected kind kv, found ffn"):
        attach(model, [retrieved(model, "kv", 1), retrieved(model, "ffn", 1)])
    with pytest.raises(ValueError, match=r"expected the layers \[0, 1, 2\], found \[2\]"):
        attach(model, [retrieved(model, "kv", 1), retrieved(model, "kv", 1, layers=(2,))])
    other = made("qwen2")
    with pytest.raises(ValueError, match="block 0/1 of 864 numbers, expected 3 times 336, as of memory of kind"):
        attach(other, retrieved(model, "lora_qk", 1))
    with pytest.raises(ValueError, match="memory of kind 'prefix', expected one of ffn, lora_qk"):
        attach(model, [None], kind="prefix")
    with pytest.raises(ValueError, match="expected an attention with q_proj, k_proj, v_proj, o_proj in each layer"):
        attach(model.lm_head, retrieved(model, "kv", 1))
    spec, found = Spec(2, D, WIDTH, BRANCHING), retrieved(model, "ffn", 1)
    wrong = Retrieved("default", 1, spec, None, "f32", found.blocks, [], {})
    with pytest.raises(ValueError, match="row 0: expected 3 layers, as many as the model has, found 2"):
        attach(model, wrong)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
