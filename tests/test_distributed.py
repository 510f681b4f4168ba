"""Two processes reach what one reaches on the joint batch, with what torch has for it, and in timm's train.py."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from distributed_worker import CHECKS, X, Y, resume, save_halfway
from PIL import Image
from timm.optim import create_optimizer_v2

import timm_aws

# train.py names a device to DDP, which takes none on the CPU.
DDP_ON_CPU = '''
from torch.nn.parallel import DistributedDataParallel

init = DistributedDataParallel.__init__
DistributedDataParallel.__init__ = lambda self, module, device_ids, **options: init(self, module, **options)
'''


def on_two_processes(folder, *args):
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', *args],
        cwd=folder, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])},
        capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def worker(tmp_path_factory):
    """The folder and the outcome of one run of all checks, with a checkpoint of one process to start from."""
    folder = tmp_path_factory.mktemp('distributed')
    save_halfway(folder / 'saved_by_one', lambda model: model, X, Y)
    return folder, on_two_processes(folder, str(Path(__file__).with_name('distributed_worker.py')))


@pytest.mark.parametrize('check', CHECKS)
def test_two_processes_equal_one(worker, check):
    _, run = worker
    assert {f'rank {rank} passed {check}' for rank in (0, 1)} <= set(run.stdout.splitlines()), run.stderr


def test_worker_ends_well(worker):
    _, run = worker
    assert run.returncode == 0, run.stderr


def test_checkpoint_of_two_processes_goes_on_on_one(worker):
    folder, run = worker
    assert (folder / 'saved_by_two').is_dir(), run.stderr
    resume(folder / 'saved_by_two', lambda model: model, X, Y)


@pytest.mark.skipif('TIMM_SCRIPTS' not in os.environ, reason="TIMM_SCRIPTS names no folder of timm's train.py")
def test_run_takes_train_py_under_torchrun(tmp_path):
    for index in range(16):
        image = tmp_path / 'images' / ('train' if index < 8 else 'validation') / 'ab'[index % 2] / f'{index}.png'
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(256, size=(48, 48, 3), dtype=np.uint8)).save(image)
    (tmp_path / 'ddp_on_cpu.py').write_text(DDP_ON_CPU)
    run = on_two_processes(
        tmp_path, '-m', 'timm_aws', 'run', os.path.join(os.environ['TIMM_SCRIPTS'], 'train.py'),
        '--data-dir', 'images', '--model', 'test_ws_resnet', '--num-classes', '2', '--img-size', '32', '-b', '2',
        '--epochs', '1', '--opt', 'aws_sgd', '--opt-kwargs', 'alpha=0.01', 'record=record.csv', '--lr', '0.1',
        '--weight-decay', '1e-4', '--device', 'cpu', '--device-modules', 'ddp_on_cpu', '--no-prefetcher', '-j', '0',
        '--output', 'runs')
    assert run.returncode == 0, run.stderr
    (summary,) = tmp_path.rglob('summary.csv')
    assert len(list(csv.DictReader(summary.open()))) == 1
    checkpoint = torch.load(summary.with_name('last.pth.tar'), weights_only=False)
    model = timm.create_model('test_ws_resnet', num_classes=2)
    model.load_state_dict(checkpoint['state_dict'])
    saved = checkpoint['optimizer']['param_groups']
    optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=1e-4)
    assert {(g['alpha'], g['normalization']): len(g['params']) for g in saved if g['alpha']} == {(0.01, 'ws'): 15}
    optimizer.load_state_dict(checkpoint['optimizer'])
    # Both processes are given the record, one of them writes it.
    rows = list(csv.DictReader((tmp_path / 'record.csv').open()))
    names = timm_aws.effective_lr(optimizer)
    assert [(row['step'], row['layer']) for row in rows] == [(step, name) for step in '12' for name in names]
