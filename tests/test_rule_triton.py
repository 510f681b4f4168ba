"""The Triton kernel on a machine without a GPU: interpreted on the CPU, and compiled for a GPU."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_aws.rule import NORMALIZATIONS

triton = pytest.importorskip('triton', reason='Triton is not installed')


def test_kernel_in_the_interpreter():
    """In a process of its own: Triton looks when it is imported whether it is to interpret."""
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-o', 'addopts=',
         str(Path(__file__).with_name('interpreted_rule_triton.py'))],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize('lr', [None, 'fp32', '*fp32'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_compiles_for_a_gpu(dtype, lr, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_aws import rule_triton

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    constants = {
        'dtype': rule_triton.TYPES[dtype], **NORMALIZATIONS['ws']._asdict(), 'decoupled': lr is not None,
        'lr_on_device': lr == '*fp32', 'block': rule_triton.BLOCK}
    signature = {'table': '*i64', 'alpha': 'fp32', 'lr': lr or 'fp32', **dict.fromkeys(constants, 'constexpr')}
    source = ASTSource(rule_triton._shrink_filter, signature, constants)
    assert '.target sm_80' in triton.compile(source, target=GPUTarget('cuda', 80, 32)).asm['ptx']
