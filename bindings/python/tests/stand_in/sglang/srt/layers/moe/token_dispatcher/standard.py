import enum
from typing import Any, NamedTuple


class DispatchOutputFormat(enum.Enum):
    STANDARD = "standard"
    DEEPEP_NORMAL = "deepep_normal"

    def is_standard(self):
        return self is DispatchOutputFormat.STANDARD


class StandardDispatchOutput(NamedTuple):
    hidden_states: Any
    hidden_states_scale: Any
    topk_output: Any
    hidden_states_pre_quant: Any = None

    @property
    def format(self):
        return DispatchOutputFormat.STANDARD


class DeepEPNormalDispatchOutput(NamedTuple):
    hidden_states: Any

    @property
    def format(self):
        return DispatchOutputFormat.DEEPEP_NORMAL


class StandardCombineInput(NamedTuple):
    hidden_states: Any
