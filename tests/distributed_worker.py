"""Run by test_distributed.py under torchrun: each check trains on one process and on several, and compares.

A check that passes says so, one that fails prints its traceback, and the next one follows. Files are those of the
folder that it is run in.
"""
import contextlib
import csv
import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import timm_aws
from timm_aws import AwsAdam, AwsSGD, WSConv2d
from timm_aws.rule import NORMALIZATIONS, filter_length

X = torch.randn(8, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 4

OPTIMIZERS = [
    (cls, {**options, **own})
    for cls, own in ((AwsSGD, {'momentum': 0.9}), (AwsAdam, {}))
    for options in ({'decoupled': False}, {'decoupled': True}, {'decoupled': False, 'foreach': True})
]
# What is saved differs from the defaults in `decoupled`.
SAVED = {'sgd': (AwsSGD, {'momentum': 0.9, 'decoupled': True}), 'adam': (AwsAdam, {'decoupled': False})}
# Filters of the two convolutions: such that two processes hold different numbers of them; such that there are even
# numbers of input channels, which FSDP2 asks for where it splits them; and a single one in the second.
UNEVEN, EVEN, SINGLE = (5, 3), (6, 3), (5, 1)


def network(filters=UNEVEN):
    """No batch norm, so the batch may be split, and no bias before a norm, whose gradient is rounding noise to Adam."""
    first, second = filters
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(4, first, 3, bias=False), nn.GroupNorm(1, first), nn.Tanh(),
        WSConv2d(first, second, 3, bias=False), nn.GroupNorm(1, second), nn.Tanh(),
        nn.Flatten(), nn.Linear(16 * second, 4),
    ).double()


def whole_filters(model):
    """FSDP2 as it comes, each process holds some of the filters."""
    return sharded(model, lambda param: None)


def split_filters(model):
    """FSDP2 where each process holds some of the input channels of each filter."""
    return sharded(model, lambda param: Shard(1) if param.ndim == 4 else None)


def sharded(model, placement):
    for layer in model:
        if isinstance(layer, (WSConv2d, nn.Linear)):
            fully_shard(layer, shard_placement_fn=placement)
    return fully_shard(model, shard_placement_fn=placement)


