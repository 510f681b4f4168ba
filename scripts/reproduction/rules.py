"""What holds the length of normalized weights in check: the rules that are compared, as optimizers over two groups."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2

import timm_aws

__all__ = ['RULES', 'Rule', 'make_optimizer']

_MOMENTUM = 0.9
_OTHER_DECAY = 1e-4  # of norm weights and classifier, as in the paper; biases have none
_SHIFT = 1e-3

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


def make_optimizer(
        model: torch.nn.Module,
        rule: str,
        lr: float,
        strength: float,
        normalization: str | None,
) -> torch.optim.Optimizer:
    """Makes an optimizer that applies a rule to the convolutions that a norm follows, normalized or not.

    Args:
        model: The network.
        rule: Key of RULES.
        lr: Learning rate.
        strength: Weight decay, or alpha of AWS.
        normalization: 'ws' or 'wn'; None for a network without, whose convolutions are then the weights in question.

    Returns:
        The optimizer; the groups are the convolutions, other weights, biases.
    """
    named = dict(model.named_parameters())
    chosen = set(timm_aws.normalized_weights(model)) or {name for name, param in named.items() if param.ndim == 4}
    groups: Groups = [{'params': [], 'normalization': normalization, 'alpha': 0.}]
    groups += [{'params': [], 'normalization': None, 'alpha': 0., 'weight_decay': decay} for decay in (_OTHER_DECAY, 0)]
    for name, param in named.items():
        groups[0 if name in chosen else 2 if name.endswith('.bias') else 1]['params'].append(param)
    return RULES[rule].make(groups, lr, strength)


def _sgd(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    groups[0]['weight_decay'] = strength
    return torch.optim.SGD(groups, lr=lr, momentum=_MOMENTUM)


def _no_decay(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    return _sgd(groups, lr, 0.)


def _timm(name: str) -> Callable[[Groups, float, float], torch.optim.Optimizer]:
    def make(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
        groups[0]['weight_decay'] = strength
        return create_optimizer_v2(groups, name, lr=lr, momentum=_MOMENTUM, weight_decay=0., nesterov=False)

    return make


def _shifted(groups: Groups, lr: float, strength: float) -> torch.optim.Optimizer:
    """L2 whose pull ends at a standard deviation of 1e-3: (1 - 1e-3 / std)(W - mean) + mean joins the gradient."""
    optimizer = _sgd(groups, lr, 0.)

    @torch.no_grad()
    def add_decay(*_) -> None:
        for param in groups[0]['params']:
            mean = param.mean((1, 2, 3), keepdim=True)
            std = param.std((1, 2, 3), correction=0, keepdim=True)
            param.grad.add_((1 - _SHIFT / std) * (param - mean) + mean, alpha=strength)

    optimizer.register_step_pre_hook(add_decay)
    return optimizer


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


RULES = {
    'none': Rule('no decay', _no_decay, None),
    'l2': Rule('L2, SGD', _sgd, 1 / (1 - _MOMENTUM)),
    'sgdw': Rule('decoupled decay (sgdw)', _timm('sgdw'), 1),
    'shifted': Rule('ε-shifted L2', _shifted, 1 / (1 - _MOMENTUM)),
    'sgdp': Rule('SGDP', _timm('sgdp'), None),
    'sgdc': Rule('corrected decay (sgdc)', _timm('sgdc'), None),
    'aws': Rule('AWS, coupled', _aws(timm_aws.AwsSGD, False), None),
    'aws_decoupled': Rule('AWS, decoupled', _aws(timm_aws.AwsSGD, True), None),
    'adam': Rule('L2, Adam', _adam, None, adam=True),
    'adamw': Rule('AdamW', _adamw, 1, adam=True),
    'aws_adam': Rule('AWS, Adam, decoupled', _aws(timm_aws.AwsAdam, True), None, adam=True),
    'aws_adam_coupled': Rule('AWS, Adam, coupled', _aws(timm_aws.AwsAdam, False), None, adam=True),
}
