"""The layer over the ranks of a torch.distributed group: on CPUs, a process each; on GPUs where there are two."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
from on_gpu import no_hopper  # noqa: E402

RANKS = Path(__file__).with_name("expert_parallel_ranks.py")
without_group = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def run(*arguments):
    command = [sys.executable, str(RANKS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the bits of one rank" in done.stdout


@without_group
def test_ranks_on_cpus_have_the_bits_of_one():
    run("--ranks", "2", "--device", "cpu")


@pytest.mark.skipif(no_hopper() is not None or torch.cuda.device_count() < 2, reason="there are no two Hopper GPUs")
def test_ranks_on_gpus_have_the_bits_of_one():
    run("--ranks", str(min(torch.cuda.device_count(), 4)), "--device", "cuda")


@without_group
def test_what_does_not_fit_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        w13, w2 = torch.zeros(2, 64, 32, dtype=torch.bfloat16), torch.zeros(2, 32, 32, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match='gate_up is "up"'):
            et.ExpertParallelLayer(w13, w2, capacity=4, topk=1, gate_up="up")
        with pytest.raises(ValueError, match="placement has 2 lists, expected 1, one for each rank"):
            et.ExpertParallelLayer(w13, w2, capacity=4, topk=1, placement=[[0], [1]])
        with pytest.raises(ValueError, match="on rank 0: local_experts is 2, expected 3, as placed"):
            et.ExpertParallelLayer(w13, w2, capacity=4, topk=1, placement=[[0, 1, 2]])
        with pytest.raises(ValueError, match='combine is "mean"'):
            et.ExpertParallelLayer(w13, w2, capacity=4, topk=1, combine="mean")
        layer = et.ExpertParallelLayer(w13, w2, capacity=4, topk=1)
        assert "1 ranks of up to 4 tokens" in layer.choice and layer.capacity == 4
        x, router = torch.zeros(5, 32, dtype=torch.bfloat16), torch.ones(5, 1)
        with pytest.raises(ValueError, match="on rank 0: tokens is 5"):
            layer(x, torch.zeros(5, 1, dtype=torch.int64), router)
        assert layer(x[:3], torch.zeros(3, 1, dtype=torch.int32), router[:3]).shape == (3, 32)
    finally:
        torch.distributed.destroy_process_group()
