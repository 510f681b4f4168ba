"""Forecasts what a run will do to the lengths of normalized weights, before it: `timm-aws plan`.

The gradient of a normalized filter is at a right angle to it, so each step makes it longer; the shrink or the weight
decay makes it shorter. Let `turn` be the angle of a step that follows gradients alone, `balance` the angle of
`equilibrium_angle`, with S and P as there, r the norm of the filter and n its elements. Then

    d ln r^2 = (S^2 / P) (turn^2 - balance^2)    per step
    turn = lr * sqrt(P) * c / r^2                SGD: the gradient is c / r
    turn = lr * sqrt(P) * sqrt(n) / r            Adam: the gradient over its root mean square is 1 in each element

until turn and balance are equal, if gradients of different steps are independent. Nobody knows c before a run. It is
measured at the initialization on 8 images of noise of 32 px with random labels, and scaled to the run's batch and
image size as gradients of noise are, by 1 / sqrt(images) and 1 / size. Norm weights of 0, at the end of residual
branches, hold gradients back and are taken as 0.2, about their mean in ws_resnet50_aws. Training finds places with
smaller gradients: half of c is taken, between all of it at the start and the 0.2 of it under a strong shrink in
scripts/results/reproduce_cpu.jsonl. A factor of 2 in c is one of 1.4 in the length under
weight decay and of 1.3 under AWS; in the angle it is none and 1.15.
"""
import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs

from .effective_lr import angle_at, gradient_sums, normalized_parameters, shrinks_at
from .param_groups import normalized_weights, param_groups_aws
from .rule import NORMALIZATIONS, filter_length

__all__ = ['Layer', 'Plan', 'forecast', 'plan_run']

_NEAR = (0.7, 1.4)  # turn / balance in equilibrium
_DEAD = 1e-6  # of the length
_IMAGES, _SIZE = 8, 32  # of the noise to measure gradients on
_CALM = 0.5  # gradients in training, over those of the initialization
_PIECES = 500  # of a run, in which turn and balance are looked at


@dataclass
class Layer:
    """Forecast of the median filter of a layer, in equilibrium at the highest learning rate of the run.

    Attributes:
        name: Parameter.
        length: Length before the run.
        half_life_steps: Steps in which the shrink alone, as strong as at this length, halves it.
        half_life_epochs: The same in epochs.
        equilibrium_length: Length at which gradient and shrink balance.
        angle: Angle of a step there, in radians.
        effective_lr: lr / length there.
        share_before: Share of the run before turn / balance is 0.7 to 1.4, looked for from the highest rate on.
        final_length: Length after the run.
    """
    name: str
    length: float
    half_life_steps: float
    half_life_epochs: float
    equilibrium_length: float
    angle: float
    effective_lr: float
    share_before: float
    final_length: float


