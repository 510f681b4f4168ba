"""Parameter groups: which parameters are normalized weights, and the split of groups by it."""
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn as nn
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.optim import param_groups_weight_decay
from torch.fx import GraphModule
from torch.nn.utils.parametrize import ParametrizationList

from .invariance import tried, uses_in_graph
from .layers import NormalizedConv2d
from .rule import DEFAULT_ALPHA, filter_length, shrink_factor

__all__ = ['alpha_like_decay', 'normalized_weights', 'param_groups_aws', 'split_normalized']

_FOREIGN = '(not of the model)'  # the name of a parameter that a user adds, one of the loss for example


def normalized_weights(model: nn.Module) -> dict[str, str]:
    """Finds the parameters whose length does not change the model's output.

    A parameter is judged by what its layer does with it. The classes of this package and timm's StdConv2d and
    ScaledStdConv2d are known. Any other convolution or linear layer that computes its weight (torch's weight_norm,
    pruning, a parametrization, a subclass) is tried: it must return the same for filters of other lengths. In a
    torch.fx graph, what the graph computes from the parameter is tried alike. A parameter that any layer uses as it is,
    beside another that normalizes it, is not normalized.

    Args:
        model: Any module, wrapped, compiled or traced by torch.fx too.

    Returns:
        Name in `named_parameters` to normalization, 'ws', 'wn' or 'cwn'.

    Raises:
        ValueError: If a part of the model is TorchScript, which hides what its layers do.
    """
    uses: dict[Any, list[str | None]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'{type(model).__name__} holds a TorchScript module, which hides if its weights are normalized: make '
                f'the optimizer or the parameter groups before torch.jit.script or torch.jit.trace.'
            )
        for param, normalization in uses_in_graph(module) if isinstance(module, GraphModule) else _uses(module):
            uses[param].append(normalization)
    return {
        name: uses[param][0] for name, param in model.named_parameters() if uses[param] and all(uses[param])  # type: ignore
    }


def _forward_of(cls: type[nn.Module]) -> tuple[Any, Any]:
    return cls.forward, getattr(cls, '_conv_forward', None)


_PLAIN_FORWARDS = [_forward_of(cls) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)]


def _uses(module: nn.Module) -> Iterable[tuple[nn.Parameter, str | None]]:
    """Yields the parameters of two dimensions and more that a module uses itself, with their normalization."""
    if isinstance(module, ParametrizationList) or type(module) is nn.Module:  # its layer uses it; or a graph does
        return
    own = dict(module.named_parameters(recurse=False))
    for name, parametrizations in getattr(module, 'parametrizations', {}).items():
        originals = parametrizations.named_parameters(recurse=False)
        own.update({f'parametrizations.{name}.{original}': param for original, param in originals})
    known = module.normalization if isinstance(module, NormalizedConv2d) else None
    if isinstance(module, (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)):
        known = 'ws'
    # By the forward, as torch's fully_shard makes subclasses of its own. A weight that is computed is no parameter.
    is_plain = _forward_of(type(module)) in _PLAIN_FORWARDS
    for name, param in own.items():
        if param.ndim < 2:
            continue
        if 'weight' in own and (known or is_plain):
            yield param, known if name == 'weight' else None
        else:
            yield param, tried(module, name, known)


@torch.no_grad()
def alpha_like_decay(model: nn.Module, weight_decay: float) -> float:
    """Computes the alpha with which a model's filters shrink, as they are now, as under a weight decay.

    gamma = alpha * length (Eq. 20) is then the weight decay for a filter of median length (the median over layers of
    the median in each). For a model at its initialization, this is where to begin tuning alpha: the long filters of
    narrow networks want a smaller one than the short filters of wide networks.

    Args:
        model: Model with normalized weights.
        weight_decay: Weight decay that would be right for the normalized weights.

    Returns:
        alpha, per unit of weight.

    Raises:
        ValueError: If the model has no normalized weights, or if their median length is 0 or not finite.
    """
    normalization_of = normalized_weights(model)
    lengths = [
        filter_length(param.detach(), normalization_of[name]).median().item()
        for name, param in model.named_parameters() if name in normalization_of
    ]
    length = statistics.median(lengths) if lengths else 0.
    if not 0 < length < math.inf:
        raise ValueError(
            f'{type(model).__name__} has {len(lengths)} normalized weights, of median length {length!r}: give a model '
            f'whose normalized weights are initialized.'
        )
    return weight_decay / shrink_factor(1., length)


