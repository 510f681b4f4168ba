"""The decoupled shrink around any other optimizer, as a class made of its class."""
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from .group_options import UNNAMED, ShrinkGroups
from .rule import DEFAULT_ALPHA, filter_length

__all__ = ['aws_optimizer']


class _DecoupledShrink(ShrinkGroups):
    """The decoupled shrink around another optimizer's step, mixed in by `aws_optimizer`."""
    base: type[torch.optim.Optimizer]

    def __init__(
            self,
            params: Iterable[Any],
            *args: Any,
            alpha: float = DEFAULT_ALPHA,
            normalization: str | None = UNNAMED,
            **options: Any,
    ) -> None:
        accepted = inspect.signature(self.base).parameters
        if 'decoupled' not in accepted and options.pop('decoupled', True) is not True:
            raise ValueError(
                f'{type(self).__name__} shrinks decoupled only, got decoupled=False: leave the option out, '
                f'or use AwsSGD or AwsAdam.'
            )
        if 'alpha' in accepted and 'base_alpha' in options:
            options['alpha'] = options.pop('base_alpha')
        super().__init__(params, *args, **options)
        self._set_shrink(**{self.alpha_key: alpha, 'normalization': normalization})

    def _shrink_and_update(self) -> None:
        # A second-order optimizer differentiates through the weights in its step: they must not change before it.
        afterwards = []
        for group in self.param_groups:
            for param in group['params']:
                if param.grad is None or group[self.alpha_key] == 0 or param.ndim < 2:
                    continue
                if group['lr'] is None:
                    raise ValueError(f'{type(self).__name__} needs a learning rate for the shrink: give lr.')
                multiplier = self._multiplier(group, param, filter_length(param, group['normalization']))
                if getattr(self, 'is_second_order', False):
                    afterwards.append((param, param * (1 - multiplier)))
                else:
                    param.mul_(multiplier)
        step: Any = self.base.step
        if getattr(step, 'hooked', False):  # torch has wrapped it to run the step hooks, which run around ours already
            step = step.__wrapped__
        step(self)
        for param, decrement in afterwards:
            param.sub_(decrement)

    def __reduce__(self):
        # Classes made by a function cannot be found by name: pickle and deepcopy get the base class instead.
        return _new_aws_optimizer, (self.base,), self.__getstate__()


@functools.cache
def aws_optimizer(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Makes the class of an optimizer with the decoupled shrink around its step.

    The class takes the options of the base and `alpha` and `normalization`, defaults of every parameter group as in
    AwsSGD. Where the base has an `alpha` of its own (RMSprop), that one is given as `base_alpha`, and the group key of
    the shrink is `aws_alpha`.

    Args:
        base: An optimizer class.

    Returns:
        A subclass of the base, called Aws and the name of the base.
    """

    def __init__(self, params, *args, **options):
        _DecoupledShrink.__init__(self, params, *args, **options)

    setattr(__init__, '__signature__', _shrinking_signature(base))  # noqa: B010  mypy knows no such attribute
    return type(f'Aws{base.__name__}', (_DecoupledShrink, base), {
        '__doc__': f'{base.__name__} with decoupled Adaptive Weight Shrink, see `aws_optimizer`.',
        '__init__': __init__,
        'base': base,
        'alpha_key': 'aws_alpha' if 'alpha' in inspect.signature(base).parameters else 'alpha',
    })


def _shrinking_signature(base: type[torch.optim.Optimizer]) -> inspect.Signature:
    """Returns the signature of the base's constructor with the options of the shrink; timm and `help` look at it."""
    own = list(inspect.signature(_DecoupledShrink.__init__).parameters.values())
    shrink = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    theirs = [
        parameter.replace(name='base_alpha') if parameter.name == 'alpha' else parameter
        for parameter in inspect.signature(base.__init__).parameters.values()
    ]
    return inspect.Signature(sorted(theirs + shrink, key=lambda parameter: parameter.kind))  # **kwargs last


def _new_aws_optimizer(base: Any) -> torch.optim.Optimizer:
    cls = aws_optimizer(base)
    return cls.__new__(cls)
