"""A whole model of Transformers with each implementation of its experts: tokens per second at prefill and at decode.

    transformers_model.py [--device cuda] [--layers 4] [--implementations expertile,grouped_mm] [--json FILE]
    transformers_model.py --device cpu --json FILE    # with four layers 13 GB of memory

Qwen3-30B-A3B's sizes with fewer layers and random bf16 weights. Prefill: `generate` of one token after 256, which
computes the logits of the last; logits: those of all 256. Decode: 32 greedy steps of `generate` after a prompt of 16
tokens, for 1 and 8 sequences. `--vocab 12672`, a twelfth, gives the head the share that it has beside 48 layers.
Attention, head and sampling are Transformers' own in every case. Logits are compared with the first implementation's
before anything is timed: where a rounding makes a router choose another expert they differ by some percent, between
any two of them. On a CPU `batched_mm` is left out unless asked for: it copies the weights of every slot, 19 GB of them
at 256 tokens.
"""

import argparse
import json
import sys
import time

import expertile.transformers as ours
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

STEPS = 32


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_each(model, names, call, rounds):
    """Median seconds with each implementation; they take turns, so that the host is as warm for all of them."""
    times = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names:
            model.set_experts_implementation(name)
            wait()
            start = time.perf_counter()
            call()
            wait()
            if index > 0:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--implementations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    config = Qwen3MoeConfig(
        vocab_size=options.vocab,
        hidden_size=2048,
        num_hidden_layers=options.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for weights in model.parameters():
        if weights.dim() >= 2:
            weights.normal_(std=weights.shape[-1] ** -0.5)
    # The others need the weights after ours has packed them on a CPU.
    ours.configure(keep_weights=True)
    prompt = torch.randint(0, options.vocab, (1, 256), device=options.device)
    starts = {batch: torch.randint(0, options.vocab, (batch, 16), device=options.device) for batch in (1, 8)}
    usual = "grouped_mm,expertile,eager" if options.device == "cpu" else "grouped_mm,expertile,batched_mm,eager"
    names, expected, rows = (options.implementations or usual).split(","), None, {}
    for name in names:
        model.set_experts_implementation(name)
        logits = model(prompt).logits.float()
        expected = logits if expected is None else expected
        distance = float((logits - expected).norm() / expected.norm())
        if not distance < 1e-1:
            sys.exit(f"{name} is {distance} away from {names[0]}")
        rows[name] = {"distance": distance}

    def generate(start, steps):
        model.generate(start, min_new_tokens=steps, max_new_tokens=steps, do_sample=False, pad_token_id=0)

    calls = {"prefill_256": lambda: generate(prompt, 1), "logits_256": lambda: model(prompt)}
    for what, call in calls.items():
        for name, seconds in seconds_each(model, names, call, options.rounds).items():
            rows[name][what] = 256 / seconds
    for batch, start in starts.items():
        short = seconds_each(model, names, lambda start=start: generate(start, 1), options.rounds)
        long = seconds_each(model, names, lambda start=start: generate(start, 1 + STEPS), options.rounds)
        for name in names:
            rows[name][f"decode_{batch}"] = STEPS * batch / (long[name] - short[name])
    columns = ("prefill_256", "logits_256", "decode_1", "decode_8")
    heads = " ".join(f"{column:>11}" for column in columns)
    print(f"{'experts':<12} {heads} {'distance':>9}   tokens per second")
    for name, row in rows.items():
        print(f"{name:<12} {' '.join(f'{row[column]:>11.1f}' for column in columns)} {row['distance']:>9.3f}")
    if options.json:
        with open(options.json, "w") as file:
            name = torch.cuda.get_device_name() if options.device != "cpu" else f"{torch.get_num_threads()} threads"
            sizes = {"layers": options.layers, "vocab": options.vocab}
            json.dump({"device": name, **sizes, "tokens_per_second": rows}, file, indent=1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
