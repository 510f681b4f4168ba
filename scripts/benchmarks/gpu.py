"""Optimizer steps, launches, CUDA graphs and training on a GPU, in one command of at most nine minutes.

What comes first matters most; what the time does not allow is left out, and the results name it. Bars: a step of at
most 1.25 times torch's fused SGD, training of at most 1.02 times resnet50 with it.
"""
import itertools
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from timm_aws import AwsAdam, AwsSGD

from .step import FAMILIES, check, make_params
from .train import BASE, OURS
from .turns import about, compare, save, show, take_turns

__all__ = ['gpu']

MODEL, IMG_SIZE = 'ws_resnet50', 224
SECONDS = 500  # in all; the rest of nine minutes is for what runs when they are over
SECONDS_OF_A_ROW, ROUNDS = 4, 21
SECONDS_TO_COMPILE = 120  # at most, for one row
LR, ALPHA = 1e-3, 2.5e-3
PRECISIONS = {'fp32': None, 'bf16 autocast': torch.bfloat16, 'fp16 autocast, GradScaler': torch.float16}
MODES = (  # batch size, precision, channels_last, model compiled
    *itertools.product((128, 32, 256), PRECISIONS, (True,), (False,)),
    *itertools.product((128,), ('bf16 autocast', 'fp16 autocast, GradScaler', 'fp32'), (True,), (True,)),
    *itertools.product((128,), PRECISIONS, (False,), (False,)),
    *itertools.product((32, 256), ('bf16 autocast',), (True,), (True,)),
)
Row = Callable[[], Any]


def gpu() -> None:
    """Checks, times, prints and writes bench_optimizers_gpu.json and bench_training_gpu.json.

    Raises:
        SystemExit: If there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SystemExit('python scripts/bench.py gpu needs a CUDA device, and torch finds none here.')
    end = time.perf_counter() + SECONDS
    optimizers: dict[str, Any] = {**about('gpu'), 'left_out': []}
    training: dict[str, Any] = {**about('gpu'), 'img_size': IMG_SIZE, 'modes': {}, 'left_out': []}
    _steps(optimizers)
    save('optimizers', optimizers)
    try:
        for mode in MODES:
            _train(*mode, training, end)
    finally:
        save('training', training)
    _compiled_steps(optimizers, end)
    save('optimizers', optimizers)


def _rounds(title: str, rows: dict[str, Row]) -> dict[str, list[float]]:
    """Takes as many turns as a few seconds a row allow, after a first that compiles what is to be compiled."""
    seconds_of_a_round = sum(times[0] for times in take_turns(title, rows, 1).values()) / 1000
    return take_turns(title, rows, max(3, min(ROUNDS, int(SECONDS_OF_A_ROW * len(rows) / seconds_of_a_round))))


def _steps(result: dict[str, Any]) -> None:
    """Steps of torch's optimizers and of ours, not compiled; launches of each; the same as CUDA graphs."""
    families = {family: {name: make for name, make in rows.items() if not name.endswith(('loop', 'compiled'))}
                for family, rows in FAMILIES.items()}
    base_of = {name: next(iter(rows)) for rows in families.values() for name in rows}
    makers = {name: make for rows in families.values() for name, make in rows.items()}
    result['errors'] = {name: check(make, MODEL) for name, make in makers.items() if name.startswith('Aws')}
    made = {name: make(make_params(MODEL)) for name, make in makers.items()}
    result['steps'] = compare(_rounds('steps', {name: one.step for name, one in made.items()}), base_of)
    show(f'One step over the parameters of {MODEL}', result['steps'])

    result['launches'] = {name: _launches(one.step) for name, one in made.items()}
    print('\nLaunches a step')
    for name, count in result['launches'].items():
        print(f'{count:6d}  {name}')
    result['waits_for_the_device'] = {name: _waits(one.step) for name, one in made.items()}

    rows, result['errors_of_graphs'] = {}, {}
    for name, make in _graphed().items():
        rows[name], result['errors_of_graphs'][name] = _graph(make)
    base_of = {name: f'torch {"AdamW" if "Adam" in name else "SGD"}, fused, CUDA graph' for name in rows}
    result['graphs'] = compare(_rounds('graphs', rows), base_of)
    show('One step as a CUDA graph', result['graphs'])


def _launches(step: Row) -> int:
    """Counts the kernels that a step launches."""
    with torch.profiler.profile() as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if 'LaunchKernel' in event.key)


def _waits(step: Row) -> bool:
    """Whether the host waits for the device in a step."""
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return False


