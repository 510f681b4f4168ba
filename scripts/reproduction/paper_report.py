"""The paper's tables and figures, at a small scale. A failed training stands in the tables as failed."""
import statistics
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from outputs import BLACK, BLUE, GREEN, VERMILION

from timm_aws.plot import add_layer_bar, layer_colors

from .grid import (
    ADAM_LR,
    NETWORK_BUDGET,
    SCALES,
    SGD_LR,
    TABLE3,
    TYPICAL_ALPHA,
    TYPICAL_DECAY,
    Cell,
    Preset,
    tuned_on_network,
)
from .report import (
    Lines,
    final_accuracy,
    has_failed,
    interval,
    markdown,
    seeds_of,
    setting,
    told_seeds,
    told_training,
    versions_of,
)

__all__ = ['figures', 'tables']

# Top-1 on ImageNet-1k in percent, from Tables 1 to 3 of the paper; None: the training failed.
_PAPER_1 = {
    1e-2: (None, None, 47.67), 1e-3: (None, None, 74.12), 1e-4: (76.74, None, 76.54), 1e-5: (74.70, None, 74.80)}
_PAPER_2 = {
    1e-1: (72.15, 71.02, 70.64, 70.15), 1e-2: (76.35, 71.85, 72.02, 71.63), 1e-3: (75.93, 72.54, 75.76, 72.31),
    1e-4: (74.37, 72.55, 76.63, 72.34), 1e-5: (73.23, 72.65, 75.48, 72.40)}
_PAPER_3 = {
    'resnet50': (76.54, 76.74, 76.59), 'resnet101': (78.17, 78.07, 78.14), 'resnext50': (77.64, 77.76, 77.71),
    'resnext101': (78.71, 78.68, 78.74), 'seresnet50': (77.55, 77.78, 77.68), 'seresnet101': (78.43, 78.65, 78.50)}
# 5,005 steps an epoch, lr 0.1 for 30 epochs, 0.01 for 30, 0.001 for 30, 0.0001 for 10, momentum 0.9.
_PAPER_EXPONENT = 5005 * (30 * 0.1 + 30 * 0.01 + 30 * 0.001 + 10 * 0.0001) / (1 - 0.9)

_COLORS = (BLUE, VERMILION, GREEN, BLACK)


def _paper(value: float | None) -> str:
    return '**fails**' if value is None else f'{value:.2f}'


def tables(lines: Lines, preset: Preset) -> str:
    """Writes every table.

    Args:
        lines: The finished trainings.
        preset: Their preset.

    Returns:
        Markdown, the same for the same lines.
    """
    if not lines:
        return 'No training has been run.\n'
    first = next(iter(lines.values()))
    about = (
        f'Validation accuracy in percent at the end of training on {first["dataset"]}; chance is '
        f'{100 / first["num_classes"]:.1f} %. {len(lines)} trainings of {preset.short.epochs} epochs, '
        f'{sum(map(has_failed, lines.values()))} of which failed: a loss or weight that is not finite, or an '
        f'accuracy below one and a half times chance. {first["hardware"]}; {versions_of(lines)}.\n'
    )
    parts = (_table1, _table2, _table3, _over_networks, _layers, _spread)
    return '\n'.join(
        [about, *(part(lines) for part in parts), _table3_tuned(lines, preset)])


def _table1(lines: Lines) -> str:
    columns = (('ws', 'l2', SGD_LR), ('ws', 'adam', ADAM_LR), ('ws', 'adamw', ADAM_LR), ('none', 'l2', SGD_LR))
    decays = sorted({cell.strength for cell in lines if (cell.normalization, cell.rule, cell.lr) in columns
                     and cell.network == 'resnet10' and cell.scale == 1})

    def row(decay: float) -> list[str]:
        ours = [lines.get(Cell('resnet10', normalization, rule, lr, decay)) for normalization, rule, lr in columns]
        exponents = [line['decay_exponent'] for line in ours if line and line['rule'] == 'l2']
        paper = _PAPER_1.get(decay)
        theirs = map(_paper, paper) if paper else [''] * 3
        return [f'{decay:g}', f'{exponents[0]:.3g}' if exponents else '', *map(told_training, ours),
                f'{decay * _PAPER_EXPONENT:.3g}' if paper else '', *theirs]

    return markdown(
        'Table 1: weight decay on standardized weights',
        ('weight decay', 'decay exponent, SGD', 'WS, SGD', 'WS, Adam (L2)', 'WS, AdamW', 'SGD, no WS',
         'paper: decay exponent, SGD', 'paper: WS, SGD', 'paper: WS, Adam', 'paper: SGD, no WS'),
        map(row, decays))


