"""The hooks against the same formula in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fake import D_MODEL, N_LAYERS, Fake, serving  # noqa: E402

from anchorage import Block, Client, Retrieved, Spec  # noqa: E402
from anchorage.torch import attach, ffn_modules  # noqa: E402

L, D, WIDTHS = 3, 8, (4, 2)


def blocks(seed: int, n_layers: int = L, d_model: int = D) -> list[Block]:
    rng = np.random.default_rng(seed)
    found = []
    for level, width in enumerate(WIDTHS):
        shape = (n_layers, 3, width, d_model)
        data = rng.standard_normal(shape).astype("<f4").tobytes()
        found.append(Block(level, seed, shape, "f32", data))
    return found


def retrieved(seed: int) -> Retrieved:
    spec = Spec(L, D, WIDTHS, (2, 3))
    return Retrieved("default", 1, spec, (0, seed), "f32", blocks(seed), [], {})


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(D, D)

    def forward(self, x: Any) -> Any:
        return x + self.mlp(x)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(L))

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def expected(model: Model, x: np.ndarray[Any, Any], memories: list[list[Block] | None]) -> np.ndarray[Any, Any]:
    """Row by row, level by level, in float64."""
    rows = []
    for row, memory in zip(x.astype(np.float64), memories):
        for i, layer in enumerate(model.layers):
            weight, bias = (p.detach().numpy().astype(np.float64) for p in (layer.mlp.weight, layer.mlp.bias))
            y = row @ weight.T + bias
            for block in memory or []:
                m1, m2, m3 = block.numpy()[i].astype(np.float64)
                gate = row @ m1.T
                y = y + (gate / (1 + np.exp(-gate)) * (row @ m2.T)) @ m3
            row = row + y
        rows.append(row)
    return np.stack(rows)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return Model().eval()


def run(model: Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def batch(n: int) -> np.ndarray[Any, Any]:
    return (0.1 * np.random.default_rng(9).standard_normal((n, 5, D))).astype(np.float32)


def test_each_row_has_its_own_memory_and_nothing_stays(model: Model) -> None:
    x, plain = batch(4), run(model, batch(4))
    memories = [blocks(1), None, blocks(2), blocks(1)]
    with attach(model, memories):
        np.testing.assert_allclose(run(model, x), expected(model, x, memories), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(model, x), plain)
    # Rows without memory have the bits of the plain model.
    with attach(model, memories):
        np.testing.assert_array_equal(run(model, x)[1], plain[1])
    with attach(model, [None, None, None, None]):
        np.testing.assert_array_equal(run(model, x), plain)


def test_one_memory_is_for_all_rows_and_repeats_follow_their_row(model: Model) -> None:
    x = batch(4)
    with attach(model, retrieved(1)) as attached:
        np.testing.assert_allclose(run(model, x), expected(model, x, [blocks(1)] * 4), rtol=1e-4, atol=1e-5)
        # As beams do: each row twice.
        attached.set([retrieved(1), retrieved(2)])
        rows = [blocks(1), blocks(1), blocks(2), blocks(2)]
        np.testing.assert_allclose(run(model, x), expected(model, x, rows), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="batch of 3 rows, expected 2, one for each memory, or a multiple"):
            run(model, batch(3))
        # One position of one row, as in decoding.
        attached.set([None])
        np.testing.assert_array_equal(run(model, x[:, :1]), run(model, x[:, :1]))


def test_a_scale_and_a_name(model: Model) -> None:
    x, plain = batch(2), run(model, batch(2))
    with attach(model, [blocks(1)], scale=0.0):
        np.testing.assert_array_equal(run(model, x), plain)
    assert len(ffn_modules(model)) == L and len(ffn_modules(model, "ml.")) == L
    with attach(model, [blocks(1)], pattern="m.p|feed_forward"):
        assert not np.array_equal(run(model, x), plain)
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_that_are_tuples_and_inputs_by_name() -> None:
    class Tuple(torch.nn.Module):
        def forward(self, hidden_states: Any) -> Any:
            return hidden_states, "router"

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Tuple()

    wrapped, x = Wrapped(), torch.from_numpy(batch(1))
    with attach(wrapped, [blocks(3, n_layers=1)]):
        y, rest = wrapped.mlp(hidden_states=x)
    assert rest == "router" and not torch.equal(y, x)


def test_half_precision_stays_what_it_is(model: Model) -> None:
    x = torch.from_numpy(batch(2)).to(torch.bfloat16)
    with attach(model.to(torch.bfloat16), [blocks(1), blocks(2)]), torch.no_grad():
        y = model(x)
    assert y.dtype == torch.bfloat16
    exact = expected(model.to(torch.float32), x.float().numpy(), [blocks(1), blocks(2)])
    np.testing.assert_allclose(y.float().numpy(), exact, rtol=0.1, atol=0.1)


def test_a_compiled_model_sees_memory_come_change_and_go(model: Model) -> None:
    x = np.random.default_rng(4).standard_normal((1, 5, D)).astype(np.float32)
    compiled: Any = torch.compile(model, backend="eager")
    plain = run(compiled, x)
    attached = attach(model, retrieved(0))
    for seed in (0, 1):
        attached.set(retrieved(seed))
        found = run(compiled, x)
        wanted = expected(model, x, [blocks(seed)])
        assert np.allclose(found, wanted, rtol=1e-3)
        assert not np.allclose(found, plain, rtol=1e-2)
    attached.remove()
    assert (run(compiled, x) == plain).all()


def test_memory_of_another_model_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="row 1: expected 3 layers, as many as modules of the model, found 2"):
        attach(model, [blocks(1), blocks(2, n_layers=2)])
    with pytest.raises(ValueError, match="found no such module"):
        attach(model, [blocks(1)], pattern="ffn")
    with pytest.raises(ValueError, match="found none"):
        attach(model, [])
    with attach(model, [blocks(1, d_model=4)]):
        with pytest.raises(ValueError, match="memory of d_model 4, expected 8 as of the model"):
            run(model, batch(1))
    with pytest.raises(ValueError, match=r"expected one width of all levels together, found \[4, 6\]"):
        attach(model, [blocks(1), blocks(2)[:1]])
    assert not any(module._forward_hooks for module in model.modules())


def test_memory_of_texts_comes_from_a_server() -> None:
    assert D_MODEL == D
    torch.manual_seed(1)
    model = Model().eval()
    del model.layers[N_LAYERS:]
    x, texts = batch(2), ["a", "three"]
    with serving(Fake()) as address, Client(address) as client:
        memories = [client.retrieve(text).blocks for text in texts]
        with attach(model, client, texts=texts) as attached:
            np.testing.assert_allclose(run(model, x), expected(model, x, memories), rtol=1e-3, atol=1e-4)
            attached.fetch(paths=["1/4/9"])
            one = [client.retrieve(path="1/4/9").blocks] * 2
            np.testing.assert_allclose(run(model, x), expected(model, x, one), rtol=1e-3, atol=1e-4)
            with pytest.raises(ValueError, match="expected texts or paths"):
                attached.fetch()


def test_a_model_of_transformers(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=L,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[1, 5, 7], [2, 6, 8]])

    def generate(rows: Any) -> list[list[int]]:
        with torch.no_grad():
            found = model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        return found.tolist()

    plain = generate(tokens)
    big = [Block(b.level, b.index, b.shape, "f32", (3 * b.numpy()).astype("<f4").tobytes()) for b in blocks(4)]
    with attach(model, [None, big]):
        mixed = generate(tokens)
    assert mixed[0] == plain[0] and mixed[1] != plain[1]
    with attach(model, [big]):
        assert generate(tokens[1:]) == [mixed[1]]
    assert generate(tokens) == plain
