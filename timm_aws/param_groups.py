"""Parameter groups: which parameters are normalized weights, the split of groups by it, and which alpha suits them."""
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.optim import param_groups_weight_decay
from torch.fx import GraphModule
from torch.nn.utils.parametrize import ParametrizationList

from .data_flow import conv_norm_pairs
from .invariance import tried, uses_in_graph
from .layers import NormalizedConv2d
from .rule import DEFAULT_ALPHA, filter_length, shrink_factor

__all__ = ['alpha_like_decay', 'choose_alpha', 'normalized_weights', 'param_groups_aws', 'split_normalized']

_logger = logging.getLogger(__name__)

_FOREIGN = '(not of the model)'  # the name of a parameter that a user adds, one of the loss for example


def normalized_weights(model: nn.Module, batch_norm: bool = False) -> dict[str, str]:
    """Finds the parameters whose length does not change the model's output.

    A parameter is judged by what its layer does with it. The classes of this package and timm's StdConv2d and
    ScaledStdConv2d are known. Any other convolution or linear layer that computes its weight (torch's weight_norm,
    pruning, a parametrization, a subclass) is tried: it must return the same for filters of other lengths. In a
    torch.fx graph, what the graph computes from the parameter is tried alike. A parameter that any layer uses as it is,
    beside another that normalizes it, is not normalized.

    With `batch_norm`, the weight of a plain nn.Conv2d is 'wn' too if its output goes to norms alone that take each
    channel by itself (batch and instance norm; under a group or layer norm, the lengths of filters relative to each
    other matter). The training loss is then the same for each filter times any positive number. Norms that are frozen
    or stay in eval mode do not count. A convolution with a bias counts only right before a batch or instance norm,
    which subtracts the mean. Linear layers do not count.

    The norm's eps limits how short a filter W may get. With s the standard deviation of the input in the direction of
    W, that of its output is s * ||W||, and the norm returns 1 / sqrt(1 + eps / (s * ||W||)^2) of what it would with
    eps = 0. This is 0.99 at ||W|| = 7.02 * sqrt(eps) / s, which is 0.022 / s for eps = 1e-5 and 0.22 / s for 1e-3, and
    0.71 at sqrt(eps) / s. Initialized filters have ||W|| of about 1.

    Args:
        model: Any module, wrapped, compiled or traced by torch.fx too.
        batch_norm: Whether plain convolutions before batch norm count. What is to stay in eval mode must be in it, and
            the model itself in training mode; a model in eval mode is judged as if all of it will train.

    Returns:
        Name in `named_parameters` to normalization, 'ws', 'wn' or 'cwn'.

    Raises:
        TypeError: If batch_norm is not True or False.
        ValueError: If a part of the model is TorchScript, which hides what its layers do.
    """
    if not isinstance(batch_norm, bool):
        raise TypeError(f'Invalid batch_norm: {batch_norm!r}, give True or False.')
    before_norm = _convs_before_norm(model) if batch_norm else set()
    uses: dict[Any, list[str | None]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f'{type(model).__name__} holds a TorchScript module, which hides if its weights are normalized: make '
                f'the optimizer or the parameter groups before torch.jit.script or torch.jit.trace.'
            )
        for param, normalization in (
                uses_in_graph(module) if isinstance(module, GraphModule) else _uses(module, module in before_norm)):
            uses[param].append(normalization)
    return {
        name: uses[param][0] for name, param in model.named_parameters() if uses[param] and all(uses[param])  # type: ignore
    }


def _convs_before_norm(model: nn.Module) -> set[nn.Module]:
    """Returns the convolutions before norms of single channels; of those with a bias, if the norm subtracts it."""
    found = set()
    for pair in conv_norm_pairs(model, each_channel=True):
        conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
        takes_bias_off = pair.exclusive and isinstance(norm, nn.modules.batchnorm._NormBase)
        if conv.bias is None or takes_bias_off:
            found.add(conv)
    return found


def _forward_of(cls: type[nn.Module]) -> tuple[Any, Any]:
    return cls.forward, getattr(cls, '_conv_forward', None)


_PLAIN_FORWARDS = [_forward_of(cls) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)]


def _uses(module: nn.Module, before_norm: bool) -> Iterable[tuple[nn.Parameter, str | None]]:
    """Yields the parameters with filters that a module uses itself, with their normalization."""
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
        if param.shape[1:].numel() < 2:  # a filter of one element has a length and no direction
            continue
        if 'weight' in own and (known or is_plain):
            yield param, known or ('wn' if before_norm else None) if name == 'weight' else None
        else:
            yield param, tried(module, name, known) or (tried(module, name, 'wn', True) if before_norm else None)


