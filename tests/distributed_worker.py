"""Run by test_distributed.py under torchrun: trains on one process, under DDP and under FSDP2, and compares."""
import os
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import timm_aws
from timm_aws import AwsAdam, AwsSGD, WSConv2d

X = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 4


def network() -> nn.Module:
    """Five and three filters, which two processes cannot share evenly; no batch norm, so the batch may be split."""
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Tanh(),
        WSConv2d(5, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4),
    ).double()


def sharded(model: nn.Module) -> nn.Module:
    for layer in model:
        if isinstance(layer, (WSConv2d, nn.Linear)):
            fully_shard(layer)
    return fully_shard(model)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, cls: type, options: dict) -> list[torch.Tensor]:
    """Takes six steps; returns the whole parameters."""
    groups = timm_aws.param_groups_aws(model, alpha=0.5, weight_decay=0.01)
    optimizer = cls(groups, lr=0.05, **options)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert sum(len(group['params']) for group in optimizer.param_groups if group['alpha']) == 2
    return [p.full_tensor() if hasattr(p, 'full_tensor') else p.detach() for p in model.parameters()]


def main() -> None:
    dist.init_process_group('gloo')
    rank, size = dist.get_rank(), dist.get_world_size()
    for cls in (AwsSGD, AwsAdam):
        for options in ({'decoupled': False}, {'decoupled': True}, {'decoupled': False, 'foreach': True}):
            if cls is AwsSGD:
                options = {**options, 'momentum': 0.9}
            alone = train(network(), X, Y, cls, options)
            for wrap in (DistributedDataParallel, sharded):
                together = train(wrap(network()), X[rank::size], Y[rank::size], cls, options)
                error = max((a - b).abs().max().item() for a, b in zip(alone, together))
                print(cls.__name__, options, wrap.__name__, error, file=sys.stderr)
                assert error < 1e-13
                for param in together:
                    first = param.clone()
                    dist.broadcast(first, 0)
                    assert torch.equal(first, param)
    dist.barrier()
    print(f'rank {rank} done', flush=True)
    os._exit(0)  # torch's own teardown of gloo after FSDP2 aborts about one run in ten, when all has been compared


if __name__ == '__main__':
    main()
