"""What holds the length of normalized weights in check: the rules that are compared, as optimizers over two groups."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2

import timm_aws
from timm_aws.rule import filter_length

from .filter_rules import Cautious, FixedAngle, FixedLength, ForcedLength, Shifted, TargetLength, sgd_with

__all__ = ['RULES', 'Rule', 'make_optimizer', 'weights_of']

_MOMENTUM = 0.9

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        title: For tables and figures.
        make: Makes the optimizer from groups, the first of which holds the weights in question, lr and strength.
        decay: By which share of weight and strength a step of rate lr shortens a weight when there is no gradient:
            lr * decay * strength. None where the strength is not that of a fixed decay.
        adam: Whether it needs the learning rates of Adam.
    """
    title: str
    make: Callable[[Groups, float, float], torch.optim.Optimizer]
    decay: float | None
    adam: bool = False


def weights_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Finds the weights that a rule is for: the normalized ones, or all convolutions of a network without any."""
    named = dict(model.named_parameters())
    chosen = timm_aws.normalized_weights(model) or {name for name, param in named.items() if param.ndim == 4}
    return {name: param for name, param in named.items() if name in chosen}


def make_optimizer(
        model: torch.nn.Module,
        rule: str,
        lr: float,
        strength: float,
        normalization: str,
        other_decay: float,
) -> torch.optim.Optimizer:
    """Makes an optimizer that applies a rule to the convolutions that a norm follows, normalized or not.

    Args:
        model: The network.
        rule: Key of RULES.
        lr: Learning rate.
        strength: Weight decay, or alpha of AWS.
        normalization: 'ws' or 'wn', which tells how the length of a filter is measured.
        other_decay: Weight decay of norm weights and classifier; biases have none.

    Returns:
        The optimizer; the groups are the convolutions, other weights, biases.
    """
    chosen = weights_of(model)
    groups: Groups = [{'params': [*chosen.values()], 'normalization': normalization, 'alpha': 0.}]
    groups += [{'params': [], 'normalization': None, 'alpha': 0., 'weight_decay': decay} for decay in (other_decay, 0)]
    for name, param in model.named_parameters():
        if name not in chosen:
            groups[2 if name.endswith('.bias') else 1]['params'].append(param)
    return RULES[rule].make(groups, lr, strength)


def _sgd(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    groups[0]['weight_decay'] = strength
    return torch.optim.SGD(groups, lr=lr, momentum=_MOMENTUM)


def _decay_by_aws_sgd(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    """L2 decay by AwsSGD, which is torch's SGD while alpha is 0."""
    groups[0]['weight_decay'] = strength
    return timm_aws.AwsSGD(groups, lr=lr, momentum=_MOMENTUM)


def _no_decay(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    return _sgd(groups, lr, 0.)


def _timm(name: str) -> Callable[[Groups, float, float], torch.optim.Optimizer]:
    def make(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
        groups[0]['weight_decay'] = strength
        return create_optimizer_v2(groups, name, lr=lr, momentum=_MOMENTUM, weight_decay=0., nesterov=False)

    return make


def _adam(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    groups[0]['weight_decay'] = strength
    return torch.optim.Adam(groups, lr=lr)


def _adamw(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    groups[0]['weight_decay'] = strength
    return torch.optim.AdamW(groups, lr=lr)


def _aws(kind: type[torch.optim.Optimizer], decoupled: bool) -> Callable[[Groups, float, float], torch.optim.Optimizer]:
    options: dict[str, Any] = {'momentum': _MOMENTUM} if kind is timm_aws.AwsSGD else {}

    def make(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
        groups[0]['alpha'] = strength
        return kind(groups, lr=lr, decoupled=decoupled, **options)

    return make


def _aws_by_layer(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    """Coupled AWS whose alpha starts each layer with the gamma of weight decay `strength` at its median length."""
    by_layer = []
    for param in groups[0]['params']:
        length = filter_length(param.detach(), groups[0]['normalization']).median().item()
        by_layer.append({**groups[0], 'params': [param], 'alpha': strength / length})
    return timm_aws.AwsSGD([*by_layer, *groups[1:]], lr=lr, momentum=_MOMENTUM)


RULES = {
    'none': Rule('no decay', _no_decay, None),
    'l2': Rule('L2, SGD', _sgd, 1 / (1 - _MOMENTUM)),
    'l2_then_aws': Rule('L2, SGD', _decay_by_aws_sgd, 1 / (1 - _MOMENTUM)),
    'sgdw': Rule('decoupled decay (sgdw)', _timm('sgdw'), 1),  # Loshchilov and Hutter 2019, arXiv 1711.05101
    'shifted': Rule('ε-shifted L2', sgd_with(Shifted, _MOMENTUM), 1 / (1 - _MOMENTUM)),
    'sgdp': Rule('SGDP', _timm('sgdp'), None),  # Heo et al. 2021, arXiv 2006.08217
    'sgdc': Rule('corrected decay (sgdc)', _timm('sgdc'), None),  # Chou 2025, arXiv 2512.08217
    'cautious': Rule('cautious decay', sgd_with(Cautious, _MOMENTUM), None),
    'target': Rule('decay to the first length', sgd_with(TargetLength, _MOMENTUM), None),
    'forced': Rule('forced length (EDM2)', sgd_with(ForcedLength, _MOMENTUM), None),
    'hyperball': Rule('fixed length (Hyperball)', sgd_with(FixedLength, _MOMENTUM), None),
    'req': Rule('fixed angle (REQ)', sgd_with(FixedAngle, _MOMENTUM), None),
    'aws': Rule('AWS, coupled', _aws(timm_aws.AwsSGD, False), None),
    'aws_decoupled': Rule('AWS, decoupled', _aws(timm_aws.AwsSGD, True), None),
    'aws_by_layer': Rule('AWS, coupled, alpha by layer', _aws_by_layer, None),
    'adam': Rule('L2, Adam', _adam, None, adam=True),
    'adamw': Rule('AdamW', _adamw, 1, adam=True),
    'aws_adam': Rule('AWS, Adam, decoupled', _aws(timm_aws.AwsAdam, True), None, adam=True),
    'aws_adam_coupled': Rule('AWS, Adam, coupled', _aws(timm_aws.AwsAdam, False), None, adam=True),
}
