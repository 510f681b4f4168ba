"""AwsSGD and AwsAdam, against the slow reference and against torch."""
import copy
import functools
import io
import itertools
import math
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import reference
import timm.optim
import torch
from torch._dynamo.utils import counters

from timm_aws import AwsAdam, AwsSGD, WSConv2d, optimizers, rule
from timm_aws.wrap_optimizer import aws_optimizer

STEPS = 20
SHAPE = (3, 2, 3, 2)
LRS = [0.1 * (1 + math.cos(math.pi * step / STEPS)) / 2 + 0.01 for step in range(STEPS)]
SGD_SETTINGS = {
    'plain': {},
    'momentum': {'momentum': 0.9},
    'dampening': {'momentum': 0.9, 'dampening': 0.3},
    'nesterov': {'momentum': 0.9, 'nesterov': True},
}
ADAM_SETTINGS = {
    'default': {},
    'betas': {'betas': (0.8, 0.95), 'eps': 1e-6},
    'amsgrad': {'amsgrad': True, 'betas': (0.9, 0.9)},
}
PATHS = {'loop': {'foreach': False}, 'foreach': {'foreach': True}, 'fused': {'fused': True}}
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


@functools.cache
def _problem():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * 0.2
    grads = tuple(torch.randn(SHAPE, generator=generator) * 0.3 for _ in range(STEPS))
    return weight, grads


@functools.cache
def _expected(rule, setting, normalization, decoupled, maximize):
    weight, grads = _problem()
    options = {**(SGD_SETTINGS if rule == 'sgd' else ADAM_SETTINGS)[setting]}
    return getattr(reference, rule)(
        weight, grads, LRS, alpha=0.5, normalization=normalization, decoupled=decoupled, maximize=maximize, **options)


def _run(optimizer, weight, grads, lrs=LRS):
    for grad, lr in zip(grads, lrs):
        for group in optimizer.param_groups:
            if torch.is_tensor(group['lr']):
                group['lr'].fill_(lr)
            else:
                group['lr'] = lr
        weight.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return weight.detach()


