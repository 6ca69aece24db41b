"""Transformers' experts computed by ``expertile.torch.Layer``.

>>> import expertile.transformers
>>> model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16", experts_implementation="expertile")

Importing the module registers the implementation, for bfloat16 experts, for float8_e4m3fn ones with 128 x 128 block
scales and for MXFP4 ones (gpt-oss's, DeepSeek-V4's), on the CPU and on a Hopper GPU. Models that do not ask for it are
loaded and computed as before.

- What no layer computes raises ValueError or TypeError when the model is made or loaded, or when
  ``set_experts_implementation`` is called, with the name of the module.
- A layer is made by the first call of its experts. On the CPU that packs the weights and gives the memory of the
  original ones back; ``state_dict``, and so ``save_pretrained``, unpacks them again. On a GPU weights in the usual
  order are used where they are; others, and MXFP4, are copied, and given back likewise. ``configure`` changes that.
- On the CPU an FP8 checkpoint keeps what is quantized in it, experts and linear layers, which Transformers would widen.
  An MXFP4 checkpoint of gpt-oss keeps its experts in 4 bits, on a Hopper GPU too.
"""

from __future__ import annotations

from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import fp8, load, mxfp4
from .experts import NAME
from .forward import configure, experts_forward

__all__ = ["configure", "experts_forward"]

ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
load.register()
fp8.register()
mxfp4.register()
