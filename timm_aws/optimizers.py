"""AwsSGD and AwsAdam: torch's SGD and Adam with Adaptive Weight Shrink.

Parameter groups carry the choice, in two keys: `alpha` (0 turns the shrink off) and `normalization` ('ws', 'wn' or
'cwn'; None for a group whose weights are not normalized). In a group with alpha > 0 each tensor of two or more
dimensions is shrunk, filter by filter, and takes no weight decay: the shrink replaces it. Tensors of fewer dimensions
have no filters and take the group's weight decay.

With momentum, Eq. 21 leaves open where the shrink enters (see shrink.py for the equations):

    coupled      gamma * W joins the gradient before momentum, as weight decay does in torch.optim.SGD
    decoupled    W is multiplied by 1 - lr * gamma, as in torch.optim.AdamW

What is not the shrink is torch's own code: alpha = 0 gives torch.optim.SGD, Adam and AdamW bit for bit.
"""
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from .handed_over import lengths_for_step, take_over
from .shrink import DEFAULT_ALPHA, add_shrink, filter_length
from .shrink_groups import ShrinkGroups, evaluate
from .updates import Update, in_cache

__all__ = ['AwsAdam', 'AwsSGD']


class _CoupledOrDecoupled(ShrinkGroups):
    """The step that AwsSGD and AwsAdam share; they supply the state of parameters and torch's own update."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, Eq. 21.

        Args:
            closure: Evaluates the model anew and returns the loss, called with gradients enabled.

        Returns:
            What the closure returns, None without one.

        Raises:
            TypeError: If a gradient is sparse.
            RuntimeError: If a gradient is not finite, looked for in torch's anomaly mode only.
        """
        loss = evaluate(closure)
        self._check_gradients()
        for group in self.param_groups:
            updates = self._gather(group)
            plain = [update for update in updates if not self._shrinks(group, update.param)]
            for update in plain:
                take_over(update.param, group['normalization'])  # must not outlast this step, see handed_over.py
            self._torch_step(group, plain)
            shrunk = [update for update in updates if self._shrinks(group, update.param)]
            for part in self._in_parts(group, shrunk):
                for update in part:
                    self._shrink(group, update, _length(group, update))
                self._torch_step({**group, 'weight_decay': 0}, part)
        return loss

    def _in_parts(self, group: dict[str, Any], updates: list[Update]) -> Iterable[list[Update]]:
        """Returns the updates, with the lengths that are known, in the parts in which they are to be taken."""
        params = [update.param for update in updates]
        at_once = _uses_foreach(group, params) or (group['fused'] and params and params[0].is_cuda)
        if at_once or torch.compiler.is_compiling():
            for update, length in zip(updates, lengths_for_step(params, group['normalization'])):
                update.length = length
            return [updates]
        for update in updates:
            update.length = take_over(update.param, group['normalization'])
        return in_cache(updates)

    def _shrink(self, group: dict[str, Any], update: Update, length: torch.Tensor) -> None:
        """Shrinks a weight, or replaces the gradient of its update by one that will."""
        if group['decoupled']:
            update.param.mul_(self._multiplier(group, update.param, length))
        else:
            update.grad = add_shrink(update.grad, update.param, length, group['alpha'], group['maximize'])

    def _gather(self, group: dict[str, Any]) -> list[Update]:
        """Gathers what a step of the group's parameters reads and changes, of those that have a gradient."""
        raise NotImplementedError('This is what AwsSGD and AwsAdam have in common: use one of them.')

    def _torch_step(self, group: dict[str, Any], updates: list[Update]) -> None:
        """Takes torch's own step, that of SGD or Adam."""
        raise NotImplementedError('This is what AwsSGD and AwsAdam have in common: use one of them.')


def _uses_foreach(group: dict[str, Any], params: list[torch.Tensor]) -> bool:
    """Whether torch takes its multi-tensor update for these parameters."""
    if group['foreach'] is None and not group['fused']:
        return len(params) > 0 and params[0].is_cuda
    return bool(group['foreach'])


def _length(group: dict[str, Any], update: Update) -> torch.Tensor:
    return filter_length(update.param, group['normalization']) if update.length is None else update.length