def alpha_like_decay(model: nn.Module, weight_decay: float, batch_norm: bool = False) -> float:
    """Computes the alpha with which a model's filters shrink, as they are now, as under a weight decay.

    gamma = alpha * length (Eq. 20) is then the weight decay for a filter of median length (the median over layers of
    the median in each). For a model at its initialization, this is where to begin tuning alpha: the long filters of
    narrow networks want a smaller one than the short filters of wide networks.

    One alpha for all layers is not one gamma for all. A filter of n elements at He initialization (fan-in) has std
    sqrt(2 / n) and norm sqrt(2). So gamma is the weight decay times sqrt(m / n) for 'ws', with m the number of elements
    in the median layer, and the weight decay in every layer for 'wn'.

    The alpha follows the initialization: from weights 100 times too short it is 100 times as large, for the whole run.
    There, give an alpha of your own.

    Args:
        model: Model with normalized weights.
        weight_decay: Weight decay that would be right for the normalized weights.
        batch_norm: Whether plain convolutions before batch norm count, see `normalized_weights`.

    Returns:
        alpha, per unit of weight.

    Raises:
        ValueError: If the weight decay is negative or not finite, if the model has no normalized weights, or if their
            median length is 0 or not finite.
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f'Invalid weight decay for alpha: {weight_decay!r}, give a finite number of at least 0.')
    length = _median_length(model, batch_norm)
    if not 0 < length < math.inf:
        raise ValueError(
            f'The normalized weights of {type(model).__name__} have a median length of {length!r}: give a model whose '
            f'normalized weights are initialized.'
        )
    return weight_decay / shrink_factor(1., length)


@torch.no_grad()
def _median_length(model: nn.Module, batch_norm: bool) -> float:
    normalization_of = _some_normalized_weights(model, batch_norm)
    lengths = []
    for name, param in model.named_parameters():
        if name in normalization_of:
            if param.is_meta:
                return math.nan
            length: Any = filter_length(param.detach(), normalization_of[name])
            whole = length.full_tensor() if hasattr(length, 'full_tensor') else length  # of a DTensor
            lengths.append(whole.median().item())
    return statistics.median(lengths)


def choose_alpha(
        model: nn.Module, alpha: float | None, like_decay: float | None, batch_norm: bool = False) -> float:
    """Chooses the alpha of a model's normalized weights, and logs what a user should know about it.

    Args:
        model: Model with normalized weights.
        alpha: What the user asks for, if anything.
        like_decay: Weight decay to compute alpha from, see `alpha_like_decay`, if the user asks for that.
        batch_norm: Whether plain convolutions before batch norm count, see `normalized_weights`.

    Returns:
        alpha, the same in all processes of torch.distributed.

    Raises:
        ValueError: If the user asks for both, or for what `alpha_like_decay` refuses.
    """
    if like_decay is None:
        if alpha is not None:
            return alpha
        gamma = shrink_factor(DEFAULT_ALPHA, _median_length(model, batch_norm))
        if gamma < 1e-5 or gamma > 1e-3:  # not of filters that have no values yet
            _logger.warning(
                f'The default alpha={DEFAULT_ALPHA} shrinks the median filter of {type(model).__name__} as a weight '
                f'decay of {gamma:.1e} would: give alpha, or like_decay=1e-4 for the alpha that is like this decay.'
            )
        return DEFAULT_ALPHA
    if alpha is not None:
        raise ValueError(f'alpha={alpha!r} and like_decay={like_decay!r} both set alpha: give one of them.')
    alpha = alpha_like_decay(model, like_decay, batch_norm)
    if dist.is_available() and dist.is_initialized():
        # Each process has weights of its own until DDP hands round those of the first: so its alpha is taken too.
        chosen = [alpha]
        dist.broadcast_object_list(chosen)
        alpha = chosen[0]
    _logger.info(
        f'alpha={alpha:.4g} shrinks the median filter as a weight decay of {like_decay} would. A resumed run keeps the '
        f'alpha that it started with.')
    return alpha


def param_groups_aws(
        model: nn.Module,
        alpha: float | None = None,
        weight_decay: float = 0.,
        no_weight_decay_list: Collection[str] = (),
        weight_decay_exclude_1d: bool = True,
        *,
        like_decay: float | None = None,
        batch_norm: bool = False,
) -> list[dict[str, Any]]:
    """Makes parameter groups for AwsSGD and AwsAdam: shrink for normalized weights, timm's weight decay for the rest.

    Args:
        model: Model with normalized weights.
        alpha: Shrink coefficient of the normalized weights. None: 2.5e-3, or what `like_decay` says.
        weight_decay: Weight decay of the others.
        no_weight_decay_list: Name patterns of parameters that get no decay.
        weight_decay_exclude_1d: Whether biases and norm parameters get no decay.
        like_decay: Weight decay as under which the normalized weights should shrink, in place of alpha; see
            `alpha_like_decay`.
        batch_norm: Whether to shrink plain convolutions before batch norm too, see `normalized_weights`.

    Returns:
        Parameter groups with the keys params, param_names, weight_decay, alpha and normalization.

    Raises:
        ValueError: If the model has no normalized weights, or if both alpha and like_decay are given.
    """
    groups = param_groups_weight_decay(
        model,
        weight_decay,
        weight_decay_exclude_1d=weight_decay_exclude_1d,
        no_weight_decay_list=no_weight_decay_list,
    )
    alpha = choose_alpha(model, alpha, like_decay, batch_norm)
    return split_normalized(groups, model, alpha, batch_norm=batch_norm)


def _some_normalized_weights(model: nn.Module, batch_norm: bool) -> dict[str, str]:
    normalization_of = normalized_weights(model, batch_norm)
    if not normalization_of:
        plain = '' if batch_norm else 'give batch_norm=True to shrink the convolutions before its batch norms, '
        raise ValueError(
            f'{type(model).__name__} has no normalized weights for the shrink to act on: build a ws_ model, '
            f"call timm_aws.convert(model, 'ws') first, {plain}or use the optimizer without aws_."
        )
    return normalization_of


def split_normalized(
        groups: Iterable[dict[str, Any] | torch.Tensor],
        model: nn.Module,
        alpha: float,
        alpha_key: str = 'alpha',
        batch_norm: bool = False,
) -> list[dict[str, Any]]:
    """Splits parameter groups into normalized weights, which get the shrink and no decay, and the rest.

    Other keys of a group stay with both halves, and its normalized weights keep an alpha of its own. A group that names
    its normalization is left as it is.

    Args:
        groups: Parameter groups, or bare parameters.
        model: Model that the parameters are from.
        alpha: Shrink coefficient of the normalized weights.
        alpha_key: Group key that holds it.
        batch_norm: Whether plain convolutions before batch norm count, see `normalized_weights`.

    Returns:
        Parameter groups that name their parameters.

    Raises:
        ValueError: If the model has no normalized weights.
        TypeError: If a group holds anything but parameters.
    """
    normalization_of = _some_normalized_weights(model, batch_norm)
    name_of: dict[Any, str] = {param: name for name, param in model.named_parameters()}
    out = []
    for group in groups:
        keys: dict[str, Any] = group if isinstance(group, dict) else {'params': [group]}
        is_named, its_alpha = 'normalization' in keys, keys.get(alpha_key, alpha)
        params = [keys['params']] if isinstance(keys['params'], torch.Tensor) else list(keys['params'])
        params = [param[1] if isinstance(param, tuple) else param for param in params]  # of named_parameters
        names = keys.get('param_names') or [name_of.get(param, _FOREIGN) for param in params]
        halves: dict[str | None, list[Any]] = {}
        for param, name in zip(params, names):
            if not isinstance(param, torch.Tensor):
                raise TypeError(f'A parameter group holds a {type(param).__name__}: give parameters.')
            normalization = None if is_named else normalization_of.get(name_of.get(param, _FOREIGN))
            halves.setdefault(normalization, []).append((param, name))
        for normalization, half in halves.items():
            split: dict[str, Any] = {
                'params': [param for param, _ in half], 'param_names': [name for _, name in half]}
            if normalization is not None:
                split.update({'normalization': normalization, alpha_key: its_alpha})
                if its_alpha != 0:
                    split['weight_decay'] = 0.  # which the shrink replaces
            elif not is_named:
                split.update({'normalization': None, alpha_key: 0.})
            out.append({**keys, **split})
    if alpha != 0:
        normalized = [group['normalization'] for group in out for param in group['params'] if param.ndim >= 2]
        _logger.info(
            f'{len(normalized) - normalized.count(None)} of {len(normalized)} weights of {type(model).__name__} are '
            f'normalized: they are shrunk and get no weight decay.')
    return out
