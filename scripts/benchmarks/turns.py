"""Times several things in turn, so that a drift of the machine affects all of them alike."""
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from outputs import RESULTS, write
from provenance import hardware, versions
from tqdm import tqdm

__all__ = ['about', 'compare', 'save', 'show', 'take_turns']

WARM_UP = 3


def take_turns(title: str, rows: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Calls each row once in each round.

    Args:
        title: Text of the progress bar.
        rows: Name to the function to time.
        rounds: Rounds that count. Three more come first, to warm up.

    Returns:
        Name to milliseconds, one value for each round.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    gc.collect()
    for index in tqdm(range(WARM_UP + rounds), desc=title, unit='round', leave=False, disable=None):
        for name, call in rows.items():
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
    """Returns median, minimum and maximum, and the median ratio to a base in the same round.

    Args:
        times: Name to milliseconds, one value for each round.
        base_of: Name to the name of its base.

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
    """Returns the origin that every result records: command, versions, hardware."""
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
    write(path, json.dumps(result, indent=2) + '\n')
    print(f'\n{path}')
