"""Trains one cell of the grid and tells everything about it that a table or a figure may want."""
import itertools
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet

import timm_aws
from timm_aws.ws_resnet import NormalizedResNet

from .grid import NETWORKS, Cell, Preset
from .images import Images, augment, normalize
from .rules import RULES, make_optimizer

__all__ = ['train_cell']


def train_cell(cell: Cell, preset: Preset, images: Images) -> dict[str, Any]:
    """Trains a network from scratch.

    Args:
        cell: What to train, and how.
        preset: How long, on which size of images.
        images: The images, on the device to train on.

    Returns:
        The cell's settings and what came of it, ready for JSON: accuracies in percent after each epoch, medians of the
        filter lengths and effective learning rates by layer, and the first step with a loss or weight that is not
        finite, where the training ends.
    """
    torch.manual_seed(cell.seed)
    model = _build(cell, images.num_classes).to(images.train.device, memory_format=torch.channels_last)
    normalization = None if cell.normalization == 'none' else cell.normalization
    optimizer = make_optimizer(model, cell.rule, cell.lr, cell.strength, normalization)
    steps = len(images.train) // preset.batch_size
    milestones = [round(preset.epochs * steps * share) for share in (0.3, 0.6, 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    generator = torch.Generator().manual_seed(cell.seed)
    record: dict[str, Any] = {
        **cell.settings(), 'title': RULES[cell.rule].title,
        'decay_exponent': _decay_exponent(cell, preset.epochs * steps, milestones),
        'train_accuracy': [], 'val_accuracy': [], 'lengths': [], 'effective_lr': [], 'first_nonfinite_step': None,
    }
    start = time.perf_counter()
    for epoch in range(preset.epochs):
        _record_lengths(record, optimizer)
        done, correct = _train_epoch(model, optimizer, schedule, images, preset.batch_size, steps, generator)
        record['train_accuracy'].append(_percent(correct, steps * preset.batch_size))
        if done < steps or not all(param.isfinite().all() for param in model.parameters()):
            record['first_nonfinite_step'] = epoch * steps + done
            break
        record['val_accuracy'].append(_validate(model, images))
    return {**record, 'layers': list(timm_aws.normalized_weights(model)), 'steps': preset.epochs * steps,
            'seconds': round(time.perf_counter() - start, 1)}


def _build(cell: Cell, num_classes: int) -> ResNet:
    arguments = {**NETWORKS[cell.network], 'num_classes': num_classes}
    if cell.normalization == 'none':
        model = ResNet(**arguments)
        weights = [name for name, param in model.named_parameters() if param.ndim == 4]
    else:
        model = NormalizedResNet(**arguments, normalization=cell.normalization)
        weights = list(timm_aws.normalized_weights(model))
    with torch.no_grad():
        for name in weights:
            model.get_parameter(name).mul_(cell.scale)
    return model


def _train_epoch(
        model: ResNet,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        images: Images,
        batch_size: int,
        steps: int,
        generator: torch.Generator,
) -> tuple[int, float]:
    """Takes the steps of an epoch, up to the first loss that is not finite; returns their number and the hits."""
    model.train()
    order = torch.randperm(len(images.train), generator=generator).to(images.train.device)
    correct = torch.zeros((), device=images.train.device)
    for step, batch in enumerate(order.split(batch_size)[:steps]):
        logits = model(normalize(augment(images.train[batch], generator)))
        loss = F.cross_entropy(logits, images.train_labels[batch])
        if step % 10 == 0 and not loss.isfinite():  # looked at now and then: a GPU has to be waited for
            return step, correct.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
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
    group = optimizer.param_groups[0]
    if group['normalization'] is None:
        return
    rates = [rate.median().item() for rate in timm_aws.effective_lr(optimizer).values()]
    record['effective_lr'].append([_digits(rate) for rate in rates])
    # A length that has overflowed has the rate 0.
    record['lengths'].append([_digits(group['lr'] / rate if rate else math.inf) for rate in rates])


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
