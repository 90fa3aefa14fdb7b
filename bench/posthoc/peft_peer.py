"""PyTorch's side of bench/posthoc: training steps of a frozen Hugging Face model with LoRA by peft, as its users train.

    python bench/posthoc/peft_peer.py FOLDER --batch 8 --length 512 --threads 2

First answers a line that tells what is trained, and what the process takes before there is a model. Then each line of
its input is one step, answered by one line of JSON: its seconds, the loss before it (in nats), and the peak of the process
since the first line, in MiB. At the end of the input it answers the medians. So another program can take its steps in
between.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="config.json and safetensors of a causal language model")
    parser.add_argument("--batch", type=int, required=True, help="sequences of a step")
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names of modules with commas between")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before the first line")
    parser.add_argument("--checkpoint", action="store_true", help="activations of layers are computed again")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16; parameters of LoRA stay f32")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


args = parsed()
# Before torch is there.
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


# Of names that are to change in a later version.
warnings.simplefilter("ignore", FutureWarning)


def status_mib(name):
    """A size of this process, as Linux tells it."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10


def model_of():
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    # The rates and factors do not change what a step costs.
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    model.config.use_cache = False
    if args.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, lora).to(args.device).train()


class Peak:
    """Of the resident memory since it was made, or of a GPU's, in MiB."""

    def __init__(self):
        self.since_start = False
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            self.since_start = True

    def mib(self):
        if args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if self.since_start:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return status_mib("VmHWM")


def main():
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    libraries = status_mib("VmRSS")
    model = model_of()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-3, fused=True)
    vocab, n_steps = model.get_base_model().config.get_text_config().vocab_size, 0
    place = torch.arange(args.batch)[:, None] * 7919 + torch.arange(args.length) * 31 + 5

    def step():
        nonlocal n_steps
        tokens = ((place + 101 * n_steps) % vocab).to(args.device)
        n_steps += 1
        began = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Waits for a GPU.
        loss = loss.item()
        return time.perf_counter() - began, loss

    warm_up = [step() for _ in range(args.warm_up)]
    peak = Peak()
    total = sum(parameter.numel() for parameter in model.parameters())
    n_trained = sum(parameter.numel() for parameter in trained)
    first = {"trained": n_trained, "frozen": total - n_trained, "libraries_mb": libraries}
    first |= {"peak_since_start": True} if peak.since_start else {}
    first |= {"first_loss": warm_up[0][1]} if warm_up else {}
    print(json.dumps(first), flush=True)

    seconds = []
    for _ in sys.stdin:
        taken, loss = step()
        seconds.append(taken)
        print(json.dumps({"step_s": taken, "loss": loss, "peak_mb": peak.mib()}), flush=True)
    if seconds:
        print(json.dumps({"median_s": statistics.median(seconds), "steps": len(seconds), "peak_mb": peak.mib()}))


main()