def _table2(lines: Lines) -> str:
    columns = [(normalization, rule, lr) for normalization in ('ws', 'wn') for rule, lr in (
        ('aws', SGD_LR), ('aws_decoupled', SGD_LR), ('aws_adam', ADAM_LR), ('aws_adam_coupled', ADAM_LR))]
    alphas = sorted({cell.strength for cell in lines if (cell.normalization, cell.rule, cell.lr) in columns
                     and cell.network == 'resnet10' and cell.scale == 1})

    def row(alpha: float) -> list[str]:
        ours = [lines.get(Cell('resnet10', normalization, rule, lr, alpha)) for normalization, rule, lr in columns]
        theirs = map(_paper, _PAPER_2[alpha]) if alpha in _PAPER_2 else [''] * 4
        return [f'{alpha:g}', *map(told_training, ours), *theirs]

    titles = [f'{normalization.upper()}, {title}' for normalization in ('ws', 'wn') for title in (
        'SGD coupled', 'SGD decoupled', 'Adam decoupled', 'Adam coupled')]
    return markdown(
        'Table 2: AWS, alpha', ('alpha', *titles, *(f'paper: {t}' for t in ('WS SGD', 'WS Adam', 'WN SGD', 'WN Adam'))),
        map(row, alphas))


def _table3(lines: Lines) -> str:
    def row(network: str) -> list[str]:
        columns = _compared(lines, network)
        decay = columns['WS + WD']
        start = f'{statistics.median(decay[0]["lengths"][0]):.2f}' if decay else 'not run'
        return [network, *map(told_seeds, columns.values()), start, *map(_paper, _PAPER_3[network])]

    return markdown(
        'Table 3: networks', ('network', *TABLE3, 'median std at the start', *(
            f'paper: {title}' for title in ('baseline', 'WS + WD', 'WS + AWS'))),
        map(row, _PAPER_3))


def _compared(lines: Lines, network: str) -> dict[str, list[dict[str, Any]]]:
    """Returns a network's trainings for each column of table 3, of the seeds that all columns have."""
    columns = {title: seeds_of(lines, Cell(network, *column)) for title, column in TABLE3.items()}
    seeds = [{line['seed'] for line in column} for column in columns.values() if column]
    common = set.intersection(*seeds) if seeds else set()
    return {title: [line for line in column if line['seed'] in common] for title, column in columns.items()}


def _over_networks(lines: Lines) -> str:
    compared = [_compared(lines, network) for network in _PAPER_3]

    def row(ours: str, base: str) -> list[str]:
        return [f'{ours} less {base}', *_difference([one[ours] for one in compared], [one[base] for one in compared])]

    baseline, decay, *aws = TABLE3
    return markdown(
        'Table 3: mean difference over the networks, and its 95 % interval', ('difference', 'points', 'networks'),
        [row(decay, baseline), row(aws[0], baseline), *(row(title, decay) for title in aws)])


def _difference(ours: Iterable[list[dict[str, Any]]], base: Iterable[list[dict[str, Any]]]) -> list[str]:
    """Tells the mean difference over networks, each with trainings of some seeds, and the number of networks."""
    gains = [_mean(one) - _mean(other) for one, other in zip(ours, base) if one and other]
    return [interval(gains), f'{len(gains)}']


def _mean(found: list[dict[str, Any]]) -> float:
    return statistics.mean(map(final_accuracy, found))


def _table3_tuned(lines: Lines, preset: Preset) -> str:
    accuracy = {cell: final_accuracy(line) for cell, line in lines.items()}
    measured: dict[str, list[list[dict[str, Any]]]] = {rule: [] for rule in NETWORK_BUDGET}

    def told(network: str, rule: str) -> list[str]:
        tuning = [lines.get(Cell(network, 'ws', rule, SGD_LR, strength)) for strength in NETWORK_BUDGET[rule]]
        best = tuned_on_network(network, rule, preset, accuracy)
        fresh = [line for line in seeds_of(lines, best) if line['seed'] != best.seed] if best else []
        measured[rule].append(fresh)
        return [*map(told_training, tuning), f'{best.strength:g}' if best else '', told_seeds(fresh)]

    rows = [[network, *(text for rule in NETWORK_BUDGET for text in told(network, rule))] for network in _PAPER_3]
    points, networks = _difference(measured['aws'], measured['l2'])
    return markdown(
        'Table 3, tuned: one seed to tune each network, other seeds to measure', (
            'network', *(f'λ = {strength:g}' for strength in NETWORK_BUDGET['l2']), 'best λ', 'WS + WD, other seeds',
            *(f'α = {strength:g}' for strength in NETWORK_BUDGET['aws']), 'best α', 'WS + AWS, other seeds'),
        rows) + f'\nWS + AWS less WS + WD, tuned, over {networks} networks: {points} points.\n'


