"""Made-up weights of 4 bits, as checkpoints have them."""

import math

import torch


def blocks(experts, rows, columns, generator):
    """Random nibbles, and scales that keep sums of their products near 1; some groups are zeros."""
    values = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    values[torch.rand(values.shape[:3], generator=generator) < 0.02] = 0
    near = 125 - int(math.log2(columns) / 2)
    return values, torch.randint(near - 2, near + 1, values.shape[:3], generator=generator, dtype=torch.uint8)


def words(experts, rows, columns, generator):
    """Random words of int4, and scales that keep sums of their products near 1: f16 ones of gate and up, else bf16."""
    values = torch.randint(-(2**31), 2**31, (experts, rows, columns // 8), generator=generator).to(torch.int32)
    scales = (torch.rand(experts, rows, columns // 32, generator=generator) + 0.5) / (4.6 * columns**0.5)
    return values, scales.to(torch.float16 if rows > columns else torch.bfloat16)


def weights_of_4_bits(experts, hidden, intermediate, form, generator):
    """w13 and w2 with their scales, on the CPU."""
    make = words if form.startswith("int4") else blocks
    (w13, s13), (w2, s2) = (
        make(experts, rows, columns, generator)
        for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    return {"w13": w13, "w2": w2, "w13_scale": s13, "w2_scale": s2}


def has_4_bits(form):
    return form.startswith(("mxfp4", "int4"))
