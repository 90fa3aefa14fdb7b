"""Makes tests/data: a tiny BERT with random weights, and what sentence-transformers and transformers make of some
texts with it. Run with torch, transformers and sentence-transformers installed:

    python crates/bert/tests/make_tiny_bert.py

Texts that fit the model go through SentenceTransformer.encode; longer ones are cut here as the crate says.
"""

import json
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent / "data"
LIMIT = 24
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "Iron melts at 1538 degrees.",
    "iron MELTS at 1538 degrees!",
    "a",
    "",
    "  \n\t ",
    "... -- ???",
    "Größe, naïve café: Ångström.",
    "北京 is the capital of China; Αθήνα that of Greece 🙂.",
    "The profession of Alba Renwick is that of a botanist.",
    "A cell is the smallest unit of life that can replicate on its own, and every organism consists of one or "
    "more of them; some organisms have only a single cell.",
    "word " * 22,
    "word " * 23,
    "The planets of the solar system are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune. " * 3,
]


def make_tokenizer():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    around = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=around
    )
    # As in published models; whoever loads one must not be caught by them.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    return tokenizer


def write(name, value):
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def make_model(vocab_size):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
        layer_norm_eps=1e-3,
        initializer_range=0.3,
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(FOLDER)
    (FOLDER / "model.safetensors").chmod(0o644)


def set_up(activation, pooling):
    config = json.loads((FOLDER / "config.json").read_text())
    write("config.json", config | {"hidden_act": activation})
    kinds = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    switches = {f"pooling_mode_{name}": kind == pooling for kind, name in kinds.items()}
    write("1_Pooling/config.json", {"word_embedding_dimension": 36} | switches)


def pool(rows, pooling):
    rows = {"mean": rows.mean(0), "cls": rows[0], "max": rows.max(0).values}[pooling]
    return torch.nn.functional.normalize(rows, dim=0)


def references(tokenizer, pooling):
    model = SentenceTransformer(str(FOLDER), device="cpu")
    model.max_seq_length = LIMIT
    transformer = BertModel.from_pretrained(FOLDER, add_pooling_layer=False).eval()
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    found = []
    for text in TEXTS:
        pieces = tokenizer.encode(text, add_special_tokens=False).ids
        if len(pieces) <= LIMIT - 2:
            found.append(model.encode(text, normalize_embeddings=True).tolist())
            continue
        total = torch.zeros(36)
        for first in range(0, len(pieces), LIMIT - 2):
            part = pieces[first : first + LIMIT - 2]
            rows = transformer(torch.tensor([[cls, *part, sep]])).last_hidden_state[0]
            total += len(part) * pool(rows, pooling)
        found.append(torch.nn.functional.normalize(total, dim=0).tolist())
    return found


@torch.no_grad()
def main():
    tokenizer = make_tokenizer()
    make_model(tokenizer.get_vocab_size())
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    module = "sentence_transformers.models."
    write(
        "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": module + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": module + "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": module + "Normalize"},
        ],
    )
    write("sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": False})
    cases = []
    variants = [("gelu", "cls"), ("gelu", "max"), ("gelu_new", "mean"), ("relu", "mean"), ("gelu", "mean")]
    for activation, pooling in variants:  # the last is how the folder stays
        set_up(activation, pooling)
        cases.append({"activation": activation, "pooling": pooling, "embeddings": references(tokenizer, pooling)})
    # A test of one would also pass on another if they were close.
    for i, one in enumerate(cases):
        for other in cases[:i]:
            apart = torch.tensor(one["embeddings"]) - torch.tensor(other["embeddings"])
            assert apart.abs().max() > 1e-4, (one["activation"], other["activation"], apart.abs().max())
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in TEXTS]
    assert {0, LIMIT - 2, LIMIT - 1} <= set(lengths) and max(lengths) > 2 * LIMIT, lengths
    cases = [case | {"embeddings": [[round(x, 7) for x in row] for row in case["embeddings"]]} for case in cases]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "reference.json").write_text(f'{{"texts": {json.dumps(TEXTS)},\n"cases": [\n{lines}\n]}}\n')
    print("word pieces:", lengths)


main()
