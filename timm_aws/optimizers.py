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

from .handed_over import length_for_step
from .shrink import DEFAULT_ALPHA, add_shrink
from .shrink_groups import ShrinkGroups, evaluate

__all__ = ['AwsAdam', 'AwsSGD']


def _own_gradient(param: torch.Tensor) -> Any:
    return param.grad


class _CoupledOrDecoupled(ShrinkGroups):
    """The step that AwsSGD and AwsAdam share; they supply `_update`, torch's own update of a list of tensors."""

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
            shrunk = [p for p in group['params'] if self._shrinks(group, p)]
            plain = [p for p in group['params'] if not self._shrinks(group, p)] if shrunk else group['params']
            self._update({**group, 'params': plain})
            at_once = _uses_foreach(group, shrunk) or (group['fused'] and shrunk and shrunk[0].is_cuda)
            for params in [shrunk] if at_once else _batches(shrunk):
                batch = {**group, 'params': params, 'weight_decay': 0}
                if group['decoupled']:
                    self._update_decoupled(batch)
                else:
                    self._update_coupled(batch)
        return loss

    def _update_decoupled(self, group: dict[str, Any]) -> None:
        for param in group['params']:
            if param.grad is not None:
                param.mul_(self._multiplier(group, param))
        self._update(group)

    def _update_coupled(self, group: dict[str, Any]) -> None:
        alpha, normalization, maximize = group['alpha'], group['normalization'], group['maximize']
        self._update(
            {**group, 'maximize': False},  # the sign is in the gradient already
            lambda param: add_shrink(
                _own_gradient(param), param, length_for_step(param, normalization), alpha, maximize),
        )

    def _update(
            self,
            group: dict[str, Any],
            gradient: Callable[[torch.Tensor], torch.Tensor] = _own_gradient,
    ) -> None:
        """Takes torch's step on a group, with what `gradient` makes of a parameter as its gradient; SGD's or Adam's."""
        raise NotImplementedError('This is what AwsSGD and AwsAdam have in common: use one of them.')

    def _match_layout(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Brings state and gradients into the memory format of their parameters; returns the gradients.

        torch's fused CPU kernels walk all of them in storage order and are silently wrong where the strides differ.
        """
        for param in params:
            state = self.state[param]
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                    state[key] = torch.empty_like(param, dtype=value.dtype).copy_(value)
        return [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in zip(params, grads)]


def _uses_foreach(group: dict[str, Any], params: list[torch.Tensor]) -> bool:
    """Whether torch takes its multi-tensor update for these parameters."""
    if group['foreach'] is None and not group['fused']:
        return len(params) > 0 and params[0].is_cuda
    return bool(group['foreach'])


def _batches(params: list[torch.Tensor], numel: int = 2 ** 20) -> Iterable[list[torch.Tensor]]:
    """Splits parameters into batches that are still in the cache when, after the shrink, they are updated."""
    batch: list[torch.Tensor] = []
    left = numel
    for param in params:
        left -= param.numel()
        if batch and left < 0:
            yield batch
            batch, left = [], numel - param.numel()
        batch.append(param)
    if batch:
        yield batch


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

    def _update_coupled(self, group):
        params = [p for p in group['params'] if p.grad is not None]
        # A momentum near 0, by which the shrink is divided below, would make it overflow.
        if group['nesterov'] or group['momentum'] < 1e-3 or any(self._buffer(p) is None for p in params):
            super()._update_coupled(group)
            return
        # What joins the gradient ends up in the buffer, times 1 - dampening, after the buffer's own decay. So it can be
        # put there beforehand, in place, where a gradient to add it to would have to be a new tensor.
        for param in params:
            gamma = group['alpha'] * length_for_step(param, group['normalization'])
            share = (1 - group['dampening']) / group['momentum']
            self.state[param]['momentum_buffer'].addcmul_(param, gamma, value=share)
        self._update(group)

    def _buffer(self, param: torch.Tensor) -> torch.Tensor | None:
        return self.state[param].get('momentum_buffer')

    def _update(self, group, gradient=_own_gradient):
        params = [p for p in group['params'] if p.grad is not None]
        fresh = [p for p in params if self._buffer(p) is None]
        if group['fused'] and 0 < len(fresh) < len(params):  # torch's fused update starts all buffers or none
            rest = [p for p in params if self._buffer(p) is not None]
            self._update({**group, 'params': fresh}, gradient)
            self._update({**group, 'params': rest}, gradient)
            return
        grads = [gradient(p) for p in params]
        if group['fused']:
            grads = self._match_layout(params, grads)
        if group['nesterov'] and _uses_foreach(group, params):  # torch adds the momentum to the gradients in place
            grads = [g.clone() if g is p.grad else g for p, g in zip(params, grads)]
        buffers = [self._buffer(p) for p in params]
        sgd(
            params,
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
            for param, buffer in zip(params, buffers):
                self.state[param]['momentum_buffer'] = buffer


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

    def _update(self, group, gradient=_own_gradient):
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        params, _, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        if group['fused']:
            self._match_layout([p for p in group['params'] if p in self.state], [])
        # A graph break under torch.compile. Captured in one graph, as it would be if it were handed the group itself,
        # a resumed run departs from the uninterrupted one in the last digits.
        self._init_group(group, *lists)
        grads = [gradient(p) for p in params]
        if group['fused']:
            grads = self._match_layout(params, grads)
        adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
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
