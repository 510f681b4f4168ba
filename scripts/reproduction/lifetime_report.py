"""Tables and figures of `lifetime`: what each rule does to the filters when it has its own time."""
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from outputs import BLACK, BLUE, GREEN, ORANGE, VERMILION, band

from .grid import ADAM_LR, LIFETIME_OTHER_DECAY, SGD_LR, Cell, Preset, cells_of
from .report import (
    Lines,
    final_accuracy,
    has_failed,
    interval,
    markdown,
    seeds_of,
    setting,
    told_done,
    told_seeds,
    versions_of,
)
from .rules import RULES

__all__ = ['figures', 'tables']

_NORMALIZATIONS = {'none': 'no WS', 'ws': 'WS', 'ws_published': 'WS as published', 'wn': 'WN'}
_TYPICAL_STD = 0.04  # at which alpha is turned into a weight decay
# What is compared seed by seed: normalization, rule, strength and where it is not 1 the scale, less the same.
_PAIRS = (
    (('ws', 'aws', 0.25), ('ws', 'l2', 1e-2)), (('ws', 'aws', 0.025), ('ws', 'l2', 1e-3)),
    (('ws', 'aws', 0.025), ('ws', 'none', 0.)), (('ws', 'l2', 1e-3), ('ws', 'none', 0.)),
    (('ws', 'l2', 1e-3), ('ws', 'l2', 1e-2)), (('ws', 'l2', 1e-2), ('none', 'l2', 1e-2)),
    (('none', 'aws', 1e-2), ('none', 'l2', 1e-2)),
    (('ws_published', 'l2', 1e-2), ('ws', 'l2', 1e-2)),
    (('ws', 'req', 1e-3), ('ws', 'aws', 0.025)), (('ws', 'req', 1e-3), ('ws', 'l2', 1e-3)),
    (('ws', 'hyperball', 0.1), ('ws', 'aws', 0.025)), (('ws', 'aws_decoupled', 0.25), ('ws', 'aws', 0.025)),
    (('ws', 'aws', 0.025, 100.), ('ws', 'l2', 1e-3, 100.)), (('ws', 'aws', 0.025, 100.), ('ws', 'aws', 0.025)),
    (('ws', 'l2', 1e-3, 100.), ('ws', 'l2', 1e-3)), (('wn', 'aws', 1e-2), ('wn', 'l2', 1e-2)),
    (('ws', 'aws_adam', 250.), ('ws', 'adamw', 10.)), (('ws', 'adamw', 10.), ('ws', 'adam', 1e-2)),
)
# The curves over time, and their colours.
_DRAWN = (
    (('ws', 'l2', 1e-2), VERMILION), (('none', 'l2', 1e-2), ORANGE), (('ws', 'aws', 0.25), BLUE),
    (('ws', 'l2', 1e-3), GREEN), (('ws', 'none', 0.), BLACK))


def _cell(normalization: str, rule: str, strength: float, scale: float = 1.) -> Cell:
    """Returns the training of the first seed, with the usual decay of the other parameters."""
    lr = ADAM_LR if 'adam' in rule else SGD_LR
    return Cell('narrow10', normalization, rule, lr, strength, scale, other_decay=LIFETIME_OTHER_DECAY)


def _title(cell: Cell) -> str:
    start = '' if cell.scale == 1 else f', from filters {cell.scale:g} times as long'
    other = '' if cell.other_decay == LIFETIME_OTHER_DECAY else f', decay of the rest {cell.other_decay:g}'
    end = f'AWS, α = {cell.then_alpha:g},' if cell.then_alpha else 'no decay'
    until = '' if cell.decay_until == 1 else f', {end} after {100 * cell.decay_until:.0f} % of the steps'
    return f'{_NORMALIZATIONS[cell.normalization]}, {setting(cell.rule, cell.strength)}{start}{other}{until}'


def tables(lines: Lines, preset: Preset) -> str:
    """Writes every table.

    Args:
        lines: The finished trainings.
        preset: Their preset.

    Returns:
        Markdown, the same for the same lines.
    """
    planned = cells_of('lifetime', preset, {})
    if not lines:
        return 'No training has been run.\n'
    first, done = next(iter(lines.values())), [cell for cell in planned if cell in lines]
    about = (
        f'{told_done(len(done), len(planned))}'
        f'{first["steps"]:,} steps of {preset.long.batch_size} images each, on {first["dataset"]}; chance is '
        f'{100 / first["num_classes"]:.1f} %. The learning rate is divided by ten after 30, 60 and 90 %. A filter is '
        f'dead where its std is below 1e-6. Norm weights and classifier have a weight decay of '
        f'{LIFETIME_OTHER_DECAY:g} if the row names no other. {first["hardware"]}; {versions_of(lines)}.\n'
    )
    rows = list(dict.fromkeys(replace(cell, seed=0) for cell in done))
    return '\n'.join([
        about, _ends(lines, rows), _deaths(lines, rows), _returns(lines, rows), _differences(lines),
        _spreads(lines, rows)])


