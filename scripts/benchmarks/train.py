"""One training step of ws_resnet50 with aws_sgd beside resnet50 with torch's fused SGD: all of it, on random images."""
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import timm_aws

from .turns import about, compare, save, show, take_turns

__all__ = ['train']

ROUNDS = 9
RECORD_EVERY = 50
MODES = (  # threads, bf16 autocast, channels_last, compiled
    *itertools.product((2,), (False, True), (False, True), (False,)),
    *itertools.product((2,), (False, True), (True,), (True,)),
    (1, False, True, False),
)
BASE, OURS = 'resnet50, torch SGD fused', 'ws_resnet50, aws_sgd fused'


def train(batch_size: int, img_size: int) -> None:
    """Checks, times, prints and writes."""
    error = _check(img_size)
    modes = {}
    for threads, bf16, channels_last, compiled in MODES:
        if bf16 and not _has_bf16():
            continue
        torch.set_num_threads(threads)
        title = ', '.join((
            f'{threads} threads', 'bf16 autocast' if bf16 else 'fp32',
            'channels_last' if channels_last else 'contiguous', 'compiled' if compiled else 'eager'))
        modes[title] = _mode(title, batch_size, img_size, bf16, channels_last, compiled)
    save('train', {
        **about(f'train --batch-size {batch_size} --img-size {img_size}'), 'rounds': ROUNDS,
        'error_of_the_logits': error, 'modes': modes,
        'share_of_the_recorder': _recorder(min(mode[OURS]['ms'] for mode in modes.values())),
    })


def _has_bf16() -> bool:
    """Whether the device computes in bf16. Other CPUs do so in software, at a tenth of the speed of float32."""
    return torch.cuda.is_available() or 'AVX512' in torch.backends.cpu.get_cpu_capability()


def _recorder(ms_of_training: float) -> float:
    """Returns by which share a recorder of every 50th step prolongs training steps of so many milliseconds."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for name, path in ((OURS, None), (f'{OURS}, recording', f'{folder}/record.csv')):
            model = timm.create_model('ws_resnet50')
            optimizer = create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=1e-4, fused=True)
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            if path:
                timm_aws.Recorder(optimizer, path, every=1)
            rows[name] = optimizer.step
        measured = compare(take_turns('recorder', rows, 2 * ROUNDS), dict.fromkeys(rows, OURS))
    show('2 threads, optimizer steps, each recorded', measured)
    ms = measured[f'{OURS}, recording']['ms'] - measured[OURS]['ms']
    return round(ms / RECORD_EVERY / ms_of_training, 5)


@torch.no_grad()
def _check(img_size: int) -> float:
    """Compares ws_resnet50 with resnet50 whose weights were standardized in float64; returns the largest error."""
    ours = timm.create_model('ws_resnet50').eval()
    plain = timm.create_model('resnet50').eval()
    weights = ours.state_dict()
    for name in timm_aws.normalized_weights(ours):
        weight = weights[name].double()
        centered = weight - weight.mean((1, 2, 3), keepdim=True)
        weights[name] = (centered / centered.square().mean((1, 2, 3), keepdim=True).sqrt()).float()
    plain.load_state_dict(weights)
    images = torch.randn(4, 3, img_size, img_size)
    expected = plain(images)
    error = ((ours(images) - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-4:
        raise ValueError(f'ws_resnet50 is {error:.1e} away from resnet50 with weights standardized in float64.')
    return error


def _mode(
        title: str,
        batch_size: int,
        img_size: int,
        bf16: bool,
        channels_last: bool,
        compiled: bool,
) -> dict[str, dict[str, float]]:
    torch._dynamo.reset()
    rows = {
        name: _step(model, opt, batch_size, img_size, bf16, channels_last, compiled)
        for name, model, opt in ((BASE, 'resnet50', 'momentum'), (OURS, 'ws_resnet50', 'aws_sgd'))
    }
    measured = compare(take_turns(title, rows, ROUNDS), dict.fromkeys(rows, BASE))
    show(title, measured)
    return measured


def _step(
        name: str,
        opt: str,
        batch_size: int,
        img_size: int,
        bf16: bool,
        channels_last: bool,
        compiled: bool,
) -> Callable[[], None]:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model: Any = timm.create_model(name, num_classes=200).to(device, memory_format=memory_format)
    optimizer = create_optimizer_v2(model, opt, lr=0.1, weight_decay=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    images = torch.randn(batch_size, 3, img_size, img_size, device=device).to(memory_format=memory_format)
    labels = torch.arange(batch_size, device=device) % 200

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
