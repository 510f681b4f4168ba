"""ResNets with normalized weights, in timm's style: the networks of the paper and the rest of their family.

timm's ResNet has no argument for the class of its convolutions, so it is built first and converted in the constructor:
keys, parameter counts, initialization and every keyword stay those of timm's own model.

Papers:
* `Understanding the Disharmony between Weight Normalization Family and Weight Decay` -
    https://doi.org/10.1609/aaai.v34i04.5904
* `Weight Standardization` - https://arxiv.org/abs/1903.10520
"""
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .checkpoint.folder import check_source, own_cfgs
from .convert import normalize_convs, reasons_to_leave
from .layers import NormalizedConv2d, normalize_filters
from .norm_statistics import relative_length, rescaled_statistics
from .rule import NORMALIZATIONS

__all__ = ['NormalizedResNet', 'list_models']  # register_model adds each entry point to this


class NormalizedResNet(ResNet):
    """timm's ResNet with a normalized weight in every convolution that a norm layer follows.

    Takes every argument of timm.models.resnet.ResNet.
    """

    def __init__(self, *args, normalization: str = 'ws', **kwargs) -> None:
        """
        Args:
            normalization: How the weights are normalized: 'ws', 'wn' or 'cwn'.
        """
        super().__init__(*args, **kwargs)
        normalize_convs(self, normalization, reasons_to_leave(self))


def _create_ws_resnet(variant: str, pretrained: bool = False, **kwargs) -> NormalizedResNet:
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        check_source(cfg)
        trained = variant.partition('_')[0]
        asked = kwargs.get('normalization', trained)
        if f'{variant}.{cfg.tag}' in _own_cfgs and asked != trained:
            raise ValueError(
                f'The weights of {variant}.{cfg.tag} were trained with {trained!r}, not with normalization={asked!r}: '
                f'leave it out, then call timm_aws.convert(model, {asked!r}).'
            )
    return build_model_with_cfg(NormalizedResNet, variant, pretrained, pretrained_filter_fn=_fold_stem, **kwargs)


def _fold_stem(state_dict: dict[str, torch.Tensor], model: NormalizedResNet) -> dict[str, torch.Tensor]:
    """Folds the stem where timm is about to sum or repeat its filters for another number of input channels.

    The layer normalizes what timm makes of them, V, once more, to (V - mean V) / s, and the batch norm behind takes
    1 / s over. So that mean V is 0, a channel that timm repeats is split among its copies, and one that timm cuts among
    the rest. The stem then gives the same for gray images in any number of channels, and for repeated channels, but not
    before a group norm, which has no statistics that could take 1 / s over.
    """
    modules = list(model.named_modules())
    index, name, conv = next((i, n, m) for i, (n, m) in enumerate(modules) if isinstance(m, nn.Conv2d))
    norm, bn = modules[index + 1]
    weight = state_dict.get(f'{name}.weight')
    if weight is None or weight.shape[1] == conv.in_channels or not isinstance(conv, NormalizedConv2d):
        return state_dict
    kind = NORMALIZATIONS[conv.normalization]
    folded = normalize_filters(weight.float(), *kind)
    if conv.in_channels > 1:  # timm sums for one
        trained, wanted = weight.shape[1], conv.in_channels
        copies = torch.arange(wanted).remainder(trained).bincount(minlength=trained).clamp(min=1)
        spread = folded + folded[:, wanted:].sum(1, keepdim=True) / wanted
        folded = spread * (wanted / trained / copies).view(-1, 1, 1)  # timm multiplies by trained / wanted
    base_chans = () if weight.shape[1] == 3 else (weight.shape[1],)  # which the oldest timm does not take
    adapted = adapt_input_conv(conv.in_channels, folded, *base_chans)
    length = relative_length(adapted, normalize_filters(adapted, *kind))
    state_dict = {**state_dict, f'{name}.weight': folded}
    if f'{norm}.running_var' in state_dict:
        keys = [f'{norm}.{key}' for key in ('running_mean', 'running_var', 'weight')]
        mean, variance, gain = (state_dict[key] for key in keys)
        state_dict.update(zip(keys, rescaled_statistics(mean, variance, gain, bn.eps, length)))
    return state_dict


def _cfg(url: str = '', **kwargs) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'doi:10.1609/aaai.v34i04.5904',
        **kwargs
    }


