"""AwsSGD and AwsAdam: torch's SGD and Adam with Adaptive Weight Shrink.

Parameter groups carry the choice, in two keys: `alpha` (0 turns the shrink off) and `normalization` ('ws', 'wn' or
'cwn'; None for a group whose weights are not normalized). In a group with alpha > 0 each tensor of two or more
dimensions is shrunk, filter by filter, and takes no weight decay: the shrink replaces it. Tensors of fewer dimensions
have no filters and take the group's weight decay. rule.py has the equations, and the two readings of them.

What is not the shrink is torch's own code: alpha = 0 gives torch.optim.SGD, Adam and AdamW bit for bit.
"""
import functools
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from .group_options import UNNAMED, ShrinkGroups
from .rule import DEFAULT_ALPHA, add_shrink, filter_length, shrink_factor

__all__ = ['AwsAdam', 'AwsSGD']


@dataclass
class _ParamState:
    """What a step reads and changes of one parameter.

    Attributes:
        param: Changed in place.
        grad: What torch's update takes for the gradient; read.
        buffers: The optimizer's state for this parameter, changed in place; None for what the step is still to make.
        carrier: Name of the buffer through which a coupled shrink reaches the weight; None if it is the gradient.
        share: What the shrink is multiplied by there.
    """
    param: torch.Tensor
    grad: torch.Tensor
    buffers: dict[str, Any]
    carrier: str | None
    share: float


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether rule_triton.py runs on a device: on a GPU that Triton knows, where Triton is installed."""
    return (device.type == 'cuda' and importlib.util.find_spec('triton') is not None
            and torch.cuda.get_device_capability(device) >= (7, 0))


def takes_kernel(param: torch.Tensor) -> bool:
    """Whether rule_triton.py shrinks a parameter; a compiled step has the shrink in its own kernels."""
    if torch.compiler.is_compiling() or not has_kernel(param.device):
        return False
    from .rule_triton import fits  # here, as Triton is not everywhere
    return fits(param)


class _CoupledOrDecoupled(ShrinkGroups):
    """The step that AwsSGD and AwsAdam share; they supply the state of parameters and torch's own update."""

    def _shrink_and_update(self) -> None:
        for group in self.param_groups:
            for part, shrinks in self._parts(group):
                if shrinks and group['fused'] and takes_kernel(part[0].param):
                    self._shrink_at_once(group, part)
                elif shrinks:
                    for state in part:
                        self._shrink(group, state, filter_length(state.param, group['normalization']))
                self._update(group, part, 0. if shrinks else group['weight_decay'])

    def _parts(self, group: dict[str, Any]) -> Iterator[tuple[list[_ParamState], bool]]:
        """Yields the parameters that have a gradient, in the parts in which they are updated, and if they are shrunk.

        Where torch's update is one launch for all, they come together. Else a shrunk one comes alone: its weight is in
        the cache from the shrink to the update, and what the step allocates is of the size of one weight.
        """
        plain: list[_ParamState] = []
        shrunk: list[_ParamState] = []
        launched: dict[tuple, list[_ParamState]] = {}
        for state in self._states(group):
            if group['fused']:
                self._match_formats(state)
            if group['alpha'] == 0 or state.param.ndim < 2:
                plain.append(state)
            elif group['fused'] and takes_kernel(state.param):
                launched.setdefault((state.param.device, state.param.dtype, state.carrier), []).append(state)
            else:
                shrunk.append(state)
        if plain:
            yield plain, False
        for part in launched.values():
            yield part, True
        at_once = group['foreach']
        if at_once is None and shrunk:  # torch's choice
            at_once = torch.compiler.is_compiling() or shrunk[0].param.is_cuda
        size = len(shrunk) if at_once else 1
        while shrunk:
            part, shrunk = shrunk[:size], shrunk[size:]  # lets go of what the step made for the part before
            yield part, True

    def _shrink(self, group: dict[str, Any], state: _ParamState, length: torch.Tensor) -> None:
        """Shrinks a weight, or lets its update do so: through the momentum buffer or through the gradient."""
        if group['decoupled']:
            state.param.mul_(self._multiplier(group, state.param, length))
        elif state.carrier is None:
            state.grad = add_shrink(state.grad, state.param, length, group['alpha'] * state.share)
        else:
            factor = shrink_factor(1., length)
            state.buffers[state.carrier].addcmul_(state.param, factor, value=group['alpha'] * state.share)

    def _shrink_at_once(self, group: dict[str, Any], part: list[_ParamState]) -> None:
        """Does in one launch what `_shrink` does to each; the first decides for all, which are alike."""
        from .rule_triton import GroupShrink

        launch = self._launches.setdefault(part[0].param, GroupShrink())
        weights, carrier = [state.param for state in part], part[0].carrier
        if group['decoupled']:
            launch(weights, weights, group['normalization'], group['alpha'], group['lr'])
            return
        if carrier is None:
            targets = launch.copy([state.grad for state in part])
            for state, target in zip(part, targets):
                state.grad = target
        else:
            targets = [state.buffers[carrier] for state in part]
        launch(weights, targets, group['normalization'], group['alpha'] * part[0].share)

    @functools.cached_property  # so that what holds addresses is not copied or saved with the optimizer
    def _launches(self) -> dict[torch.Tensor, Any]:
        return {}

    def _match_formats(self, state: _ParamState) -> None:
        """Brings gradient and buffers into the memory format of their parameter.

        torch's fused CPU kernels walk all of them in storage order and are silently wrong where the strides differ.
        """
        state.grad = _matched(state.param, state.grad)
        for key, buffer in state.buffers.items():
            if buffer is not None:
                matched = state.buffers[key] = _matched(state.param, buffer)
                if matched is not buffer:
                    self.state[state.param][key] = matched

    def _states(self, group: dict[str, Any]) -> list[_ParamState]:
        """Returns the states of the group's parameters that have a gradient; AwsSGD and AwsAdam each have their own."""
        raise NotImplementedError  # of this class alone no optimizer is made

    def _update(self, group: dict[str, Any], part: list[_ParamState], weight_decay: float) -> None:
        """Takes torch's own step, of SGD in AwsSGD and of Adam in AwsAdam."""
        raise NotImplementedError  # as above


