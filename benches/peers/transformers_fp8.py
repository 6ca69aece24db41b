"""An FP8 checkpoint on a CPU, end to end: ours, which keeps its experts, beside what Transformers does with it.

    transformers_fp8.py [--folder DIR] [--layers 4] [--implementations expertile,grouped_mm,eager] [--json FILE]
    transformers_fp8.py --in-turns [--rounds 7] ...    # times only, all implementations in one process

A checkpoint of Qwen3-30B-A3B's sizes with fewer layers is made up in DIR (a temporary folder otherwise; 3.8 GB with
four layers): e4m3 with scales of 128 x 128 for experts and attention, as Qwen's own FP8 checkpoints have it. Each
implementation loads it with `from_pretrained` in a process of its own, in turn, for several rounds; Transformers
widens it to bf16 there. Printed: the most memory from start to end and what is held after the first call (a process's
own, without what the libraries alone take: pages of the checkpoint's mapped files can be dropped and are not counted),
prefill (`generate` of one token after 256, which computes the logits of the last), the logits of all 256, and decode
(32 greedy steps, 1 and 8 sequences), in tokens per second, and the share of positions whose logits are within 2 % of
the first implementation's.

With `--in-turns` one process holds all implementations, and every round times one call of each: on a machine whose
speed comes and goes that compares what was measured at the same time. Decode is of 8 steps then; printed are the
medians, and how they compare with the first implementation's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

STEPS = 32
PROMPT = 256
E4M3 = torch.float8_e4m3fn
# Of the e4m3 values: the largest of 16384 normal ones are then near 448.
SPREAD = 100.0


def config_of(options):
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": options.intermediate,
        "num_experts": options.experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }


def quantized(name, rows, cols):
    """A matrix of standard deviation 1 / sqrt(K) and its scales."""
    values = (torch.randn(rows, cols) * SPREAD).clamp(-448, 448).to(E4M3)
    scales = torch.full((rows // 128, cols // 128), cols**-0.5 / SPREAD)
    return {f"{name}.weight": values, f"{name}.weight_scale_inv": scales}


def layer_weights(options, layer):
    hidden, intermediate, prefix = options.hidden, options.intermediate, f"model.layers.{layer}."
    weights = {
        f"{prefix}input_layernorm.weight": torch.ones(hidden).bfloat16(),
        f"{prefix}post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
        f"{prefix}self_attn.q_norm.weight": torch.ones(128).bfloat16(),
        f"{prefix}self_attn.k_norm.weight": torch.ones(128).bfloat16(),
        f"{prefix}mlp.gate.weight": (torch.randn(options.experts, hidden) * hidden**-0.5).bfloat16(),
    }
    for name, rows, cols in [("q", 4096, hidden), ("k", 512, hidden), ("v", 512, hidden), ("o", hidden, 4096)]:
        weights |= quantized(f"{prefix}self_attn.{name}_proj", rows, cols)
    for expert in range(options.experts):
        for name, rows, cols in [
            ("gate", intermediate, hidden),
            ("up", intermediate, hidden),
            ("down", hidden, intermediate),
        ]:
            weights |= quantized(f"{prefix}mlp.experts.{expert}.{name}_proj", rows, cols)
    return weights


def make_checkpoint(folder, options):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    table = torch.randn(options.vocab, options.hidden).bfloat16()
    parts = [{"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(options.hidden).bfloat16()}]
    parts[0]["lm_head.weight"] = (torch.randn(options.vocab, options.hidden) * options.hidden**-0.5).bfloat16()
    files = {}
    for index in range(options.layers + 1):
        part = parts[0] if index == 0 else layer_weights(options, index - 1)
        file = f"model-{index}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config_of(options)))


def own_kib():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1])


class Peak(threading.Thread):
    """The most memory of its own that the process has had, looked at every 20 milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.kib = 0
        self.start()

    def run(self):
        while True:
            self.kib = max(self.kib, own_kib())
            time.sleep(0.02)


def seconds(call, *arguments):
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def generate(model, start, steps):
    model.generate(start, min_new_tokens=steps, max_new_tokens=steps, do_sample=False, pad_token_id=0)