_own_cfgs = own_cfgs()
# NAME_aws is the checkpoint of NAME that was trained with AWS; of several, the first one in the order of own_cfgs.
_aws = {f'{name.partition(".")[0]}_aws': name for name in reversed(_own_cfgs) if '.aws_' in name}

default_cfgs = generate_default_cfgs({
    # Checkpoints come before .untrained*. The asterisk makes the network without trained weights the default.
    **_own_cfgs,
    **{name: _own_cfgs[checkpoint] for name, checkpoint in _aws.items()},
    'ws_resnet18.untrained*': _cfg(),
    'ws_resnet34.untrained*': _cfg(),
    'ws_resnet50.untrained*': _cfg(),
    'ws_resnet101.untrained*': _cfg(),
    'ws_resnet152.untrained*': _cfg(),
    'ws_resnext50.untrained*': _cfg(),
    'ws_resnext101.untrained*': _cfg(),
    'ws_seresnet50.untrained*': _cfg(),
    'ws_seresnet101.untrained*': _cfg(),
    'wn_resnet50.untrained*': _cfg(),
    'cwn_resnet50.untrained*': _cfg(),
    'test_ws_resnet.untrained*': _cfg(input_size=(3, 160, 160), pool_size=(5, 5), first_conv='conv1.0'),
})


def list_models() -> list[str]:
    """Returns the names under which timm knows the models of this package, sorted."""
    return sorted(default_cfgs)


@register_model
def ws_resnet18(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-18 with Weight Standardization, the twin of timm's resnet18."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_ws_resnet('ws_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_resnet34(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-34 with Weight Standardization, the twin of timm's resnet34."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_ws_resnet('ws_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_resnet50(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-50 with Weight Standardization, the twin of timm's resnet50."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_ws_resnet('ws_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_resnet101(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-101 with Weight Standardization, the twin of timm's resnet101."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_ws_resnet('ws_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_resnet152(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-152 with Weight Standardization, the twin of timm's resnet152."""
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3))
    return _create_ws_resnet('ws_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_resnext50(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNeXt-50 32x4d with Weight Standardization, the twin of timm's resnext50_32x4d."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_ws_resnet('ws_resnext50', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_resnext101(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNeXt-101 32x4d with Weight Standardization, the twin of timm's resnext101_32x4d."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_ws_resnet('ws_resnext101', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_seresnet50(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs an SE-ResNet-50 with Weight Standardization, the twin of timm's seresnet50."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), block_args=dict(attn_layer='se'))
    return _create_ws_resnet('ws_seresnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def ws_seresnet101(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs an SE-ResNet-101 with Weight Standardization, the twin of timm's seresnet101."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), block_args=dict(attn_layer='se'))
    return _create_ws_resnet('ws_seresnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def wn_resnet50(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-50 with Weight Normalization, the twin of timm's resnet50."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), normalization='wn')
    return _create_ws_resnet('wn_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def cwn_resnet50(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a ResNet-50 with Centered Weight Normalization, the twin of timm's resnet50."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), normalization='cwn')
    return _create_ws_resnet('cwn_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def test_ws_resnet(pretrained: bool = False, **kwargs) -> NormalizedResNet:
    """Constructs a tiny ResNet with Weight Standardization for tests, the twin of timm's test_resnet."""
    model_args = dict(
        block=[BasicBlock, BasicBlock, Bottleneck, BasicBlock], layers=(1, 1, 1, 1),
        stem_width=16, stem_type='deep', avg_down=True, channels=(32, 48, 48, 96))
    return _create_ws_resnet('test_ws_resnet', pretrained, **dict(model_args, **kwargs))


def _register_aws(name: str, checkpoint: str) -> None:
    """Registers `<architecture>_aws`, an entry point that loads `<architecture>.<tag>`."""
    architecture, _, default_tag = checkpoint.partition('.')

    def entry_point(pretrained: bool = False, **kwargs) -> NormalizedResNet:
        tag = kwargs.pop('pretrained_cfg', None) or default_tag
        return globals()[architecture](pretrained, pretrained_cfg=tag, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f'Constructs {architecture} for its checkpoint trained with AWS, `{checkpoint}`.'
    globals()[name] = register_model(entry_point)


for _name, _checkpoint in _aws.items():
    _register_aws(_name, _checkpoint)
