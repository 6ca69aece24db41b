"""The expert half of a Mixture-of-Experts layer.

Planning works with nothing installed beside this package:

>>> import expertile
>>> expertile.Plan.tight(tokens=128, topk=8, local_experts=128)
Plan(tokens=128, topk=8, local_experts=128, alignment=128, m_sum=16384)

``expertile.deep_gemm_utils``
    vLLM's module of that name, function for function, on torch tensors and NumPy arrays.
``expertile.torch``
    What that module lacks, as torch operators.
``expertile.deep_gemm``
    DeepGEMM's grouped GEMMs of contiguous rows, argument for argument.
``expertile.vllm``
    Experts for an installed vLLM, or ``expertile.deep_gemm_utils`` in the place of its own.

Bad input raises ``ValueError``, or ``TypeError`` for a wrong type or dtype: an :class:`ArgumentError`, whose message
and attributes say which argument, what it was and what was expected. Nothing has been written.
"""

from ._errors import ArgumentDeviceError, ArgumentError, ArgumentMemoryError, ArgumentTypeError, ArgumentValueError
from ._native import (
    Plan,
    __version__,
    compute_aligned_m_and_alignment,
    expert_num_tokens_round_up_and_sum,
    get_num_threads,
    round_up,
    set_num_threads,
    theoretical_alignment,
    tight_m_sum,
)

__all__ = [
    "ArgumentDeviceError",
    "ArgumentError",
    "ArgumentMemoryError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "Plan",
    "__version__",
    "compute_aligned_m_and_alignment",
    "expert_num_tokens_round_up_and_sum",
    "get_num_threads",
    "round_up",
    "set_num_threads",
    "theoretical_alignment",
    "tight_m_sum",
]
