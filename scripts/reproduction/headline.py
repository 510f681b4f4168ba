"""The picture at the top of the README: what a fixed decay does that AWS does not."""
from matplotlib.figure import Figure
from outputs import BLUE, VERMILION, band

from .grid import LIFETIME_OTHER_DECAY, SCALES, SGD_LR, TYPICAL_ALPHA, TYPICAL_DECAY, Cell
from .report import Lines, final_accuracy, seeds_of

__all__ = ['headline']

# Normalization, rule and strength of each curve of the left panel.
_DYING = (
    ('none', 'l2', TYPICAL_DECAY, 'weight decay', VERMILION, 'dashed'),
    ('ws', 'l2', TYPICAL_DECAY, 'weight decay, WS', VERMILION, 'solid'),
    ('none', 'aws', 1e-2, 'AWS', BLUE, 'dashed'),
    ('ws', 'aws', TYPICAL_ALPHA, 'AWS, WS', BLUE, 'solid'),
)
_SCALED = (('l2', TYPICAL_DECAY, 'weight decay, WS', VERMILION), ('aws', TYPICAL_ALPHA, 'AWS, WS', BLUE))


def headline(paper: Lines, lifetime: Lines) -> Figure | None:
    """Draws dead filters over the steps of `lifetime`, and accuracy over the initializations of figures 5 and 6.

    Args:
        paper: The finished trainings of the paper's tables and figures.
        lifetime: Those of `lifetime`.

    Returns:
        The figure, a line the mean and a band the range of the seeds; None where trainings are missing.
    """
    dying = [seeds_of(lifetime, Cell('narrow10', *curve[:2], SGD_LR, curve[2], other_decay=LIFETIME_OTHER_DECAY))
             for curve in _DYING]
    scaled = [[seeds_of(paper, Cell('resnet10', 'ws', rule, SGD_LR, strength, scale)) for scale in SCALES]
              for rule, strength, *_ in _SCALED]
    if not all(dying) or not all(seeds for curve in scaled for seeds in curve):
        return None
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    for found, (*_, label, color, style) in zip(dying, _DYING):
        counts = [[sum(layers) for layers in line['dead']] for line in found]
        steps = [found[0]['steps'] / len(counts[0]) * (1 + epoch) for epoch in range(len(counts[0]))]
        band(left, steps, list(zip(*counts)), color, label=label, linestyle=style)
    left.set(title='Filters that die', xlabel='step', ylabel=f'dead filters of {sum(dying[0][0]["filters"])}')
    left.set_xlim(0)
    for curve, (*_, label, color) in zip(scaled, _SCALED):
        band(right, SCALES, [[final_accuracy(line) for line in seeds] for seeds in curve], color, label=label)
    right.set(title='Filters that start too long', xlabel='initialization times', xscale='log', ylim=(0, None),
              ylabel='validation accuracy, %')
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(loc='center right' if panel is left else 'lower left')
    return figure
