"""Pictures of training runs, all in one style."""
import csv
from collections import defaultdict
from pathlib import Path

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ['plot_effective_lr']


def plot_effective_lr(source: Path, out: Path) -> None:
    """Draws the effective learning rate of each layer over training, as the paper's Figures 2 and 4 do.

    Args:
        source: CSV file with a header: `epoch`, `layer`, `lr` and `length`, the median over the layer's filters.
        out: Picture to write, of the format that its suffix names.
    """
    layers = defaultdict(list)
    with source.open(newline='') as file:
        for row in csv.DictReader(file):
            layers[row['layer']].append((float(row['epoch']), float(row['lr']) / float(row['length'])))
    figure = Figure(figsize=(7, 4), layout='constrained')
    panel = figure.subplots()
    colors = colormaps['viridis']  # even in lightness, so it reads without colours too
    for index, points in enumerate(layers.values()):
        panel.plot(*zip(*points), color=colors(index / max(1, len(layers) - 1)), linewidth=1, marker='.', markersize=4)
    panel.set(xlabel='epoch', ylabel='effective learning rate, lr / filter length', yscale='log')
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    bar = figure.colorbar(ScalarMappable(cmap=colors), ax=panel, ticks=[0, 1])
    bar.ax.set_yticklabels(['first layer', 'last layer'])
    figure.savefig(out, dpi=150)
