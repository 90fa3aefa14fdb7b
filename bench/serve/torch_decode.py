"""PyTorch's side of bench/serve: the anchor of crates/anchor decoding with a cache, as a PyTorch user would write it,
and a Qwen3 of the same sizes in transformers. Answers lines `WHAT BATCH CONTEXT STEPS` by lines of JSON; WHAT is
`none`, `different` (each sequence has blocks of its own, by bmm) or `transformers` (the Qwen3, whose QK-norm is one a head)."""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open


class Anchor:
    def __init__(self, folder):
        with open(f"{folder}/bench.json") as file:
            bench = json.load(file)
        self.folder, self.config, self.width = folder, bench["anchor"], bench["width"]
        c = self.config
        half = c["head_width"] // 2
        rate = c["rope_base"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(c["max_seq_len"], dtype=torch.float64), rate)
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        with safe_open(f"{folder}/anchor.safetensors", "pt") as file:
            get = file.get_tensor
            self.embedding, self.final_norm = get("token_embedding"), get("final_norm")
            self.layers = [
                {name: get(f"layers.{i}.{name}") for name in (
                    "attention_norm", "query", "key", "value", "query_norm", "key_norm", "attention_output",
                    "ffn_norm", "ffn",
                )}
                for i in range(c["n_layers"])
            ]
        for layer in self.layers:
            layer["down"] = layer["ffn"][2].T.contiguous()
        self.memory = None

    def load_memory(self, batch):
        """Per layer and level the blocks of all sequences, [B, 3, R, D], gathered when a sequence begins."""
        c = self.config
        blocks = []
        for level, width in enumerate(self.width):
            values = np.fromfile(f"{self.folder}/memory-{level}.bin", dtype="<f4")
            values = torch.from_numpy(values.reshape(-1, c["n_layers"], 3, width, c["d_model"]))
            blocks.append(values[torch.arange(batch) % len(values)])
        return [[level[:, i].contiguous() for level in blocks] for i in range(c["n_layers"])]

    def norm(self, x, gain):
        return F.rms_norm(x, gain.shape, gain, self.config["norm_eps"])

    def step(self, tokens, cache, position, memory):
        """Scores of the last token's next one, [B, V]."""
        c = self.config
        b, t = tokens.shape
        cos, sin = self.cos[position:position + t], self.sin[position:position + t]
        heads = lambda y: y.view(b, t, c["n_heads"], c["head_width"]).transpose(1, 2)
        x = F.embedding(tokens, self.embedding)
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, cache)):
            h = self.norm(x, layer["attention_norm"])
            q = rope(heads(self.norm(F.linear(h, layer["query"]), layer["query_norm"])), cos, sin)
            k = rope(heads(self.norm(F.linear(h, layer["key"]), layer["key_norm"])), cos, sin)
            keys[:, :, position:position + t] = k
            values[:, :, position:position + t] = heads(F.linear(h, layer["value"]))
            seen = (keys[:, :, :position + t], values[:, :, :position + t])
            mixed = F.scaled_dot_product_attention(q, *seen, is_causal=t > 1)
            x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, -1), layer["attention_output"])
            h = self.norm(x, layer["ffn_norm"])
            y = F.linear(F.silu(F.linear(h, layer["ffn"][0])) * F.linear(h, layer["ffn"][1]), layer["down"])
            for block in memory[i] if memory else ():
                w1, w2, w3 = block.unbind(1)
                y = y + torch.bmm(F.silu(torch.bmm(h, w1.transpose(1, 2))) * torch.bmm(h, w2.transpose(1, 2)), w3)
            x = x + y
        return F.linear(self.norm(x[:, -1], self.final_norm), self.embedding)

    def time(self, what, batch, context, steps):
        c = self.config
        shape = (batch, c["n_heads"], context + steps, c["head_width"])
        cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]
        memory = None
        if what == "different":
            if self.memory is None or len(self.memory[0][0]) != batch:
                self.memory = self.load_memory(batch)
            memory = self.memory
        place = torch.arange(batch)[:, None] * 7919 + torch.arange(context + steps) * 31 + 5
        tokens = place % c["vocab_size"]
        logits = self.step(tokens[:, :context], cache, 0, memory)
        seconds = []
        for step in range(steps):
            position = context + step
            began = time.perf_counter()
            logits = self.step(tokens[:, position:position + 1], cache, position, memory)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "logits": logits[0, :64].tolist()}


def rope(x, cos, sin):
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Qwen3:
    """The eager model of transformers, with its own cache."""

    def __init__(self, config):
        from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

        self.new_cache, self.vocab_size = DynamicCache, config["vocab_size"]
        sizes = Qwen3Config(
            vocab_size=config["vocab_size"],
            hidden_size=config["d_model"],
            intermediate_size=config["ffn_width"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config["n_heads"],
            head_dim=config["head_width"],
            max_position_embeddings=config["max_seq_len"],
            tie_word_embeddings=config["tied_embeddings"],
        )
        self.model = Qwen3ForCausalLM(sizes).float().eval()

    def time(self, batch, context, steps):
        place = torch.arange(batch)[:, None] * 7919 + torch.arange(context + steps) * 31 + 5
        tokens = place % self.vocab_size
        cache = self.new_cache()
        self.model(tokens[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            one = tokens[:, context + step:context + step + 1]
            self.model(one, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}


def main():
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    anchor, other = Anchor(folder), None
    with torch.inference_mode():
        for line in sys.stdin:
            what, *sizes = line.split()
            sizes = [int(size) for size in sizes]
            if what == "transformers":
                other = other or Qwen3(anchor.config)
                answer = other.time(*sizes)
            else:
                answer = anchor.time(what, *sizes)
            print(json.dumps(answer), flush=True)


main()
