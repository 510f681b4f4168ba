"""Adaptive Weight Shrink for timm: importing this registers the models and optimizers and gives the public names."""
from . import ws_resnet
from .convert import convert
from .effective_lr import decay_as_lr, effective_lr, equilibrium_angle
from .layers import CWNConv2d, WNConv2d, WSConv2d
from .norm_statistics import recalibrate
from .optimizers import AwsAdam, AwsSGD
from .param_groups import alpha_like_decay, normalized_weights, param_groups_aws
from .record import Recorder
from .timm_registry import register
from .ws_resnet import list_models

__all__ = [
    'AwsAdam',
    'AwsSGD',
    'CWNConv2d',
    'Recorder',
    'WNConv2d',
    'WSConv2d',
    'alpha_like_decay',
    'convert',
    'decay_as_lr',
    'effective_lr',
    'equilibrium_angle',
    'list_models',
    'normalized_weights',
    'param_groups_aws',
    'recalibrate',
    'ws_resnet',
]
__version__ = '0.1.0'

register()
