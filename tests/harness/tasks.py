"""Tasks of lm-evaluation-harness made of a closed world's questions and held-out texts:
tasks.py DATA TOKENIZER FOLDER LIMIT"""

import json
import os
import shutil
import sys

import yaml

data, tokenizer, folder, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])


def read(name):
    with open(os.path.join(data, name)) as file:
        return [json.loads(line) for line in file]


def spread(rows, n):
    """At most n of them, from all over the list."""
    step = max(1, len(rows) // n)
    return rows[::step][:n]


def write(name, rows):
    path = os.path.join(folder, f"{name}.jsonl")
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def task(name, kind, rows, **more):
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": write(name, rows)}},
        "output_type": kind,
        "test_split": "test",
        "metadata": {"version": 1.0},
        **more,
    }
    with open(os.path.join(folder, "tasks", f"{name}.yaml"), "w") as file:
        yaml.safe_dump(settings, file)


def metrics(*names, best="higher"):
    return [{"metric": name, "aggregation": "mean", "higher_is_better": best == "higher"} for name in names]


os.makedirs(os.path.join(folder, "tasks"))
questions = [row for row in read("questions.jsonl") if row["answer"] in row["choices"]]
rows = [
    {"text": row["prompt"], "choices": row["choices"], "place": row["choices"].index(row["answer"]), "answer": row["answer"]}
    for row in spread(questions, limit)
]
task(
    "anchorage_choice", "multiple_choice", rows, doc_to_text="{{text}}", doc_to_choice="{{choices}}",
    doc_to_target="{{place}}", metric_list=metrics("acc"),
)
task(
    "anchorage_recall", "generate_until", rows, doc_to_text="{{text}}", doc_to_target="{{answer}}",
    generation_kwargs={"until": [".", "\n"], "max_gen_toks": 12, "do_sample": False},
    filter_list=[{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    metric_list=metrics("exact_match"),
)
texts = [{"text": row["text"]} for row in spread(read("validation.jsonl"), limit // 4)]
task(
    "anchorage_text", "loglikelihood_rolling", texts, doc_to_text="", doc_to_target="{{text}}",
    metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
)
place = os.path.join(folder, "tokenizer")
os.makedirs(place)
shutil.copy(tokenizer, os.path.join(place, "tokenizer.json"))
with open(tokenizer) as file:
    special = [token["content"] for token in json.load(file)["added_tokens"] if token["special"]]
with open(os.path.join(place, "tokenizer_config.json"), "w") as file:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "bos_token": special[0]}, file)
