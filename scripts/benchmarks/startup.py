"""Start-up: importing the package, the command line's help, and loading the checkpoint that comes with it."""
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
from outputs import ROOT

import timm_aws  # noqa: F401  registers ws_resnet50_aws

from .turns import about, compare, save, show, take_turns

__all__ = ['startup']

ROUNDS = 9
WEIGHTS = ROOT / 'weights' / 'ws_resnet50.aws_tin200' / 'model.safetensors'
PYTHON, IMPORT_TIMM, HELP = 'python -c pass', 'import timm', 'timm-aws --help'
TORCH, OURS = 'build resnet50, copy the file in', 'load ws_resnet50_aws'


def startup() -> None:
    """Times, prints and writes; ratios are to `import timm`, and to what torch alone needs to load the file."""
    processes = {
        PYTHON: _process('-c', 'pass'),
        IMPORT_TIMM: _process('-c', 'import timm'),
        'import timm_aws': _process('-c', 'import timm_aws'),
        HELP: _process(str(Path(sys.executable).with_name('timm-aws')), '--help'),
    }
    loading = {TORCH: _copy_in, OURS: lambda: timm.create_model('ws_resnet50_aws', pretrained=True)}
    added = [_import_after_timm() for _ in range(ROUNDS)]
    rows = {
        **compare(take_turns('processes', processes, ROUNDS), dict.fromkeys(processes, IMPORT_TIMM)),
        **compare(take_turns('loading', loading, ROUNDS), dict.fromkeys(loading, TORCH)),
    }
    show('Start-up', rows)
    median = round(statistics.median(added), 1)
    print(f'import timm_aws, with timm imported: {median} ms')
    save('startup', {**about('startup'), 'rounds': ROUNDS, 'rows': rows, 'ms_after_timm': median})


def _import_after_timm() -> float:
    """Returns the milliseconds of an import in a process that has imported timm: far less than those of torch vary."""
    code = ('import time, timm; start = time.perf_counter(); import timm_aws; '
            'print(1000 * (time.perf_counter() - start))')
    return float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)


def _process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def _copy_in() -> None:
    model = timm.create_model('resnet50', num_classes=200)
    model.load_state_dict(safetensors.torch.load_file(WEIGHTS))
