"""Options of parameter groups that carry the shrink: defaults, checks, loading of states; and how a step begins.

Every optimizer of this package has this in common.
"""
import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from .rule import get_normalization, is_on_cpu, shrink_multiplier

__all__ = ['UNNAMED', 'ShrinkGroups', 'Unnamed']


class Unnamed(str):
    """The normalization of weights for which nobody has named one."""


UNNAMED = Unnamed('ws')


class ShrinkGroups(torch.optim.Optimizer):
    """Parameter groups that carry the shrink: their defaults, their checks, and which tensors they shrink.

    Mixed in before an optimizer of torch or timm, whose constructor calls `_set_shrink` once it has its groups.
    """
    alpha_key = 'alpha'
    _has_warned = False
    _split: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None  # of the model that timm's factory got

    def _set_shrink(self, **options: Any) -> None:
        # torch's fused updates would unscale the gradients and skip a step themselves, which is after the shrink.
        self._step_supports_amp_scaling = False
        self.defaults.update(options)
        for group in self.param_groups:
            self._complete_group(group)
            _check_group(group, self.defaults, self.alpha_key)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. What timm's factory made from a model splits it into normalized weights and the rest.

        Args:
            param_group: Parameters and options. With `normalization` among them it is taken as it is.

        Raises:
            TypeError: If an option is of the wrong type.
            ValueError: If an option is out of range, or if nothing says whether the weights are normalized.
        """
        if self.alpha_key not in param_group and {'alpha', 'normalization'} <= param_group.keys():
            # of param_groups_aws, for an optimizer with an alpha of its own
            param_group = {self.alpha_key: param_group['alpha'], **param_group}
            del param_group['alpha']
        if self.alpha_key not in self.defaults:  # the base constructor adds the first groups
            super().add_param_group(param_group)
            return
        is_named = 'normalization' in param_group
        count = len(self.param_groups)
        try:
            for group in [param_group] if is_named or self._split is None else self._split([param_group]):
                self._complete_group(group)
                if self.param_groups and 'param_names' in self.param_groups[0]:
                    params = [group['params']] if isinstance(group['params'], torch.Tensor) else list(group['params'])
                    names = [f'{len(self.param_groups)}.{index}' for index in range(len(params))]
                    group = {'param_names': names, **group, 'params': params}
                super().add_param_group(group)
                _check_group(self.param_groups[-1], self.defaults, self.alpha_key)
        except (TypeError, ValueError):
            del self.param_groups[count:]
            raise

    def _complete_group(self, group: dict[str, Any]) -> None:
        for key in self._shrink_keys():
            group.setdefault(key, self.defaults[key])
        if isinstance(group['normalization'], Unnamed):
            group['normalization'] = str(group['normalization'])
            self._warn_of_unnamed(group)

    def _warn_of_unnamed(self, group: dict[str, Any]) -> None:
        params = [group['params']] if isinstance(group['params'], torch.Tensor) else group['params']
        shapes = [str(tuple(param.shape)) for param in params if isinstance(param, torch.Tensor) and param.ndim >= 2]
        if shapes and group[self.alpha_key] != 0:
            warnings.warn(
                f'{type(self).__name__} shrinks {len(shapes)} tensors of shapes {", ".join(sorted(set(shapes)))}, '
                f'though nothing says that a layer normalizes them: give timm_aws.param_groups_aws(model), or name '
                f"normalization='ws' if one does.",
                stacklevel=2,
            )

    def _shrink_keys(self) -> list[str]:
        return [key for key in (self.alpha_key, 'normalization', 'decoupled') if key in self.defaults]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this optimizer, or that of its base.

        As in torch, options in the state replace those of the groups here, `alpha`, `foreach` and `fused` among them.
        `decoupled` and `normalization` say what the buffers hold and must be the same in both. A key of the shrink
        that the state lacks, as that of the base does, stays as it is here, and a warning says so.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If groups differ in number or size, in `decoupled` or in `normalization`.
        """
        saved_groups = state_dict['param_groups']
        if len(saved_groups) == len(self.param_groups):  # else torch says so
            keys = self._shrink_keys()
            missing = [key for key in keys if not all(key in saved for saved in saved_groups)]
            if missing:
                warnings.warn(
                    f'The loaded state holds no {", ".join(missing)}: {type(self).__name__} keeps that of its own '
                    f'groups.',
                    stacklevel=2,
                )
            own = [{key: group[key] for key in keys} for group in self.param_groups]
            merged = [{**kept, **saved} for kept, saved in zip(own, saved_groups)]
            _check_same_rule(own, merged)
            state_dict = {**state_dict, 'param_groups': merged}
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self._complete_group(group)
            _check_group(group, self.defaults, self.alpha_key)

    def _multiplier(self, group: dict[str, Any], param: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Computes the decoupled shrink of a parameter, and warns once if it takes a whole filter away."""
        multiplier = shrink_multiplier(length, group['lr'], group[self.alpha_key])
        looks = not torch.compiler.is_compiling() and is_on_cpu(param)  # elsewhere it would have to wait for the device
        if looks and not self._has_warned and not multiplier.all():
            self._has_warned = True
            warnings.warn(
                f'{type(self).__name__} shrinks filters of shape {tuple(param.shape[1:])} to 0, as '
                f'1 - lr * {self.alpha_key} * length stops there: lower {self.alpha_key}={group[self.alpha_key]!r} or '
                f'lr={group["lr"]!r}. This warning comes once.',
                stacklevel=2,
            )
        return multiplier

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, Eq. 21, whole or not at all: it looks at all gradients before it updates anything.

        Args:
            closure: Evaluates the model and returns the loss, called with gradients enabled.

        Returns:
            What the closure returns, None without one.

        Raises:
            TypeError: If a gradient is sparse.
            RuntimeError: If a gradient is not finite, looked for in torch's anomaly mode only.
            ValueError: If the optimizer sets its learning rate itself (lr=None).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # NaN and inf are looked for in anomaly mode only, as the host waits for the device.
        anomaly = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
        for group in self.param_groups:
            for index, param in enumerate(group['params']):
                if param.grad is not None and param.grad.is_sparse:
                    raise TypeError(
                        f'{type(self).__name__} does not take sparse gradients, but a parameter of shape '
                        f'{tuple(param.shape)} has one: use sparse=False in its nn.Embedding.'
                    )
                if anomaly and param.grad is not None and not param.grad.isfinite().all():
                    names = group.get('param_names')
                    raise RuntimeError(
                        f'The gradient of the parameter {names[index] if names else f"of shape {tuple(param.shape)}"} '
                        f'holds NaN or inf: {type(self).__name__} has updated nothing, zero the gradients to go on.'
                    )
        self._shrink_and_update()
        return loss

    def _shrink_and_update(self) -> None:
        """Shrinks and updates; each optimizer that this is mixed into has its own."""
        raise NotImplementedError  # of this class alone no optimizer is made


def _check_same_rule(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Checks that saved buffers, which hold the shrink or not, go on by the rule that made them."""
    for index, (here, there) in enumerate(zip(own, saved)):
        for key in ('decoupled', 'normalization'):
            if key in here and here[key] != there[key]:
                raise ValueError(
                    f'The state was saved with {key}={there[key]!r}, but parameter group {index} has '
                    f'{key}={here[key]!r}: build the optimizer with {key}={there[key]!r}, or delete {key!r} from the '
                    f'param_groups of the state to go on with {here[key]!r} from its buffers.'
                )


def _check_group(group: dict[str, Any], defaults: dict[str, Any], alpha_key: str) -> None:
    """Checks the values of one parameter group; torch checks only the constructor's, and lets NaN through."""
    if not isinstance(group[alpha_key], Real):
        raise TypeError(f'Invalid {alpha_key}: {group[alpha_key]!r}, give a number.')
    if not isinstance(group.get('decoupled', False), bool):
        raise TypeError(f'Invalid decoupled: {group["decoupled"]!r}, give True or False.')
    for key in (alpha_key, 'lr', 'momentum', 'dampening', 'weight_decay', 'eps'):
        value = group.get(key)  # of another kind in some optimizers, None for one that is set on the way, for example
        if isinstance(value, (Real, torch.Tensor)):
            if not 0 <= float(value) < math.inf:
                raise ValueError(f'Invalid {key}: {value!r}, give a finite number of at least 0.')
        elif isinstance(value, str) or isinstance(defaults.get(key), Real):
            raise TypeError(f'Invalid {key}: {value!r}, give a number.')
    for beta in group.get('betas') or ():
        if isinstance(beta, Real) and not 0 <= float(beta) < 1:
            raise ValueError(f'Invalid betas: {group["betas"]!r}, give numbers of at least 0 and below 1.')
    if group['normalization'] is not None:
        get_normalization(group['normalization'])
    elif group[alpha_key] != 0:
        raise ValueError(
            f'{alpha_key}={group[alpha_key]!r} in a group with normalization=None: weights that are not normalized '
            f'must not be shrunk, set {alpha_key} to 0 or name their normalization.'
        )
    _check_params(group)


def _check_params(group: dict[str, Any]) -> None:
    for param in group['params']:
        if param.is_complex():
            raise TypeError(
                f'Complex parameters have no filter length, but one of shape {tuple(param.shape)} is '
                f'{param.dtype}: hand it to torch.optim.'
            )
        # torch's fused CPU kernels walk the storage in order, gaps and all; empty_like leaves none.
        gaps = is_on_cpu(param) and torch.empty_like(param, device='meta').stride() != param.stride()
        if group.get('fused') and gaps:
            raise ValueError(
                f'fused=True with a parameter whose storage has gaps, shape {tuple(param.shape)}, strides '
                f'{param.stride()}: make it contiguous, or leave fused out.'
            )