def _matched(param: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in the memory format of a parameter of its shape; the stride of a dimension of 1 is free."""
    if tensor.shape != param.shape or all(
            size == 1 or one == other for size, one, other in zip(param.shape, param.stride(), tensor.stride())):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


class AwsSGD(_CoupledOrDecoupled, torch.optim.SGD):
    """Stochastic gradient descent with Adaptive Weight Shrink.

    With g the gradient, gamma = alpha * length(W) per filter and b the momentum buffer, a coupled step is

        b <- momentum * b + (1 - dampening) * (g + gamma * W)
        W <- W - lr * b

    and a decoupled one leaves gamma * W out of b and takes W <- (1 - lr * gamma) W - lr * b.

    Paper: `Understanding the Disharmony between Weight Normalization Family and Weight Decay` -
        https://doi.org/10.1609/aaai.v34i04.5904
    """

    def __init__(
            self,
            params: Iterable[Any],
            lr: float | torch.Tensor = 1e-3,
            momentum: float = 0.,
            dampening: float = 0.,
            weight_decay: float = 0.,
            nesterov: bool = False,
            *,
            alpha: float = DEFAULT_ALPHA,
            normalization: str | None = UNNAMED,
            decoupled: bool = False,
            maximize: bool = False,
            foreach: bool | None = None,
            fused: bool | None = None,
    ) -> None:
        """
        Args:
            params: Parameters or parameter groups; a group may override every option below.
            lr: Learning rate, a number or a tensor of one element.
            momentum: Momentum factor.
            dampening: Dampening of the momentum.
            weight_decay: Weight decay of what is not shrunk, added to the gradient.
            nesterov: Nesterov momentum.
            alpha: Shrink coefficient, 0 turns the shrink off.
            normalization: How the weights are normalized: 'ws', 'wn' or 'cwn'. Left out: 'ws', with a warning.
            decoupled: Whether the shrink acts on the weight directly rather than through the momentum buffer.
            maximize: Climb the gradient. The shrink shrinks all the same.
            foreach: torch's multi-tensor update, its default on CUDA.
            fused: torch's fused update, and on CUDA with Triton the shrink of a group in one launch; it differs from
                torch's default in the last bits, so that it is no default here either.

        Raises:
            ValueError: If a value is negative, not finite or unknown.
            TypeError: If a parameter is complex.
        """
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach, fused=fused)
        self._set_shrink(alpha=alpha, normalization=normalization, decoupled=decoupled)
        self._warn_of_overflow()

    @torch.no_grad()
    def _warn_of_overflow(self) -> None:
        """Warns where a coupled step takes all of a filter or more: the buffer goes on past 0, and may lengthen it."""
        for group in self.param_groups:
            for param in group['params'] if group['alpha'] and not group['decoupled'] else ():
                # Not of a DTensor or a fake one; meta and empty ones have no lengths.
                plain = type(param) in (torch.Tensor, torch.nn.Parameter) and not param.is_meta
                if param.ndim < 2 or not param.numel() or not plain:
                    continue
                length = filter_length(param, group['normalization'])
                share = shrink_factor(float(group['lr']) * group['alpha'], length).nan_to_num().max().item()
                if share >= 1:
                    warnings.warn(
                        f'{type(self).__name__} with lr={float(group["lr"])!r} and alpha={group["alpha"]!r} shrinks a '
                        f'filter of shape {tuple(param.shape[1:])} by {share:.2g} times its length in a step, which '
                        f'goes past 0 and may overflow: lower alpha, or give decoupled=True, whose shrink stops at 0.',
                        stacklevel=3,
                    )
                    return

    def _states(self, group):
        states = []
        for param in group['params']:
            if param.grad is not None:
                buffer = self.state.get(param, {}).get('momentum_buffer')
                carrier, share = None, -1. if group['maximize'] else 1.
                # A momentum near 0, by which the shrink is divided, would make it overflow.
                if buffer is not None and not group['nesterov'] and group['momentum'] >= 1e-3:
                    # What joins the gradient ends up in the buffer, times 1 - dampening, after the buffer's own decay.
                    # So it can be put there beforehand, in place, where a gradient to add it to would be a new tensor.
                    carrier, share = 'momentum_buffer', (1 - group['dampening']) / group['momentum']
                states.append(_ParamState(param, param.grad, {'momentum_buffer': buffer}, carrier, share))
        return states

    def _update(self, group, part, weight_decay):
        buffers = [state.buffers['momentum_buffer'] for state in part]
        fresh = [buffer is None for buffer in buffers]
        if group['fused'] and any(fresh) and not all(fresh):  # torch's fused update starts all buffers or none
            for kind in (True, False):
                self._update(group, [state for state, new in zip(part, fresh) if new is kind], weight_decay)
            return
        grads = [state.grad for state in part]
        if group['nesterov'] and group['foreach'] is not False and not group['fused']:
            # torch's multi-tensor update adds the momentum to them in place
            grads = [grad.clone() if grad is state.param.grad else grad for grad, state in zip(grads, part)]
        sgd(
            [state.param for state in part], grads, buffers, weight_decay=weight_decay, momentum=group['momentum'],
            lr=group['lr'], dampening=group['dampening'], nesterov=group['nesterov'], maximize=group['maximize'],
            foreach=group['foreach'], fused=group['fused'])
        if group['momentum'] != 0:
            for state, buffer in zip(part, buffers):
                if state.buffers['momentum_buffer'] is None:
                    self.state[state.param]['momentum_buffer'] = buffer


class AwsAdam(_CoupledOrDecoupled, torch.optim.Adam):
    """Adam with Adaptive Weight Shrink.

    Decoupled (the default) W is multiplied by 1 - lr * gamma before Adam's update, gamma = alpha * length(W) per
    filter, and the weight decay of what is not shrunk is that of torch.optim.AdamW. Coupled, gamma * W joins the
    gradient, where the second moment rescales it, and the weight decay is that of torch.optim.Adam.

    Paper: `Understanding the Disharmony between Weight Normalization Family and Weight Decay` -
        https://doi.org/10.1609/aaai.v34i04.5904
    """

    def __init__(
            self,
            params: Iterable[Any],
            lr: float | torch.Tensor = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0.,
            amsgrad: bool = False,
            *,
            alpha: float = DEFAULT_ALPHA,
            normalization: str | None = UNNAMED,
            decoupled: bool = True,
            maximize: bool = False,
            foreach: bool | None = None,
            capturable: bool = False,
            fused: bool | None = None,
    ) -> None:
        """
        Args:
            params: Parameters or parameter groups; a group may override every option below.
            lr: Learning rate, a number or a tensor of one element.
            betas: Coefficients of the running averages of the gradient and of its square.
            eps: Added to the denominator.
            weight_decay: Weight decay of what is not shrunk.
            amsgrad: Use the maximum of the second moments so far.
            alpha: Shrink coefficient, 0 turns the shrink off.
            normalization: How the weights are normalized: 'ws', 'wn' or 'cwn'. Left out: 'ws', with a warning.
            decoupled: Whether shrink and weight decay act on the weight directly rather than through the gradient.
            maximize: Climb the gradient. The shrink shrinks all the same.
            foreach: torch's multi-tensor update, its default on CUDA.
            capturable: Whether a step can be captured in a CUDA graph.
            fused: torch's fused update, and on CUDA with Triton the shrink of a group in one launch; it differs from
                torch's default in the last bits, so that it is no default here either.

        Raises:
            ValueError: If a value is negative, not finite or unknown.
            TypeError: If a parameter is complex.
        """
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize, capturable=capturable,
            fused=fused, decoupled_weight_decay=decoupled)
        self._set_shrink(alpha=alpha, normalization=normalization, decoupled=decoupled)

    def _complete_group(self, group):
        super()._complete_group(group)
        group['decoupled_weight_decay'] = group['decoupled']

    def _states(self, group):
        # With the group itself and empty lists, as torch.compile takes this call for torch's own.
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *lists)
        params, grads, averages, squares, maxima, steps = lists
        states = []
        for index, (param, grad) in enumerate(zip(params, grads)):
            buffers = {'exp_avg': averages[index], 'exp_avg_sq': squares[index], 'step': steps[index]}
            if group['amsgrad']:
                buffers['max_exp_avg_sq'] = maxima[index]
            states.append(_ParamState(param, grad, buffers, None, -1. if group['maximize'] else 1.))
        return states

    def _update(self, group, part, weight_decay):
        def buffers(key: str) -> list[torch.Tensor]:
            return [state.buffers[key] for state in part if key in state.buffers]

        beta1, beta2 = group['betas']
        adam(
            [state.param for state in part], [state.grad for state in part], buffers('exp_avg'), buffers('exp_avg_sq'),
            buffers('max_exp_avg_sq'), buffers('step'), amsgrad=group['amsgrad'], beta1=beta1, beta2=beta2,
            lr=group['lr'], weight_decay=weight_decay, eps=group['eps'], maximize=group['maximize'],
            foreach=group['foreach'], capturable=group['capturable'], fused=group['fused'],
            decoupled_weight_decay=group['decoupled_weight_decay'])
