"""Tiny models of Transformers with random weights, and what of them is compared."""

import copy

import torch
import transformers
from packaging.version import Version

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Qwen3Moe": {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "DeepseekV4": {
        "moe_intermediate_size": 96,
        "head_dim": 32,
        "num_key_value_heads": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 8,
        "hc_mult": 2,
        "sliding_window": 16,
        "swiglu_limit": 1.0,
    },
    "GptOss": {
        "intermediate_size": 48,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
}

if Version(transformers.__version__) < Version("5.24"):
    # Its own layers multiply f32 by bf16 there.
    del FAMILIES["DeepseekV4"]


def model_of(family, implementation, device="cpu", seed=0, **more):
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, dtype=torch.bfloat16, experts_implementation=implementation
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name and "expert" in name:
                parameter.normal_(std=0.1)
            elif parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):
                rows, topk = table.shape
                table.copy_(torch.rand(rows, config.num_local_experts).topk(topk).indices)
    return model.to(device).eval()


def is_near(logits, expected, tokens):
    """Whether logits are those of the eager model, or about as near to the same model's in f32 as its own: where two
    experts nearly tie, rounding to bfloat16 decides, and eager experts round differently on other CPUs."""
    its = expected(tokens).logits
    if distance(logits, its) < 1e-2:
        return True
    exact = copy.deepcopy(expected).float()(tokens).logits
    return distance(logits, exact) < 1.25 * distance(its, exact)


def experts_of(model):
    return [module for module in model.modules() if "_expertile_layer" in module.__dict__]


def distance(mine, expected):
    return float((mine.double() - expected.double()).norm() / expected.double().norm())


def share_near(mine, expected, within=1e-2):
    """The share of positions whose logits are near.

    Where a rounding makes a router choose another expert those of a token are some percent away.
    """
    mine, expected = (logits.double().flatten(0, -2) for logits in (mine, expected))
    apart = (mine - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float((apart < within).double().mean())
