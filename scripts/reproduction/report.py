"""How the reports tell what came of trainings: one training, its seeds, differences between them, a table."""
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .grid import Cell
from .rules import RULES

__all__ = [
    'Lines', 'final_accuracy', 'has_failed', 'interval', 'markdown', 'seeds_of', 'setting', 'told_done', 'told_seeds',
    'told_training', 'versions_of',
]

Lines = dict[Cell, dict[str, Any]]

# 97.5 % quantile of Student's t for the mean of so many differences.
_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}
_MORE = 2.45


def final_accuracy(line: dict[str, Any]) -> float:
    """Returns the validation accuracy at the end in percent; that of chance for a training that did not get there."""
    return line['val_accuracy'][-1] if line['first_nonfinite_step'] is None else 100 / line['num_classes']


def has_failed(line: dict[str, Any]) -> bool:
    """Whether a training ended early or learned next to nothing."""
    return line['first_nonfinite_step'] is not None or final_accuracy(line) < 1.5 * 100 / line['num_classes']


def setting(rule: str, strength: float) -> str:
    """Names a rule and its strength: alpha, weight decay, or what sets a length (s in filter_rules.py)."""
    if rule == 'none':
        return RULES[rule].title
    symbol = 'α' if rule.startswith('aws') else 's' if rule in ('forced', 'hyperball') else 'λ'
    return f'{RULES[rule].title}, {symbol} = {strength:g}'


def told_training(line: dict[str, Any] | None) -> str:
    """Tells the accuracy of a training, or how it failed."""
    if line is None:
        return 'not run'
    if line['first_nonfinite_step'] is not None:
        return f'**not finite** (step {line["first_nonfinite_step"]})'
    accuracy = f'{line["val_accuracy"][-1]:.1f}'
    return f'**{accuracy}** (chance)' if has_failed(line) else accuracy


def seeds_of(lines: Lines, cell: Cell) -> list[dict[str, Any]]:
    """Returns the trainings of a cell with any seed, in the order of the seeds."""
    found = [other for other in lines if replace(other, seed=cell.seed) == cell]
    return [lines[other] for other in sorted(found, key=lambda other: other.seed)]


def told_seeds(found: list[dict[str, Any]]) -> str:
    """Tells the accuracies of several seeds: mean and standard deviation, or one by one where one has failed."""
    if len(found) < 2 or any(map(has_failed, found)):
        return ', '.join(map(told_training, found)) or 'not run'
    values = [final_accuracy(line) for line in found]
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)'


def interval(differences: list[float]) -> str:
    """Tells the mean of differences and the half width of its 95 % interval, by Student's t; of seven for more."""
    count = len(differences)
    if count < 2:
        return f'{differences[0]:+.1f}' if differences else 'not run'
    width = _QUANTILES.get(count, _MORE) * statistics.stdev(differences) / count ** 0.5
    return f'{statistics.mean(differences):+.1f} ± {width:.1f}'


def markdown(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Writes a table below a heading."""
    lines = [' | '.join(head), *(' | '.join(row) for row in rows)]
    rule = '|' + '---|' * len(lines[0].split(' | '))
    return '\n'.join([f'## {title}', '', f'| {lines[0]} |', rule, *(f'| {line} |' for line in lines[1:]), ''])


def told_done(done: int, planned: int) -> str:
    """Tells how many trainings of an experiment are done, and if that is all."""
    return f'{done} of {planned} trainings are done{"" if done == planned else ": this is a part"}. '


def versions_of(lines: Lines) -> str:
    """Names the versions of what the trainings ran on."""
    return '; '.join(sorted({', '.join(f'{name} {version}' for name, version in line['versions'].items())
                             for line in lines.values()}))
