"""Checks that memory, compile cache and time per step do not grow over many optimizer steps in one process.

    python scripts/soak.py [--steps 20000]

Steps over the parameters of ws_resnet18 with fixed gradients and a new learning rate in each step. The state after the
first thousand steps is the base. After them, three limits hold: no step compiles anything, resident memory stays within
1 % of the base, and the median time of a step grows by less than 10 % from the first quarter of the rest to the last.
Every tenth step is followed by a step of torch's own optimizer over parameters of its own. The growth of time is that
of the ratio of the two, because the speed of a machine drifts over minutes. The compiled row takes a tenth of the
steps; its backend is `eager`, because only Dynamo's recompilations count. Each row has its own process, because memory
that one row leaves would count in the next.

Prints a line for each row, writes scripts/results/soak.json, and ends in an error if something grew. Linux only.
"""
import argparse
import ctypes
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.step import Params, make_params
from outputs import RESULTS, write
from provenance import hardware, versions
from torch._dynamo.utils import counters
from tqdm import tqdm

from timm_aws import AwsAdam, AwsSGD

LR = 1e-3
SETTLE = 1000
MAX_MEMORY, MAX_TIME = 1.01, 1.1


@dataclass(frozen=True)
class Row:
    """What is stepped: makes the optimizer and torch's own, compiled or not, for one in so many of the steps."""
    make: Callable[[Params], torch.optim.Optimizer]
    make_peer: Callable[[Params], torch.optim.Optimizer]
    compiled: bool = False
    one_in: int = 1


ROWS = {
    'AwsSGD, fused': Row(
        lambda p: AwsSGD(p, LR, momentum=0.9, fused=True), lambda p: torch.optim.SGD(p, LR, momentum=0.9, fused=True)),
    'AwsAdam, fused': Row(lambda p: AwsAdam(p, LR, fused=True), lambda p: torch.optim.Adam(p, LR, fused=True)),
    # A learning rate that is a float would compile again when it changes.
    'AwsSGD, compiled': Row(
        lambda p: AwsSGD(p, torch.tensor(LR), momentum=0.9), lambda p: torch.optim.SGD(p, LR, momentum=0.9),
        compiled=True, one_in=10),
}


def memory() -> int:
    """Returns the resident memory of this process in bytes, less the freed blocks that the allocator holds on to."""
    ctypes.CDLL(None).malloc_trim(0)  # they come and go, tens of MiB from one step to the next
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def graphs() -> int:
    """Returns how many graphs were compiled in this process."""
    return counters['stats']['unique_graphs']


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group['lr'], torch.Tensor):
            group['lr'].fill_(lr)
        else:
            group['lr'] = lr


def soak(name: str, steps: int) -> dict:
    """Takes the steps of one row; returns what was measured."""
    row = ROWS[name]
    params = make_params('ws_resnet18')
    optimizer = row.make(params)
    step = torch.compile(optimizer.step, backend='eager') if row.compiled else optimizer.step
    peer = row.make_peer(make_params('ws_resnet18'))
    settle = min(SETTLE, steps // 3)
    times, peer_times, memories, base_graphs = [], [], [], 0
    for index in tqdm(range(steps), desc=name, unit='step', leave=False, disable=None):
        set_lr(optimizer, LR * (1 + math.cos(math.pi * index / steps)) / 2)
        duration = timed(step)
        if index == settle:
            base_graphs = graphs()
        if index >= settle:
            times.append(duration)
        if index % 10 == 0:
            peer_duration = timed(peer.step)
            if index >= settle:
                peer_times.append(peer_duration)
                memories.append(memory())
    if row.compiled and not base_graphs:
        raise ValueError(f'{name} compiled nothing.')
    if not all(param.isfinite().all() for param in params):
        raise ValueError(f'{name} has weights that are not finite after {steps} steps.')
    first, last = quarters(times)
    peer_first, peer_last = quarters(peer_times)
    return {
        'steps': steps, 'settled_after': settle,
        'mib_settled': round(memories[0] / 2**20, 1), 'mib_highest': round(max(memories) / 2**20, 1),
        'memory_ratio': round(max(memories) / memories[0], 4),
        'ms_first_quarter': round(first, 3), 'ms_last_quarter': round(last, 3),
        'ms_of_torch_first_quarter': round(peer_first, 3), 'ms_of_torch_last_quarter': round(peer_last, 3),
        'time_ratio': round(last / first * peer_first / peer_last, 3),
        'graphs': base_graphs, 'new_graphs': graphs() - base_graphs,
    }


def timed(step: Callable[[], object]) -> float:
    """Returns the milliseconds of a step."""
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def quarters(times: list[float]) -> tuple[float, float]:
    """Returns the medians of the first quarter and of the last."""
    quarter = len(times) // 4
    return statistics.median(times[:quarter]), statistics.median(times[-quarter:])


def problems(rows: dict[str, dict]) -> list[str]:
    """Says which rows grew."""
    bars: list[tuple[str, Callable[[dict], bool]]] = [
        ('memory', lambda row: row['memory_ratio'] < MAX_MEMORY),
        ('the compile cache', lambda row: row['new_graphs'] == 0),
        ('the time of a step', lambda row: row['time_ratio'] < MAX_TIME),
    ]
    return [f'{what} grew under {name}: {row}' for name, row in rows.items() for what, fine in bars if not fine(row)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=20_000, help='how many (default: 20000)')
    steps = parser.parse_args().steps
    if steps < 1000:
        parser.error('--steps must be 1000 or more: the compiled row takes a tenth, torch its tenth of that')
    rows = {}
    for name, row in ROWS.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
            rows[name] = measured = process.submit(soak, name, steps // row.one_in).result()
        print(f'{name:18s} {measured["steps"]:6d} steps  {measured["mib_settled"]:8.1f} to '
              f'{measured["mib_highest"]:.1f} MiB  '
              f'{measured["ms_first_quarter"]:.2f} to {measured["ms_last_quarter"]:.2f} ms a step  '
              f'{measured["new_graphs"]} new graphs')
    result = {
        'command': f'python scripts/soak.py --steps {steps}', 'model': 'ws_resnet18', 'rows': rows,
        'threads': torch.get_num_threads(),
        'versions': versions(), 'hardware': hardware('cpu'),
    }
    write(RESULTS / 'soak.json', json.dumps(result, indent=2) + '\n')
    if found := problems(rows):
        raise ValueError('; '.join(found))


if __name__ == '__main__':
    main()
