"""Which norm layer follows which convolution in a network.

Read off the data flow with torch.fx rather than off the order of definition: pre-activation blocks define a norm right
behind a convolution whose output it never sees, and separable convolutions hide theirs in the parent module. A norm
layer is what acts like one, whatever its name: see `norm_layers`.
"""
import copy
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d, LayerNormAct2d, SyncBatchNormAct
from torch.func import functional_call

from .invariance import same_outputs

__all__ = ['ConvNormPair', 'conv_norm_pairs', 'norm_layers']


class ConvNormPair(NamedTuple):
    """A convolution and the norm layer that takes its output, by module name.

    `exclusive` says that nothing else takes that output and that both run once in a forward. `channels` has every norm
    layer that takes the output, with the channels of the norm that it takes it in. It is empty where one of them takes
    other outputs in these channels too, or where the channels cannot be counted.
    """
    conv: str
    norm: str
    exclusive: bool
    channels: dict[str, slice]


def conv_norm_pairs(root: nn.Module, each_channel: bool = False) -> list[ConvNormPair]:
    """Finds the convolutions of a network that a norm layer follows every time they run.

    A module whose forward cannot be traced (control flow that depends on the data) is one opaque node of the graph
    around it; what is inside is then traced by itself. So a pair that spans the border of such a module is not found.
    Not found either is a convolution whose weight the forward reads beside the convolution, in a penalty for example.

    Args:
        root: Network to trace; it is not run.
        each_channel: Whether only norms count that take each channel by itself.

    Returns:
        One pair for each such convolution, in order of execution.
    """
    return _pairs(root, {norm: alone for norm, alone in norm_layers(root).items() if alone or not each_channel})


def _pairs(root: nn.Module, norms: dict[nn.Module, bool]) -> list[ConvNormPair]:
    graph, opaque = _trace(root, norms)
    pairs = _pairs_in_graph(graph, root, norms) if graph else []
    for name, part in _outermost(root, opaque) if graph else root.named_children():
        for pair in _pairs(part, norms):
            channels = {f'{name}.{norm}': its_channels for norm, its_channels in pair.channels.items()}
            pairs.append(ConvNormPair(f'{name}.{pair.conv}', f'{name}.{pair.norm}', pair.exclusive, channels))
    return pairs


# Layers of these classes need no trial while they train. True: each channel by itself.
_KNOWN_NORMS = {
    nn.BatchNorm2d: True, BatchNormAct2d: True, nn.InstanceNorm2d: True,
    nn.SyncBatchNorm: True, SyncBatchNormAct: True,  # which run on a GPU alone where there are several processes
    nn.LayerNorm: False, LayerNorm: False, LayerNorm2d: False, LayerNormAct2d: False,
}


_NO_NORMS = {f'torch.nn.modules.{name}' for name in ('activation', 'container', 'dropout', 'linear', 'pooling')}


def norm_layers(root: nn.Module) -> dict[nn.Module, bool]:
    """Finds the norm layers of a network: they return the same for their input times 0.1 and times 10.

    A copy of each candidate is tried on a few random numbers, in the mode in which it trains: a frozen norm, a batch
    norm that stays in evaluation, an evolving or a response norm are none.

    Args:
        root: Network to look at; it is not run.

    Returns:
        Norm layer to whether it treats each channel by itself, so that each may be of another scale.
    """
    found = {}
    with torch.device('cpu'):  # whatever torch.set_default_device says
        for module in root.modules():
            training = module.training or not root.training  # in a network in evaluation, all will train again
            if type(module) in _KNOWN_NORMS and training:
                found[module] = _KNOWN_NORMS[type(module)]
            elif type(module).__module__ not in _NO_NORMS and not any(map(_has_filters, module.modules())):
                x = torch.randn(2, _channels(module), 5, 6, generator=torch.Generator().manual_seed(0))
                scales = torch.logspace(1, 3, x.shape[1])
                for images, each_channel in ((x, scales.view(-1, 1, 1)), (x.permute(0, 2, 3, 1), scales)):
                    if _ignores(module, training, images, torch.tensor(100.)):
                        found[module] = _ignores(module, training, images, each_channel)
                        break
    return found