def param_groups_aws(
        model: nn.Module,
        alpha: float = DEFAULT_ALPHA,
        weight_decay: float = 0.,
        no_weight_decay_list: Collection[str] = (),
        weight_decay_exclude_1d: bool = True,
) -> list[dict[str, Any]]:
    """Makes parameter groups for AwsSGD and AwsAdam: shrink for normalized weights, timm's weight decay for the rest.

    Args:
        model: Model with normalized weights.
        alpha: Shrink coefficient of the normalized weights.
        weight_decay: Weight decay of the others.
        no_weight_decay_list: Name patterns of parameters that get no decay.
        weight_decay_exclude_1d: Whether biases and norm parameters get no decay.

    Returns:
        Parameter groups with the keys params, param_names, weight_decay, alpha and normalization.

    Raises:
        ValueError: If the model has no normalized weights.
    """
    groups = param_groups_weight_decay(
        model,
        weight_decay,
        weight_decay_exclude_1d=weight_decay_exclude_1d,
        no_weight_decay_list=no_weight_decay_list,
    )
    return split_normalized(groups, model, alpha)


def split_normalized(
        groups: Iterable[dict[str, Any] | torch.Tensor],
        model: nn.Module,
        alpha: float,
        alpha_key: str = 'alpha',
) -> list[dict[str, Any]]:
    """Splits parameter groups into normalized weights, which get the shrink and no decay, and the rest.

    Other keys of a group stay with both halves. A group that has the shrink's key already is left as it is.

    Args:
        groups: Parameter groups, or bare parameters.
        model: Model that the parameters are from.
        alpha: Shrink coefficient of the normalized weights.
        alpha_key: Group key that holds it.

    Returns:
        Parameter groups that name their parameters.

    Raises:
        ValueError: If the model has no normalized weights.
        TypeError: If a group holds anything but parameters.
    """
    normalization_of = normalized_weights(model)
    if not normalization_of:
        raise ValueError(
            f'{type(model).__name__} has no normalized weights for the shrink to act on: build a ws_ model, '
            f"call timm_aws.convert(model, 'ws') first, or use the optimizer without aws_."
        )
    name_of: dict[Any, str] = {param: name for name, param in model.named_parameters()}
    out = []
    for group in groups:
        keys: dict[str, Any] = {'params': [group]} if isinstance(group, torch.Tensor) else group
        params = [keys['params']] if isinstance(keys['params'], torch.Tensor) else list(keys['params'])
        names = keys.get('param_names') or [name_of.get(param, _FOREIGN) for param in params]
        halves: dict[str | None, list[Any]] = {}
        for param, name in zip(params, names):
            if not isinstance(param, torch.Tensor):
                raise TypeError(f'A parameter group holds a {type(param).__name__}: give parameters, without names.')
            normalization = None if alpha_key in keys else normalization_of.get(name_of.get(param, _FOREIGN))
            halves.setdefault(normalization, []).append((param, name))
        for normalization, half in halves.items():
            split: dict[str, Any] = {
                'params': [param for param, _ in half], 'param_names': [name for _, name in half]}
            if normalization is not None:
                split.update({'normalization': normalization, alpha_key: alpha})
                if alpha != 0:
                    split['weight_decay'] = 0.  # which the shrink replaces
            elif alpha_key not in keys:
                split.update({'normalization': None, alpha_key: 0.})
            out.append({**keys, **split})
    return out
