"""Two processes reach what one reaches on the joint batch, with DDP and with FSDP2."""
import subprocess
import sys
from pathlib import Path


def test_ddp_and_fsdp2_equal_one_process():
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
         str(Path(__file__).with_name('distributed_worker.py'))],
        capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count(' done') == 2
