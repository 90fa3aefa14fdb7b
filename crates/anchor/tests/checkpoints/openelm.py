"""OpenELM as its paper (arXiv 2404.14619) and its published checkpoints describe it, in plain PyTorch, for `make`.

transformers has no such model. Names of the parameters are the checkpoints'.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn


def make_divisible(value, divisor):
    """The multiple of `divisor` nearest to `value`, at least one, and not less than nine tenths of it."""
    near = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * value else near


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.width, self.base = config["head_dim"], config["rope_freq_constant"]
        self.n_query, self.n_kv = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        self.qkv_proj = nn.Linear(config["model_dim"], (self.n_query + 2 * self.n_kv) * self.width, bias=False)
        self.out_proj = nn.Linear(self.n_query * self.width, config["model_dim"], bias=False)
        self.q_norm, self.k_norm = RmsNorm(self.width), RmsNorm(self.width)

    def rotated(self, x):
        """The halves of each head are the parts of its pairs."""
        half = self.width // 2
        rate = self.base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), rate)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        low, high = x[..., :half], x[..., half:]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def forward(self, x, seen):
        b, t, _ = x.shape
        heads = self.qkv_proj(x).view(b, t, -1, self.width).transpose(1, 2)
        q, k, v = heads.split([self.n_query, self.n_kv, self.n_kv], dim=1)
        q, k = self.rotated(self.q_norm(q)), self.rotated(self.k_norm(k))
        k, v = (y.repeat_interleave(self.n_query // self.n_kv, dim=1) for y in (k, v))
        scores = q @ k.mT * self.width**-0.5
        mixed = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) @ v
        return self.out_proj(mixed.transpose(1, 2).reshape(b, t, -1))


class Ffn(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        d = config["model_dim"]
        width = make_divisible(config["ffn_multipliers"][layer] * d, config["ffn_dim_divisor"])
        self.proj_1, self.proj_2 = nn.Linear(d, 2 * width, bias=False), nn.Linear(width, d, bias=False)

    def forward(self, x):
        gate, up = self.proj_1(x).chunk(2, -1)
        return self.proj_2(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.ffn = Attention(config, layer), Ffn(config, layer)
        self.attn_norm, self.ffn_norm = RmsNorm(config["model_dim"]), RmsNorm(config["model_dim"])

    def forward(self, x, seen):
        x = x + self.attn(self.attn_norm(x), seen)
        return x + self.ffn(self.ffn_norm(x))


class OpenElm(nn.Module):
    """Takes what a causal model of transformers takes, and answers `logits`."""

    def __init__(self, config):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.token_embeddings = nn.Embedding(config["vocab_size"], config["model_dim"])
        self.transformer.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_transformer_layers"]))
        self.transformer.norm = RmsNorm(config["model_dim"])

    def forward(self, input_ids, attention_mask=None):
        t = input_ids.shape[1]
        seen = torch.ones(t, t, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None, :]
        x = self.transformer.token_embeddings(input_ids)
        for layer in self.transformer.layers:
            x = layer(x, seen)
        logits = F.linear(self.transformer.norm(x), self.transformer.token_embeddings.weight)
        return types.SimpleNamespace(logits=logits)
