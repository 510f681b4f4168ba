"""Tables and figures of `rules` and `strengths`: every rule, tuned alike, and decay and AWS at every strength."""
import statistics
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from outputs import BLACK, BLUE, VERMILION, band

from .grid import (
    RULE_LRS,
    RULE_SCALES,
    SGD_LR,
    STRENGTH_RULES,
    SUITES,
    Cell,
    Preset,
    cells_of,
    compared_rules,
    rule_map,
    strength_map,
    tuned_rule,
)
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
    planned = {cell for name in SUITES['rules'] for cell in cells_of(name, preset, _accuracy(lines))}
    done = sum(cell in lines for cell in planned)
    about = (
        f'{told_done(done, len(planned))}'
        f'{first["steps"]} steps of {preset.brief.batch_size} images each, on {first["dataset"]}; chance is '
        f'{100 / first["num_classes"]:.1f} %. Each rule is tuned with five strengths on one seed at lr {SGD_LR:g}, and '
        f'the best strength runs at every learning rate and initialization. A training that fails counts as chance. '
        f'{first["hardware"]}; {versions_of(lines)}.\n'
    )
    best = _best(lines, preset)
    return '\n'.join([
        about, _initializations(lines, best), _differences(lines, best, preset, ('ws', 'l2'), (SGD_LR,)),
        _differences(lines, best, preset, ('ws', 'aws_decoupled'), (SGD_LR,)),
        _differences(lines, best, preset, ('ws', 'l2'), RULE_LRS), _maps(lines, best), _strengths(lines, preset)])


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


def _differences(
        lines: Lines,
        best: dict[tuple[str, str], Cell],
        preset: Preset,
        base: tuple[str, str],
        lrs: tuple[float, ...],
) -> str:
    """Compares each rule with another seed by seed: the mean of a seed's cells at some learning rates is one number."""

    def mean(cell: Cell, scales: tuple[float, ...], seed: int) -> float | None:
        found = [lines.get(one) for one in rule_map(cell, preset, seed) if one.scale in scales and one.lr in lrs]
        return statistics.mean(map(final_accuracy, found)) if found and all(found) else None

    def told(cell: Cell, scales: tuple[float, ...]) -> str:
        pairs = [(mean(cell, scales, seed), mean(best[base], scales, seed)) for seed in range(preset.scale_seeds)]
        return interval([one - other for one, other in pairs if one is not None and other is not None])

    at = f'at lr {lrs[0]:g}' if len(lrs) == 1 else 'mean over the learning rates'
    return markdown(
        f'Less {_title(base)}, {at}: points with 95 % intervals over seeds',
        ('rule', *(f'initialization × {scale:g}' for scale in RULE_SCALES), 'mean of the initializations'),
        [[_title(compared), *(told(cell, scales) for scales in (*((scale,) for scale in RULE_SCALES), RULE_SCALES))]
         for compared, cell in best.items() if base in best and compared != base])


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


def _strengths(lines: Lines, preset: Preset) -> str:
    return markdown(
        f'Strength and initialization, at lr {SGD_LR:g}',
        ('rule', *(f'initialization × {scale:g}' for scale in RULE_SCALES), 'lowest mean'),
        [[_told_strength(cells[0]), *(told_seeds(seeds_of(lines, cell)) for cell in cells), _lowest(lines, cells)]
         for compared in STRENGTH_RULES for cells in _by_strength(compared, preset)])


def _lowest(lines: Lines, cells: list[Cell]) -> str:
    found = [seeds_of(lines, cell) for cell in cells]
    return f'{min(statistics.mean(map(final_accuracy, seeds)) for seeds in found):.1f}' if all(found) else ''


def _by_strength(compared: tuple[str, str], preset: Preset) -> list[list[Cell]]:
    """Returns for each strength of a rule the trainings from each initialization, of the first seed."""
    cells = strength_map(*compared, preset, seed=0)
    return [[cell for cell in cells if cell.strength == strength]
            for strength in dict.fromkeys(cell.strength for cell in cells)]


def _told_strength(cell: Cell) -> str:
    return f'{setting(cell.rule, cell.strength)}{"" if cell.normalization == "ws" else ", no WS"}'


def figures(lines: Lines, preset: Preset) -> dict[str, Figure | None]:
    """Draws the map of every rule, and accuracy over the strength; None where trainings are missing."""
    return {'maps': _heat_maps(lines, _best(lines, preset)), 'plateaus': _plateaus(lines, preset)}


def _plateaus(lines: Lines, preset: Preset) -> Figure | None:
    """Draws accuracy over the strength from each initialization, bands from the worst to the best seed."""
    compared = [rule for rule in STRENGTH_RULES if rule in compared_rules(preset)]
    rows = [_by_strength(rule, preset) for rule in compared]
    if not all(cell in lines for row in rows for cells in row for cell in cells):
        return None
    figure = Figure(figsize=(2.6 * len(compared) + 1, 3.2), layout='constrained')
    panels = figure.subplots(1, len(compared), sharey=True)
    for panel, rule, cells in zip(panels, compared, rows):
        for of_scale, color in zip(zip(*cells), (BLUE, BLACK, VERMILION)):
            accuracies = [[final_accuracy(line) for line in seeds_of(lines, cell)] for cell in of_scale]
            band(panel, [cell.strength for cell in of_scale], accuracies, color,
                 label=f'initialization × {of_scale[0].scale:g}')
        panel.set(title=_title(rule), xscale='log', xlabel='λ' if rule[1] == 'l2' else 'α')
        panel.grid(alpha=0.3)
    panels[0].set(ylabel='validation accuracy, %', ylim=(0, None))
    panels[0].legend()
    return figure


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
