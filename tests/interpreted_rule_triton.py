"""The Triton kernel against the slow reference; test_rule_triton.py runs this in Triton's interpreter, on the CPU."""
import copy
import pickle
from collections import Counter

import pytest
import reference
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from timm_aws import AwsAdam, AwsSGD, optimizers, rule_triton
from timm_aws.rule import NORMALIZATIONS
from timm_aws.rule_triton import GroupShrink

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
READINGS = ('added', 'multiplied', 'multiplied, lr in a tensor')
ALPHA, LR = 0.5, 0.1
SETTINGS = {
    'sgd': (AwsSGD, {}),
    'momentum': (AwsSGD, {'momentum': 0.9}),
    'dampening': (AwsSGD, {'momentum': 0.9, 'dampening': 0.3}),
    'nesterov': (AwsSGD, {'momentum': 0.9, 'nesterov': True}),
    'adam': (AwsAdam, {}),
    'amsgrad': (AwsAdam, {'amsgrad': True, 'betas': (0.9, 0.9)}),
}
KERNEL = rule_triton._shrink_filter


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Has optimizers use the kernel on the CPU; the grid of each launch."""
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return KERNEL[grid]

    monkeypatch.setattr(rule_triton, '_shrink_filter', Recorded())
    monkeypatch.setattr(optimizers, 'has_kernel', lambda device: True)
    return grids


def random(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.2 + 0.1
    return values.to(dtype).contiguous(memory_format=memory_format if len(shape) == 4 else torch.contiguous_format)


def assert_shrinks(weights, reading, normalization):
    """Takes one launch over weights, and compares with float64."""
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    targets = [random(weight.shape, seed=1).to(weight) for weight in weights]
    targets = [torch.empty_like(weight).copy_(target) for weight, target in zip(weights, targets)]
    starts = [target.clone() for target in targets]
    with torch.no_grad():
        if reading == 'added':
            GroupShrink()(params, targets, normalization, ALPHA)
        else:
            lr = torch.tensor(LR, dtype=torch.float64) if 'tensor' in reading else LR
            GroupShrink()(params, params, normalization, ALPHA, lr)
    for weight, param, target, start in zip(weights, params, targets, starts):
        rows = weight.double().reshape(len(weight), -1)
        gamma = torch.tensor([[ALPHA * reference.filter_length(row.tolist(), normalization)] for row in rows])
        if reading == 'added':
            assert torch.equal(param, weight)
            actual, expected = target, start.double() + (gamma * rows).view(weight.shape)
        else:
            actual, expected = param, ((1 - LR * gamma).clamp(min=0) * rows).view(weight.shape)
            assert torch.equal(target, start)
        assert actual.stride() == weight.stride()
        error = (actual.double() - expected).abs()
        # One rounding to the type of the weight (the interpreter cuts to bfloat16), and those of float32 before it.
        rounding = torch.finfo(weight.dtype).eps * (1 if weight.dtype == torch.bfloat16 else 0.5)
        assert (error <= (rounding + 1e-6) * expected.abs() + 1e-7).all()


@pytest.mark.parametrize('reading', READINGS)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(
    st.tuples(st.integers(1, 3), st.integers(2, 5), *[st.integers(1, 4)] * 2)
    | st.tuples(st.integers(1, 2), st.integers(2, 3000)),
    min_size=1, max_size=3))
def test_weights_of_any_shapes_shrink_as_in_float64(normalization, dtype, memory_format, reading, shapes):
    assert_shrinks([random(shape, dtype, FORMATS[memory_format]) for shape in shapes], reading, normalization)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('normalization', ['ws', 'wn'])
def test_filters_of_2_to_100000_elements_shrink_in_one_launch(normalization, dtype, launches):
    sizes = 2, rule_triton.BLOCK - 1, rule_triton.BLOCK, rule_triton.BLOCK + 1, 100_000
    assert_shrinks([random((1, size), dtype) * 0.02 for size in sizes], 'added', normalization)
    assert launches == [(len(sizes),)]


@pytest.mark.parametrize('size', [2, 9, 4608, 100_000])
@pytest.mark.parametrize('normalization', NORMALIZATIONS)
def test_a_filter_with_a_mean_of_1000_deviations_comes_out_right(normalization, size):
    weight = torch.randn(1, size, generator=torch.Generator().manual_seed(0)) + 1000
    gradient = torch.zeros_like(weight)
    GroupShrink()([weight], [gradient], normalization, 1.)
    length = reference.filter_length(weight[0].tolist(), normalization)
    torch.testing.assert_close(gradient.double(), weight.double() * length, rtol=1e-4, atol=0)


def test_a_shrink_stops_at_0_and_hides_no_nan():
    weight = torch.tensor([[1., 3.], [1., torch.nan], [1e30, 3e30]])
    GroupShrink()([weight], [weight], 'ws', 1e6, 1.)
    assert weight[0].tolist() == weight[2].tolist() == [0., 0.]
    assert weight[1].isnan().all()


def steps(cls, weights, grads, lr=LR, **options):
    """Takes a step for each gradient of each weight; returns the weights."""
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = cls(params, lr, **{'alpha': ALPHA, 'normalization': 'ws', 'fused': True, **options})
    for index in range(len(grads[0])):
        for param, own in zip(params, grads):
            param.grad = own[index].clone()
        optimizer.step()
        assert all(torch.equal(param.grad, own[index]) for param, own in zip(params, grads))
    return [param.detach() for param in params]


@pytest.mark.parametrize('maximize', [False, True])
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@pytest.mark.parametrize('setting', SETTINGS)
def test_steps_equal_reference(setting, normalization, decoupled, maximize, launches):
    """A contiguous weight, and one in channels_last, which has gradients in either format."""
    cls, options = SETTINGS[setting]
    weights = [random((1, 3, 3, 2)), random((2, 3, 2, 2), memory_format=torch.channels_last)]
    grads = [[random(weight.shape, memory_format=memory_format, seed=seed)
              for seed, memory_format in enumerate((*FORMATS.values(), torch.channels_last), 1)] for weight in weights]
    rule = {'normalization': normalization, 'decoupled': decoupled, 'maximize': maximize, **options}
    lr = torch.tensor(LR) if maximize else LR
    for weight, own, actual in zip(weights, grads, steps(cls, weights, grads, lr, **rule)):
        expected = (reference.sgd if cls is AwsSGD else reference.adam)(weight, own, [LR] * 3, alpha=ALPHA, **rule)
        assert (actual.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert actual.stride() == weight.stride()
    assert launches == [(3,)] * 3


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('setting', SETTINGS)
def test_types_and_formats_that_the_kernel_does_not_take_join_in(setting, decoupled, monkeypatch, launches):
    """float64, and filters that lie between each other in memory, beside types that each have a launch."""
    cls, options = SETTINGS[setting]
    weights = [random((3, 4)), random((2, 6)).bfloat16(), random((3, 4)).double(), random((4, 3)).t(), random((5,))]
    grads = [[random(w.shape, seed=seed).to(w.dtype) for seed in (1, 2)] for w in weights]
    actual = steps(cls, weights, grads, decoupled=decoupled, **options)
    assert launches == [(3,), (2,)] * 2
    monkeypatch.setattr(optimizers, 'has_kernel', lambda device: False)
    for one, other in zip(actual, steps(cls, weights, grads, decoupled=decoupled, **options)):
        # In bfloat16 the interpreter and the loop round each step in their own way.
        tolerance = 4 * torch.finfo(one.dtype).eps if one.dtype == torch.bfloat16 else 1e-6
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize('nesterov', [False, True])
def test_a_weight_whose_first_gradient_comes_later(nesterov):
    early, late = (torch.nn.Parameter(torch.tensor([[1., 1., 3., 3.]])) for _ in range(2))
    optimizer = AwsSGD(
        [early, late], lr=0.1, momentum=0.9, nesterov=nesterov, alpha=0.5, normalization='ws', fused=True)
    early.grad = torch.ones(1, 4)
    optimizer.step()
    late.grad = torch.ones(1, 4)
    optimizer.step()
    assert torch.equal(late, steps(AwsSGD, [torch.tensor([[1., 1., 3., 3.]])], [[torch.ones(1, 4)]], momentum=0.9,
                                   nesterov=nesterov)[0])


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('setting', SETTINGS)
def test_tensors_that_move_and_copies_of_an_optimizer_go_on_exactly(setting, decoupled):
    cls, options = SETTINGS[setting]
    grads = [random((2, 6), seed=seed) for seed in range(1, 5)]
    (expected,) = steps(cls, [random((2, 6))], [grads], decoupled=decoupled, **options)
    param = torch.nn.Parameter(random((2, 6)))
    optimizer = cls([param], LR, alpha=ALPHA, normalization='ws', fused=True, decoupled=decoupled, **options)
    changes = (
        lambda optimizer: optimizer,
        copy.deepcopy,
        lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
        lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())) or optimizer,
    )
    for grad, change in zip(grads, changes):
        optimizer = change(optimizer)
        param = optimizer.param_groups[0]['params'][0]
        param.data = param.data.clone()
        param.grad = grad
        optimizer.step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('setting', SETTINGS)
def test_the_table_is_made_once(setting, decoupled, monkeypatch):
    made = []
    table = rule_triton._table
    monkeypatch.setattr(rule_triton, '_table', lambda *args: made.append(None) or table(*args))
    cls, options = SETTINGS[setting]
    steps(cls, [random((1, 3)), random((1, 4))], [[random((1, 3))] * 4, [random((1, 4))] * 4],
          decoupled=decoupled, **options)
    # Through a momentum buffer twice, as the first step has none yet.
    assert len(made) == (2 if setting in ('momentum', 'dampening') and not decoupled else 1)


class Counting(TorchDispatchMode):
    """Counts the operations that torch dispatches."""
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_third_step(optimizer):
    for _ in range(2):
        optimizer.step()
    with Counting() as counting:
        optimizer.step()
    return counting.calls


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('setting', SETTINGS)
def test_a_step_over_resnet50_dispatches_at_most_ten_operations_more_than_torch(setting, decoupled, monkeypatch):
    cls, options = SETTINGS[setting]
    grids = []

    class NotRun:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(rule_triton, '_shrink_filter', NotRun())
    with torch.device('meta'):
        model = timm.create_model('ws_resnet50')
    params = [torch.nn.Parameter(torch.zeros(p.shape)) for p in model.parameters()]
    for param in params:
        param.grad = torch.zeros_like(param)
    convolutions = [p for p in params if p.ndim == 4]
    rest = [p for p in params if p.ndim != 4]
    groups = [{'params': convolutions, 'normalization': 'ws'}, {'params': rest, 'alpha': 0., 'normalization': None}]
    base = torch.optim.SGD if cls is AwsSGD else torch.optim.Adam
    theirs = count_third_step(base(params, LR, fused=True, **options))
    ours = count_third_step(cls(groups, LR, decoupled=decoupled, fused=True, **options))
    assert grids == [(sum(map(len, convolutions)),)] * 3
    assert ours.total() + 1 <= theirs.total() + 10, ours - theirs
