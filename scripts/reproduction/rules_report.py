"""Tables and figure of `rules`: every rule, tuned alike, at other learning rates and initializations."""
import statistics
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .grid import RULE_LRS, RULE_SCALES, SGD_LR, Cell, Preset, cells_of, compared_rules, rule_map, tuned_rule
from .report import (
    Lines,
    final_accuracy,
    has_failed,
    interval,
    markdown,
    seeds_of,
    told_done,
    told_seeds,
    versions_of,
)
from .rules import RULES

__all__ = ['figures', 'tables']

_BASE = ('ws', 'l2')


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
    planned = cells_of('rules', preset, _accuracy(lines))
    done = sum(cell in lines for cell in planned)
    about = (
        f'{told_done(done, len(planned))}'
        f'{first["steps"]} steps of {preset.brief.batch_size} images each, on {first["dataset"]}; chance is '
        f'{100 / first["num_classes"]:.1f} %. Each rule is tuned with five strengths on one seed at lr {SGD_LR:g}, and '
        f'the best strength runs at every learning rate and initialization. A training that fails counts as chance. '
        f'{first["hardware"]}; {versions_of(lines)}.\n'
    )
    best = _best(lines, preset)
    return '\n'.join([about, _initializations(lines, best), _differences(lines, best, preset), _maps(lines, best)])


def _accuracy(lines: Lines) -> dict[Cell, float]:
    return {cell: final_accuracy(line) for cell, line in lines.items()}


def _best(lines: Lines, preset: Preset) -> dict[tuple[str, str], Cell]:
    """Returns the training with the best strength of each rule whose tuning is done."""
    accuracy = _accuracy(lines)
    best = {compared: tuned_rule(*compared, preset, accuracy) for compared in compared_rules(preset)}
    return {compared: cell for compared, cell in best.items() if cell}


def _title(compared: tuple[str, str]) -> str:
    normalization, rule = compared
    return f'{RULES[rule].title}{", no WS" if normalization == "none" else ""}'


def _at(lines: Lines, best: Cell, lr: float, scale: float) -> list[dict[str, Any]]:
    return seeds_of(lines, Cell(best.network, best.normalization, best.rule, lr, best.strength, scale))


def _initializations(lines: Lines, best: dict[tuple[str, str], Cell]) -> str:
    return markdown(
        f'Initialization times, at lr {SGD_LR:g}',
        ('rule', 'best strength', *(f'{scale:g}' for scale in RULE_SCALES)),
        [[_title(compared), f'{cell.strength:g}', *(told_seeds(_at(lines, cell, SGD_LR, scale))
                                                    for scale in RULE_SCALES)]
         for compared, cell in best.items()])


def _differences(lines: Lines, best: dict[tuple[str, str], Cell], preset: Preset) -> str:
    """Compares each rule with L2 seed by seed: the mean of a seed's cells is one number."""

    def mean(cell: Cell, scale: float, seed: int) -> float | None:
        found = [lines.get(one) for one in rule_map(cell, preset, seed) if one.scale == scale]
        return statistics.mean(map(final_accuracy, found)) if found and all(found) else None

    def told(cell: Cell, scale: float) -> str:
        pairs = [(mean(cell, scale, seed), mean(best[_BASE], scale, seed)) for seed in range(preset.scale_seeds)]
        return interval([one - other for one, other in pairs if one is not None and other is not None])

    return markdown(
        'Less L2 decay with WS, mean over the learning rates, points with 95 % intervals over seeds',
        ('rule', *(f'initialization × {scale:g}' for scale in RULE_SCALES)),
        [[_title(compared), *(told(cell, scale) for scale in RULE_SCALES)]
         for compared, cell in best.items() if _BASE in best and compared != _BASE])


def _maps(lines: Lines, best: dict[tuple[str, str], Cell]) -> str:
    return markdown(
        'Mean accuracy at each learning rate and initialization',
        ('rule', *(f'lr {lr:g} × {scale:g}' for scale in RULE_SCALES for lr in RULE_LRS)),
        [[_title(compared), *(_mean(_at(lines, cell, lr, scale)) for scale in RULE_SCALES for lr in RULE_LRS)]
         for compared, cell in best.items()])


def _mean(found: list[dict[str, Any]]) -> str:
    if not found:
        return 'not run'
    failed = sum(map(has_failed, found))
    mean = f'{statistics.mean(map(final_accuracy, found)):.0f}'
    return f'**{mean}** ({failed} of {len(found)} fail)' if failed else mean


def figures(lines: Lines, preset: Preset) -> dict[str, Figure | None]:
    """Draws the map of every rule; None where trainings are missing."""
    return {'maps': _heat_maps(lines, _best(lines, preset))}


def _heat_maps(lines: Lines, best: dict[tuple[str, str], Cell]) -> Figure | None:
    found = {compared: [[_at(lines, cell, lr, scale) for scale in RULE_SCALES] for lr in RULE_LRS]
             for compared, cell in best.items()}
    drawn = {compared: rows for compared, rows in found.items() if any(seeds for row in rows for seeds in row)}
    if len(drawn) < 2:
        return None
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(2.75 * columns + 1, 2.4 * rows + 0.6), layout='constrained')
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    shade, colors = Normalize(0, max(_accuracy(lines).values())), colormaps['cividis']
    for panel, (compared, cells) in zip(panels, drawn.items()):
        _heat_map(panel, cells, colors, shade)
        panel.set_title(f'{_title(compared)}, {best[compared].strength:g}', fontsize=9)
    for panel in list(figure.axes)[len(drawn):]:
        panel.set_axis_off()
    figure.colorbar(ScalarMappable(shade, colors), ax=figure.axes, label='validation accuracy, %')
    figure.supxlabel('initialization times')
    figure.supylabel('learning rate')
    return figure


def _heat_map(panel: Axes, cells: list[list[list[dict[str, Any]]]], colors: Any, shade: Normalize) -> None:
    means = [[statistics.mean(map(final_accuracy, seeds)) if seeds else float('nan') for seeds in row] for row in cells]
    panel.imshow(means, cmap=colors, norm=shade, origin='lower', aspect='auto')
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            text = f'{mean:.0f}' if cells[y][x] else ''
            panel.text(x, y, text, ha='center', va='center', color='white' if shade(mean) < 0.6 else 'black')
    panel.set_xticks(range(len(RULE_SCALES)), [f'{scale:g}' for scale in RULE_SCALES])
    panel.set_yticks(range(len(RULE_LRS)), [f'{lr:g}' for lr in RULE_LRS])