def _assert_equals_reference(cls, rule, setting, normalization, decoupled, maximize, path, memory_format, lr=0.1):
    weight, grads = _problem()
    weight = torch.nn.Parameter(weight.clone().to(memory_format=memory_format))
    options = (SGD_SETTINGS if rule == 'sgd' else ADAM_SETTINGS)[setting]
    optimizer = cls(
        [weight], lr, alpha=0.5, normalization=normalization, decoupled=decoupled, maximize=maximize,
        **options, **path)
    actual = _run(optimizer, weight, [grad.to(memory_format=memory_format) for grad in grads])
    expected = _expected(rule, setting, normalization, decoupled, maximize)
    assert (actual.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('maximize', [False, True])
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
@pytest.mark.parametrize('setting', SGD_SETTINGS)
def test_sgd_equals_reference(setting, normalization, decoupled, maximize, memory_format, path):
    _assert_equals_reference(
        AwsSGD, 'sgd', setting, normalization, decoupled, maximize, PATHS[path], FORMATS[memory_format])


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('maximize', [False, True])
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
@pytest.mark.parametrize('setting', ADAM_SETTINGS)
def test_adam_equals_reference(setting, normalization, decoupled, maximize, memory_format, path):
    _assert_equals_reference(
        AwsAdam, 'adam', setting, normalization, decoupled, maximize, PATHS[path], FORMATS[memory_format])


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_a_gradient_that_differs_in_the_stride_of_one_element_is_taken_as_it_is(cls):
    """As those of 1 x 1 convolutions do under channels_last."""
    weight = torch.randn(4, 8, 1, 1).to(memory_format=torch.channels_last)
    grad = torch.randn(4, 8).as_strided((4, 8, 1, 1), (8, 1, 1, 1))
    assert grad.stride() != weight.stride()
    fused, loop = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    fused.grad, loop.grad = grad, grad
    optimizer = cls([fused], lr=0.1, alpha=0.5, fused=True)
    (state,), shrinks = next(iter(optimizer._parts(optimizer.param_groups[0])))
    assert state.grad is grad
    assert shrinks
    optimizer.step()
    cls([loop], lr=0.1, alpha=0.5, foreach=False).step()
    torch.testing.assert_close(fused, loop)


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
@pytest.mark.parametrize('shape', [(0, 3), (4, 0), (0, 0)])
def test_weights_without_elements_do_not_keep_others_from_their_step(shape, normalization):
    """Of one element each, without a gradient: 'wn' shrinks by 1 - 0.1 * 0.5 * 2, the others have length 0."""
    for path in PATHS.values():
        empty, full = torch.nn.Parameter(torch.empty(shape)), torch.nn.Parameter(torch.tensor([[2.]]))
        empty.grad, full.grad = torch.empty(shape), torch.zeros(1, 1)
        AwsSGD([empty, full], lr=0.1, alpha=0.5, normalization=normalization, **path).step()
        assert empty.shape == shape
        assert full.item() == pytest.approx(2 * 0.9 if normalization == 'wn' else 2)


@pytest.mark.parametrize('path', ['loop', 'fused'])
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_tensor_lr_equals_reference(cls, decoupled, path):
    rule, setting = ('sgd', 'momentum') if cls is AwsSGD else ('adam', 'default')
    _assert_equals_reference(
        cls, rule, setting, 'ws', decoupled, False, PATHS[path], torch.contiguous_format, lr=torch.tensor(0.1))


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_gradient_and_state_of_another_memory_format(cls, path):
    """torch's fused kernels walk storage in order and are wrong here when they are not told."""
    weight, grads = _problem()
    options = {'momentum': 0.9} if cls is AwsSGD else {}
    contiguous, channels_last = (
        torch.nn.Parameter(weight.clone().to(memory_format=memory_format)) for memory_format in FORMATS.values())
    bias = torch.nn.Parameter(torch.zeros(1))
    first = cls([contiguous, bias], 0.1, alpha=0.5, **options, **PATHS[path])
    second = cls([channels_last, bias], 0.1, alpha=0.5, **options, **PATHS[path])
    _run(first, contiguous, grads[:5])
    _run(second, channels_last, grads[:5])  # contiguous gradients
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # contiguous state
    _run(first, contiguous, grads[5:])
    _run(second, channels_last, grads[5:])
    torch.testing.assert_close(channels_last.detach(), contiguous.detach(), rtol=1e-6, atol=1e-7)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('decoupled', [False, True])
def test_hand_computed_step(decoupled):
    """Eq. 21 for one filter of 2 by 2: mean 2, std 1, so gamma = 0.5 and the factor is 1 - 0.1 * 0.5 = 0.95.

        0.95 * 1 - 0.1 * 1 = 0.85    0.95 * 1 - 0 = 0.95    0.95 * 3 - 0 = 2.85    0.95 * 3 + 0.1 * 1 = 2.95
    """
    weight = torch.nn.Parameter(torch.tensor([[[[1., 1.], [3., 3.]]]], dtype=torch.float64))
    weight.grad = torch.tensor([[[[1., 0.], [0., -1.]]]], dtype=torch.float64)
    AwsSGD([weight], lr=0.1, alpha=0.5, decoupled=decoupled).step()
    torch.testing.assert_close(weight.flatten().tolist(), [0.85, 0.95, 2.85, 2.95], rtol=1e-15, atol=0)


def test_decoupled_shrink_never_flips_a_filter():
    weight = torch.nn.Parameter(torch.tensor([[1., 1., 3., 3.]]))
    weight.grad = torch.zeros_like(weight)
    AwsSGD([weight], lr=1., alpha=1e6, decoupled=True).step()
    assert weight.tolist() == [[0., 0., 0., 0.]]


def _twins():
    torch.manual_seed(1)
    params = [torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(5, 4)]
    params[0] = params[0].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(p.clone()) for p in params], [torch.nn.Parameter(p.clone()) for p in params]


