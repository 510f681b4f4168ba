"""Trains one cell of the grid and tells everything about it that a table or a figure may want."""
import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.resnet import ResNet

import timm_aws
from timm_aws.rule import filter_length
from timm_aws.ws_resnet import NormalizedResNet

from .grid import NETWORKS, Cell, Task
from .images import Images, augment, normalize
from .layers import publish
from .measures import DEAD, are_dead, turned
from .rules import RULES, make_optimizer, weights_of

__all__ = ['train_cell']

# Under batch norm alone it is the norm of a filter that changes nothing but the effective learning rate.
_LENGTH_OF = {'none': 'wn', 'ws_published': 'ws'}
_LAST_STEPS = 20  # of an epoch, in which gradients and angles are looked at


def train_cell(cell: Cell, task: Task, images: Images) -> dict[str, Any]:
    """Trains a network from scratch.

    Args:
        cell: What to train, and how.
        task: How long, on which size of images.
        images: The images, on the device to train on.

    Returns:
        The cell's settings and what came of it, ready for JSON: accuracies in percent after each epoch; by epoch and
        layer the medians of filter lengths and effective learning rates before it, and after it the numbers of filters
        that are dead, that had no gradient in its last steps, of both kinds at once, and of norm weights below 1e-6;
        for the filters that had a gradient then, the angles of these steps and the effective learning rates; the
        shortest std of a filter after each epoch; the scale of the loss at the end; and the first step with a loss or
        weight that is not finite, where the training ends.
    """
    torch.manual_seed(cell.seed)
    model = _build(cell, images.num_classes).to(images.train.device, memory_format=torch.channels_last)
    normalization = _LENGTH_OF.get(cell.normalization, cell.normalization)
    optimizer = make_optimizer(model, cell.rule, cell.lr, cell.strength, normalization, cell.other_decay)
    steps = task.epoch_steps or len(images.train) // task.batch_size
    milestones = [round(task.epochs * steps * share) for share in (0.3, 0.6, 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    generator = torch.Generator().manual_seed(cell.seed)
    precision = _Precision(cell.precision, images.train.device.type)
    record: dict[str, Any] = {
        **cell.settings(), 'title': RULES[cell.rule].title,
        'decay_exponent': _decay_exponent(cell, task.epochs * steps, milestones),
        'train_accuracy': [], 'val_accuracy': [], 'lengths': [], 'effective_lr': [], 'angles': [], 'moving_lr': [],
        'dead': [], 'still': [], 'dead_and_still': [], 'dead_norm_weights': [], 'shortest': [],
        'first_nonfinite_step': None,
    }
    start = time.perf_counter()
    for epoch in range(task.epochs):
        if epoch == round(cell.decay_until * task.epochs):
            for group in optimizer.param_groups:
                group.update(weight_decay=0., alpha=cell.then_alpha if group['normalization'] else 0.)
        _record_lengths(record, optimizer)
        last = _LastSteps(weights_of(model).values(), normalization)
        done, correct = _train_epoch(
            model, optimizer, schedule, images, task.batch_size, steps, generator, last, precision)
        record['train_accuracy'].append(_percent(correct, steps * task.batch_size))
        if done < steps or not all(param.isfinite().all() for param in model.parameters()):
            record['first_nonfinite_step'] = epoch * steps + done
            break
        record['val_accuracy'].append(_validate(model, images, precision))
        _record_filters(record, model, last, optimizer.param_groups[0]['lr'])
    weights = weights_of(model)
    return {**record, 'layers': list(weights), 'filters': [len(weight) for weight in weights.values()],
            'loss_scale': precision.scaler.get_scale(), 'steps': task.epochs * steps,
            'seconds': round(time.perf_counter() - start, 1)}


def _build(cell: Cell, num_classes: int) -> ResNet:
    arguments = {**NETWORKS[cell.network], 'num_classes': num_classes}
    if cell.normalization == 'none':
        model = ResNet(**arguments)
    else:
        model = NormalizedResNet(**arguments, normalization=cell.normalization.removesuffix('_published'))
    if cell.normalization == 'ws_published':
        publish(model)
    with torch.no_grad():
        for weight in weights_of(model).values():
            weight.mul_(cell.scale)
    return model


class _Precision:
    """Runs the network in a precision and takes its steps, under a GradScaler in float16."""

    def __init__(self, name: str, device: str) -> None:
        self._device, self._dtype = device, getattr(torch, name)
        self.scaler = torch.amp.GradScaler(device, enabled=name == 'float16')

    def logits(self, model: ResNet, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32):
            return model(normalize(images)).float()


class _LastSteps:
    """Looks at the last steps of an epoch: which filters get a gradient, and by how much each step turns them."""

    def __init__(self, weights: Iterable[torch.Tensor], normalization: str) -> None:
        self._weights, self._normalization = list(weights), normalization
        self._before: list[torch.Tensor] = []
        self._squares = [torch.zeros(len(weight), device=weight.device) for weight in self._weights]
        self._count = 0
        self.are_still = [square == 0 for square in self._squares]

    @torch.no_grad()
    def begin(self) -> None:
        self._before = [weight.detach().clone() for weight in self._weights]
        for still, weight in zip(self.are_still, self._weights):
            still &= ~weight.grad.flatten(1).any(1)

    @torch.no_grad()
    def end(self) -> None:
        self._count += 1
        for square, before, after in zip(self._squares, self._before, self._weights):
            square += turned(before, after, self._normalization) ** 2

    def angles(self) -> list[float | None]:
        """Returns for each layer the median over its moving filters of the root mean square angle, in radians."""
        return [_median((square[~still] / self._count).sqrt())
                for square, still in zip(self._squares, self.are_still)]

    @torch.no_grad()
    def effective_lr(self, lr: float) -> list[float | None]:
        """Returns for each layer the median over its moving filters of lr / length."""
        return [_median(lr / filter_length(weight, self._normalization).flatten()[~still])
                for weight, still in zip(self._weights, self.are_still)]


def _median(values: torch.Tensor) -> float | None:
    return _digits(values.nanmedian().item()) if len(values) else None


def _train_epoch(
        model: ResNet,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        images: Images,
        batch_size: int,
        steps: int,
        generator: torch.Generator,
        last: _LastSteps,
        precision: _Precision,
) -> tuple[int, float]:
    """Takes the steps of an epoch, up to the first loss that is not finite; returns their number and the hits."""
    model.train()
    passes = -(-steps * batch_size // len(images.train))
    order = torch.cat([torch.randperm(len(images.train), generator=generator) for _ in range(passes)])
    correct = torch.zeros((), device=images.train.device)
    for step, batch in enumerate(order.to(images.train.device).split(batch_size)[:steps]):
        logits = precision.logits(model, augment(images.train[batch], generator))
        loss = F.cross_entropy(logits, images.train_labels[batch])
        if step % 10 == 0 and not loss.isfinite():  # looked at now and then: a GPU has to be waited for
            return step, correct.item()
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        measured = step >= steps - _LAST_STEPS
        if measured:
            last.begin()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        if measured:
            last.end()
        schedule.step()
        correct += (logits.argmax(1) == images.train_labels[batch]).sum()
    return steps, correct.item()


@torch.inference_mode()
def _validate(model: ResNet, images: Images, precision: _Precision) -> float:
    model.eval()
    hits = sum((precision.logits(model, batch).argmax(1) == labels).sum().item()
               for batch, labels in zip(images.val.split(500), images.val_labels.split(500)))
    return _percent(hits, len(images.val))


def _percent(hits: float, count: int) -> float:
    return round(100 * hits / count, 2)


def _record_lengths(record: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Adds the present median effective learning rate of each layer, and the filter lengths that divide it."""
    lr = optimizer.param_groups[0]['lr']
    rates = [rate.median().item() for rate in timm_aws.effective_lr(optimizer).values()]
    record['effective_lr'].append([_digits(rate) for rate in rates])
    # A length that has overflowed has the rate 0.
    record['lengths'].append([_digits(lr / rate if rate else math.inf) for rate in rates])


@torch.no_grad()
def _record_filters(record: dict[str, Any], model: ResNet, last: _LastSteps, lr: float) -> None:
    weights = weights_of(model)
    dead = [are_dead(weight) for weight in weights.values()]
    record['angles'].append(last.angles())
    record['moving_lr'].append(last.effective_lr(lr))
    record['dead'].append([int(layer.sum()) for layer in dead])
    record['still'].append([int(layer.sum()) for layer in last.are_still])
    record['dead_and_still'].append([int((one & other).sum()) for one, other in zip(dead, last.are_still)])
    record['dead_norm_weights'].append([int((norm.weight.abs() < DEAD).sum()) for norm in model.modules()
                                        if isinstance(norm, nn.BatchNorm2d)])
    record['shortest'].append(_digits(min(filter_length(weight, 'ws').min().item() for weight in weights.values())))


def _digits(value: float) -> float | None:
    return float(f'{value:.4g}') if math.isfinite(value) else None


def _decay_exponent(cell: Cell, steps: int, milestones: list[int]) -> float | None:
    """Returns by how many times the number e fixed decay alone would shorten a weight: the sum of its shares."""
    decay = RULES[cell.rule].decay
    if decay is None:
        return None
    pieces = itertools.pairwise([0, *milestones, steps])
    total_lr = sum(cell.lr * 0.1 ** index * (end - start) for index, (start, end) in enumerate(pieces))
    return _digits(decay * cell.strength * total_lr)
