"""Trials of what cannot be known by its class: is the length of a parameter's filters, or of an input, irrelevant?"""
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

__all__ = ['same_outputs', 'tried', 'uses_in_graph']


@torch.no_grad()
def same_outputs(
        output: Callable[[torch.Tensor], list[torch.Tensor]],
        values: Iterable[torch.Tensor],
        tolerance: float,
) -> bool:
    """Whether a function returns the same for each of some values.

    Args:
        output: Called with one value after the other, each time with the CPU's random numbers from the same seed.
        values: What to call it with.
        tolerance: Largest difference to count as the same, relative to the largest element for the first value.

    Returns:
        False also where the function raises: anything can come out of a layer that is given another input than it was
        made for.
    """
    outputs = []
    try:
        with torch.random.fork_rng(devices=[]), torch.device('cpu'):  # whatever torch.set_default_device says
            for value in values:
                torch.default_generator.manual_seed(0)  # of a dropout; torch.manual_seed would change the GPUs' too
                outputs.append(output(value))
        return all(
            (one - other).abs().max() <= tolerance * one.abs().max()
            for others in outputs[1:] for one, other in zip(outputs[0], others))
    except Exception:
        return False


def tried(module: nn.Module, name: str, known: str | None = None, before_norm: bool = False) -> str | None:
    """Runs a layer with filters of other lengths, on random numbers.

    Args:
        module: A layer with in_channels and kernel_size, or in_features; another cannot be tried. It is not changed.
        name: Name of one of its parameters, (out_channels, ...).
        known: What the normalization is if the layer normalizes the parameter at all; None to find that out too.
        before_norm: Whether only what a norm of each channel makes of the output has to be the same.

    Returns:
        'ws' or 'wn', or what is known; None where the output changes, or where the layer cannot be tried.
    """
    try:
        shape = _input_shape(module)
    except (AttributeError, TypeError):  # a layer whose sizes are others than torch's
        return None
    param = module.get_parameter(name)
    # Buffers are handed over too, so that those that a forward changes (spectral norm's) stay what they are.
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}

    def output(value: torch.Tensor) -> list[torch.Tensor]:
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(param)
        y = functional_call(module, {**buffers, name: value}, (x,))
        return [F.batch_norm(y, None, None, training=True) if before_norm else y]

    return _normalization(param, output, known)


def _input_shape(module: Any) -> list[int]:
    if hasattr(module, 'in_features'):
        return [module.in_features]
    sizes = zip(module.kernel_size, module.dilation, module.stride)
    return [module.in_channels, *(2 * kernel * dilation + stride for kernel, dilation, stride in sizes)]


def uses_in_graph(module: torch.fx.GraphModule) -> Iterable[tuple[nn.Parameter, str | None]]:
    """Tries what a graph computes from each of its parameters before any input comes in.

    Args:
        module: Trace of a network, or of a part of it.

    Returns:
        Parameters of two dimensions and more that the graph reads, with 'ws', 'wn', or None where it uses their length.
    """
    constant: dict[torch.fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == 'get_attr' or (
                node.op in ('call_function', 'call_method') and node.all_input_nodes
                and all(read in constant for read in node.all_input_nodes)):
            constant[node] = None
    for node in constant:
        if node.op != 'get_attr':
            continue
        param = _attribute(module, str(node.target))
        if isinstance(param, nn.Parameter) and param.ndim >= 2:
            def output(value: torch.Tensor, node: torch.fx.Node = node) -> list[torch.Tensor]:
                return _leaving(module, constant, node, value)

            yield param, _normalization(param, output, None)


def _leaving(
        module: torch.fx.GraphModule,
        constant: Container[torch.fx.Node],
        changed: torch.fx.Node,
        value: torch.Tensor,
) -> list[torch.Tensor]:
    """Returns what the input meets of all that depends on a changed parameter."""
    values: dict[torch.fx.Node, Any] = {changed: value}

    def compute(node: torch.fx.Node) -> Any:
        if node not in values and node.op == 'get_attr':
            values[node] = _attribute(module, str(node.target))
        elif node not in values:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), compute)
            if node.op == 'call_method':
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    depend = [changed]
    for node in depend:  # which grows meanwhile
        depend += [user for user in node.users if user in constant and user not in depend]
    leaving = [compute(node) for node in depend if any(user not in constant for user in node.users)]
    return [tensor for tensor in leaving if isinstance(tensor, torch.Tensor)]


def _attribute(module: nn.Module, target: str) -> Any:
    for name in target.split('.'):
        module = getattr(module, name)
    return module


def _normalization(
        param: torch.Tensor,
        output: Callable[[torch.Tensor], list[torch.Tensor]],
        known: str | None,
) -> str | None:
    """Compares outputs for filters of other lengths and, if the normalization is not known, of other means."""
    with torch.device('cpu'):
        filters = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)).to(param)
        scales = torch.logspace(-0.5, 0.5, param.shape[0]).view(-1, *[1] * (param.ndim - 1)).to(param)
    if not same_outputs(output, (filters, filters * (10 * scales)), 1e-2):
        return None
    return known or ('ws' if same_outputs(output, (filters, filters + scales), 1e-2) else 'wn')
