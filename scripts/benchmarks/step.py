"""One optimizer step over the parameters of a model, beside other optimizers.

Each of our rows is compared with Eq. 21 in float64 at this size before it is timed. Nesterov momentum is off
everywhere.
"""
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2

from timm_aws import AwsAdam, AwsSGD

from .turns import about, compare, save, show, take_turns

__all__ = ['FAMILIES', 'check', 'make_params', 'step']

LR, MOMENTUM, ALPHA, DECAY = 1e-3, 0.9, 2.5e-3, 1e-4
ROUNDS = 21
SGD = {'lr': LR, 'momentum': MOMENTUM}
Params = list[torch.nn.Parameter]


def _grouped(params: Params) -> list[dict[str, Any]]:
    """Returns groups that shrink the convolutions and decay the rest. In torch's rows everything decays."""
    return [
        {'params': [p for p in params if p.ndim == 4], 'normalization': 'ws'},
        {'params': [p for p in params if p.ndim != 4], 'alpha': 0., 'normalization': None, 'weight_decay': DECAY},
    ]


def _aws_sgd(params: Params, **options: Any) -> AwsSGD:
    return AwsSGD(_grouped(params), **{**SGD, 'alpha': ALPHA, **options})


def _aws_adam(params: Params, **options: Any) -> AwsAdam:
    return AwsAdam(_grouped(params), **{'lr': LR, 'alpha': ALPHA, **options})


def _compiled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


# Name to the function that makes the optimizer. The first of a family is the base of the others.
FAMILIES: dict[str, dict[str, Callable[[Params], torch.optim.Optimizer]]] = {
    'SGD': {
        'torch SGD, fused': lambda p: torch.optim.SGD(p, **SGD, weight_decay=DECAY, fused=True),
        'torch SGD, foreach': lambda p: torch.optim.SGD(p, **SGD, weight_decay=DECAY, foreach=True),
        'torch SGD, loop': lambda p: torch.optim.SGD(p, **SGD, weight_decay=DECAY, foreach=False),
        'torch SGD, compiled': lambda p: _compiled(
            torch.optim.SGD(p, lr=torch.tensor(LR), momentum=MOMENTUM, weight_decay=DECAY)),
        'AwsSGD, fused': lambda p: _aws_sgd(p, fused=True),
        'AwsSGD, fused, decoupled': lambda p: _aws_sgd(p, fused=True, decoupled=True),
        'AwsSGD, compiled': lambda p: _compiled(_aws_sgd(p, lr=torch.tensor(LR))),  # a number would be compiled in
        'AwsSGD, foreach': lambda p: _aws_sgd(p, foreach=True),
        'AwsSGD, loop': lambda p: _aws_sgd(p, foreach=False),
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
        'torch AdamW, compiled': lambda p: _compiled(torch.optim.AdamW(p, torch.tensor(LR), weight_decay=DECAY)),
        'AwsAdam, fused': lambda p: _aws_adam(p, fused=True),
        'AwsAdam, compiled': lambda p: _compiled(_aws_adam(p, lr=torch.tensor(LR))),
        'AwsAdam, foreach': lambda p: _aws_adam(p, foreach=True),
        'AwsAdam, loop': lambda p: _aws_adam(p, foreach=False),
        'timm adamp': lambda p: create_optimizer_v2(p, 'adamp', lr=LR, weight_decay=DECAY, nesterov=False),
    },
}


def make_params(model: str) -> Params:
    """Returns parameters of the model's shapes with gradients, drawn at random with the size of trained ones."""
    with torch.device('meta'):
        shapes = [p.shape for p in timm.create_model(model).parameters()]
    return params_of_shapes(shapes)


def params_of_shapes(shapes: list[torch.Size] | list[tuple[int, ...]]) -> Params:
    """Returns parameters of these shapes with gradients, on the GPU where there is one."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.04).to(device)) for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 0.01).to(device)
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
    starts = {p: p.detach().double() for p in params}
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    error = 0.
    for group in optimizer.param_groups:
        for param in group['params']:
            expected = _two_steps(starts[param], param.grad.double(), group)
            error = max(error, ((param.double() - expected).abs().max() / expected.abs().max()).item())
    if error > 1e-6:
        raise ValueError(f'{type(optimizer).__name__} is {error:.1e} away from Eq. 21 in float64 on {model}.')
    return error


@torch.no_grad()
def _two_steps(weight: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Takes two steps of Eq. 21 in float64, with torch's loop over plain tensors for what is not the shrink."""
    param = torch.nn.Parameter(weight.clone())
    if 'betas' in group:
        optimizer = torch.optim.Adam([param], LR, foreach=False)
    else:
        optimizer = torch.optim.SGD([param], **SGD, foreach=False)
    for _ in range(2):
        gamma = torch.full((), group['weight_decay'], dtype=param.dtype, device=param.device)
        if group['alpha'] > 0:
            gamma = ALPHA * param.std(dim=tuple(range(1, param.ndim)), correction=0, keepdim=True)
        if group['decoupled'] and ('betas' in group or group['alpha'] > 0):  # SGD's weight decay is always coupled
            param.grad = grad
            param.mul_(1 - LR * gamma)
        else:
            param.grad = grad + gamma * param
        optimizer.step()
    return param.detach()


def step(model: str) -> None:
    """Checks, times, prints and writes."""
    errors = {
        name: check(make, model)
        for family in FAMILIES.values() for name, make in family.items() if name.startswith('Aws')
    }
    optimizers = {name: make(make_params(model)) for family in FAMILIES.values() for name, make in family.items()}
    base_of = {name: next(iter(family)) for family in FAMILIES.values() for name in family}
    threads = {}
    for count in (2, 1):
        torch.set_num_threads(count)
        times = take_turns(f'{count} threads', {name: o.step for name, o in optimizers.items()}, ROUNDS)
        threads[count] = compare(times, base_of)
        show(f'One step over the parameters of {model}, {count} threads', threads[count])
    save('step', {
        **about(f'step --model {model}'), 'rounds': ROUNDS, 'errors': errors,
        'parameters': sum(p.numel() for p in make_params(model)), 'threads': threads,
    })
