"""Takes the times of several things in turn, so that a drift of the machine meets them all alike."""
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import hardware, versions
from tqdm import tqdm

__all__ = ['about', 'compare', 'save', 'show', 'take_turns']

RESULTS = Path(__file__).parent.parent / 'results'
WARM_UP = 3


def take_turns(
        title: str,
        rows: dict[str, Callable[[], Any]],
        rounds: int,
        before: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Calls each row once a round.

    Args:
        title: What is measured, for the progress bar.
        rows: Name to what is called.
        rounds: Rounds that count; three more come before them.
        before: Name of a row to what is called before it, outside of the time.

    Returns:
        Name to milliseconds, one a round.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    gc.collect()
    for index in tqdm(range(WARM_UP + rounds), desc=title, unit='round', leave=False, disable=None):
        for name, call in rows.items():
            if before and name in before:
                before[name]()
            _wait_for_device()
            start = time.perf_counter()
            call()
            _wait_for_device()
            if index >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(times: dict[str, list[float]], base_of: dict[str, str]) -> dict[str, dict[str, float]]:
    """Returns medians with the lowest and the highest, and the median of the ratios to a base in the same round.

    Args:
        times: Name to milliseconds, one a round.
        base_of: Name to the name of what it is compared with.

    Returns:
        Name to ms, min, max and ratio.
    """
    return {
        name: {
            'ms': round(statistics.median(own), 2), 'min': round(min(own), 2), 'max': round(max(own), 2),
            'ratio': round(statistics.median(a / b for a, b in zip(own, times[base_of[name]])), 3),
        } for name, own in times.items()
    }


def about(command: str) -> dict[str, Any]:
    """Returns what every result tells of its origin."""
    return {
        'command': f'python scripts/bench.py {command}',
        'versions': versions(),
        'hardware': hardware('cuda' if torch.cuda.is_available() else 'cpu'),
    }


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints a table."""
    width = max(map(len, rows))
    print(f'\n{title}\n{"":{width}s}        ms      lowest     highest   ratio')
    for name, row in rows.items():
        print(f'{name:{width}s} {row["ms"]:9.2f} {row["min"]:11.2f} {row["max"]:11.2f} {row["ratio"]:7.2f}')


def save(name: str, result: dict[str, Any]) -> None:
    """Writes scripts/results/bench_<name>.json, on a GPU bench_<name>_gpu.json."""
    path = RESULTS / f'bench_{name}{"_gpu" if torch.cuda.is_available() else ""}.json'
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + '\n')
    print(f'\n{path}')
