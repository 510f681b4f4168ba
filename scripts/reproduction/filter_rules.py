"""Rules for the length of filters that no optimizer of torch, timm or timm_aws has, each beside torch's SGD.

A rule works filter by filter, before a step on the gradient or the weight, or after it on the weight. W is the weight
before the step, u the update (the momentum buffer, so that SGD alone gives W - lr * u), s the strength, and length()
that of timm_aws.rule. Where the layer centers its filters, the rules that fix a length center them too, as the mean
changes nothing.
"""
import math
from collections.abc import Callable
from typing import Any

import torch

from timm_aws.rule import NORMALIZATIONS, filter_length

__all__ = ['Cautious', 'FilterRule', 'FixedAngle', 'FixedLength', 'ForcedLength', 'Shifted', 'TargetLength', 'sgd_with']

_TINY = 1e-30  # in place of the length of an update that is 0


class FilterRule:
    """Does nothing: SGD without decay."""
    keeps_start = False

    def __init__(self, strength: float, normalization: str, momentum: float) -> None:
        """
        Args:
            strength: What is tuned: a weight decay, a length or a factor of the learning rate, see the rule.
            normalization: 'ws', 'wn' or 'cwn': how the length of a filter is measured.
            momentum: Momentum of SGD.
        """
        self.strength, self.normalization, self.momentum = strength, normalization, momentum
        self.state: dict[torch.Tensor, Any] = {}

    def before_step(self, weight: torch.Tensor, lr: float) -> None:
        """Changes weight.grad or the weight in place."""

    def after_step(self, weight: torch.Tensor, start: torch.Tensor, lr: float) -> None:
        """Changes the weight in place, given what it was before the step; called where `keeps_start` is set."""

    def length(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns (out_channels, 1, ...)."""
        return filter_length(tensor, self.normalization)

    def centered(self, tensor: torch.Tensor) -> torch.Tensor:
        """Takes the mean of each filter off where its layer does so."""
        if not NORMALIZATIONS[self.normalization].centered:
            return tensor
        return tensor - tensor.mean(tuple(range(1, tensor.ndim)), keepdim=True)

    def first_length(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the length at the first call for this weight."""
        return self.state.setdefault(weight, self.length(weight))


class Shifted(FilterRule):
    """Epsilon-shifted L2, its pull ends at a std of 1e-3: s * ((1 - 1e-3 / std)(W - mean) + mean) joins the gradient.

    From code that the first author of the AWS paper published.
    """

    def before_step(self, weight, lr):
        dims = tuple(range(1, weight.ndim))
        mean, std = weight.mean(dims, keepdim=True), filter_length(weight, 'ws')
        weight.grad.add_((1 - 1e-3 / std) * (weight - mean) + mean, alpha=self.strength)


class TargetLength(FilterRule):
    """Decoupled decay towards the first length R: W <- (1 - lr * s * (1 - R / length(W))) W, then the step.

    Paper: `Weight Norm Control` (AdamWN), Loshchilov 2023 - https://arxiv.org/abs/2311.11446
    """

    def before_step(self, weight, lr):
        weight.mul_(1 - lr * self.strength * (1 - self.first_length(weight) / self.length(weight)))


class Cautious(FilterRule):
    """Decoupled decay of the elements that the step brings closer to 0.

        W <- W - lr * (u + s * W) where u * W >= 0, W - lr * u elsewhere

    Paper: `Cautious Weight Decay`, Chen et al. 2025 - https://arxiv.org/abs/2510.12402
    """
    keeps_start = True

    def after_step(self, weight, start, lr):
        shortens = (start - weight) * start >= 0
        weight.sub_(start * shortens, alpha=lr * self.strength)


class ForcedLength(FilterRule):
    """Scales each filter to the length s after each step.

    EDM2 does this with s = 1, and normalizes in the layer too, as WS and WN do.
    Paper: `Analyzing and Improving the Training Dynamics of Diffusion Models`, Karras et al. 2024 -
        https://arxiv.org/abs/2312.02696
    """
    keeps_start = True

    def after_step(self, weight, start, lr):
        weight.copy_(self.strength * self.centered(weight) / self.length(weight))


class FixedLength(FilterRule):
    """Keeps the first length R and gives each step the length lr * s * R: Hyperball, a filter at a time.

        W <- W - lr * s * R * u / length(u), then scaled to length R

    Paper: `Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization`, Wen et al. 2026 -
        https://arxiv.org/abs/2606.16899
    """
    keeps_start = True

    def before_step(self, weight, lr):
        self.first_length(weight)

    def after_step(self, weight, start, lr):
        length, update = self.first_length(weight), self.centered(start - weight)
        moved = self.centered(start) - lr * self.strength * length * update / self.length(update).clamp_(min=_TINY)
        weight.copy_(length * moved / self.length(moved))


class FixedAngle(FilterRule):
    """Keeps the first length R and turns each filter by the angle of the equilibrium under L2 decay s, on average.

        u <- u without its part along W
        v <- 0.9 v + 0.1 length(u)^2
        W <- W - sqrt(2 * lr * s / (1 + momentum)) * R * u / sqrt(v / (1 - 0.9^t)), then scaled to length R

    Paper: `Rotational Equilibrium`, Kosson et al. 2023 - https://arxiv.org/abs/2305.17212
    """
    keeps_start = True

    def before_step(self, weight, lr):
        if weight not in self.state:
            length = self.length(weight)
            self.state[weight] = {'length': length, 'v': torch.zeros_like(length), 'step': 0}

    def after_step(self, weight, start, lr):
        state, dims = self.state[weight], tuple(range(1, weight.ndim))
        start, update = self.centered(start), self.centered(start - weight) / lr
        update -= start * ((update * start).sum(dims, keepdim=True) / (start * start).sum(dims, keepdim=True))
        state['step'] += 1
        state['v'].lerp_(self.length(update) ** 2, 0.1)
        mean = (state['v'] / (1 - 0.9 ** state['step'])).sqrt_().clamp_(min=_TINY)
        angle = math.sqrt(2 * lr * self.strength / (1 + self.momentum))
        moved = start - angle * state['length'] * update / mean
        weight.copy_(state['length'] * moved / self.length(moved))


def sgd_with(kind: type[FilterRule], momentum: float) -> Callable[..., torch.optim.Optimizer]:
    """Returns what makes torch's SGD with a rule for the first of its groups, from groups, lr and strength."""

    def make(groups: list[dict[str, Any]], lr: float, strength: float) -> torch.optim.Optimizer:
        group = {**groups[0], 'weight_decay': 0.}
        optimizer = torch.optim.SGD([group, *groups[1:]], lr=lr, momentum=momentum)
        rule = kind(strength, group['normalization'], momentum)
        starts: list[torch.Tensor] = []

        @torch.no_grad()
        def before(*_) -> None:
            for weight in group['params']:
                rule.before_step(weight, optimizer.param_groups[0]['lr'])
            starts[:] = [weight.detach().clone() for weight in group['params'] if rule.keeps_start]

        @torch.no_grad()
        def after(*_) -> None:
            for weight, start in zip(group['params'], starts):
                rule.after_step(weight, start, optimizer.param_groups[0]['lr'])

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    return make