def _matched(group: dict[str, Any], param: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a gradient or a state in the memory format of its parameter, where torch's update needs it.

    torch's fused CPU kernels walk all of them in storage order and are silently wrong where the strides differ.
    """
    if not group['fused'] or tensor.shape != param.shape or _same_order(tensor, param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def _same_order(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether elements lie in the same order in both; the stride of a dimension of size 1 does not matter."""
    strides = first.stride(), second.stride()
    return strides[0] == strides[1] or all(
        size == 1 or one == other for size, one, other in zip(first.shape, *strides))


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
            normalization: str | None = 'ws',
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
            normalization: How the weights are normalized: 'ws', 'wn' or 'cwn'.
            decoupled: Whether the shrink acts on the weight directly rather than through the momentum buffer.
            maximize: Climb the gradient. The shrink shrinks all the same.
            foreach: torch's multi-tensor update, its default on CUDA.
            fused: torch's fused update.

        Raises:
            ValueError: If a value is negative, not finite or unknown.
            TypeError: If a parameter is complex.
        """
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=foreach, fused=fused)
        self._set_shrink(alpha=alpha, normalization=normalization, decoupled=decoupled)
        self._step_supports_amp_scaling = False  # the shrink joins gradients that are unscaled

    def _gather(self, group):
        updates = []
        for param in group['params']:
            if param.grad is not None:
                state = {}
                if group['momentum'] != 0:
                    buffer = self.state[param].get('momentum_buffer')
                    if buffer is not None:
                        buffer = self.state[param]['momentum_buffer'] = _matched(group, param, buffer)
                    state['momentum_buffer'] = buffer
                updates.append(Update(param, _matched(group, param, param.grad), state))
        return updates

    def _shrink(self, group, update, length):
        buffer = update.state.get('momentum_buffer')
        # A momentum near 0, by which the shrink is divided below, would make it overflow.
        if group['decoupled'] or group['nesterov'] or group['momentum'] < 1e-3 or buffer is None:
            super()._shrink(group, update, length)
            return
        # What joins the gradient ends up in the buffer, times 1 - dampening, after the buffer's own decay. So it can be
        # put there beforehand, in place, where a gradient to add it to would have to be a new tensor.
        share = (1 - group['dampening']) / group['momentum']
        buffer.addcmul_(update.param, length, value=group['alpha'] * share)

    def _torch_step(self, group, updates):
        buffers = [update.state.get('momentum_buffer') for update in updates]
        fresh = [buffer is None for buffer in buffers]
        if group['fused'] and any(fresh) and not all(fresh):  # torch's fused update starts all buffers or none
            for kind in (True, False):
                self._torch_step(group, [update for update, is_fresh in zip(updates, fresh) if is_fresh is kind])
            return
        grads = [update.grad for update in updates]
        if group['nesterov'] and _uses_foreach(group, grads):  # torch adds the momentum to the gradients in place
            grads = [grad.clone() if grad is update.param.grad else grad for grad, update in zip(grads, updates)]
        sgd(
            [update.param for update in updates],
            grads,
            buffers,
            weight_decay=group['weight_decay'],
            momentum=group['momentum'],
            lr=group['lr'],
            dampening=group['dampening'],
            nesterov=group['nesterov'],
            maximize=group['maximize'],
            foreach=group['foreach'],
            fused=group['fused'],
        )
        if group['momentum'] != 0:
            for update, buffer, is_fresh in zip(updates, buffers, fresh):
                if is_fresh:
                    self.state[update.param]['momentum_buffer'] = buffer


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
            normalization: str | None = 'ws',
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
            normalization: How the weights are normalized: 'ws', 'wn' or 'cwn'.
            decoupled: Whether shrink and weight decay act on the weight directly rather than through the gradient.
            maximize: Climb the gradient. The shrink shrinks all the same.
            foreach: torch's multi-tensor update, its default on CUDA.
            capturable: Whether a step can be captured in a CUDA graph.
            fused: torch's fused update.

        Raises:
            ValueError: If a value is negative, not finite or unknown.
            TypeError: If a parameter is complex.
        """
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            fused=fused,
            decoupled_weight_decay=decoupled,
        )
        self._set_shrink(alpha=alpha, normalization=normalization, decoupled=decoupled)
        self._step_supports_amp_scaling = False  # the shrink joins gradients that are unscaled

    def _complete_group(self, group):
        super()._complete_group(group)
        group['decoupled_weight_decay'] = group['decoupled']

    def _gather(self, group):
        # Handed the group itself and empty lists, as torch.compile takes this call for torch's own.
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *lists)
        params, grads, averages, squares, maxima, steps = lists
        updates = []
        for index, (param, grad) in enumerate(zip(params, grads)):
            state = {'exp_avg': averages[index], 'exp_avg_sq': squares[index], 'step': steps[index]}
            if group['amsgrad']:
                state['max_exp_avg_sq'] = maxima[index]
            for key, value in state.items():
                state[key] = _matched(group, param, value)
                if state[key] is not value:
                    self.state[param][key] = state[key]
            updates.append(Update(param, _matched(group, param, grad), state))
        return updates

    def _torch_step(self, group, updates):
        def of_all(key: str) -> list[torch.Tensor]:
            return [update.state[key] for update in updates if key in update.state]

        adam(
            [update.param for update in updates],
            [update.grad for update in updates],
            of_all('exp_avg'),
            of_all('exp_avg_sq'),
            of_all('max_exp_avg_sq'),
            of_all('step'),
            amsgrad=group['amsgrad'],
            beta1=group['betas'][0],
            beta2=group['betas'][1],
            lr=group['lr'],
            weight_decay=group['weight_decay'],
            eps=group['eps'],
            maximize=group['maximize'],
            foreach=group['foreach'],
            capturable=group['capturable'],
            fused=group['fused'],
            decoupled_weight_decay=group['decoupled_weight_decay'],
        )
