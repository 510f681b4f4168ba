"""Pictures of training runs, all in one style."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .record import read_rows

__all__ = ['add_layer_bar', 'draw_effective_lr', 'layer_colors', 'plot_effective_lr']

_LAYERS = colormaps['viridis']  # its lightness rises evenly, so it reads in grey too


def layer_colors(count: int) -> list[tuple[float, float, float, float]]:
    """Returns a colour for each of so many layers, from the first to the last."""
    return [_LAYERS(index / max(1, count - 1)) for index in range(count)]


def add_layer_bar(figure: Figure, panels: Sequence[Axes]) -> None:
    """Adds the key of `layer_colors` beside the panels."""
    bar = figure.colorbar(ScalarMappable(cmap=_LAYERS), ax=panels, ticks=[0, 1])
    bar.ax.set_yticklabels(['first layer', 'last layer'])


def plot_effective_lr(source: Path, out: Path) -> None:
    """Draws the effective learning rate of each layer over training, as the paper's Figures 2 and 4 do.

    Where the file has the columns that `timm_aws.Recorder` writes, a second panel shows how far each step turns the
    filters, over the angle that theory gives for the equilibrium.

    Args:
        source: CSV file with a header: `step` or `epoch`, then `layer`, `lr` and `length` among others, the length
            being the median over the layer's filters.
        out: Picture to write, of the format that its suffix names.

    Raises:
        ValueError: If the file has no such columns or no rows.
    """
    columns, *values = read_rows(source) or [[]]
    rows = [dict(zip(columns, row)) for row in values]
    if not rows or not {'layer', 'lr', 'length'} <= set(columns):
        raise ValueError(f'{source} is no record of effective learning rates: it has no rows, or no layer, lr, length.')
    draw_effective_lr(rows, out)


def draw_effective_lr(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draws the rows of a record, each column to value, whose first column is `step` or `epoch`.

    Args:
        rows: Rows with the columns of `timm_aws.Recorder`, without the two angles for the first panel alone.
        out: Picture to write, of the format that its suffix names.
    """
    columns = list(rows[0])
    curves = {'effective learning rate, lr / filter length': ('lr', 'length')}
    if {'angle', 'equilibrium_angle'} <= set(columns):
        curves['angle of a step / angle in equilibrium'] = ('angle', 'equilibrium_angle')
    figure = Figure(figsize=(4 + 4 * len(curves), 4), layout='constrained')
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (label, ratio) in zip(panels, curves.items()):
        _draw_layers(panel, columns[0], rows, *ratio)
        panel.set(xlabel=columns[0], ylabel=label, yscale='log')
    add_layer_bar(figure, panels)
    figure.savefig(out, dpi=150)


def _draw_layers(panel: Axes, x: str, rows: Sequence[dict[str, Any]], over: str, under: str) -> None:
    layers: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points = layers.setdefault(row['layer'], [])  # each has its colour, in every panel the same
        numerator, denominator = float(row[over]), float(row[under])
        # Else there is no ratio or no logarithm: no angle is known, a filter has length 0, the last step has lr 0.
        if numerator > 0 and denominator > 0:
            points.append((float(row[x]), numerator / denominator))
    for color, points in zip(layer_colors(len(layers)), layers.values()):
        xs, ys = zip(*points) if points else ((), ())
        panel.plot(xs, ys, color=color, linewidth=1, marker='.' if len(points) < 30 else None, markersize=4)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
