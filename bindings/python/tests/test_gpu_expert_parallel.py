"""The layer over several GPUs. Skips without two Hopper GPUs; its errors without any need none."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
from on_gpu import no_hopper  # noqa: E402

RANKS = Path(__file__).with_name("expert_parallel_ranks.py")


@pytest.mark.skipif(no_hopper() is not None or torch.cuda.device_count() < 2, reason="there are no two Hopper GPUs")
def test_ranks_have_the_bits_of_one_gpu():
    ranks = min(torch.cuda.device_count(), 4)
    done = subprocess.run(
        [sys.executable, str(RANKS), "--ranks", str(ranks)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the bits of one GPU" in done.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_weights_on_the_cpu_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        w13, w2 = torch.zeros(2, 64, 32, dtype=torch.bfloat16), torch.zeros(2, 32, 32, dtype=torch.bfloat16)
        with pytest.raises((ValueError, RuntimeError), match="on the CPU|cuda"):
            et.ExpertParallelLayer(w13, w2, capacity=4, topk=1)
        with pytest.raises(ValueError, match='gate_up is "up"'):
            et.ExpertParallelLayer(w13, w2, capacity=4, topk=1, gate_up="up")
    finally:
        torch.distributed.destroy_process_group()
