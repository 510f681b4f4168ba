"""Writes the README's table of what things cost, and draws its chart, from what scripts/bench.py has measured.

    python scripts/bench_report.py

Figures on two threads, from scripts/results/bench_*.json. tests/test_readme.py fails where the README holds another
table than this makes.
"""
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'scripts' / 'results'
README = ROOT / 'README.md'
BEGIN, END = '<!-- costs: written by scripts/bench_report.py -->\n', '<!-- end of costs -->\n'
OURS_COLOR, OTHER_COLOR = '#D55E00', '#0072B2'  # Okabe and Ito, safe for the colour blind

Rows = dict[str, dict[str, Any]]


def measured(name: str) -> dict[str, Any]:
    """Returns what scripts/bench.py wrote."""
    return json.loads((RESULTS / f'bench_{name}.json').read_text())


def steps() -> Rows:
    """Returns the optimizer steps over the parameters of ws_resnet50."""
    return measured('step')['threads']['2']


def trainings() -> Rows:
    """Returns the training steps of ws_resnet50 with aws_sgd, by mode."""
    return {mode: next(row for name, row in rows.items() if name.startswith('ws_'))
            for mode, rows in _on_two_threads('train').items()}


def inferences() -> Rows:
    """Returns the forwards of ws_resnet50 in evaluation, by kind and mode."""
    return {f'{name.removeprefix("ws_resnet50").strip(", ")}, {mode}': row
            for mode, rows in _on_two_threads('infer').items()
            for name, row in rows.items() if name.startswith('ws_')}


def _on_two_threads(name: str) -> dict[str, Rows]:
    begin = '2 threads, '
    return {mode.removeprefix(begin): rows for mode, rows in measured(name)['modes'].items() if mode.startswith(begin)}


def table() -> str:
    """Returns the whole table, but for what it is compared with and for slower ways to take the same step."""
    left_out = {name for name in steps() if name.endswith(('foreach', 'loop'))
                or (name.startswith('torch') and not name.endswith('compiled'))}
    startup = measured('startup')['rows']
    parts = (
        ('step', steps(), lambda name: f"torch's fused {'Adam' if 'dam' in name else 'SGD'}"),
        ('training', trainings(), lambda name: 'resnet50, fused SGD'),
        ('inference', inferences(), lambda name: f'resnet50{", batch norm fused" if "folded too" in name else ""}'),
        ('start-up', {name: row for name, row in startup.items() if 'timm' in name or 'ws_' in name},
         lambda name: 'building resnet50, copying the file in' if 'load' in name else '`import timm`'),
    )
    lines = ['| what | | ms | times | of |', '|---|---|---|---|---|']
    for what, rows, base in parts:
        lines += [f'| {what} | {name} | {row["ms"]:.1f} | {row["ratio"]:.2f} | {base(name)} |'
                  for name, row in rows.items() if name not in left_out]
    return '\n'.join(lines) + '\n'


def draw() -> None:
    """Draws scripts/results/bench.png and .svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout='constrained')
    panels = figure.subplots(1, 3)
    sgd = {name: row for name, row in steps().items() if 'dam' not in name}
    bars(panels[0], 'optimizer step, times fused SGD', sgd)
    bars(panels[1], 'training step, times resnet50, fused SGD', trainings())
    bars(panels[2], 'inference, times resnet50', inferences())
    for suffix, options in (('.png', {'dpi': 130}), ('.svg', {'metadata': {'Date': None}})):
        with rc_context({'svg.hashsalt': 'bench'}):  # else matplotlib draws new ids each time
            figure.savefig(RESULTS / f'bench{suffix}', **options)


def bars(panel: Any, label: str, rows: Rows) -> None:
    """Draws a bar for each row, ours in a colour of their own, and a line at 1."""
    ratios = [row['ratio'] for row in rows.values()]
    colors = [OTHER_COLOR if name.startswith(('torch', 'timm')) else OURS_COLOR for name in rows]
    panel.bar_label(
        panel.barh(list(rows), ratios, color=colors), [f'{ratio:.2f}' for ratio in ratios], padding=4, fontsize=8,
        bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})  # over the line at 1
    panel.axvline(1, color='black', linewidth=0.8, zorder=0)
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.tick_params(axis='y', labelsize=8)
    panel.set_xlabel(label, fontsize=9)


def main() -> None:
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])
    draw()


if __name__ == '__main__':
    main()
