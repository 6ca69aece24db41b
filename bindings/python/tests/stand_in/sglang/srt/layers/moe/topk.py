from typing import Any, NamedTuple


class StandardTopKOutput(NamedTuple):
    topk_weights: Any
    topk_ids: Any
    router_logits: Any


class BypassedTopKOutput(NamedTuple):
    hidden_states: Any
    router_logits: Any


class TopKOutputChecker:
    @staticmethod
    def format_is_standard(topk_output):
        return isinstance(topk_output, StandardTopKOutput)
