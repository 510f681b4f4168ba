"""What test_resume.py trains. Run as a script it is the new process: it goes on from saved states, to the last step.

    python resume_worker.py STATES_IN STATES_OUT
"""
import itertools
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_aws
from timm_aws import AwsAdam, AwsSGD, WSConv2d

STEPS, SAVED_AT, SKIPPED = 6, 3, 1
OPTIMIZERS = {'AwsSGD': AwsSGD, 'AwsAdam': AwsAdam}
PATHS = {'loop': {'foreach': False}, 'foreach': {'foreach': True}, 'fused': {'fused': True}, 'compiled': {}}
CASES = {
    '-'.join(case): case for case in [
        *itertools.product(OPTIMIZERS, ['coupled', 'decoupled'], ['loop', 'foreach', 'fused'], ['fp32', 'amp']),
        ('AwsSGD', 'coupled', 'compiled', 'amp'),
        ('AwsAdam', 'decoupled', 'compiled', 'fp32'),
    ]
}


def train(case, state, until):
    """Goes on from a state, or from the start where it is None; returns the state after step `until`."""
    name, rule, path, precision = case
    torch.manual_seed(0)
    model = nn.Sequential(WSConv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    options = {'momentum': 0.9} if name == 'AwsSGD' else {}
    optimizer = OPTIMIZERS[name](
        timm_aws.param_groups_aws(model, alpha=0.5, weight_decay=0.01),
        # A number would be compiled in, and another one compiled anew.
        lr=torch.tensor(0.1) if path == 'compiled' else 0.1,
        decoupled=rule == 'decoupled',
        **options,
        **PATHS[path],
    )
    # Grows after two good steps, so that what it counts matters.
    scaler = torch.amp.GradScaler('cpu', enabled=precision == 'amp', init_scale=2. ** 10, growth_interval=2)
    if state is not None:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        scaler.load_state_dict(state['scaler'])
    if path == 'compiled':
        # Captured by dynamo and run op by op: what is tested is the state, not the code generator.
        model.compile(backend='aot_eager')
        optimizer.step = torch.compile(optimizer.step, backend='eager')
    for step in range(0 if state is None else state['steps'], until):
        _set_lr(optimizer, 0.1 / (1 + step))
        x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        with torch.autocast('cpu', torch.float16, enabled=precision == 'amp'):
            loss = F.cross_entropy(model(x), torch.arange(5) % 3)
        if precision == 'amp' and step == SKIPPED:
            loss = loss * 1e6  # overflows on the way back
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {
        'steps': until,
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'scaler': scaler.state_dict(),
    }


def _set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(lr)
        else:
            group['lr'] = lr


if __name__ == '__main__':
    states_in, states_out = sys.argv[1:]
    torch.save({name: train(CASES[name], state, STEPS) for name, state in torch.load(states_in).items()}, states_out)
