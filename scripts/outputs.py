"""What the scripts write: the folder of results, whole files, numbers and tables inside a README, and figures.

A README marks what a script fills in: `<!--NAME-->` before it, `<!--/-->` after it. NAME is a key of the `values()` of
zoo_table.py, comparison.py, bench_report.py, tested_table.py, findings.py or fine_tuning.py. tests/test_readme.py fails
where a README holds another value than its script gives.
"""
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ['BLACK', 'BLUE', 'GREEN', 'ORANGE', 'READMES', 'RESULTS', 'ROOT', 'VERMILION', 'band', 'fill_in',
           'filled_in', 'save_figure', 'write']

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'scripts' / 'results'
READMES = (ROOT / 'README.md', RESULTS / 'README.md')
# The palette of Okabe and Ito, which colour-blind readers can tell apart. The colours of layers: timm_aws.plot.
BLUE, VERMILION, GREEN, ORANGE, BLACK = '#0072B2', '#D55E00', '#009E73', '#E69F00', '#000000'


def write(path: Path, text: str) -> None:
    """Writes a file under another name beside it, then renames it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_text(text)
    os.replace(partial, path)


def filled_in(text: str, values: dict[str, str]) -> str:
    """Returns the text with the marked values replaced. Marks whose name is not in values stay as they were."""
    return re.sub(r'<!--(\w+)-->(.*?)<!--/-->', lambda mark: f'<!--{mark[1]}-->{values.get(mark[1], mark[2])}<!--/-->',
                  text, flags=re.DOTALL)


def fill_in(values: dict[str, str]) -> None:
    """Writes values into every README that marks a place for them."""
    for path in READMES:
        write(path, filled_in(path.read_text(), values))


def band(panel: Axes, xs: Sequence[float], values: Sequence[Sequence[float]], color: str, **style: Any) -> None:
    """Draws the mean over the seeds, and a band from the lowest to the highest; one list of seeds for each x."""
    panel.plot(xs, [statistics.mean(seeds) for seeds in values], color=color, **style)
    panel.fill_between(xs, [min(seeds) for seeds in values], [max(seeds) for seeds in values], color=color, alpha=0.2,
                       linewidth=0)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Saves a figure as PNG and SVG, the same bytes for the same figure.

    Args:
        figure: The figure.
        path: Where to save it, without a suffix.

    Returns:
        The two files.
    """
    files = []
    for suffix, options in (('.png', {'dpi': 150}), ('.svg', {'metadata': {'Date': None}})):
        files.append(path.with_name(path.name + suffix))
        with rc_context({'svg.hashsalt': path.name}):  # matplotlib draws random ids otherwise
            figure.savefig(files[-1], **options)
    return files
