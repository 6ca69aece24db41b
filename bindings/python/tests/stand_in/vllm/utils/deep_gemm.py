"""Stands in for vLLM's wrapper of DeepGEMM."""

state = {"alignment": 128, "theoretical": None}


def get_mk_alignment_for_contiguous_layout():
    return [state["alignment"], state["alignment"]]


def set_mk_alignment_for_contiguous_layout(value):
    state["alignment"] = value


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m=None, num_groups=None):
    if state["theoretical"] is None:
        raise RuntimeError("unexpected second argument")
    return state["theoretical"]