def _has_filters(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _channels(module: nn.Module) -> int:
    sizes = [getattr(module, name, None) for name in ('num_features', 'num_channels')]
    sizes += [tensor.numel() for tensor in (*module.parameters(), *module.buffers()) if tensor.numel() > 1]
    return next((size for size in sizes if isinstance(size, int)), 4)


def _ignores(module: nn.Module, training: bool, x: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether a copy of a module, on the CPU, returns the same for 0.1 * x and that times a scale."""

    def output(image: torch.Tensor) -> list[torch.Tensor]:
        tensors = {  # of random numbers, as a weight of zeros would hide what the layer does
            name: torch.rand(old.shape) + 0.5 if old.is_floating_point() else torch.zeros(old.shape, dtype=old.dtype)
            for name, old in (*module.named_parameters(), *module.named_buffers())
        }
        return [functional_call(copy.deepcopy(module).train(training), tensors, (image,))]

    return same_outputs(output, (0.1 * x, 0.1 * x * scale), 0.1)  # the eps of a norm, up to 1e-3, shows at 0.1


# What stands between a convolution and its norm without a say in the matter: it hands every channel on by itself, and
# a channel of another length comes out as that much longer.
_PASSING = (nn.Identity, nn.AvgPool2d, nn.MaxPool2d)
_PASSING_FUNCTIONS = ('permute', 'contiguous')
_METADATA = ('size', 'dim')  # looks at the shape, not at the values


# torch.fx replaces nn.Module.__call__ for all threads while it traces: one may do so at a time.
_TRACING = threading.Lock()


class _Tracer(torch.fx.Tracer):
    """Traces down to single layers; modules of the `opaque` types are not looked into."""

    def __init__(self, opaque: set[type], norms: dict[nn.Module, bool]) -> None:
        super().__init__()
        self.opaque = opaque
        self.norms = norms
        self.failed: nn.Module | None = None  # the innermost module whose forward could not be traced
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.opaque or next(m.children(), None) is None or m in self.norms

    def to_bool(self, obj):
        if isinstance(obj, torch.fx.proxy.Attribute) and obj.attr == 'requires_grad':
            return False  # timm's DenseNet asks it of its inputs, before it checkpoints gradients
        return super().to_bool(obj)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:  # a network that runs meanwhile
            return forward(*args, **kwargs)
        try:
            # Not `forward`, which runs hooks, FSDP's among them, that a trace must not set off.
            return super().call_module(m, m.forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise


def _trace(root: nn.Module, norms: dict[nn.Module, bool]) -> tuple[torch.fx.Graph | None, set[type]]:
    """Returns the graph, None if the root's own forward cannot be traced, and the types it does not look into."""
    opaque: set[type] = set()
    while True:
        tracer = _Tracer(opaque, norms)
        try:
            with _TRACING, _without_proxies(root):
                return tracer.trace(root), opaque
        except Exception:  # anything can come out of a forward that is given proxies in place of tensors
            if tracer.failed is None:
                return None, opaque
            opaque.add(type(tracer.failed))


@contextmanager
def _without_proxies(root: nn.Module) -> Iterator[None]:
    """Takes back the proxies that a traced forward puts into its module, into a cache of attention for example."""
    attributes = [values for module in root.modules() for values in (vars(module), *vars(module).values())
                  if isinstance(values, dict)]
    before = [dict(values) for values in attributes]
    try:
        yield
    finally:
        for values, old in zip(attributes, before):
            for key in [key for key, value in values.items() if isinstance(value, torch.fx.Proxy)]:
                del values[key]
                values.update({key: old[key]} if key in old else {})


def _outermost(root: nn.Module, types: set[type]) -> Iterable[tuple[str, nn.Module]]:
    """Yields the modules of the given types that are not inside another one of them."""
    for name, child in root.named_children():
        if type(child) in types:
            yield name, child
        else:
            yield from ((f'{name}.{inner}', m) for inner, m in _outermost(child, types))


def _pairs_in_graph(graph: torch.fx.Graph, root: nn.Module, norms: dict[nn.Module, bool]) -> list[ConvNormPair]:
    modules: dict[Any, nn.Module] = dict(root.named_modules())
    calls: dict[Any, list[torch.fx.Node]] = defaultdict(list)
    read = {node.target for node in graph.nodes if node.op == 'get_attr'}
    for node in graph.nodes:
        if node.op == 'call_module':
            calls[node.target].append(node)
    pairs = []
    for conv, nodes in calls.items():
        layer = modules[conv]
        if isinstance(layer, nn.Conv2d) and f'{conv}.weight' not in read:
            behind = [_norms_behind(node, modules, norms) for node in nodes]
            if all(behind):
                norm = behind[0][0][0]
                alone = len(nodes) == len(calls[norm.target]) == 1 and list(nodes[0].users) == [norm]
                channels = _channels_in_norms([call for users in behind for call in users], calls, layer.out_channels)
                pairs.append(ConvNormPair(conv, str(norm.target), alone, channels))
    return pairs


def _channels_in_norms(
        behind: list[tuple[torch.fx.Node, int | None]],
        calls: dict[Any, list[torch.fx.Node]],
        width: int,
) -> dict[str, slice]:
    """Counts `ConvNormPair.channels` from the end of those of the norm."""
    channels = {}
    for norm, after in behind:
        if after is None or sum(call.target == norm.target for call, _ in behind) != len(calls[norm.target]):
            return {}
        channels[str(norm.target)] = slice(-after - width, -after or None)
    return channels


def _norms_behind(
        node: torch.fx.Node,
        modules: dict[Any, nn.Module],
        norms: dict[nn.Module, bool],
        each_channel: bool = False,
        after: int | None = 0,
) -> list[tuple[torch.fx.Node, int | None]]:
    """Returns the calls of norm layers that take the output of a node, none if anything else takes it as well.

    With `each_channel`, something of another scale may be in other channels: the norm has to take each by itself.
    With each call comes the number of channels in its input after those of the node, None where it cannot be told.
    """
    found: list[tuple[torch.fx.Node, int | None]] = []
    for user in node.users:
        module = modules[user.target] if user.op == 'call_module' else None
        if module in norms and (norms[module] or not each_channel):
            found.append((user, after))
        elif isinstance(module, _PASSING) or user.target in _PASSING_FUNCTIONS or _joins_channels(user):
            joins = user.target is torch.cat
            added = _channels_after(node, user, modules) if joins else None if user.target == 'permute' else 0
            further = None if after is None or added is None else after + added
            behind = _norms_behind(user, modules, norms, each_channel or joins, further)
            # A permutation takes the channels where only a norm of all of them finds them.
            if not behind or (user.target == 'permute' and any(norms[modules[call.target]] for call, _ in behind)):
                return []
            found += behind
        elif not (user.target in _METADATA or (user.target is getattr and user.args[1] in ('shape', 'ndim', 'dtype'))):
            return []
    return found


def _joins_channels(node: torch.fx.Node) -> bool:
    dim = node.kwargs.get('dim', node.args[1] if len(node.args) > 1 else 0)
    return node.target is torch.cat and dim in (1, -3)


def _channels_after(node: torch.fx.Node, cat: torch.fx.Node, modules: dict[Any, nn.Module]) -> int | None:
    """Counts the channels that a concatenation puts after those of a node, where convolutions alone make them."""
    parts: Any = cat.args[0] if cat.args else cat.kwargs['tensors']
    if parts.count(node) > 1:
        return None
    width = 0
    for part in parts[parts.index(node) + 1:]:
        maker = modules[part.target] if part.op == 'call_module' else None
        if not isinstance(maker, nn.Conv2d):
            return None
        width += maker.out_channels
    return width