def _step_both(ours, theirs, first, second, steps=10):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator).contiguous(
                memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('maximize', [False, True])
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('setting', SGD_SETTINGS)
def test_alpha_zero_is_torch_sgd_bit_for_bit(setting, decoupled, maximize, path):
    ours, theirs = _twins()
    options = {**SGD_SETTINGS[setting], 'lr': 0.1, 'weight_decay': 1e-2, 'maximize': maximize, **PATHS[path]}
    _step_both(ours, theirs, AwsSGD(ours, alpha=0, decoupled=decoupled, **options), torch.optim.SGD(theirs, **options))


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('maximize', [False, True])
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('setting', ADAM_SETTINGS)
def test_alpha_zero_is_torch_adam_or_adamw_bit_for_bit(setting, decoupled, maximize, path):
    ours, theirs = _twins()
    options = {**ADAM_SETTINGS[setting], 'lr': 0.1, 'weight_decay': 1e-2, 'maximize': maximize, **PATHS[path]}
    twin = torch.optim.AdamW if decoupled else torch.optim.Adam
    _step_both(ours, theirs, AwsAdam(ours, alpha=0, decoupled=decoupled, **options), twin(theirs, **options))


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_bare_list_shrinks_two_dimensions_and_more_and_decays_fewer(cls):
    weight, bias = (torch.nn.Parameter(p) for p in (torch.tensor([[1., 1., 3., 3.]]), torch.tensor([2., 4.])))
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    cls([weight, bias], lr=0.1, alpha=0.5, weight_decay=0.25, decoupled=cls is AwsAdam).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95, 0.95, 2.85, 2.85]]))  # std 1: 1 - 0.1 * 0.5
    decayed = [2 * (1 - 0.1 * 0.25), 4 * (1 - 0.1 * 0.25)]
    torch.testing.assert_close(bias.tolist(), decayed, rtol=1e-6, atol=0)


def test_groups_are_independent():
    first, second = (torch.nn.Parameter(torch.tensor([[3., 4.]], dtype=torch.float64)) for _ in range(2))
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    AwsSGD([
        {'params': [first], 'normalization': 'wn', 'alpha': 0.1},  # length 5, gamma 0.5
        {'params': [second], 'alpha': 0, 'weight_decay': 0.2},
    ], lr=0.1).step()
    torch.testing.assert_close(first.flatten().tolist(), [3 * 0.95, 4 * 0.95])
    torch.testing.assert_close(second.flatten().tolist(), [3 * 0.98, 4 * 0.98])


BAD = [
    ({'lr': -1.}, ValueError, 'lr|learning rate'),
    ({'lr': math.nan}, ValueError, 'lr|learning rate'),
    ({'lr': math.inf}, ValueError, 'lr'),
    ({'alpha': -1.}, ValueError, 'alpha'),
    ({'alpha': math.nan}, ValueError, 'alpha'),
    ({'alpha': math.inf}, ValueError, 'alpha'),
    ({'alpha': '1'}, TypeError, 'alpha'),
    ({'alpha': None}, TypeError, 'alpha'),
    ({'weight_decay': -1.}, ValueError, 'weight_decay'),
    ({'weight_decay': math.inf}, ValueError, 'weight_decay'),
    ({'normalization': 'bn'}, ValueError, "'bn'.*'ws', 'wn', 'cwn'"),
    ({'normalization': None}, ValueError, 'normalization=None'),
    ({'epsilon': 1.}, TypeError, 'epsilon'),
]


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam, aws_optimizer(timm.optim.Lion)])
@pytest.mark.parametrize(('options', 'error', 'message'), BAD)
def test_bad_options_raise(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([torch.nn.Parameter(torch.ones(2, 2))], **{'lr': 0.1, **options})


@pytest.mark.parametrize('options', [
    {'momentum': math.nan}, {'momentum': -1.}, {'dampening': -1.}, {'dampening': math.inf}, {'nesterov': True}])
def test_bad_sgd_options_raise(options):
    with pytest.raises(ValueError, match=next(iter(options)).replace('nesterov', 'Nesterov')):
        AwsSGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **options)


@pytest.mark.parametrize('options', [{'betas': (1., 0.9)}, {'betas': (0.9, math.nan)}, {'eps': -1.}, {'eps': math.nan}])
def test_bad_adam_options_raise(options):
    with pytest.raises(ValueError, match=r'beta|eps'):
        AwsAdam([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **options)


@pytest.mark.parametrize('group', [
    {'alpha': -1.}, {'lr': math.nan}, {'normalization': 'x'}, {'weight_decay': -1.}, {'betas': (2., 0.)}])
def test_bad_group_options_raise(group):
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match=next(iter(group))):
        AwsAdam([{'params': [params[0]], **group}])
    optimizer = AwsAdam([params[0]])
    with pytest.raises(ValueError, match=next(iter(group))):
        optimizer.add_param_group({'params': [params[1]], **group})
    assert len(optimizer.param_groups) == 1


