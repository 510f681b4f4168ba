"""Everything that needs timm's private modules: optimizers enter its factory, folding enters its reparameterization.

timm's factory keeps only what follows the last underscore of an optimizer's name, so that `aws_sgd` would silently be
`sgd`. The registry instance's `create_optimizer` is wrapped for names that begin with `aws_`: they are resolved in a
registry of their own, where the name has no underscore. Every other name goes to timm as it came. For `aws_` names the
factory takes four options of its own: `like_decay` and `batch_norm` of `param_groups_aws`, `record` and `record_every`.
"""
import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm.models
import timm.models._manipulate
import timm.utils
import timm.utils.model
import torch
import torch.nn as nn
from timm.optim import Lookahead
from timm.optim._optim_factory import OptimInfo, OptimizerRegistry, default_registry

from .fold import fold_normalization
from .layers import NormalizedConv2d, compute_weights
from .optimizers import AwsAdam, AwsSGD
from .param_groups import choose_alpha, split_normalized
from .record import Recorder
from .wrap_optimizer import aws_optimizer

__all__ = ['register']

_PREFIX = 'aws_'
_LOOKAHEAD = 'lookahead_'


def register() -> None:
    """Registers the optimizers and the folding with timm; doing so again changes nothing."""
    if default_registry.list_optimizers(f'{_PREFIX}sgd'):
        return
    # On the instance: train.py holds the module's functions already, and they all end up here.
    for method, ours in (
            ('create_optimizer', _create_optimizer), ('get_optimizer_info', _get_optimizer_info),
            ('list_optimizers', _list_optimizers)):
        setattr(default_registry, method, functools.partial(ours, getattr(default_registry, method)))
    default_registry.list_optimizers()  # registers them
    # Lookahead has torch's own, which knows neither the checks of the base optimizer nor how it splits a group.
    setattr(Lookahead, 'add_param_group', lambda self, group: self._base_optimizer.add_param_group(group))  # noqa: B010
    for module in (timm.models._manipulate, timm.models, timm.utils.model, timm.utils):
        if hasattr(module, 'reparameterize_model'):
            setattr(module, 'reparameterize_model', _folding(module.reparameterize_model))  # noqa: B010


def _get_optimizer_info(get_optimizer_info: Callable[[str], OptimInfo], name: str) -> OptimInfo:
    """Stands in for `OptimizerRegistry.get_optimizer_info`: `aws_<name>` is made of what `<name>` is now."""
    base_name = name.lower().removeprefix(_PREFIX)
    if name.lower() == _PREFIX + base_name and not base_name.startswith(_PREFIX):
        try:
            base = get_optimizer_info(base_name)
        except ValueError:
            return get_optimizer_info(name)  # raises under the name that was asked for
        if isinstance(base.opt_class, (type, str)):  # no function, of which no class can be made
            return _shrinking(base_name, base)
    return get_optimizer_info(name)


def _list_optimizers(list_optimizers: Callable[..., list], *args: Any, **kwargs: Any) -> list:
    """Stands in for `OptimizerRegistry.list_optimizers`: it lists our names too, without classes of other packages."""
    names = set(list_optimizers())
    for name in names:
        if not name.startswith(_PREFIX) and _PREFIX + name not in names:
            base = default_registry.get_optimizer_info(name)
            if isinstance(base.opt_class, type):
                default_registry.register(_shrinking(name, base))
    return list_optimizers(*args, **kwargs)


def _shrinking(name: str, base: OptimInfo) -> OptimInfo:
    """Describes to timm the optimizer `aws_<name>`."""
    info = replace(base, name=_PREFIX + name, description=f'Adaptive Weight Shrink around {name}, decoupled')
    if name == 'sgd':
        return replace(info, opt_class=AwsSGD, description='SGD with Adaptive Weight Shrink', defaults=None)
    if name == 'adam':
        return replace(info, opt_class=AwsAdam, description='Adam with Adaptive Weight Shrink', defaults=None)
    if base.opt_class is torch.optim.SGD:  # timm's names for the other settings of SGD
        return replace(info, opt_class=AwsSGD, defaults={**(base.defaults or {}), 'decoupled': True})
    base_class: Any = default_registry.get_optimizer_class(base, bind_defaults=False)
    opt_class: Any = aws_optimizer(base_class)
    if opt_class.alpha_key != 'alpha' and base.defaults:
        info = replace(info, defaults={'base_alpha' if k == 'alpha' else k: v for k, v in base.defaults.items()})
    return replace(info, opt_class=opt_class)


def _create_optimizer(
        create_optimizer: Callable[..., torch.optim.Optimizer],
        model_or_params: nn.Module | Iterable[Any],
        opt: str,
        *args: Any,
        **kwargs: Any,
) -> torch.optim.Optimizer:
    """Stands in for `OptimizerRegistry.create_optimizer`, which it calls for names that are not ours."""
    lookahead, name = _LOOKAHEAD if opt.lower().startswith(_LOOKAHEAD) else '', opt.lower().removeprefix(_LOOKAHEAD)
    if not name.startswith(_PREFIX):
        return create_optimizer(model_or_params, opt, *args, **kwargs)
    info = default_registry.get_optimizer_info(name)  # raises where timm has no such optimizer
    opt_class: Any = info.opt_class

    def split_and_create(
            params: Any,
            record: str | None = None,
            record_every: int | None = None,
            like_decay: float | None = None,
            batch_norm: bool = False,
            **options: Any,
    ) -> Any:
        if record_every is not None and not record:
            raise ValueError(f'record_every={record_every!r} without a file: name one with record=FILE.csv.')
        if not isinstance(model_or_params, nn.Module):
            if like_decay is not None or batch_norm:
                raise ValueError('like_decay and batch_norm look at layers: give the model in place of its parameters.')
            optimizer = opt_class(params, **options)
        else:
            if 'normalization' in options:
                raise ValueError(
                    f'normalization={options["normalization"]!r} is no option where a model is given, as its layers '
                    f'decide: leave it out, or change the layers with timm_aws.convert.'
                )
            alpha = options['alpha'] = choose_alpha(model_or_params, options.get('alpha'), like_decay, batch_norm)
            split = functools.partial(
                split_normalized, model=model_or_params, alpha=alpha, alpha_key=opt_class.alpha_key,
                batch_norm=batch_norm)
            optimizer = opt_class(split(params), **options)
            # A group that is added later is split alike. A copy of the optimizer, which has no model, refuses it.
            optimizer._split = split
            optimizer.defaults['normalization'] = None
        if record:
            Recorder(optimizer, record, record_every)
        return optimizer

    # timm groups the parameters, sorts out the options and adds Lookahead as for any other optimizer.
    registry = OptimizerRegistry()
    split_class: Any = split_and_create  # timm calls it with the groups and the options, as it would a class
    registry.register(replace(info, name='aws', opt_class=split_class))
    return registry.create_optimizer(model_or_params, f'{lookahead}aws', *args, **kwargs)


def _folding(reparameterize_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes timm's reparameterization fold weight normalization, and batch norm with it, before it does the rest."""

    @functools.wraps(reparameterize_model)
    def fold_and_reparameterize(model: nn.Module, inplace: bool = False) -> nn.Module:
        if not any(isinstance(module, NormalizedConv2d) for module in model.modules()):
            return reparameterize_model(model, inplace=inplace)
        compute_weights(model)
        folded = fold_normalization(copy.deepcopy(model), functools.partial(reparameterize_model, inplace=True))
        if not inplace:
            return folded
        model.__dict__ = folded.__dict__  # at once, so that none is left half folded where a part raises
        return model

    return fold_and_reparameterize
