"""Writes scripts/results/COSTS.md and its chart, and the README's numbers on cost, from bench_*.json and soak.json.

    python scripts/bench_report.py

The numbers are those on two threads.
"""
import json
from typing import Any

from benchmarks.step import FAMILIES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from outputs import BLUE, RESULTS, VERMILION, fill_in, save_figure, write

Rows = dict[str, dict[str, Any]]

TEXT = """\
# What AWS costs

![Optimizer step, training step and inference, each as a multiple of its base](bench.png)

Measured on the CPU, two threads: {machines}. No GPU has timed this yet: the kernel is tested in Triton's interpreter
only; `python scripts/bench.py gpu` measures it. Startup, scale and soak are older than the last redesign. A CPU without
bf16 leaves the bf16 modes of train out. Each number is the median over interleaved rounds; each ratio compares with the
base in the same round. The files [step](bench_step.json), [train](bench_train.json), [infer](bench_infer.json),
[startup](bench_startup.json), [scale](bench_scale.json) and [soak](soak.json) hold versions, spread and the numbers on
one thread.

    python scripts/bench.py step       # also train, infer, startup, scale
    python scripts/soak.py
    python scripts/bench_report.py     # writes this file

{table}
- **Step.** Set `fused=True` on the CPU (`--opt-kwargs fused=True`), for torch's optimizers as well as ours.
  `torch.compile(optimizer.step)` compiles AwsSGD and AwsAdam into one graph. Pass `lr` as a tensor: a float is
  recompiled when it changes.
- **Inference.** In CPU evaluation the normalized weights are cached until they change. The cache takes twice as
  much memory as the weights. Folded weights need no cache.
- **Size.** The time of a step grows with the number of parameters: {ns_low} to {ns_high} ns for each parameter, over
  networks of {smallest} to {largest} million. Many small tensors cost more: 1,024 tensors take {tensors} times as long
  as 64 tensors with the same number of parameters. Short filters cost more: filters of 4 elements take {fan_in} times
  as long as filters of 64. With momentum, a step allocates at most {peak} times the size of the largest weight.
- **Recorder.** A `Recorder` of every 50th step makes training {recorder} % slower.
- **Long runs.** Over {steps} steps in one process, memory grew by {memory} % at most. The time of a step grew by
  {time} % at most, relative to torch's. Recompiled graphs: {graphs}.
"""


def load(name: str) -> dict[str, Any]:
    """Reads a file of results."""
    return json.loads((RESULTS / f'{name}.json').read_text())


def steps() -> Rows:
    """Returns the optimizer steps over the parameters of ws_resnet50, as far as they are measured."""
    measured = load('bench_step')['threads']['2']
    return {name: measured[name] for family in FAMILIES.values() for name in family if name in measured}


def trainings() -> Rows:
    """Returns the training steps of ws_resnet50 with aws_sgd, by mode."""
    return {mode: next(row for name, row in rows.items() if name.startswith('ws_'))
            for mode, rows in on_two_threads('bench_train').items()}


def inferences() -> Rows:
    """Returns the forwards of ws_resnet50 in evaluation, by kind and mode."""
    return {f'{name.removeprefix("ws_resnet50").strip(", ")}, {mode}': row
            for mode, rows in on_two_threads('bench_infer').items()
            for name, row in rows.items() if name.startswith('ws_')}


def on_two_threads(name: str) -> dict[str, Rows]:
    """Returns the modes of a file that ran on two threads."""
    begin = '2 threads, '
    return {mode.removeprefix(begin): rows for mode, rows in load(name)['modes'].items() if mode.startswith(begin)}


def machines() -> str:
    """Tells on which machine, and with which torch, each file was measured."""
    files: dict[str, list[str]] = {}
    for name in ('step', 'train', 'infer', 'startup', 'scale'):
        result = load(f'bench_{name}')
        files.setdefault(f'{result["hardware"]}, torch {result["versions"]["torch"]}', []).append(name)
    return '; '.join(f'{", ".join(names)} on {machine}' for machine, names in files.items())


def table() -> str:
    """Returns the table of costs, without the bases and without the slower variants of a step."""
    left_out = {name for name in steps() if name.endswith(('foreach', 'loop'))
                or (name.startswith('torch') and not name.endswith('compiled'))}
    startup = load('bench_startup')['rows']
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


def text() -> str:
    """Returns the whole of COSTS.md."""
    scale, soak = load('bench_scale'), load('soak')['rows'].values()
    large = {point['parameters'] / 1e6: point['rows']['AwsSGD, fused']['ms']
             for point in scale['network'] if point['parameters'] > 25e6}
    ns = [ms / millions for millions, ms in large.items()]
    ms = {sweep: {point['name']: point['rows']['AwsSGD, fused']['ms'] for point in scale[sweep]}
          for sweep in ('tensors', 'fan_in')}
    return TEXT.format(
        machines=machines(), table=table(), ns_low=f'{min(ns):.1f}', ns_high=f'{max(ns):.1f}',
        smallest=f'{min(large):.0f}', largest=f'{max(large):.0f}',
        tensors=f'{ms["tensors"]["1024"] / ms["tensors"]["64"]:.0f}',
        fan_in=f'{ms["fan_in"]["4"] / ms["fan_in"]["64"]:.0f}',
        peak=f'{max(point["peak_in_largest_parameters"] for point in scale["network"]):g}',
        recorder=f'{100 * load("bench_train")["share_of_the_recorder"]:.2f}',
        steps=f'{max(row["steps"] for row in soak):,}', graphs=sum(row['new_graphs'] for row in soak),
        memory=f'{100 * (max(row["memory_ratio"] for row in soak) - 1):.2f}',
        time=f'{100 * (max(row["time_ratio"] for row in soak) - 1):.0f}',
    )


def values() -> dict[str, str]:
    """Returns the numbers that the README marks a place for."""
    training = [row['ratio'] for row in trainings().values()]
    return {
        'step': f'{steps()["AwsSGD, fused"]["ratio"]:.2f}',
        'training': f'{min(training):.2f} to {max(training):.2f}',
    }


def draw() -> None:
    """Draws scripts/results/bench.png and .svg."""
    figure = Figure(figsize=(14, 4.4), layout='constrained')
    panels = figure.subplots(1, 3)
    sgd = {name: row for name, row in steps().items() if 'dam' not in name}
    bars(panels[0], 'optimizer step, times fused SGD', sgd)
    bars(panels[1], 'training step, times resnet50, fused SGD', trainings())
    bars(panels[2], 'inference, times resnet50', inferences())
    save_figure(figure, RESULTS / 'bench')


def bars(panel: Axes, label: str, rows: Rows) -> None:
    """Draws a bar for each row, ours in vermilion, and a line at 1."""
    ratios = [row['ratio'] for row in rows.values()]
    colors = [BLUE if name.startswith(('torch', 'timm')) else VERMILION for name in rows]
    panel.bar_label(
        panel.barh(list(rows), ratios, color=colors), [f'{ratio:.2f}' for ratio in ratios], padding=4, fontsize=8,
        bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})  # over the line at 1
    panel.axvline(1, color='black', linewidth=0.8, zorder=0)
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.tick_params(axis='y', labelsize=8)
    panel.set_xlabel(label, fontsize=9)


def main() -> None:
    write(RESULTS / 'COSTS.md', text())
    fill_in(values())
    draw()


if __name__ == '__main__':
    main()