def test_added_group_gets_the_defaults():
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = copy.deepcopy(AwsSGD([params[0]], lr=0.1, alpha=0.3, normalization='cwn'))
    optimizer.add_param_group({'params': [params[1]]})
    group = optimizer.param_groups[1]
    assert (group['alpha'], group['normalization'], group['decoupled']) == (0.3, 'cwn', False)


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam, aws_optimizer(timm.optim.Lion)])
def test_sparse_and_complex_are_refused_before_anything_changes(cls):
    dense, embedding = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    dense.grad = torch.ones(3, 2)
    embedding.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2))
    optimizer = cls([dense, embedding], lr=0.1)
    with pytest.raises(TypeError, match=r'sparse gradients.*\(3, 2\)'):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3, 2))
    with pytest.raises(TypeError, match='Complex'):
        cls([torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], lr=0.1)


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_step_touches_no_gradient_keeps_no_graph_and_enables_grad_in_the_closure(cls, decoupled):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = cls([weight], lr=0.1, alpha=0.5, decoupled=decoupled)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    expected = 2 * weight.detach()
    value = weight.detach().square().sum()
    with torch.no_grad():
        assert optimizer.step(closure).item() == value.item()
    assert torch.equal(weight.grad, expected)
    assert weight.is_leaf
    assert weight.grad_fn is None
    for state in optimizer.state[weight].values():
        assert state is None or not state.requires_grad


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('nesterov', [False, True])
def test_no_path_touches_a_gradient(nesterov, decoupled, path):
    """torch's multi-tensor Nesterov update does."""
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))]
    grads = [torch.randn_like(p) for p in params]
    optimizer = AwsSGD(params, lr=0.1, momentum=0.9, nesterov=nesterov, decoupled=decoupled, **PATHS[path])
    for _ in range(2):
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        optimizer.step()
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads))


