"""Reproduces the tables and figures of the paper at a scale that one machine can run.

    python scripts/reproduce.py run all --preset cpu --data tiny-imagenet    # trains what is not yet there
    python scripts/reproduce.py report --preset cpu                          # tables and figures from what is there

`run` adds one line of JSON for each finished training to a file in scripts/results: those of `lifetime`, `precision`
and `rules` to lifetime_PRESET.jsonl and so on, those of the paper's tables and figures to reproduce_PRESET.jsonl. It
can be stopped at any moment. Presets: `smoke`, made-up patterns and a few steps, to try the scripts (no --data); `cpu`,
twenty classes of Tiny-ImageNet-200 at 32 px, or ten at 16 px for what is not in the paper; `gpu`, forty classes.
reproduction/grid.py lists the trainings of each table and figure.
"""
import argparse
import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from outputs import RESULTS, save_figure, write
from provenance import hardware, versions
from reproduction import images as image_sets
from reproduction import lifetime_report, paper_report, precision_report, rules_report
from reproduction.grid import EXPERIMENTS, PRESETS, SUITES, Cell, Preset, Task, cells_of, task_of
from reproduction.headline import headline
from reproduction.images import Images
from reproduction.report import final_accuracy
from reproduction.training import train_cell
from tqdm import tqdm

_worker: dict[str, Any] = {}


def read_lines(path: Path) -> dict[Cell, dict[str, Any]]:
    """Reads the finished trainings; a last line that was cut off is none."""
    lines = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[cell_of(line)] = line
    return lines


def cell_of(line: dict[str, Any]) -> Cell:
    """Returns what a line is the result of."""
    return Cell(**{field.name: line.get(field.name, field.default) for field in fields(Cell)})


def pending(experiments: Iterable[str], preset: Preset, lines: dict[Cell, dict[str, Any]]) -> list[Cell]:
    """Lists what is still to be trained, as far as it is known now."""
    accuracy = {cell: final_accuracy(line) for cell, line in lines.items()}
    cells = dict.fromkeys(cell for name in experiments for cell in cells_of(name, preset, accuracy))
    return [cell for cell in cells if cell not in lines]


def _start_worker(images: Images, task: Task, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker.update(images=images.to(device), task=task)


def _work(cell: Cell) -> dict[str, Any]:
    return train_cell(cell, _worker['task'], _worker['images'])


def run_cells(cells: list[Cell], pool: ProcessPoolExecutor) -> Iterator[dict[str, Any]]:
    """Trains several cells at a time and yields what came of each, as they finish."""
    futures = [pool.submit(_work, cell) for cell in cells]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def run(options: argparse.Namespace) -> None:
    """Trains what is not yet there, and writes a line for each."""
    preset = PRESETS[options.preset]
    if options.seeds:
        preset = replace(preset, seeds=options.seeds, scale_seeds=options.seeds, life_seeds=options.seeds)
    for suite, experiments in SUITES.items():
        chosen = [name for name in experiments if options.experiment in (name, 'all')]
        if chosen:
            _run_suite(suite, chosen, preset, options)


def _run_suite(suite: str, experiments: list[str], preset: Preset, options: argparse.Namespace) -> None:
    """Trains what is not yet there of some experiments of a suite."""
    path = options.out / f'{suite}_{options.preset}.jsonl'
    lines = read_lines(path)
    write(path, ''.join(json.dumps(line) + '\n' for line in lines.values()))
    if not pending(experiments, preset, lines):
        return
    task = task_of(suite, preset)
    images = image_sets.load(options.data, task.every, task.image_size) if task.every else image_sets.patterns(
        task.image_size)
    about = _about(options, images)
    with ProcessPoolExecutor(
            options.jobs, multiprocessing.get_context('spawn'), _start_worker,
            (images.share(), task, options.device, options.threads)) as pool, tqdm(unit='training') as progress:
        # Again and again, as best strengths are known only after their tuning.
        while cells := pending(experiments, preset, lines):
            progress.total = progress.n + len(cells)
            for result in run_cells(cells, pool):
                line = {**result, **about}
                lines[cell_of(line)] = line
                with path.open('a') as file:
                    file.write(json.dumps(line) + '\n')
                progress.update()


def _about(options: argparse.Namespace, images: Images) -> dict[str, Any]:
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()
    return {
        'dataset': images.name, 'num_classes': images.num_classes, 'preset': options.preset, 'commit': commit,
        'hardware': hardware(options.device), 'versions': versions(),
    }


def report(options: argparse.Namespace) -> None:
    """Writes the tables and draws the figures of a preset."""
    preset = PRESETS[options.preset]
    found = {suite: read_lines(options.out / f'{suite}_{options.preset}.jsonl') for suite in SUITES}
    for suite, reporter in zip(SUITES, (paper_report, lifetime_report, precision_report, rules_report)):
        path = options.out / f'{suite}_{options.preset}.md'
        write(path, reporter.tables(found[suite], preset))
        folder = path.with_suffix('')
        folder.mkdir(exist_ok=True)
        print(path)
        figures = reporter.figures(found[suite], preset)
        if suite == 'lifetime':
            figures['headline'] = headline(found['reproduce'], found['lifetime'])
        for name, figure in figures.items():
            if figure:
                print(*save_figure(figure, folder / name), sep='\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    run_parser = commands.add_parser('run', help='train what is not yet there')
    run_parser.add_argument('experiment', choices=[*EXPERIMENTS, 'all'])
    run_parser.add_argument('--data', type=Path, help='folder of Tiny-ImageNet-200')
    run_parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    run_parser.add_argument('--seeds', type=int, help='seeds of table 3, of figures 5 and 6, and of lifetime')
    run_parser.add_argument('--jobs', type=int, help='trainings at a time')
    run_parser.add_argument('--threads', type=int, help='threads of each')
    run_parser.set_defaults(command=run)
    report_parser = commands.add_parser('report', help='write tables and figures from the lines that are there')
    report_parser.set_defaults(command=report)
    for command in (run_parser, report_parser):
        command.add_argument('--preset', choices=PRESETS, default='cpu')
        command.add_argument('--out', type=Path, default=RESULTS, help='folder of the results')
    options = parser.parse_args()
    if options.command is run:
        if PRESETS[options.preset].short.every and not options.data:
            parser.error(f'the preset {options.preset} needs --data, the folder of Tiny-ImageNet-200')
        options.jobs = options.jobs or (8 if options.device.startswith('cuda') else os.cpu_count() or 1)
        options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    options.command(options)


if __name__ == '__main__':
    main()
