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
_ANGLE_STEPS = 5  # at the end of an epoch


def train_cell(cell: Cell, task: Task, images: Images) -> dict[str, Any]:
    """Trains a network from scratch.

    Args:
        cell: What to train, and how.
        task: How long, on which size of images.
        images: The images, on the device to train on.

    Returns:
        The cell's settings and what came of it, ready for JSON: accuracies in percent after each epoch; by epoch and
        layer the medians of filter lengths and effective learning rates before it, and after it the angles of its last
        steps and the numbers of dead filters, of norm weights below 1e-6, and of filters where both is so; the
        shortest std of a filter after each epoch; and the first step with a loss or weight that is not finite, where
        the training ends.
    """
    torch.manual_seed(cell.seed)
    model = _build(cell, images.num_classes).to(images.train.device, memory_format=torch.channels_last)
    normalization = _LENGTH_OF.get(cell.normalization, cell.normalization)
    optimizer = make_optimizer(model, cell.rule, cell.lr, cell.strength, normalization, cell.other_decay)
    steps = task.epoch_steps or len(images.train) // task.batch_size
    milestones = [round(task.epochs * steps * share) for share in (0.3, 0.6, 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    generator = torch.Generator().manual_seed(cell.seed)
    record: dict[str, Any] = {
        **cell.settings(), 'title': RULES[cell.rule].title,
        'decay_exponent': _decay_exponent(cell, task.epochs * steps, milestones),
        'train_accuracy': [], 'val_accuracy': [], 'lengths': [], 'effective_lr': [], 'angles': [], 'dead': [],
        'dead_norm_weights': [], 'dead_both': [], 'shortest': [], 'first_nonfinite_step': None,
    }
    start = time.perf_counter()
    for epoch in range(task.epochs):
        if epoch == round(cell.decay_until * task.epochs):
            for group in optimizer.param_groups:
                group.update(weight_decay=0., alpha=0.)
        _record_lengths(record, optimizer)
        angles = _Angles(weights_of(model).values(), normalization)
        done, correct = _train_epoch(model, optimizer, schedule, images, task.batch_size, steps, generator, angles)
        record['train_accuracy'].append(_percent(correct, steps * task.batch_size))
        if done < steps or not all(param.isfinite().all() for param in model.parameters()):
            record['first_nonfinite_step'] = epoch * steps + done
            break
        record['val_accuracy'].append(_validate(model, images))
        record['angles'].append(angles.by_layer())
        _record_dead(record, model)
    weights = weights_of(model)
    return {**record, 'layers': list(weights), 'filters': [len(weight) for weight in weights.values()],
            'steps': task.epochs * steps, 'seconds': round(time.perf_counter() - start, 1)}


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


class _Angles:
    """Measures by how much the last steps of an epoch turn each filter."""

    def __init__(self, weights: Iterable[torch.Tensor], normalization: str) -> None:
        self._weights = list(weights)
        self._normalization = normalization
        self._before: list[torch.Tensor] = []
        self._squares = [0. * weight.detach().flatten(1)[:, 0] for weight in self._weights]

    def begin(self) -> None:
        self._before = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def end(self) -> None:
        for square, before, after in zip(self._squares, self._before, self._weights):
            square += turned(before, after, self._normalization) ** 2 / _ANGLE_STEPS

    def by_layer(self) -> list[float | None]:
        """Returns for each layer the median over its living filters of the root mean square angle, in radians."""
        return [_digits(square.sqrt().nanmedian().item()) for square in self._squares]


def _train_epoch(
        model: ResNet,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        images: Images,
        batch_size: int,
        steps: int,
        generator: torch.Generator,
        angles: _Angles,
) -> tuple[int, float]:
    """Takes the steps of an epoch, up to the first loss that is not finite; returns their number and the hits."""
    model.train()
    passes = -(-steps * batch_size // len(images.train))
    order = torch.cat([torch.randperm(len(images.train), generator=generator) for _ in range(passes)])
    correct = torch.zeros((), device=images.train.device)
    for step, batch in enumerate(order.to(images.train.device).split(batch_size)[:steps]):
        logits = model(normalize(augment(images.train[batch], generator)))
        loss = F.cross_entropy(logits, images.train_labels[batch])
        if step % 10 == 0 and not loss.isfinite():  # looked at now and then: a GPU has to be waited for
            return step, correct.item()
        optimizer.zero_grad()
        loss.backward()
        measured = step >= steps - _ANGLE_STEPS
        if measured:
            angles.begin()
        optimizer.step()
        if measured:
            angles.end()
        schedule.step()
        correct += (logits.argmax(1) == images.train_labels[batch]).sum()
    return steps, correct.item()


@torch.inference_mode()
def _validate(model: ResNet, images: Images) -> float:
    model.eval()
    hits = sum((model(normalize(batch)).argmax(1) == labels).sum().item()
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
def _record_dead(record: dict[str, Any], model: ResNet) -> None:
    weights = weights_of(model)
    filters = [are_dead(weight) for weight in weights.values()]
    norms = [torch.zeros_like(dead) if norm is None else norm.weight.abs() < DEAD
             for dead, norm in zip(filters, _norms_after(model, weights))]
    record['dead'].append([int(dead.sum()) for dead in filters])
    record['dead_norm_weights'].append([int(dead.sum()) for dead in norms])
    record['dead_both'].append([int((one & other).sum()) for one, other in zip(filters, norms)])
    record['shortest'].append(_digits(min(filter_length(weight, 'ws').min().item() for weight in weights.values())))


def _norms_after(model: ResNet, weights: Iterable[str]) -> list[nn.BatchNorm2d | None]:
    """Returns the batch norm behind the convolution of each weight; those of SE gates have none."""
    modules = [(name, module) for name, module in model.named_modules()
               if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    norm_of = {f'{name}.weight': after for (name, _), (_, after) in itertools.pairwise(modules)
               if isinstance(after, nn.BatchNorm2d)}
    return [norm_of.get(name) for name in weights]


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
