import enum


class MoeRunnerBackend(enum.Enum):
    TRITON = "triton"
    DEEP_GEMM = "deep_gemm"


class MoeA2ABackend(enum.Enum):
    NONE = "none"
    DEEPEP = "deepep"

    def is_none(self):
        return self is MoeA2ABackend.NONE


all_to_all = MoeA2ABackend.NONE


def get_moe_a2a_backend():
    return all_to_all