@dataclass
class Plan:
    """Forecast of a run.

    Attributes:
        steps: Steps of the run.
        layers: What each layer does.
        warnings: What will go wrong, a sentence or two each.
        epochs: Rows as those of `timm_aws.Recorder`, one a layer at the start of each epoch.
    """
    steps: int
    layers: list[Layer]
    warnings: list[str]
    epochs: list[dict[str, Any]]

    def to_json(self) -> str:
        """Returns all but the epochs."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != 'epochs'}, indent=2)

    def to_text(self) -> str:
        """Returns a table with a line a layer, then the warnings."""
        width = max(len(layer.name) for layer in self.layers)
        return '\n'.join([
            f'{"":{width}}            half-life of shrink        equilibrium at highest lr      share of',
            f'{"layer":{width}}    length        steps   epochs      length  angle, rad  lr / length  run before',
            *(f'{layer.name:{width}} {layer.length:9.3g} {layer.half_life_steps:12,.0f} {layer.half_life_epochs:8.2g} '
              f'{layer.equilibrium_length:11.3g} {layer.angle:11.3g} {layer.effective_lr:12.3g} '
              f'{layer.share_before:11.0%}' for layer in self.layers),
            f'{self.steps:,} steps',
            *(f'Warning: {warning}' for warning in self.warnings)])


def plan_run(
        model: str,
        opt: str,
        lr: float,
        epochs: int,
        images: int,
        batch_size: int,
        opt_kwargs: Sequence[str] = (),
        weight_decay: float = 0.,
        momentum: float = 0.9,
        img_size: int | None = None,
        **schedule: Any,
) -> Plan:
    """Forecasts a run of timm's train.py.

    Args:
        model: Name of a model with normalized weights.
        opt: Name of an optimizer, SGD or Adam, with a shrink or a weight decay.
        lr: Learning rate.
        epochs: Epochs of training.
        images: Images of an epoch.
        batch_size: Images of a step.
        opt_kwargs: Options of the optimizer, each `KEY=VALUE`.
        weight_decay: Weight decay.
        momentum: Momentum of SGD.
        img_size: Side of the images in pixels, that of the model if left out.
        schedule: Options of timm's create_scheduler_v2, such as `sched` and `warmup_epochs`.

    Returns:
        The forecast.

    Raises:
        ValueError: If a name is unknown, a number out of range, or if there is no forecast for model or optimizer.
    """
    if not timm.is_model(model):
        raise ValueError(f'Unknown model {model!r}: timm.list_models() lists them.')
    if opt.lower().removeprefix('lookahead_') not in list_optimizers():
        raise ValueError(f'Unknown optimizer {opt!r}: timm.optim.list_optimizers() lists them.')
    if not (epochs > 0 and 0 < batch_size <= images and 0 < lr < math.inf and 0 <= momentum < 1
            and (img_size is None or img_size > 0)):
        raise ValueError(
            f'There is nothing to plan in epochs={epochs!r}, images={images!r}, batch_size={batch_size!r}, lr={lr!r}, '
            f'momentum={momentum!r}, img_size={img_size!r}: give an epoch, a batch, a learning rate, a momentum below '
            f'1 and the pixels of an image.')
    if wrong := [option for option in opt_kwargs if '=' not in option]:
        raise ValueError(f'Invalid opt_kwargs: {wrong[0]!r}, write KEY=VALUE, such as alpha=0.0025.')
    parsed = argparse.Namespace()
    ParseKwargs([], 'kwargs')(argparse.ArgumentParser(), parsed, list(opt_kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = timm.create_model(model)
    params = network
    if not opt.lower().startswith('aws_'):
        if not normalized_weights(network):
            raise ValueError(f'{model} has no normalized weights to plan: timm_aws.list_models() lists models with.')
        params = param_groups_aws(network, 0., weight_decay)
    optimizer = create_optimizer_v2(
        params, opt, lr=lr, weight_decay=weight_decay, momentum=momentum, **parsed.kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=epochs, **schedule)
    lrs = []
    for epoch in range(epochs):
        if scheduler is not None:
            scheduler.step(epoch)
        lrs.append(optimizer.param_groups[0]['lr'])
    return forecast(
        network, optimizer, lrs, images // batch_size, batch_size, img_size or network.default_cfg['input_size'][-1])


@torch.no_grad()
def forecast(
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lrs: Sequence[float],
        steps_per_epoch: int,
        batch_size: int,
        img_size: int,
) -> Plan:
    """Forecasts the normalized weights of a model of timm under an optimizer of its parameters.

    Args:
        model: Model at its initialization; it stays as it is.
        optimizer: SGD or Adam with a shrink or a weight decay; its parameter groups name a normalization.
        lrs: Learning rate of each epoch.
        steps_per_epoch: Steps of an epoch.
        batch_size: Images of a step.
        img_size: Side of the images in pixels.

    Returns:
        The forecast.

    Raises:
        ValueError: If there is no forecast for the optimizer, or if no group names a normalization.
    """
    groups: dict[int, list[tuple[str, torch.Tensor, dict[str, Any]]]] = {}
    for member in normalized_parameters(optimizer):
        groups.setdefault(id(member[2]), []).append(member)
    gradients = _gradients(model, batch_size, img_size) if isinstance(optimizer, torch.optim.SGD) else {}
    plan = Plan(len(lrs) * steps_per_epoch, [], [], [])
    highest = max(lrs)
    pieces = min(steps_per_epoch, math.ceil(_PIECES / len(lrs)))  # of an epoch
    for members in groups.values():
        filters = _Filters(optimizer, members, gradients)
        starved, settled = copy.copy(filters), copy.copy(filters)
        starved.strength = torch.zeros_like(filters.strength)
        settled.settle(highest)
        length, half_life = filters.length, filters.half_life(highest)
        overflow = filters.overflow(highest)
        reached = torch.ones_like(length)
        for index, lr in enumerate(lr for lr in lrs for _ in range(pieces)):
            turn, balance = filters.turn(lr), filters.balance(lr)
            if index % pieces == 0:
                values = torch.stack([filters.length, turn, balance], 1).tolist()
                for name, row in zip(filters.names, values):
                    columns = zip(('length', 'angle', 'equilibrium_angle'), row)
                    plan.epochs.append({'epoch': index // pieces + 1, 'layer': name, 'lr': lr, **dict(columns)})
            if index // pieces >= lrs.index(highest):
                near = (_NEAR[0] * balance < turn) & (turn < _NEAR[1] * balance)
                reached[near & (reached == 1)] = index / (len(lrs) * pieces)
            filters.advance(lr, steps_per_epoch / pieces)
            starved.advance(lr, steps_per_epoch / pieces)
        values = torch.stack([
            length, half_life, half_life / steps_per_epoch, settled.length, settled.balance(highest),
            highest / settled.length, reached, filters.length], 1).tolist()
        layers = [Layer(name, *row) for name, row in zip(filters.names, values)]
        plan.warnings += overflow or _endings(layers, (starved.length / length).nan_to_num().min().item())
        plan.layers += layers
    return plan


class _Filters:
    """The median filter of each layer of a parameter group, on its way through a run.

    Attributes:
        names: Parameters of the layers.
        length: Their lengths, (layers,).
        strength: turn * length ** (power / 2) at a learning rate of 1, (layers,).
    """

    def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            members: list[tuple[str, torch.Tensor, dict[str, Any]]],
            gradients: dict[torch.Tensor, torch.Tensor],
    ) -> None:
        self.optimizer, self.group = optimizer, members[0][2]
        self.names = [name for name, *_ in members]
        self.power = 4 if gradients else 2
        total, squares = gradient_sums(optimizer, self.group)
        self.speed = total ** 2 / squares
        lengths, strengths = [], []
        for _, weight, group in members:
            length = filter_length(weight, group['normalization'])
            norm = filter_length(weight, 'cwn' if NORMALIZATIONS[group['normalization']].centered else 'wn')
            step = gradients[weight] if gradients else math.sqrt(weight[0].numel())
            lengths.append(length.median())
            strengths.append((math.sqrt(squares) * step / norm * length ** (self.power / 2)).median())
        self.length, self.strength = torch.stack(lengths).double(), torch.stack(strengths).double()
        known = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam))
        if not (known and (self.balance(1.) > 0).all() and (self.strength > 0).all()):
            raise ValueError(
                f'There is no forecast for {type(optimizer).__name__} with these options: take SGD or Adam, under aws_ '
                f'or not, with alpha or weight_decay above 0, which in Adam must be decoupled.'
            )

    def turn(self, lr: float) -> torch.Tensor:
        """Returns the angles by which the gradients of a step turn the filters, (layers,)."""
        return lr * self.strength / self.length ** (self.power / 2)

    def balance(self, lr: float) -> torch.Tensor:
        """Returns the angles at which gradients would hold the lengths, (layers,)."""
        return angle_at(self.optimizer, {**self.group, 'lr': lr}, self.length)

    def half_life(self, lr: float) -> torch.Tensor:
        """Returns the steps in which the shrink, as strong as now, would halve the lengths, (layers,)."""
        return 2 * math.log(2) / (self.speed * self.balance(lr) ** 2)

    def settle(self, lr: float) -> None:
        """Goes to the equilibrium."""
        for _ in range(100):  # gamma at one length gives the next, nearer by a half at least
            self.length = self.length * (self.turn(lr) / self.balance(lr)) ** (2 / self.power)

    def advance(self, lr: float, steps: float) -> None:
        """Takes steps, in parts in which gamma hardly changes: length ** power then follows a linear equation."""
        left = steps
        while left > 0:
            turn, balance = self.turn(lr) ** 2, self.balance(lr) ** 2
            rate = self.power / 2 * self.speed * balance
            part = min(left, max((0.5 / rate.max()).item(), steps / 8))
            share = -torch.expm1(-rate * part)
            self.length = self.length * (1 - share + share * turn / balance) ** (1 / self.power)
            left -= part

    def overflow(self, lr: float) -> list[str]:
        """Returns a warning if a step of the shrink takes all of a filter or more."""
        share = max((lr * torch.as_tensor(gamma)).max().item()
                    for _, gamma in shrinks_at(self.optimizer, self.group, self.length))
        return [f'A step shrinks a filter by {share:.2g} times its length, where 1 leaves nothing and more ends in '
                f'overflow: lower the learning rate, alpha or the weight decay.'] if share >= 1 else []


def _endings(layers: list[Layer], share_left: float) -> list[str]:
    """Returns warnings of filters that end too long or too short, or that will die without a gradient."""
    warnings = []
    for word, sign in (('long', 1), ('short', -1)):
        late = [layer for layer in layers
                if layer.share_before == 1 and sign * (layer.final_length - layer.equilibrium_length) > 0]
        if late:
            worst = max(late, key=lambda layer: sign * math.log(layer.final_length / layer.equilibrium_length))
            warnings.append(
                f'{len(late)} of {len(layers)} layers stay too {word} for the equilibrium, {worst.name} ends at '
                f'{worst.final_length / worst.equilibrium_length:.2g} times its length: train for longer, or raise '
                f'the learning rate, alpha or the weight decay.')
    if share_left < _DEAD:
        warnings.append(
            f'A filter that gets no gradient, as behind a closed ReLU, dies: it ends at {share_left:.0e} of its '
            f'length. Lower the weight decay, or take aws_sgd, whose shrink slows down for short filters.')
    return warnings


def _gradients(model: torch.nn.Module, batch_size: int, img_size: int) -> dict[torch.Tensor, torch.Tensor]:
    """Measures the gradient norms of filters on noise, scaled to batches of images of these sizes."""
    copied: Any = copy.deepcopy(model).train()
    for name, param in copied.named_parameters():
        if not name.endswith('bias') and not param.any():  # the gain of a norm, or of the last layer in an NFNet
            torch.nn.init.constant_(param, 0.2)
    channels, _, size = copied.default_cfg['input_size']
    if not copied.default_cfg.get('fixed_input_size'):
        size = _SIZE
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        logits = copied(torch.randn(_IMAGES, channels, size, size).to(next(copied.parameters())))
        F.cross_entropy(logits, torch.randint(logits.shape[1], (_IMAGES,)).to(logits.device)).backward()
    scale = _CALM * math.sqrt(_IMAGES / batch_size) * size / img_size
    pairs = zip(model.parameters(), copied.parameters())
    return {param: scale * filter_length(twin.grad, 'wn') for param, twin in pairs if param.ndim > 1}
