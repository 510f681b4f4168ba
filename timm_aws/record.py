"""Records the effective learning rate of every normalized layer while a network trains, in any loop.

The steps are counted in the optimizer's own parameter groups, so the count is saved and loaded with its state: a run
that is resumed goes on in the same file, and what a killed run wrote after its last checkpoint is replaced.
"""
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from .effective_lr import equilibrium_angle
from .rule import filter_length

__all__ = ['COLUMNS', 'Recorder']

COLUMNS = ('step', 'layer', 'lr', 'length', 'angle', 'equilibrium_angle')
_STEP = 'recorded_steps'


class Recorder:
    """Writes a CSV file with one row a layer, every so many steps of an optimizer.

    Columns: the step (the first is 1), the layer's parameter, its learning rate, and the medians over its filters of
    the length before the step, of the angle in radians by which the step turned the normalized filter, and of the angle
    that theory gives for the equilibrium of gradient and shrink (`equilibrium_angle`). lr / length is the effective
    learning rate (Eq. 12 and 13 of https://doi.org/10.1609/aaai.v34i04.5904). With tensorboard installed the same goes
    into an event file in the folder of the CSV file's name without its suffix.

    Of several processes only the first writes. Steps at learning rate 0 turn nothing and are not counted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, path: str | os.PathLike, every: int = 50) -> None:
        """
        Args:
            optimizer: Optimizer whose parameter groups name a normalization, such as AwsSGD and AwsAdam.
            path: CSV file to write. Rows of the same run that are there already are kept.
            every: Steps from one record to the next, counted from the first step.

        Raises:
            ValueError: If `every` is not positive, or if no group names a normalization. The optimizer's first step
                raises it if the file holds rows but the optimizer has taken no steps, as those are of another run.
        """
        if every < 1:
            raise ValueError(f'Invalid every: {every!r}, record every 1 step or more.')
        self.optimizer = optimizer
        self.path = Path(path)
        self.every = every
        self._names = list(equilibrium_angle(optimizer))  # raises where there is nothing to record
        self._writes = False  # decided at the first step, when the processes know each other
        # There from the start, as torch.distributed.checkpoint loads only the keys that it finds.
        optimizer.param_groups[0].setdefault(_STEP, 0)
        self._before: list[torch.Tensor] = []
        self._opened = False
        self._events: Any = None
        self._hooks = [optimizer.register_step_pre_hook(self._begin), optimizer.register_step_post_hook(self._end)]

    def close(self) -> None:
        """Stops recording."""
        for hook in self._hooks:
            hook.remove()
        if self._events is not None:
            self._events.close()

    def _begin(self, *_) -> None:
        if self._stands_still():
            return
        group = self.optimizer.param_groups[0]
        step = group.setdefault(_STEP, 0) + 1
        if not self._opened:
            self._open(step)
        if (step - 1) % self.every == 0:
            self._before = [weight.detach().clone() for _, weight in self._weights()]

    @torch.no_grad()
    def _end(self, *_) -> None:
        if self._stands_still():
            return
        group = self.optimizer.param_groups[0]
        group[_STEP] += 1
        if not self._before:
            return
        lengths, angles, lrs = [], [], []
        for before, (group_of_weight, weight) in zip(self._before, self._weights()):
            normalization = group_of_weight['normalization']
            start, end = _whole(before), _whole(weight)
            lengths.append(filter_length(start, normalization).median())
            angles.append(_angle(start, end, normalization).median())
            lrs.append(torch.as_tensor(group_of_weight['lr'], dtype=torch.float32, device=weight.device))
        equilibria = [_whole(angle).median() for angle in equilibrium_angle(self.optimizer).values()]
        self._before = []
        # One transfer from the device for all layers.
        rows = torch.stack([torch.stack(list(row)) for row in zip(lrs, lengths, angles, equilibria)]).tolist()
        if self._writes:
            self._write(self.optimizer.param_groups[0][_STEP], rows)

    def _stands_still(self) -> bool:
        """Whether this step is at learning rate 0, as the one by which torch.distributed.checkpoint makes a state."""
        return all(group['lr'] == 0 for group in self.optimizer.param_groups)

    def _weights(self) -> Iterator[tuple[dict, torch.Tensor]]:
        for group in self.optimizer.param_groups:
            if group.get('normalization') is not None:
                yield from ((group, param) for param in group['params'] if param.ndim >= 2)

    def _open(self, step: int) -> None:
        """Makes the file hold the rows of the steps that have been taken, and no others."""
        self._opened = True
        self._writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not self._writes:
            return
        rows = []
        if self.path.is_file():
            with self.path.open(newline='') as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(COLUMNS)]
        if rows and step == 1:
            raise ValueError(
                f'{self.path} holds the record of another run, and this one is at its first step: name another file, '
                f'move it away, or resume with the state of the optimizer.'
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f'.{self.path.name}.{os.getpid()}')
        with aside.open('w', newline='') as file:
            csv.writer(file).writerows([COLUMNS, *(row for row in rows if int(row[0]) < step)])
        aside.replace(self.path)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._events = SummaryWriter(str(self.path.with_suffix('')), purge_step=step)

    def _write(self, step: int, rows: list[list[float]]) -> None:
        with self.path.open('a', newline='') as file:
            csv.writer(file).writerows(
                [step, name, *(f'{value:.6g}' for value in row)] for name, row in zip(self._names, rows))
        if self._events is not None:
            for name, (lr, length, *_) in zip(self._names, rows):
                self._events.add_scalar(f'effective_lr/{name}', lr / length, step)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what all processes hold together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _angle(before: torch.Tensor, after: torch.Tensor, normalization: str) -> torch.Tensor:
    """Returns the angle in radians between each filter before and after a step, centered where its norm centers it."""
    pair = [weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)) for weight in (before, after)]
    if normalization != 'wn':
        pair = [weight - weight.mean(1, keepdim=True) for weight in pair]
    first, second = (torch.nn.functional.normalize(weight, dim=1) for weight in pair)
    # From the chord: the arc cosine has no digits left at the angles of one step.
    return 2 * torch.asin((first - second).norm(dim=1).div(2).clamp(max=1))