def _layers(lines: Lines) -> str:
    def row(rule: str, strength: float) -> list[str]:
        line = lines.get(Cell('resnet10', 'ws', rule, SGD_LR, strength))
        if line is None or len(line['effective_lr']) < 3:
            return [setting(rule, strength), *['not run so far'] * 4]
        start, later = line['effective_lr'][0], line['effective_lr'][2]
        growth = sorted(after / before for before, after in zip(start[1:], later[1:]))
        return [setting(rule, strength), f'{max(start) / min(start):.1f}', f'{max(later) / min(later):.1f}',
                f'{growth[0]:.1f} to {growth[-1]:.1f}', f'{statistics.median(line["effective_lr"][-1]):.2g}']

    return markdown(
        'Figures 2 and 4: effective learning rates of the layers',
        ('rule', 'largest over smallest at the start', 'after two epochs',
         'growth until then, all layers but the first', 'median in the last epoch'),
        [row('l2', 0.), row('l2', TYPICAL_DECAY), row('aws', TYPICAL_ALPHA)])


def _spread(lines: Lines) -> str:
    def row(rule: str, strength: float) -> list[str]:
        found = [seeds_of(lines, Cell('resnet10', 'ws', rule, SGD_LR, strength, scale)) for scale in SCALES]
        means = [statistics.mean(map(final_accuracy, seeds)) for seeds in found if seeds]
        spread = f'{max(means) - min(means):.1f}' if len(means) > 1 else ''
        return [setting(rule, strength), *map(told_seeds, found), spread]

    return markdown(
        'Figures 5 and 6: initialization times', ('rule', *(f'{scale:g}' for scale in SCALES), 'spread, points'),
        [row('l2', TYPICAL_DECAY), row('aws', TYPICAL_ALPHA)])


def figures(lines: Lines, preset: Preset) -> dict[str, Figure | None]:
    """Draws every figure; None where trainings are missing."""
    return {
        'fig1': _fig1(lines), 'fig2': _effective_lrs(lines, (('l2', 0.), ('l2', TYPICAL_DECAY))),
        'fig4': _effective_lrs(lines, (('aws', TYPICAL_ALPHA),)),
        'fig5': _fig56(lines, 'l2', TYPICAL_DECAY), 'fig6': _fig56(lines, 'aws', TYPICAL_ALPHA),
    }


def _fig1(lines: Lines) -> Figure | None:
    found = [(decay, lines.get(Cell('resnet10', 'ws', 'l2', SGD_LR, decay))) for decay in (0., TYPICAL_DECAY)]
    figure = Figure(figsize=(6, 4), layout='constrained')
    panel = figure.subplots()
    for color, (decay, line) in zip(_COLORS, found):
        if line is None:
            return None
        _curve(panel, line['train_accuracy'], color, f'λ = {decay:g}')
    panel.set(xlabel='epoch', ylabel='train accuracy, %')
    panel.legend()
    return figure


def _curve(panel: Axes, values: list[float], color: str, label: str, **style: Any) -> None:
    panel.plot(range(1, len(values) + 1), values, color=color, label=label, **style)
    panel.grid(alpha=0.3)


def _effective_lrs(lines: Lines, rules: tuple[tuple[str, float], ...]) -> Figure | None:
    found = [lines.get(Cell('resnet10', 'ws', rule, SGD_LR, strength)) for rule, strength in rules]
    if not all(found):
        return None
    figure = Figure(figsize=(1 + 4.5 * len(rules), 4), layout='constrained')
    panels = figure.subplots(1, len(rules), squeeze=False, sharey=True)[0]
    for panel, line, (rule, strength) in zip(panels, found, rules):
        for color, rates in zip(layer_colors(len(line['layers'])), zip(*line['effective_lr'])):
            _curve(panel, rates, color, '')
        panel.set(title=setting(rule, strength), xlabel='epoch', yscale='log')
    panels[0].set_ylabel('effective learning rate, lr / std')
    add_layer_bar(figure, panels)
    return figure


def _fig56(lines: Lines, rule: str, strength: float) -> Figure | None:
    found = {scale: seeds_of(lines, Cell('resnet10', 'ws', rule, SGD_LR, strength, scale)) for scale in SCALES}
    if not all(found.values()):
        return None
    figure = Figure(figsize=(9, 4), layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, ('train', 'val')):
        for color, (scale, seeds) in zip(_COLORS, found.items()):
            failed = ', not finite' if any(line['first_nonfinite_step'] is not None for line in seeds) else ''
            for index, line in enumerate(seeds):
                label = '' if index else f'initialization × {scale:g}{failed}'
                _curve(panel, line[f'{kind}_accuracy'], color, label, marker='.', linewidth=0.8)
        panel.set(xlabel='epoch', ylabel=f'{kind} accuracy, %', title=setting(rule, strength))
    panels[0].legend()
    return figure