def test_parameters_without_gradient_are_left_alone():
    frozen, trained = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    for cls, path in itertools.product((AwsSGD, AwsAdam), PATHS.values()):
        trained.grad = torch.ones(2, 2)
        cls([frozen, trained], lr=0.1, alpha=1., **path).step()
        assert torch.equal(frozen, torch.ones(2, 2))


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('setting', SGD_SETTINGS)
def test_many_small_and_large_weights_in_one_group_equal_float64(setting, path):
    """Batches of small tensors, tensors over the size of a batch, and one whose mean is thirty times its deviation."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 5, generator=generator) * 0.1 for _ in range(5)]
    weights += [torch.randn(3, 2 ** 19, generator=generator) * 0.1, weights[0] + 3]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = AwsSGD(params, lr=0.1, alpha=0.5, **SGD_SETTINGS[setting], **PATHS[path])
    grads = [[torch.randn(w.shape, generator=generator) * 0.1 for _ in range(2)] for w in weights]
    for step in range(2):
        for param, grad in zip(params, grads):
            param.grad = grad[step].clone()
        optimizer.step()
    for weight, grad, param in zip(weights, grads, params):
        expected = _double_steps(weight, grad, SGD_SETTINGS[setting])
        assert (param.detach().double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def _double_steps(weight, grads, setting):
    """Coupled steps in float64; the loops of reference.py would take minutes over a million elements."""
    momentum, dampening = setting.get('momentum', 0.), setting.get('dampening', 0.)
    weight, buffer = weight.double(), None
    for grad in grads:
        grad = grad.double() + 0.5 * weight.std(dim=1, correction=0, keepdim=True) * weight
        buffer = grad if buffer is None else momentum * buffer + (1 - dampening) * grad
        weight = weight - 0.1 * (grad + momentum * buffer if setting.get('nesterov') else buffer)
    return weight


@pytest.mark.parametrize('path', PATHS)
def test_parameter_whose_first_gradient_comes_later(path):
    early, late = (torch.nn.Parameter(torch.tensor([[1., 1., 3., 3.]])) for _ in range(2))
    optimizer = AwsSGD([early, late], lr=0.1, momentum=0.9, alpha=0.5, **PATHS[path])
    early.grad = torch.ones(1, 4)
    optimizer.step()
    late.grad = torch.ones(1, 4)
    optimizer.step()
    torch.testing.assert_close(late.flatten().tolist(), [0.85, 0.85, 2.75, 2.75])


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam, aws_optimizer(timm.optim.Lion), aws_optimizer(torch.optim.RMSprop)])
def test_pickle_deepcopy_and_state_dict_continue_exactly(cls):
    weight, grads = _problem()
    options = {'momentum': 0.9} if cls is AwsSGD else {}
    original = torch.nn.Parameter(weight.clone())
    optimizer = cls([original], lr=0.1, alpha=0.5, **options)
    _run(optimizer, original, grads[:10])
    loaded_weight = torch.nn.Parameter(original.detach().clone())
    loaded = cls([loaded_weight], lr=0.3, alpha=0.1, **options)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    copies = [loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    expected = _run(optimizer, original, grads[10:])
    for other in copies:
        assert type(other) is type(optimizer)
        assert torch.equal(_run(other, other.param_groups[0]['params'][0], grads[10:]), expected)


def test_state_of_torch_sgd_loads_and_keeps_the_shrink_of_the_groups():
    weight, grads = _problem()
    theirs, ours = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    saved = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    _run(saved, theirs, grads[:3])
    optimizer = AwsSGD([{'params': [ours], 'alpha': 0.7, 'normalization': 'wn'}], lr=0.5, momentum=0.9)
    with pytest.warns(UserWarning, match='holds no alpha'):
        optimizer.load_state_dict(saved.state_dict())
    group = optimizer.param_groups[0]
    assert (group['alpha'], group['normalization'], group['decoupled']) == (0.7, 'wn', False)
    assert group['lr'] == saved.param_groups[0]['lr']
    assert torch.equal(optimizer.state[ours]['momentum_buffer'], saved.state[theirs]['momentum_buffer'])


def test_amp_scaling_stays_with_the_scaler():
    """A fused optimizer would get scaled gradients, to which the shrink must not be added."""
    weight = torch.nn.Parameter(torch.tensor([[1., 1., 3., 3.]]))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    optimizer = AwsSGD([weight], lr=0.1, alpha=0.5, fused=True)
    scaler.scale((weight * torch.tensor([1., 0., 0., -1.])).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(weight.flatten().tolist(), [0.85, 0.95, 2.85, 2.95])


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize(('cls', 'dtype'), [
    (AwsSGD, torch.bfloat16),
    (AwsSGD, torch.float16),
    (AwsAdam, torch.bfloat16),  # in float16 the square of a small gradient is 0, in torch's Adam too
])
def test_low_precision_weights_follow_the_reference_to_their_precision(cls, decoupled, dtype):
    weight, grads = _problem()
    param = torch.nn.Parameter(weight.to(dtype))
    grad = grads[0].to(dtype)
    param.grad = grad
    cls([param], lr=0.1, alpha=0.5, decoupled=decoupled).step()
    rule = reference.sgd if cls is AwsSGD else reference.adam
    expected = rule(weight.to(dtype), [grad], [0.1], alpha=0.5, normalization='ws', decoupled=decoupled)
    assert param.dtype == dtype
    assert (param.detach().double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_lr_zero_changes_nothing():
    for cls, lr in itertools.product((AwsSGD, AwsAdam), (0., torch.tensor(0.))):
        weight = torch.nn.Parameter(_problem()[0].clone())
        weight.grad = torch.ones_like(weight)
        cls([weight], lr=lr, alpha=0.5).step()
        assert torch.equal(weight, _problem()[0])


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_compiled_step_equals_eager(cls, decoupled):
    """Captured by dynamo and run op by op: what is tested is that the step can be traced, not the code generator."""
    weight, grads = _problem()
    eager, compiled = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    options = {'lr': 0.1, 'alpha': 0.5, 'decoupled': decoupled, **({'momentum': 0.9} if cls is AwsSGD else {})}
    first, second = cls([eager], **options), cls([compiled], **options)
    step = torch.compile(second.step, backend='eager')
    for grad in grads[:3]:
        eager.grad, compiled.grad = grad.clone(), grad.clone()
        first.step()
        step()
    # A compiled torch.optim.Adam counts its steps in a float32 tensor, which shows in the bias correction.
    atol = 1e-7 if cls is AwsSGD else 5e-6
    torch.testing.assert_close(compiled.detach(), eager.detach(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_step_compiled_for_the_cpu_equals_eager_as_one_graph_for_every_lr(cls, decoupled):
    """With torch's own code generator, over what it cannot reduce and update in one graph by itself."""
    generator = torch.Generator().manual_seed(0)
    shapes = (64, 16, 3, 3), (64, 64, 1, 1), (10, 64), (64,)
    weights = [torch.randn(shape, generator=generator) * 0.05 for shape in shapes]
    options = {'alpha': 0.5, 'decoupled': decoupled, **({'momentum': 0.9} if cls is AwsSGD else {})}
    lr = torch.tensor(0.1)

    def made():
        params = [torch.nn.Parameter(weight.clone()) for weight in weights]
        plain = {'params': params[2:], 'alpha': 0., 'normalization': None, 'weight_decay': 0.01}
        return params, cls([{'params': params[:2]}, plain], lr=lr, **options)

    (eager, first), (compiled, second) = made(), made()
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(second.step)
    for value in (0.1, 0.1, 0.01, 0.001):
        lr.fill_(value)
        for one, other in zip(eager, compiled):
            one.grad = torch.randn(one.shape, generator=generator) * 0.01
            other.grad = one.grad.clone()
        first.step()
        step()
    for one, other in zip(eager, compiled):
        # The second moment of a coupled shrink is next to 0 for some, which the last digits then decide.
        torch.testing.assert_close(other, one, rtol=1e-5, atol=5e-6 if decoupled or cls is AwsSGD else 2e-4)
    assert not counters['graph_break']
    assert counters['stats']['unique_graphs'] <= 2  # the first step, which makes the state, and the others


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_a_step_keeps_one_gradient_of_its_own_at_a_time(cls, nesterov, monkeypatch):
    params = [torch.nn.Parameter(torch.randn(1, 12)) for _ in range(5)]
    for param in params:
        param.grad = torch.randn(1, 12)
    made, alive = [], []

    def add_and_count(*args):
        alive.append(sum(grad() is not None for grad in made))
        grad = rule.add_shrink(*args)
        made.append(weakref.ref(grad))
        return grad

    monkeypatch.setattr(optimizers, 'add_shrink', add_and_count)
    options = {'momentum': 0.9, 'nesterov': nesterov} if cls is AwsSGD else {'decoupled': False}
    cls(params, lr=0.1, alpha=0.5, foreach=False, **options).step()
    assert len(alive) == 5
    assert max(alive) <= 1


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_filters_that_lie_between_each_other_in_memory(cls):
    weight, grad = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    transposed, plain = torch.nn.Parameter(weight.clone().t()), torch.nn.Parameter(weight.t().contiguous())
    for param in (transposed, plain):
        optimizer = cls([param], lr=0.1, alpha=0.5, fused=True)
        for _ in range(3):
            param.grad = grad.t()
            optimizer.step()
    torch.testing.assert_close(transposed, plain)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_the_length_is_that_of_the_weight_that_the_step_changes(cls, compiled):
    """A weight that was made ten times longer between backward and step is shrunk by ten times as much."""
    conv = WSConv2d(3, 4, 3, bias=False)
    start = conv.weight.detach().clone()
    conv(torch.randn(2, 3, 8, 8)).sum().backward()
    conv.weight.grad.zero_()
    conv.weight.data.mul_(10)
    optimizer = cls([conv.weight], lr=torch.tensor(0.1), alpha=0.5, decoupled=True)
    torch._dynamo.reset()
    (torch.compile(optimizer.step) if compiled else optimizer.step)()
    length = 10 * start.std(dim=(1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(conv.weight.detach(), 10 * start * (1 - 0.1 * 0.5 * length), rtol=1e-5, atol=1e-6)


def test_a_step_stays_in_three_files_and_eleven_functions():
    """As many as fit on a screen, and in a reader's head."""
    folder = Path(optimizers.__file__).parent

    def count(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == 'call' and path.parent == folder and not frame.f_code.co_name.startswith('<'):
            called.add((path.name, frame.f_code.co_name))

    param = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    param.grad = torch.randn_like(param)
    optimizer = AwsSGD([param], lr=0.1, momentum=0.9)
    for _ in range(2):  # the first makes the momentum buffer
        called = set()
        sys.setprofile(count)
        optimizer.step()
        sys.setprofile(None)
        assert {name for name, _ in called} == {'group_options.py', 'optimizers.py', 'rule.py'}
        assert len(called) <= 11
