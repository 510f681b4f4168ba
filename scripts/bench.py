"""What one optimizer step costs, beside the optimizers that people use.

    python scripts/bench.py step [--model ws_resnet50]

Times one step over all parameters of a model, gradients given. The optimizers take turns, round by round, so that a
drift of the machine meets them all; figures are medians over the rounds with the lowest and the highest, and ratios to
torch's fused SGD (AdamW for the Adam family) of the same round. Each of our rows is held against Eq. 21 in float64 at
this very size before it is timed. Nesterov momentum is off everywhere.

Prints a table and writes scripts/results/bench_step.json.
"""
import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from tqdm import tqdm

import timm_aws
from timm_aws import AwsAdam, AwsSGD

RESULTS = Path(__file__).parent / 'results'
LR, MOMENTUM, ALPHA, DECAY = 1e-3, 0.9, 2.5e-3, 1e-4
WARM_UP, ROUNDS = 3, 15
SGD = {'lr': LR, 'momentum': MOMENTUM}
Params = list[torch.nn.Parameter]

# Name to what makes the optimizer; the first of a family is what the others are compared with.
FAMILIES: dict[str, dict[str, Callable[[Params], torch.optim.Optimizer]]] = {
    'SGD': {
        'torch SGD, fused': lambda p: torch.optim.SGD(p, **SGD, weight_decay=DECAY, fused=True),
        'torch SGD, foreach': lambda p: torch.optim.SGD(p, **SGD, weight_decay=DECAY, foreach=True),
        'torch SGD, loop': lambda p: torch.optim.SGD(p, **SGD, weight_decay=DECAY, foreach=False),
        'AwsSGD, fused': lambda p: AwsSGD(p, **SGD, alpha=ALPHA, fused=True),
        'AwsSGD, foreach': lambda p: AwsSGD(p, **SGD, alpha=ALPHA, foreach=True),
        'AwsSGD, loop': lambda p: AwsSGD(p, **SGD, alpha=ALPHA, foreach=False),
        'AwsSGD, fused, decoupled': lambda p: AwsSGD(p, **SGD, alpha=ALPHA, fused=True, decoupled=True),
        **{
            f'timm {name}': lambda p, name=name: create_optimizer_v2(
                p, name, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=False)
            for name in ('sgdw', 'sgdc', 'lars', 'sgdp')
        },
    },
    'Adam': {
        'torch AdamW, fused': lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY, fused=True),
        'torch AdamW, foreach': lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY, foreach=True),
        'torch AdamW, loop': lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY, foreach=False),
        'AwsAdam, fused': lambda p: AwsAdam(p, LR, alpha=ALPHA, fused=True),
        'AwsAdam, foreach': lambda p: AwsAdam(p, LR, alpha=ALPHA, foreach=True),
        'AwsAdam, loop': lambda p: AwsAdam(p, LR, alpha=ALPHA, foreach=False),
        'timm adamp': lambda p: create_optimizer_v2(p, 'adamp', lr=LR, weight_decay=DECAY, nesterov=False),
    },
}


def make_params(model: str) -> Params:
    """Returns parameters of the model's shapes with gradients, drawn at random with the size of trained ones."""
    with torch.device('meta'):
        shapes = [p.shape for p in timm.create_model(model).parameters()]
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.04) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 0.01
    return params


def check(make: Callable[[Params], torch.optim.Optimizer], model: str) -> float:
    """Takes two steps of one of our optimizers and of Eq. 21 in float64.

    Args:
        make: Makes the optimizer.
        model: Name of the model.

    Returns:
        The largest error of a weight, relative to the largest weight of its tensor.

    Raises:
        ValueError: If it is over 1e-6.
    """
    params = make_params(model)
    starts = [p.detach().double() for p in params]
    optimizer = make(params)
    optimizer.step()
    optimizer.step()
    twin, = optimizer.param_groups
    expected = [_two_steps(start, p.grad.double(), twin) for start, p in zip(starts, params)]
    error = max(((p.double() - e).abs().max() / e.abs().max()).item() for p, e in zip(params, expected))
    if error > 1e-6:
        raise ValueError(f'{type(optimizer).__name__} is {error:.1e} away from Eq. 21 in float64 on {model}.')
    return error


@torch.no_grad()
def _two_steps(weight: torch.Tensor, grad: torch.Tensor, group: dict) -> torch.Tensor:
    """Takes two steps of Eq. 21 in float64, with torch's loop over plain tensors for what is not the shrink."""
    param = torch.nn.Parameter(weight.clone())
    if 'betas' in group:
        optimizer = torch.optim.Adam([param], LR, foreach=False)
    else:
        optimizer = torch.optim.SGD([param], **SGD, foreach=False)
    for _ in range(2):
        gamma = torch.zeros(())
        if param.ndim >= 2:
            gamma = ALPHA * param.std(dim=tuple(range(1, param.ndim)), correction=0, keepdim=True)
        if group['decoupled']:
            param.grad = grad
            param.mul_(1 - LR * gamma)
        else:
            param.grad = grad + gamma * param
        optimizer.step()
    return param.detach()


def time_steps(model: str, threads: int) -> dict[str, dict]:
    """Times all rows in turn; returns milliseconds and ratios of each."""
    torch.set_num_threads(threads)
    rows = {
        name: (make(make_params(model)), base)
        for base, family in FAMILIES.items() for name, make in family.items()
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in tqdm(range(WARM_UP + ROUNDS), desc=f'{threads} threads', unit='round', leave=False, disable=None):
        for name, (optimizer, _) in rows.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(1000 * (time.perf_counter() - start))
    measured = {}
    for name, (_, base) in rows.items():
        own, first = times[name][WARM_UP:], times[next(iter(FAMILIES[base]))][WARM_UP:]
        measured[name] = {
            'ms': round(statistics.median(own), 2), 'min': round(min(own), 2), 'max': round(max(own), 2),
            'ratio': round(statistics.median(a / b for a, b in zip(own, first)), 2),
        }
    return measured


def step(model: str) -> None:
    """Checks, times, prints and writes."""
    errors = {
        name: check(make, model)
        for family in FAMILIES.values() for name, make in family.items() if name.startswith('Aws')
    }
    result = {
        'command': f'python scripts/bench.py step --model {model}', 'rounds': ROUNDS, 'errors': errors,
        'parameters': sum(p.numel() for p in make_params(model)),
        'threads': {threads: time_steps(model, threads) for threads in (2, 1)},
        'versions': {'torch': torch.__version__, 'timm': timm.__version__, 'timm_aws': timm_aws.__version__},
        'hardware': f'{os.cpu_count()} cores, {platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}',
    }
    for threads, rows in result['threads'].items():
        print(f'{threads} threads{"":20s}  ms (lowest to highest)   ratio')
        for name, row in rows.items():
            print(f'{name:28s} {row["ms"]:8.1f} ({row["min"]:.1f} to {row["max"]:.1f}){"":6s} {row["ratio"]:8.2f}')
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / 'bench_step.json').write_text(json.dumps(result, indent=2) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    step_parser = commands.add_parser('step', help='one optimizer step over the parameters of a model')
    step_parser.add_argument('--model', default='ws_resnet50', help='whose parameters (default: ws_resnet50)')
    step(parser.parse_args().model)


if __name__ == '__main__':
    main()
