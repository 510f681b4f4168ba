"""Parameter groups that carry the shrink: what every optimizer of this package has in common."""
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .shrink import NORMALIZATIONS

__all__ = ['ShrinkGroups', 'evaluate']


class ShrinkGroups(torch.optim.Optimizer):
    """Parameter groups that carry the shrink: their defaults, their checks, and which tensors they shrink.

    Mixed in before an optimizer of torch or timm, whose constructor calls `_set_shrink` once it has its groups.
    """
    alpha_key = 'alpha'

    def _set_shrink(self, **options: Any) -> None:
        self.defaults.update(options)
        for group in self.param_groups:
            self._complete_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.alpha_key in self.defaults:  # not yet while the base constructor adds the first groups
            try:
                self._complete_group(self.param_groups[-1])
            except (TypeError, ValueError):
                del self.param_groups[-1]
                raise

    def _complete_group(self, group: dict[str, Any]) -> None:
        for key in (self.alpha_key, 'normalization', 'decoupled'):
            if key in self.defaults:
                group.setdefault(key, self.defaults[key])
        _check_group(group, self.alpha_key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer, or that of its base: groups then keep the shrink they have here."""
        keys = (self.alpha_key, 'normalization', 'decoupled')
        saved_groups = state_dict['param_groups']
        if len(saved_groups) == len(self.param_groups) and not all(self.alpha_key in group for group in saved_groups):
            warnings.warn(
                f'The loaded state holds no {self.alpha_key}: {type(self).__name__} keeps that of its own groups.',
                stacklevel=2,
            )
            own = [{key: group[key] for key in keys if key in group} for group in self.param_groups]
            state_dict = {**state_dict, 'param_groups': [{**o, **saved} for o, saved in zip(own, saved_groups)]}
        super().load_state_dict(state_dict)

    def _shrinks(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        return group[self.alpha_key] != 0 and param.ndim >= 2

    def _refuse_sparse_gradients(self) -> None:
        """Looks before anything is updated, so that a step is either taken whole or not at all."""
        for group in self.param_groups:
            for param in group['params']:
                if param.grad is not None and param.grad.is_sparse:
                    raise TypeError(
                        f'{type(self).__name__} does not take sparse gradients, but a parameter of shape '
                        f'{tuple(param.shape)} has one: use sparse=False in its nn.Embedding.'
                    )


def _check_group(group: dict[str, Any], alpha_key: str) -> None:
    """Checks the values of one parameter group; torch checks only the constructor's, and lets NaN through."""
    if not isinstance(group[alpha_key], (int, float)):
        raise TypeError(f'Invalid {alpha_key}: {group[alpha_key]!r}, give a number.')
    for key in (alpha_key, 'lr', 'momentum', 'dampening', 'weight_decay', 'eps'):
        value = group.get(key)  # of another kind in some optimizers, None for one that is set on the way, for example
        if isinstance(value, (int, float, torch.Tensor)) and not 0 <= value < math.inf:
            raise ValueError(f'Invalid {key}: {value!r}, give a finite number of at least 0.')
    for beta in group.get('betas') or ():
        if isinstance(beta, float) and not 0 <= beta < 1:
            raise ValueError(f'Invalid betas: {group["betas"]!r}, give numbers of at least 0 and below 1.')
    normalization = group['normalization']
    if normalization not in (*NORMALIZATIONS, None):
        raise ValueError(
            f'Unknown normalization: {normalization!r}, choose one of {", ".join(map(repr, NORMALIZATIONS))}.')
    if normalization is None and group[alpha_key] != 0:
        raise ValueError(
            f'{alpha_key}={group[alpha_key]!r} in a group with normalization=None: weights that are not normalized '
            f'must not be shrunk, set {alpha_key} to 0 or name their normalization.'
        )
    for param in group['params']:
        if param.is_complex():
            raise TypeError(
                f'Complex parameters have no filter length, but one of shape {tuple(param.shape)} is '
                f'{param.dtype}: hand it to torch.optim.'
            )


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Calls the closure of an optimizer step, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