def _graphed() -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    lr = torch.tensor(LR, device='cuda')
    shrink = {'alpha': ALPHA, 'normalization': 'ws'}
    sgd, adam = {'lr': lr, 'momentum': 0.9, 'fused': True}, {'lr': lr, 'fused': True, 'capturable': True}
    rows = {
        'torch SGD, fused': lambda params: torch.optim.SGD(params, **sgd),
        'AwsSGD, fused': lambda params: AwsSGD(params, **shrink, **sgd),
        'AwsSGD, fused, decoupled': lambda params: AwsSGD(params, **shrink, decoupled=True, **sgd),
        'AwsSGD, fused, Nesterov': lambda params: AwsSGD(params, **shrink, nesterov=True, **sgd),
        'torch AdamW, fused': lambda params: torch.optim.AdamW(params, **adam),
        'AwsAdam, fused': lambda params: AwsAdam(params, **shrink, **adam),
        'AwsAdam, fused, coupled': lambda params: AwsAdam(params, **shrink, decoupled=False, **adam),
    }
    return {f'{name}, CUDA graph': make for name, make in rows.items()}


def _graph(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> tuple[Row, float]:
    """Captures a step.

    Returns:
        What takes the step again, and the largest difference of a weight from steps without a graph, relative to the
        largest weight of its tensor.

    Raises:
        ValueError: If it is over 1e-6.
    """
    (params, optimizer), (eager_params, eager) = (
        (params, make(params)) for params in (make_params(MODEL), make_params(MODEL)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        eager.step()
    error = max(((one - other).abs().max() / other.abs().max()).item() for one, other in zip(params, eager_params))
    if error > 1e-6:
        raise ValueError(f'A {type(optimizer).__name__} replayed as a CUDA graph is {error:.1e} away from eager steps.')
    return graph.replay, error


def _train(
        batch_size: int,
        precision: str,
        channels_last: bool,
        compiled: bool,
        result: dict[str, Any],
        end: float,
) -> None:
    """Training steps in one mode, if the time and the memory allow it."""
    title = ', '.join((f'batch {batch_size}', precision, 'channels_last' if channels_last else 'contiguous',
                       'compiled' if compiled else 'eager'))
    makers = {
        name: (model, opt, compiled, False)
        for name, model, opt in ((BASE, 'resnet50', 'momentum'), (OURS, MODEL, 'aws_sgd'))
    }
    if batch_size == 128 and precision == 'bf16 autocast' and channels_last:
        makers.update({f'{name.removesuffix(" fused")}, step compiled': (*maker[:3], True)
                       for name, maker in makers.items()})
    compilations = sum(model_compiled + step_compiled for _, _, model_compiled, step_compiled in makers.values())
    if time.perf_counter() + compilations * SECONDS_TO_COMPILE / 2 + SECONDS_OF_A_ROW * len(makers) > end:
        result['left_out'].append(f'{title}: no time')
        return
    torch._dynamo.reset()
    try:
        rows = {name: _training_step(*maker, batch_size, precision, channels_last) for name, maker in makers.items()}
        times = _rounds(title, rows)
    except torch.cuda.OutOfMemoryError:
        result['left_out'].append(f'{title}: no memory')
        return
    result['modes'][title] = compare(times, dict.fromkeys(rows, BASE))
    show(title, result['modes'][title])


def _training_step(
        model_name: str,
        opt: str,
        model_compiled: bool,
        step_compiled: bool,
        batch_size: int,
        precision: str,
        channels_last: bool,
) -> Row:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model: Any = timm.create_model(model_name).to('cuda', memory_format=memory_format)
    fused = None if step_compiled else True  # compiled, the update is in the code generator's own kernels
    optimizer = create_optimizer_v2(model, opt, lr=0.1, weight_decay=1e-4, fused=fused)
    take_step = torch.compile(optimizer.step) if step_compiled else optimizer.step
    forward = torch.compile(model) if model_compiled else model
    images = torch.randn(batch_size, 3, IMG_SIZE, IMG_SIZE, device='cuda').to(memory_format=memory_format)
    labels = torch.arange(batch_size, device='cuda')
    dtype = PRECISIONS[precision]
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast('cuda', dtype, enabled=dtype is not None):
            loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            take_step()

    return step


def _compiled_steps(result: dict[str, Any], end: float) -> None:
    """Compiled steps beside torch's fused ones."""
    for family in FAMILIES.values():
        base = next(iter(family))
        for name, make in family.items():
            if not name.endswith('compiled'):
                continue
            if time.perf_counter() + SECONDS_TO_COMPILE / 2 > end:
                result['left_out'].append(f'{name}: no time')
                continue
            rows = {base: family[base](make_params(MODEL)).step, name: make(make_params(MODEL)).step}
            result['steps'][name] = compare(_rounds(name, rows), {base: base, name: base})[name]
            show(name, {name: result['steps'][name]})
