"""What a call costs beside the work: microseconds, the best of several rounds. python benches/overhead.py"""

import timeit

import expertile
from expertile import deep_gemm_utils


def us(call, number):
    return min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6


def show(name, call, number=20000):
    print(f"| `{name}` | {us(call, number):.2f} |")


def planning():
    show("Plan.tight(128, 8, 128)", lambda: expertile.Plan.tight(128, 8, 128))
    show("tight_m_sum(128, 8, 128, 128)", lambda: expertile.tight_m_sum(128, 8, 128, 128))
    show("compute_aligned_M(128, 8, 128, 128, None)", lambda: deep_gemm_utils.compute_aligned_M(128, 8, 128, 128, None))
    show(
        "compute_aligned_M_and_alignment(128, 8, 128, 128, None)",
        lambda: deep_gemm_utils.compute_aligned_M_and_alignment(128, 8, 128, 128, None),
    )


def tensors():
    import torch

    import expertile.torch as et

    meta = deep_gemm_utils.ExpertTokensMetadata.make_from_list([8] * 128, "cpu")
    show("compute_aligned_M(..., 128 counts)", lambda: deep_gemm_utils.compute_aligned_M(128, 8, 128, 128, meta))
    counts = meta.expert_num_tokens_cpu
    show(
        "expert_num_tokens_round_up_and_sum(128 counts, 128)",
        lambda: deep_gemm_utils.expert_num_tokens_round_up_and_sum(counts, 128),
    )
    # One token, one expert, 128 values: there is nothing to do but the call.
    x, ids = torch.zeros(1, 128), torch.zeros(1, 1, dtype=torch.int64)
    sizes = et.sizes(1, 1, 1, 128, alignment=1)
    out = torch.empty(1, 128, dtype=torch.float8_e4m3fn)
    scales, layout = torch.empty(sizes.scale_words), torch.empty(sizes.layout_len, dtype=torch.int32)
    options = {"alignment": 1, "out": out, "scales": scales, "layout": layout}
    show("torch.build_layout, M = 1", lambda: et.build_layout(ids, 1, alignment=1, layout=layout), 2000)
    show("torch.quantize_permute, M = 1", lambda: et.quantize_permute(x, ids, 1, **options), 2000)
    show("torch: torch.zeros(1, 128)", lambda: torch.zeros(1, 128), 2000)


print("| call | us |\n|---|---|")
planning()
try:
    tensors()
except ImportError as missing:
    print(f"(no tensors: {missing})")
