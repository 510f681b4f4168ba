"""Which norm layer follows which convolution in a network.

Read off the data flow with torch.fx rather than off the order of definition: pre-activation blocks define a norm right
behind a convolution whose output it never sees, and separable convolutions hide theirs in the parent module.
"""
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn as nn

__all__ = ['ConvNormPair', 'conv_norm_pairs']


class ConvNormPair(NamedTuple):
    """A convolution and the norm layer that takes its output, by module name.

    `exclusive` says that nothing else takes that output and that both run once in a forward.
    """
    conv: str
    norm: str
    exclusive: bool


def conv_norm_pairs(root: nn.Module) -> list[ConvNormPair]:
    """Finds the convolutions of a network that a norm layer follows every time they run.

    A module whose forward cannot be traced (control flow that depends on the data) is one opaque node of the graph
    around it; what is inside is then traced by itself. So a pair that spans the border of such a module is not found.

    Args:
        root: Network to trace; it is not run.

    Returns:
        One pair for each such convolution, in order of execution.
    """
    graph, opaque = _trace(root)
    pairs = _pairs_in_graph(graph, root) if graph else []
    for name, part in _outermost(root, opaque) if graph else root.named_children():
        for conv, norm, exclusive in conv_norm_pairs(part):
            pairs.append(ConvNormPair(f'{name}.{conv}', f'{name}.{norm}', exclusive))
    return pairs


# What stands between a convolution and its norm without a say in the matter: it hands every channel on by itself, and
# a channel of another length comes out as that much longer.
_PASSING = (nn.Identity, nn.AvgPool2d, nn.MaxPool2d)
_PASSING_FUNCTIONS = (torch.cat, 'permute', 'contiguous')
_METADATA = (getattr, 'size', 'dim')  # looks at the shape, not at the values


# torch.fx replaces nn.Module.__call__ for all threads while it traces: one may do so at a time.
_TRACING = threading.Lock()


class _Tracer(torch.fx.Tracer):
    """Traces down to single layers; modules of the `opaque` types are not looked into."""

    def __init__(self, opaque: set[type]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: nn.Module | None = None  # the innermost module whose forward could not be traced
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.opaque or next(m.children(), None) is None or _is_norm(m)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:  # a network that runs meanwhile
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise


def _trace(root: nn.Module) -> tuple[torch.fx.Graph | None, set[type]]:
    """Returns the graph, None if the root's own forward cannot be traced, and the types it does not look into."""
    opaque: set[type] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            with _TRACING:
                return tracer.trace(root), opaque
        except Exception:  # anything can come out of a forward that is given proxies in place of tensors
            if tracer.failed is None:
                return None, opaque
            opaque.add(type(tracer.failed))


def _outermost(root: nn.Module, types: set[type]) -> Iterable[tuple[str, nn.Module]]:
    """Yields the modules of the given types that are not inside another one of them."""
    for name, child in root.named_children():
        if type(child) in types:
            yield name, child
        else:
            yield from ((f'{name}.{inner}', m) for inner, m in _outermost(child, types))


def _pairs_in_graph(graph: torch.fx.Graph, root: nn.Module) -> list[ConvNormPair]:
    modules: dict[Any, nn.Module] = dict(root.named_modules())
    calls: dict[Any, list[torch.fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == 'call_module':
            calls[node.target].append(node)
    pairs = []
    for conv, nodes in calls.items():
        if isinstance(modules[conv], nn.Conv2d):
            norms = [_norms_behind(node, modules) for node in nodes]
            if all(norms):
                norm = norms[0][0]
                alone = len(nodes) == len(calls[norm.target]) == 1 and list(nodes[0].users) == [norm]
                pairs.append(ConvNormPair(conv, str(norm.target), alone))
    return pairs


def _norms_behind(node: torch.fx.Node, modules: dict[Any, nn.Module]) -> list[torch.fx.Node]:
    """Returns the calls of norm layers that take the output of a node, none if anything else takes it as well."""
    norms = []
    for user in node.users:
        module = modules[user.target] if user.op == 'call_module' else None
        if module is not None and _is_norm(module):
            norms.append(user)
        elif isinstance(module, _PASSING) or user.target in _PASSING_FUNCTIONS:
            behind = _norms_behind(user, modules)
            if not behind:
                return []
            norms += behind
        elif user.target not in _METADATA:
            return []
    return norms


def _is_norm(module: nn.Module) -> bool:
    """Tells norm layers by name, as timm's have no base class in common, and apart from blocks like ConvNormAct."""
    return 'norm' in type(module).__name__.lower() and not any(
        isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in module.modules())
