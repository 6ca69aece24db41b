"""The expert layers that are compared, by key. One more is a class of `base.Rival` in a module of its own."""

from rivals.expertile import Expertile, ExpertileCopy, ExpertileW4A16
from rivals.humming import Humming, HummingBatchInvariant, HummingMxfp4
from rivals.marlin import Marlin
from rivals.triton_kernels import TritonKernels
from rivals.vllm_deepgemm import VllmDeepGemm
from rivals.vllm_triton import VllmTriton, VllmTritonBatchInvariant

OURS = Expertile.key
RIVALS = {
    rival.key: rival
    for rival in (
        Expertile(),
        VllmTriton(),
        VllmDeepGemm(),
        Humming(),
        VllmTritonBatchInvariant(),
        HummingBatchInvariant(),
        HummingMxfp4(),
        ExpertileW4A16(),
        ExpertileCopy(),
        TritonKernels(),
        Marlin(),
    )
}