def _total(line: dict[str, Any], key: str) -> list[int]:
    """Returns the sum over the layers after each epoch."""
    return [sum(layers) for layers in line[key]]


def _span(values: Iterable[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ''
    low, high = f'{min(found):{form}}', f'{max(found):{form}}'
    return low if low == high else f'{low} to {high}'


def _ends(lines: Lines, rows: list[Cell]) -> str:
    def row(cell: Cell) -> list[str]:
        found = seeds_of(lines, cell)
        finite = [line for line in found if line['dead']]
        exponent = found[0]['decay_exponent']
        return [
            _title(cell), '' if exponent is None else f'{exponent:.3g}',
            _span((_total(line, 'dead')[-1] for line in finite), 'd'),
            _span((line['shortest'][-1] for line in finite), '.2g'),
            _span((line['train_accuracy'][-1] for line in finite), '.0f'), told_seeds(found), str(len(found))]

    filters = sum(next(iter(lines.values()))['filters'])
    return markdown(
        'At the end', (
            'rule', 'decay exponent', f'dead filters of {filters}', 'shortest std', 'train accuracy, last epoch',
            'validation accuracy', 'seeds'),
        map(row, rows))


def _half_time(line: dict[str, Any], key: str) -> int | None:
    """Returns the step by which half of what is dead at the end had died, as far as the record tells."""
    counts = _total(line, key)
    if not counts or not counts[-1]:
        return None
    step = line['steps'] // len(counts)
    return step * (1 + next(index for index, count in enumerate(counts) if count >= counts[-1] / 2))


def _deaths(lines: Lines, rows: list[Cell]) -> str:
    def row(cell: Cell) -> list[str]:
        found = [line for line in seeds_of(lines, cell) if line['dead']]
        told = [line for line in found if 'still' in line]  # lines of the first version do not say so
        shares = [sum(dead) / len(found) / count for dead, count in zip(
            zip(*(line['dead'][-1] for line in found)), found[0]['filters'])]
        most = max(range(len(shares)), key=shares.__getitem__)
        layer = found[0]['layers'][most].removesuffix('.weight')
        return [
            _title(cell), _span((_total(line, 'still')[-1] for line in told), 'd'),
            _span((_half_time(line, 'still') for line in told), ',d'),
            _span((_total(line, 'dead')[-1] for line in found), 'd'),
            _span((_half_time(line, 'dead') for line in found), ',d'),
            _span((_total(line, 'dead_and_still')[-1] for line in told), 'd'),
            _span((_total(line, 'dead_norm_weights')[-1] for line in found), 'd'),
            f'{layer} ({100 * shares[most]:.0f} %)' if any(shares) else '']

    return markdown(
        'How filters die', (
            'rule', 'without gradient', 'half of them by step', 'dead', 'half of the dead by step',
            'dead and without gradient', 'norm weights below 1e-6', 'layer with the largest share of dead filters'),
        map(row, (cell for cell in rows if any(line['dead'] for line in seeds_of(lines, cell))))) + (
        '\n"Without gradient": the gradient was exactly 0 in the last 20 steps of an epoch, as where the ReLU behind '
        'the filter is closed for every image. Then nothing but the decay acts on the filter.\n')


def _returns(lines: Lines, rows: list[Cell]) -> str:
    def row(cell: Cell) -> list[str]:
        found = [line for line in seeds_of(lines, cell) if line['first_nonfinite_step'] is None]
        epochs = [round(cell.decay_until * len(found[0]['dead'])) - 1, -1] if found else []
        counts = [_span((_total(line, key)[epoch] for line in found), 'd') for key in ('dead', 'still')
                  for epoch in epochs]
        return [_title(cell), *(counts or [''] * 4)]

    return markdown(
        'What comes back when decay ends', (
            'rule', 'dead when it ends', 'dead at the end', 'without gradient when it ends',
            'without gradient at the end'),
        map(row, (cell for cell in rows if cell.decay_until < 1)))


def _differences(lines: Lines) -> str:
    def row(ours: Cell, base: Cell) -> list[str]:
        pairs = [(final_accuracy(lines[one]), final_accuracy(lines[other])) for one, other in (
            (replace(ours, seed=line['seed']), replace(base, seed=line['seed'])) for line in seeds_of(lines, ours))
            if other in lines]
        return [f'{_title(ours)} less {_title(base)}', interval([one - other for one, other in pairs]), str(len(pairs))]

    return markdown(
        'Differences in accuracy, seed by seed, with 95 % intervals', ('difference', 'points', 'seeds'),
        [row(_cell(*ours), _cell(*base)) for ours, base in _PAIRS if _cell(*ours) in lines and _cell(*base) in lines])


def _spread_of(line: dict[str, Any], key: str) -> float | None:
    """Returns the largest over the smallest layer in the last epoch before the learning rate falls, if known."""
    epoch = math.floor(0.3 * len(line['val_accuracy'])) - 1
    if line['first_nonfinite_step'] is not None or epoch < 0 or 'still' not in line:
        return None
    values = [value for value in line[key][epoch] if value]  # a layer without a moving filter has none
    return max(values) / min(values) if values else None


def _spreads(lines: Lines, rows: list[Cell]) -> str:
    def row(cell: Cell) -> list[str]:
        found = seeds_of(lines, cell)
        return [_title(cell), *(_span((_spread_of(line, key) for line in found), '.3g')
                                for key in ('angles', 'moving_lr'))]

    return markdown(
        'Two effective learning rates, before the learning rate falls: largest over smallest layer',
        ('rule', 'angle of a step, filters with a gradient', 'lr / length, the same filters'),
        map(row, (cell for cell in rows if any('still' in line for line in seeds_of(lines, cell)))))


def figures(lines: Lines, preset: Preset) -> dict[str, Figure | None]:
    """Draws every figure; None where trainings are missing."""
    return {'dying': _dying(lines), 'strengths': _strengths(lines), 'spreads': _spread_map(lines)}


def _dying(lines: Lines) -> Figure | None:
    figure = Figure(figsize=(10, 4), layout='constrained')
    panels = figure.subplots(1, 2)
    for setting_, color in _DRAWN:
        found = [line for line in seeds_of(lines, _cell(*setting_)) if line['dead']]
        for index, line in enumerate(found):
            steps = [line['steps'] // len(line['dead']) * (1 + epoch) for epoch in range(len(line['dead']))]
            label = '' if index else _title(_cell(*setting_))
            panels[0].plot(steps, _total(line, 'dead'), color=color, label=label, linewidth=1)
            if 'still' in line:
                panels[0].plot(steps, _total(line, 'still'), color=color, linestyle='dotted', linewidth=1)
            panels[1].plot(steps, [value or math.nan for value in line['shortest']], color=color, linewidth=1)
    if not panels[0].lines:
        return None
    panels[0].set(xlabel='step', ylabel='dead filters; dotted: without gradient')
    panels[1].set(xlabel='step', ylabel='shortest std of a filter', yscale='log')
    panels[1].legend(handles=panels[0].get_legend_handles_labels()[0], fontsize=8, loc='lower right')
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure


def _strengths(lines: Lines) -> Figure | None:
    """Draws accuracy and dead filters over the strength, bands from the worst to the best seed."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    panels = figure.subplots(1, 2)
    for rule, color, factor in (('l2', VERMILION, 1.), ('aws', BLUE, _TYPICAL_STD)):
        cells = sorted(
            {replace(cell, seed=0) for cell in lines
             if replace(cell, seed=0) == _cell('ws', rule, cell.strength)}, key=lambda cell: cell.strength)
        if len(cells) < 2:
            return None
        found = [seeds_of(lines, cell) for cell in cells]
        strengths = [factor * cell.strength for cell in cells]
        label = {'l2': 'weight decay', 'aws': 'AWS'}[rule]
        accuracies = [[final_accuracy(line) for line in seeds] for seeds in found]
        band(panels[0], strengths, accuracies, color, label=label, marker='.')
        for key, style in (('dead', 'solid'), ('still', 'dotted')):
            shares = [[100 * _share(line, key) for line in seeds if 'still' in line] for seeds in found]
            if all(shares):
                band(panels[1], strengths, shares, color, label=label, marker='.', linestyle=style)
    without = seeds_of(lines, _cell('ws', 'none', 0.))
    if without:
        panels[0].axhline(
            statistics.mean(map(final_accuracy, without)), color=BLACK, linestyle='dashed', label='no decay')
    panels[0].set(ylabel='validation accuracy, %')
    panels[1].set(ylabel='dead filters, %; dotted: without gradient', ylim=(-2, 102))
    for panel in panels:
        panel.set(xscale='log', xlabel=f'weight decay, or α × {_TYPICAL_STD:g}')
        panel.grid(alpha=0.3)
    panels[0].legend()
    return figure


def _share(line: dict[str, Any], key: str) -> float:
    """Returns the share of filters that are counted under a key at the end, all where the training has failed."""
    return 1. if has_failed(line) or not line[key] else _total(line, key)[-1] / sum(line['filters'])


def _spread_map(lines: Lines) -> Figure | None:
    """Draws the spread of the angles against that of lr / length, a point for each training with normalized weights."""
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    panel = figure.subplots()
    for index, title in enumerate(dict.fromkeys(rule.title for rule in RULES.values())):
        pairs = [(_spread_of(line, 'moving_lr'), _spread_of(line, 'angles')) for cell, line in lines.items()
                 if RULES[cell.rule].title == title and cell.normalization != 'none']
        points = [pair for pair in pairs if all(pair)]
        if points:
            color, marker = colormaps['tab20'](index % 20), 'os^vDPX'[index % 7]
            panel.scatter(*zip(*points), color=color, marker=marker, label=title)
    if len(panel.collections) < 2:  # nothing to compare
        return None
    panel.set(xscale='log', yscale='log', xlabel='lr / length, largest over smallest layer',
              ylabel='angle of a step, largest over smallest layer')
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure
