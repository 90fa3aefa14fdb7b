#!/usr/bin/env python3
"""stories260K of llama2.c as a Llama of transformers: its logits, for what anchorage reads and exports of that file.

    tests/posthoc/stories260k.py stories260K.bin --write FOLDER      a model folder, with reference.safetensors
    tests/posthoc/stories260k.py stories260K.bin --exported FOLDER   that folder, loaded by transformers, against it
    tests/posthoc/stories260k.py stories260K.bin --restore FILE      the file as it was before it was spoilt

A copy of stories260K.bin goes about in which the matrices were transposed in place, several times over, for some
processor (sha256 9414d5a2…). It has the right sizes and says nonsense; --restore undoes that, and checks that the model
then begins as the true one does.

Answers by a line of JSON, and fails when logits are further apart than --tolerance. reference.safetensors holds `tokens`
[4, 64], `logits` [4, 64, V], `long.tokens` [1, 512] and `long.logits` [1, 512, V]; the first row of `tokens` is what the
model says by itself. Needs torch and transformers; nothing is fetched.
"""

import argparse
import json
import os
import pathlib
import struct
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BOS = 1
#: "Once upon a time, there was a little girl named Lily": what the true model says first.
SAYS = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401]
#: How often the matrices of the spoilt file are to be transposed again.
TURNS = 5


def sizes_of(raw):
    """dim, FFN width, layers, heads, K/V heads, vocabulary (negative: the head has a matrix of its own), positions."""
    return struct.unpack("<7i", raw[:28])


def restored(raw):
    """The file with each matrix transposed, five times, as if it were [out, in] each time."""
    dim, hidden, n_layers, n_heads, n_kv, vocab, _ = sizes_of(raw)
    values, kv = np.frombuffer(raw[28:], "<f4").copy(), dim // n_heads * n_kv
    attention, ffn = [(dim, dim), (kv, dim), (kv, dim), (dim, dim)], [(hidden, dim), (dim, hidden), (hidden, dim)]
    # The embedding and the norms of attention are before these, the norms of the FFN between them.
    place = abs(vocab) * dim + n_layers * dim
    for shapes in (attention, ffn):
        for shape in shapes:
            for matrix in values[place:][: n_layers * shape[0] * shape[1]].reshape(n_layers, -1):
                for _ in range(TURNS):
                    matrix[:] = matrix.reshape(shape).T.ravel()
            place += n_layers * shape[0] * shape[1]
        place += n_layers * dim
    return raw[:28] + values.tobytes()


def read(raw):
    """The legacy format: seven integers, then float32 of each kind of tensor, layer after layer."""
    dim, hidden, n_layers, n_heads, n_kv, vocab, max_len = sizes_of(raw)
    values = torch.from_numpy(np.frombuffer(raw[28:], "<f4").copy())
    # A negative size says that the head has a matrix of its own.
    tied, vocab = vocab > 0, abs(vocab)
    width = dim // n_heads
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        max_position_embeddings=max_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    place = 0

    def take(*shape):
        nonlocal place
        n = int(np.prod(shape))
        place += n
        return values[place - n : place].view(shape)

    def halved(weight):
        """Rows of a head from neighbours that are turned together to halves that are."""
        rows, columns = weight.shape
        return weight.view(rows // width, width // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    by_layer = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (n_heads * width, dim)),
        ("self_attn.k_proj", (n_kv * width, dim)),
        ("self_attn.v_proj", (n_kv * width, dim)),
        ("self_attn.o_proj", (dim, n_heads * width)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    for name, shape in by_layer:
        for layer, weight in enumerate(take(n_layers, *shape)):
            turned = name.endswith(("q_proj", "k_proj"))
            state[f"model.layers.{layer}.{name}.weight"] = halved(weight) if turned else weight
    state["model.norm.weight"] = take(dim)
    # Cosines and sines, which transformers makes itself.
    take(2, max_len, width // 2)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else take(vocab, dim)
    if place != len(values):
        sys.exit(f"error: {len(values)} numbers, expected {place} by the sizes at the head of the file")
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def sequences(model):
    config, generator = model.config, torch.Generator().manual_seed(260)
    said = model.generate(torch.tensor([[BOS]]), max_new_tokens=63, min_new_tokens=63, do_sample=False, pad_token_id=0)
    others = torch.randint(3, config.vocab_size, (3, 64), generator=generator)
    others[:, 0] = BOS
    long = torch.randint(3, config.vocab_size, (1, config.max_position_embeddings), generator=generator)
    return torch.cat([said, others]), long


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin")
    parser.add_argument("--write", metavar="FOLDER")
    parser.add_argument("--restore", metavar="FILE")
    parser.add_argument("--exported", metavar="FOLDER")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    with torch.inference_mode():
        raw = pathlib.Path(args.bin).read_bytes()
        if args.restore:
            raw = restored(raw)
        model = read(raw)
        tokens, long = sequences(model)
        says = tokens[0, 1 : 1 + len(SAYS)].tolist() == SAYS
        logits, long_logits = model(tokens).logits, model(long).logits
        said = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()
        answer = {"parameters": model.num_parameters(), "loss_of_what_it_says": round(said, 4), "is_true": says}
        if args.write:
            model.save_pretrained(args.write)
            found = {"tokens": tokens, "logits": logits, "long.tokens": long, "long.logits": long_logits}
            save_file({key: value.clone() for key, value in found.items()}, f"{args.write}/reference.safetensors")
        if args.exported:
            other = AutoModelForCausalLM.from_pretrained(args.exported, dtype=torch.float32).eval()
            pairs = [(other(tokens).logits, logits), (other(long).logits, long_logits)]
            answer["max_abs"] = max((a - b).abs().max().item() for a, b in pairs)
            answer["std_of_logits"] = round(logits.std().item(), 3)
    print(json.dumps(answer))
    if args.restore and not says:
        sys.exit(f"error: {args.bin}: expected the file whose matrices were transposed, found another")
    if args.restore:
        pathlib.Path(args.restore).write_bytes(raw)
    if answer.get("max_abs", 0) > args.tolerance:
        sys.exit(f"error: {args.exported}: logits {answer['max_abs']:.1e} apart, expected at most {args.tolerance:.0e}")


main()
