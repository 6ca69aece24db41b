"""The expert layers that are compared, and what each would take at best."""

from typing import NamedTuple

# Of weights read, and of products in the format of weights and rows: what a Hopper gave on random data, hot.
READ_TBS = 4.43
# Rows beside MXFP4 weights are e4m3; those beside the others have their format.
TFLOPS = {"e4m3": 1300.0, "bf16": 700.0, "mxfp4": 1300.0}
WEIGHT_BYTES = {"e4m3": 1, "bf16": 2, "mxfp4": 17 / 32}


class Shape(NamedTuple):
    """H, I, experts whose weights are here, experts per token, and all experts that a token may choose."""

    hidden: int
    intermediate: int
    experts: int
    topk: int
    global_experts: int

    def numbers(self):
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    "dsv3": Shape(7168, 2048, 256, 8, 256),
    "dsv3_ep8": Shape(7168, 2048, 32, 8, 256),
    "dsv3_tp8": Shape(7168, 256, 256, 8, 256),
    "qwen235": Shape(4096, 1536, 128, 8, 128),
    "qwen235_tp4": Shape(4096, 384, 128, 8, 128),
    "qwen30b": Shape(2048, 768, 128, 8, 128),
    "mixtral": Shape(4096, 14336, 8, 2, 8),
    "gpt_oss": Shape(2880, 2880, 128, 4, 128),
}


class Swiglu(NamedTuple):
    """What a layer does between its products and beside them."""

    alpha: float = 1.0
    beta: float = 0.0
    # Of gate from above, of up on both sides; none where it is 0.
    limit: float = 0.0
    # Gate's and up's rows of w13 take turns, instead of gate's first.
    interleaved: bool = False
    # Both products have biases.
    biased: bool = False


# Of gpt-oss-120b, whose checkpoints have MXFP4 weights.
SWIGLU = {"gpt_oss": Swiglu(alpha=1.702, beta=1.0, limit=7.0, interleaved=True, biased=True)}


def swiglu_of(shape):
    return SWIGLU.get(shape, Swiglu())


# Those of the comparisons step by step.
STEP_SHAPES = ("dsv3", "dsv3_ep8", "qwen235", "mixtral")


def add_shape(text):
    """Adds a shape that is written as its numbers, `H,I,E,topk[,G]`; -> its name."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (4, 5):
        raise ValueError(f"shape {text!r}, expected H,I,E,topk or H,I,E,topk,G: four or five whole numbers")
    shape = Shape(*numbers[:4], numbers[4] if len(numbers) == 5 else numbers[2])
    if shape.hidden < 1 or shape.hidden % 128 or shape.intermediate < 1 or shape.intermediate % 128:
        raise ValueError(f"shape {text!r}, expected H and I that are multiples of 128")
    if not 1 <= shape.topk <= shape.global_experts or not 1 <= shape.experts <= shape.global_experts:
        raise ValueError(f"shape {text!r}, expected 1 <= topk <= G and 1 <= E <= G")
    name = f"h{shape.hidden}_i{shape.intermediate}_e{shape.experts}_k{shape.topk}"
    if shape.experts != shape.global_experts:
        name += f"_of{shape.global_experts}"
    SHAPES[name] = shape
    return name


def floor_us(numbers, live, active, format):
    """The larger of reading the active experts' weights once, `numbers` each, and of the products of the live rows."""
    read = active * numbers * WEIGHT_BYTES[format] / (READ_TBS * 1e6)
    return max(read, 2 * live * numbers / (TFLOPS[format] * 1e6))