def child(options):
    """Loads, runs and prints what was found; logits go to a file."""
    import expertile.transformers  # noqa: F401
    from transformers import AutoModelForCausalLM

    libraries, peak = own_kib(), Peak()
    load = AutoModelForCausalLM.from_pretrained
    model = load(options.folder, dtype="bfloat16", experts_implementation=options.child).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, options.vocab, (1, PROMPT), generator=generator)
    torch.save(model(prompt).logits, options.logits)
    found = {"held_gb": (own_kib() - libraries) / 1e6}
    found["prefill_256"] = PROMPT / min(seconds(generate, model, prompt, 1) for _ in range(3))
    found["logits_256"] = PROMPT / min(seconds(model, prompt) for _ in range(3))
    for batch in (1, 8):
        start = torch.randint(0, options.vocab, (batch, 16), generator=generator)
        generate(model, start, 2)
        short, long = (min(seconds(generate, model, start, steps) for _ in range(2)) for steps in (1, 1 + STEPS))
        found[f"decode_{batch}"] = STEPS * batch / (long - short)
    found["peak_gb"] = (peak.kib - libraries) / 1e6
    print(json.dumps(found))


def in_turns(folder, options):
    """Tokens per second of every implementation, each round one call of every one."""
    import expertile.transformers  # noqa: F401
    from transformers import AutoModelForCausalLM

    names, steps, found = options.implementations.split(","), 8, {}
    load = AutoModelForCausalLM.from_pretrained
    models = {name: load(folder, dtype="bfloat16", experts_implementation=name).eval() for name in names}
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, options.vocab, (1, PROMPT), generator=generator)
    starts = {batch: torch.randint(0, options.vocab, (batch, 16), generator=generator) for batch in (1, 8)}

    def decode(model, batch):
        return seconds(generate, model, starts[batch], 1 + steps) - seconds(generate, model, starts[batch], 1)

    calls = {
        "prefill_256": (PROMPT, lambda model: seconds(generate, model, prompt, 1)),
        "logits_256": (PROMPT, lambda model: seconds(model, prompt)),
        "decode_1": (steps, lambda model: decode(model, 1)),
        "decode_8": (steps * 8, lambda model: decode(model, 8)),
    }
    for model in models.values():
        model(prompt)
    for what, (tokens, call) in calls.items():
        times = {name: [] for name in names}
        for turn in range(options.rounds):
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(call(models[name]))
        medians = {name: tokens / sorted(values)[options.rounds // 2] for name, values in times.items()}
        found[what] = medians
        cells = ", ".join(f"{name} {speed:.1f} ({speed / medians[names[0]]:.2f})" for name, speed in medians.items())
        print(f"{what:<12} {cells}", flush=True)
    return found


def share_near(logits, expected):
    apart = (logits.double() - expected.double()).flatten(0, -2).norm(dim=-1) / expected.double().flatten(0, -2).norm(
        dim=-1
    )
    return float((apart < 2e-2).double().mean())


def measure(folder, options):
    names, rounds, expected = options.implementations.split(","), {}, None
    for _ in range(options.rounds):
        for name in names:
            logits = folder / f"logits-{name}.pt"
            sizes = ["--vocab", str(options.vocab), "--folder", str(folder), "--logits", str(logits)]
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, *sizes], stdout=subprocess.PIPE, text=True
            )
            if done.returncode != 0:
                sys.exit(f"{name} ended with {done.returncode}")
            found = json.loads(done.stdout.splitlines()[-1])
            logits = torch.load(logits)
            expected = logits if expected is None else expected
            rounds.setdefault(name, []).append({**found, "near": share_near(logits, expected)})
    return rounds


def write(options, found):
    if options.json:
        with open(options.json, "w") as file:
            where = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "layers": options.layers}
            json.dump({**where, **found}, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--implementations", default="grouped_mm,expertile,eager")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-turns", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--logits", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            make_checkpoint(folder, options)
        rounds = in_turns(folder, options) if options.in_turns else measure(folder, options)
    if options.in_turns:
        write(options, {"vocab": options.vocab, "tokens_per_second": rounds})
        return
    heads = " ".join(f"{head:>9}" for head in ("prefill", "logits", "decode 1", "decode 8"))
    print(f"{'experts':<12} {'peak GB':>8} {'held GB':>8} {heads} {'near':>6}")
    for name, rows in rounds.items():
        memory = [min(row[key] for row in rows) for key in ("peak_gb", "held_gb")]
        speed = [max(row[key] for row in rows) for key in ("prefill_256", "logits_256", "decode_1", "decode_8")]
        near = min(row["near"] for row in rows)
        cells = " ".join(f"{cell:>9.2f}" for cell in speed)
        print(f"{name:<12} {memory[0]:>8.2f} {memory[1]:>8.2f} {cells} {near:>6.2f}")
    write(options, {"rounds": rounds})


if __name__ == "__main__":
    with torch.no_grad():
        main()