def own_share():
    """This process's part of the batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return X[rank::size], Y[rank::size]


def groups_of(model):
    groups = timm_aws.param_groups_aws(model, alpha=0.5, weight_decay=0.01)
    assert sum(len(group['params']) for group in groups if group['alpha']) == 2
    return groups


def optimizer_of(model, cls, options):
    return cls(groups_of(model), lr=0.05, **options)


def train(model, optimizer, *batches, steps=6):
    """Takes steps whose gradients are accumulated over the batches, which DDP is told."""
    for _ in range(steps):
        optimizer.zero_grad()
        for index, (x, y) in enumerate(batches, start=1):
            with contextlib.nullcontext() if index == len(batches) else model.no_sync():
                F.cross_entropy(model(x), y).div(len(batches)).backward()
        optimizer.step()


def trained_alone(filters, cls, options):
    model = network(filters)
    optimizer = optimizer_of(model, cls, options)
    train(model, optimizer, (X, Y))
    return model, optimizer


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def largest_error(model, expected):
    return max((whole(a) - b.detach()).abs().max().item() for a, b in zip(model.parameters(), expected.parameters()))


def assert_equal_on_all_ranks(model, alone):
    agree = []
    for param in model.parameters():
        first = whole(param).clone()
        dist.broadcast(first, 0)
        agree.append(torch.equal(first, whole(param)))
    error = largest_error(model, alone)
    assert all(agree), agree
    assert error < 1e-13, error


def check_training(wrap, filters):
    for cls, options in OPTIMIZERS:
        alone, _ = trained_alone(filters, cls, options)
        model = wrap(network(filters))
        train(model, optimizer_of(model, cls, options), own_share())
        assert_equal_on_all_ranks(model, alone)


def check_accumulation():
    x, y = own_share()
    for cls, options in OPTIMIZERS:
        alone, _ = trained_alone(UNEVEN, cls, options)
        model = DistributedDataParallel(network())
        train(model, optimizer_of(model, cls, options), (x[:2], y[:2]), (x[2:], y[2:]))
        assert_equal_on_all_ranks(model, alone)


def check_zero_redundancy():
    for cls, options in OPTIMIZERS:
        alone, one = trained_alone(UNEVEN, cls, options)
        model = DistributedDataParallel(network())
        optimizer = ZeroRedundancyOptimizer(groups_of(model.module), optimizer_class=cls, lr=0.05, **options)
        train(model, optimizer, own_share())
        assert_equal_on_all_ranks(model, alone)
        assert 0 < len(optimizer.optim.state) < len(list(model.parameters()))
        assert_rates_equal(optimizer, one)


def assert_rates_equal(optimizer, expected):
    rates, expected = timm_aws.effective_lr(optimizer), timm_aws.effective_lr(expected)
    assert list(rates) == list(expected)
    for name in expected:
        torch.testing.assert_close(whole(rates[name]), expected[name], rtol=1e-12, atol=0)


def check_lengths(wrap, filters, local):
    """Compares filter lengths and effective learning rates of weights of which a process holds the `local` shapes."""
    alone, model = network(filters), wrap(network(filters))
    assert [tuple(model[index].weight.to_local().shape[:2]) for index in (0, 3)] == local[dist.get_rank()]
    for normalization in NORMALIZATIONS:
        for index in (0, 3):
            length = filter_length(model[index].weight.detach(), normalization)
            expected = filter_length(alone[index].weight.detach(), normalization)
            torch.testing.assert_close(whole(length), expected, rtol=1e-14, atol=0)
    assert_rates_equal(*(AwsSGD(groups_of(m), lr=0.05) for m in (model, alone)))


def check_like_decay():
    """DDP hands round the weights of the first process after the optimizer is made: its alpha is that of all."""
    model = network()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + dist.get_rank())
    expected = timm_aws.alpha_like_decay(network(), 0.1)
    for of_rank in (model, whole_filters(network())):
        alpha = max(group['alpha'] for group in timm_aws.param_groups_aws(of_rank, like_decay=0.1))
        assert abs(alpha / expected - 1) < 1e-12, (alpha, expected)


def check_batch_norm():
    """Looking for the convolutions before batch norm sets nothing off in a wrapped network, which trains on."""
    def plain(norm=nn.BatchNorm2d):
        return nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3), norm(6)), nn.Flatten(), nn.Linear(216, 4)).double()

    def shard(model):
        fully_shard(model[0])
        return fully_shard(model)

    assert timm_aws.normalized_weights(plain(nn.SyncBatchNorm), batch_norm=True) == {'0.0.weight': 'wn'}
    for wrap in (DistributedDataParallel, shard):
        model = wrap(plain())
        groups = timm_aws.param_groups_aws(model, batch_norm=True, like_decay=0.1)
        assert [len(group['params']) for group in groups if group['alpha']] == [1]
        train(model, AwsSGD(groups, lr=0.05), own_share(), steps=2)


def check_record(wrap):
    """All ranks are given the same file."""
    files = [Path(f'{wrap.__name__}.{name}.csv') for name in ('alone', 'together')]
    for file, model, batch in zip(files, (network(), wrap(network())), ((X, Y), own_share())):
        optimizer = optimizer_of(model, AwsSGD, {'momentum': 0.9})
        recorder = timm_aws.Recorder(optimizer, file, every=2)
        train(model, optimizer, batch)
        recorder.close()
    dist.barrier()
    alone, together = (list(csv.DictReader(file.read_text().splitlines())) for file in files)
    assert [row['step'] for row in alone] == ['1', '1', '3', '3', '5', '5']
    for row, expected in zip(together, alone, strict=True):
        assert row.pop('layer').removeprefix('module.') == expected.pop('layer')
        torch.testing.assert_close(
            {key: float(value) for key, value in row.items()},
            {key: float(value) for key, value in expected.items()}, rtol=1e-5, atol=0)


def save(folder, model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({'model': model_state, 'optimizer': optimizer_state}, checkpoint_id=folder)


def load(folder, model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {'model': model_state, 'optimizer': optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])


def save_halfway(folder, wrap, *batch):
    """Saves each of SAVED after three of six steps."""
    for name, (cls, options) in SAVED.items():
        model = wrap(network())
        optimizer = optimizer_of(model, cls, options)
        train(model, optimizer, batch, steps=3)
        save(folder / name, model, optimizer)


def resume(folder, wrap, *batch):
    """Goes on from each of SAVED, with a network and an optimizer that were made with other values."""
    for name, (cls, options) in SAVED.items():
        alone, uninterrupted = trained_alone(UNEVEN, cls, options)
        model = wrap(network())
        optimizer = optimizer_of(model, cls, options)
        for group in optimizer.param_groups:
            group.update(lr=0.1, weight_decay=0.1)
            if group['normalization'] is not None:
                group.update(alpha=0.1)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        load(folder / name, model, optimizer)
        train(model, optimizer, batch, steps=3)
        error = largest_error(model, alone)
        assert error < 1e-12, (name, error)
        assert settings(optimizer) == settings(uninterrupted)


def settings(optimizer):
    return [{**group, 'params': len(group['params'])} for group in optimizer.param_groups]


def check_checkpoint_of_two():
    save_halfway(Path('saved_by_two'), whole_filters, *own_share())
    resume(Path('saved_by_two'), whole_filters, *own_share())


CHECKS = {
    'ddp': partial(check_training, DistributedDataParallel, UNEVEN),
    'ddp_accumulation_with_no_sync': check_accumulation,
    'zero_redundancy_optimizer': check_zero_redundancy,
    'fsdp2_whole_filters': partial(check_training, whole_filters, UNEVEN),
    'fsdp2_split_filters': partial(check_training, split_filters, EVEN),
    'fsdp2_fewer_filters_than_ranks': partial(check_training, whole_filters, SINGLE),
    'lengths_of_whole_filters': partial(
        check_lengths, whole_filters, UNEVEN, [[(3, 4), (2, 5)], [(2, 4), (1, 5)]]),
    'lengths_of_split_filters': partial(
        check_lengths, split_filters, EVEN, [[(6, 2), (3, 3)], [(6, 2), (3, 3)]]),
    'lengths_of_fewer_filters_than_ranks': partial(
        check_lengths, whole_filters, SINGLE, [[(3, 4), (1, 5)], [(2, 4), (0, 5)]]),
    'like_decay_of_all_ranks': check_like_decay,
    'batch_norm': check_batch_norm,
    'record_under_ddp': partial(check_record, DistributedDataParallel),
    'record_under_fsdp2': partial(check_record, whole_filters),
    'checkpoint_of_one_process_on_two': lambda: resume(Path('saved_by_one'), whole_filters, *own_share()),
    'checkpoint_of_two_processes_on_two': check_checkpoint_of_two,
}


def main():
    # A rank that fails alone leaves the other waiting, for so long.
    dist.init_process_group('gloo', timeout=timedelta(seconds=120))
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:
            print(f'rank {dist.get_rank()} failed {name}: {traceback.format_exc()}', file=sys.stderr, flush=True)
        else:
            # With its newline in one write, as the ranks share the stream.
            print(f'rank {dist.get_rank()} passed {name}\n', end='', flush=True)
    dist.barrier()
    os._exit(0)  # torch's own teardown of gloo after FSDP2 aborts about one run in ten, when all has been compared


if __name__ == '__main__':
    main()
