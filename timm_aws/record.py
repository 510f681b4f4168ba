"""Records the effective learning rate of every normalized layer while a network trains, in any loop.

The steps are counted in the optimizer's own parameter groups, so the count is saved and loaded with its state: a run
that is resumed goes on in the same file. What the file holds of steps that come again, written by a killed run after
its last checkpoint for example, is kept in a file of its name and `.old1`, `.old2` and so on.
"""
import contextlib
import csv
import itertools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from .effective_lr import angle_between, equilibrium_angle, normalized_parameters, unwrap
from .rule import filter_length

__all__ = ['COLUMNS', 'Recorder', 'read_rows']

COLUMNS = ('step', 'layer', 'lr', 'length', 'angle', 'equilibrium_angle')
_STEP = 'recorded_steps'


class Recorder:
    """Writes a CSV file with one row a layer and recorded step of an optimizer.

    Columns: the step (the first is 1), the layer's parameter, its learning rate, and the medians over its filters of
    the length before the step, of the angle in radians by which the step turned the normalized filter, and of the angle
    that theory gives for the equilibrium of gradient and shrink (`equilibrium_angle`). lr / length is the effective
    learning rate (Eq. 12 and 13 of https://doi.org/10.1609/aaai.v34i04.5904). With tensorboard installed the same goes
    into an event file in the folder of the CSV file's name without its suffix, `.events` where it has none.

    Of several processes only the first writes. Steps at learning rate 0 turn nothing and are not counted. Where the
    file cannot be written, as on a full disk, the record ends with a warning and the training goes on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, path: str | os.PathLike, every: int | None = None) -> None:
        """
        Args:
            optimizer: Optimizer whose parameter groups name a normalization, as AwsSGD or AwsAdam, or a wrapper of one.
            path: CSV file to write. Rows of the same run that are there already are kept.
            every: Steps from one record to the next, counted from the first step. By default every step up to 128 is
                recorded, every second up to 256, every fourth up to 512 and so on.

        Raises:
            ValueError: If `every` is not a positive integer, or if no group names a normalization. The optimizer's
                first step raises it if the file is no record, or if it holds rows but the optimizer has taken no steps,
                as those are of another run.
            TypeError: If it is no optimizer of torch, or no path.
        """
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(f'Invalid every: {every!r}, record every 1 step or more, or leave it out.')
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f'Invalid path of a record: {path!r}, name a CSV file.')
        self.optimizer = unwrap(optimizer)
        self.path = Path(path)
        self.every = every
        next(normalized_parameters(self.optimizer))  # raises where there is nothing to record
        self._writes: bool | None = None  # decided at the first step, when the processes know each other
        # There from the start, as torch.distributed.checkpoint loads only the keys that it finds.
        self.optimizer.param_groups[0].setdefault(_STEP, 0)
        self._step = 0  # the present one, 0 where it is not counted
        self._last = math.inf  # the last one in the file, once that is open
        self._before: list[tuple[str, torch.Tensor, dict[str, Any], torch.Tensor]] = []
        self._events: Any = None
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._begin), self.optimizer.register_step_post_hook(self._end)]

    def close(self) -> None:
        """Stops recording."""
        for hook in self._hooks:
            hook.remove()
        self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    def _begin(self, *_) -> None:
        self._step, self._before = 0, []
        groups = self.optimizer.param_groups
        if all(group['lr'] == 0 for group in groups):  # as where torch.distributed.checkpoint makes a state by a step
            return
        self._step = groups[0].get(_STEP, 0) + 1  # other recorders of this optimizer find the same
        if self._writes is None:
            self._writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if self._writes and self._step <= self._last:  # at the start, and where an earlier state was loaded
            self._writes = self._open()
        if self._is_recorded():
            self._before = [
                (name, weight, group, weight.detach().clone())
                for name, weight, group in normalized_parameters(self.optimizer)
            ]

    def _is_recorded(self) -> bool:
        if self.every is None:
            return self._step % (1 << max(0, (self._step - 1).bit_length() - 7)) == 0
        return (self._step - 1) % self.every == 0

    @torch.no_grad()
    def _end(self, *_) -> None:
        if self._step:
            self.optimizer.param_groups[0][_STEP] = self._step
        if not self._before:
            return
        rows = []
        equilibria = equilibrium_angle(self.optimizer)
        for name, weight, group, before in self._before:
            start, end = _whole(before), _whole(weight)
            row = (
                torch.as_tensor(group['lr'], dtype=torch.float32, device=weight.device).reshape(()),
                filter_length(start, group['normalization']).median(),
                angle_between(start, end, group['normalization']).median(),
                _whole(equilibria[name]).median(),
            )
            rows.append(torch.stack(row))
        names = [name for name, *_ in self._before]
        self._before = []
        values = torch.stack(rows).tolist()  # one transfer from the device for all layers
        if self._writes:
            self._write(names, values)

    def _open(self) -> bool:
        """Makes the file hold the rows of the steps that have been taken, and no others; returns if it could."""
        rows, later = self._rows_of_run()
        aside = self.path.with_name(f'.{self.path.name}.{os.getpid()}')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open('w', newline='') as file:
                csv.writer(file).writerows([COLUMNS, *rows])
            if later:
                names = (self.path.with_name(f'{self.path.name}.old{number}') for number in itertools.count(1))
                old = self.path.rename(next(name for name in names if not name.exists()))
                warnings.warn(
                    f'{self.path} held {len(later)} rows from step {self._step} on, which comes again: {old} has them.',
                    stacklevel=2)
            aside.replace(self.path)
            self._last = self._step - 1
            self._close_events()
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                folder = self.path.with_suffix('' if self.path.suffix else '.events')
                self._events = SummaryWriter(str(folder), purge_step=self._step)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            self._give_up(error)
            return False
        return True

    def _rows_of_run(self) -> tuple[list[list[str]], list[list[str]]]:
        """Returns the file's rows of earlier and of later steps, and raises ValueError where it is not this run's."""
        if not self.path.exists() or (self.path.is_file() and not self.path.stat().st_size):
            return [], []
        header, *rows = (self.path.is_file() and read_rows(self.path)) or [[]]
        if header != list(COLUMNS) or not all(row[0].isdecimal() for row in rows):
            raise ValueError(f'{self.path} is no record of effective learning rates: name another file.')
        if rows and self._step == 1 and self._last == math.inf:
            raise ValueError(
                f'{self.path} holds the record of another run, and this one is at its first step: name another file, '
                f'move it away, or resume with the state of the optimizer.'
            )
        return [row for row in rows if int(row[0]) < self._step], [row for row in rows if int(row[0]) >= self._step]

    def _write(self, names: list[str], rows: list[list[float]]) -> None:
        try:
            with self.path.open('r+', newline='') as file:  # 'a' would make a file without header where there is none
                file.seek(0, os.SEEK_END)
                self._last = self._step
                csv.writer(file).writerows(
                    [self._step, name, *(f'{value:.6g}' for value in row)] for name, row in zip(names, rows))
            if self._events is not None:
                for name, (lr, length, *_) in zip(names, rows):
                    self._events.add_scalar(f'effective_lr/{name}', lr / length if length else math.inf, self._step)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writes = False  # it measures all the same: other processes may wait for its share of the weights
        warnings.warn(f'The record {self.path} ends before step {self._step}, training goes on: {error}', stacklevel=2)


def read_rows(path: Path) -> list[list[str]]:
    """Reads the rows of a CSV file, its header first, without a last one that was cut in the middle of its line."""
    with path.open(newline='', errors='replace') as file:
        try:
            rows = list(csv.reader(line for line in file if line.endswith('\n')))
        except csv.Error:  # a file of another kind
            return []
    return [row for row in rows if len(row) == len(rows[0])]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what all processes hold together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
