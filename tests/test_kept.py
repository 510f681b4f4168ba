"""What the layers keep of their weights, for evaluation and for the step after a forward, and when they do not."""
import copy
import gc
import io

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_aws
from timm_aws import AwsAdam, AwsSGD, CWNConv2d, WNConv2d, WSConv2d, handed_over, normalized_conv, optimizers, updates
from timm_aws.any_optimizer import aws_optimizer
from timm_aws.shrink import filter_length

LAYERS = [WSConv2d, WNConv2d, CWNConv2d]
X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))


def _conv(cls=WSConv2d):
    torch.manual_seed(0)
    return cls(4, 8, 3)


def _fresh(conv):
    """What the layer must give, with a weight that is normalized now."""
    return F.conv2d(X.to(conv.weight.dtype), conv.normalized_weight(), conv.bias)


@pytest.fixture
def normalized(monkeypatch):
    """Names the layers that normalize their weight, call by call."""
    calls = []
    for cls in LAYERS:
        original = cls.normalized_weight
        monkeypatch.setattr(
            cls, 'normalized_weight', lambda conv, original=original: calls.append(type(conv)) or original(conv))
    return calls


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('cls', LAYERS)
def test_evaluation_normalizes_a_weight_once(cls, mode, normalized):
    conv = _conv(cls).eval()
    with mode():
        outputs = [conv(X) for _ in range(3)]
    assert normalized == [cls]
    assert all(torch.equal(out, _fresh(conv)) for out in outputs)


def _in_place(conv):
    with torch.no_grad():
        conv.weight[3].neg_()
    return conv


def _load_state_dict(conv, **options):
    conv.load_state_dict({name: value + torch.rand_like(value) for name, value in conv.state_dict().items()}, **options)
    return conv


def _one_element_of_data(conv):
    conv.weight.data[2, 1, 0, 2] = 0.5
    return conv


def _averaged_weights_swapped_in(conv):
    conv.weight.data.copy_(conv.weight.data.roll(1, 1) * 0.999)
    return conv


def _data_replaced(conv):
    conv.weight.data = conv.weight.data.flip(1)
    return conv


def _parameter_replaced(conv):
    conv.weight = nn.Parameter(conv.weight.detach().flip(1))
    return conv


def _step(optimizer, conv):
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    return conv


def _requires_grad(conv):
    return _in_place(conv.requires_grad_(False))


CHANGES = {
    'an in-place operation': _in_place,
    'load_state_dict': _load_state_dict,
    'load_state_dict(assign=True)': lambda conv: _load_state_dict(conv, assign=True),
    'an element of .data': _one_element_of_data,
    'a copy into .data': _averaged_weights_swapped_in,
    'other .data': _data_replaced,
    'another parameter': _parameter_replaced,
    'a fused step of torch': lambda conv: _step(torch.optim.SGD([conv.weight], lr=0.1, fused=True), conv),
    'a foreach step of torch': lambda conv: _step(torch.optim.SGD([conv.weight], lr=0.1, foreach=True), conv),
    'a fused step of ours': lambda conv: _step(AwsSGD([conv.weight], lr=0.1, fused=True), conv),
    'requires_grad_': _requires_grad,
    'another dtype': lambda conv: conv.double(),
    'another memory format': lambda conv: conv.to(memory_format=torch.channels_last),
    'a share of NaN': lambda conv: conv.weight.data[1].fill_(torch.nan) is None or conv,
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('cls', LAYERS)
@torch.no_grad()
def test_evaluation_follows_every_change_of_a_weight(cls, change):
    conv = _conv(cls).eval()
    conv(X)
    conv = CHANGES[change](conv)
    for _ in range(2):
        torch.testing.assert_close(conv(X.to(conv.weight.dtype)), _fresh(conv), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('dim', [0, 1, 2, 3])
@torch.no_grad()
def test_evaluation_follows_elements_that_change_places(dim):
    """Integers, so that no sum of them is rounded."""
    conv = _conv().eval()
    conv.weight.copy_(torch.randint(-9, 9, conv.weight.shape))
    conv(X)
    conv.weight.data.copy_(conv.weight.data.flip(dim))
    assert torch.equal(conv(X), _fresh(conv))


@torch.no_grad()
def test_evaluation_follows_a_conversion_to_another_normalization():
    model = nn.Sequential(WSConv2d(4, 8, 3), nn.BatchNorm2d(8)).eval()
    model(X)
    timm_aws.convert(model, 'wn')
    assert torch.equal(model[0](X), _fresh(model[0]))


@torch.no_grad()
def test_evaluation_of_a_timm_average_follows_its_updates():
    model = timm.create_model('test_ws_resnet')
    average = timm.utils.ModelEmaV3(model, decay=0.5).eval()
    images = torch.randn(1, 3, 32, 32)
    before = average(images)
    for param in model.parameters():
        param.add_(torch.randn_like(param))
    average.update(model)
    assert not torch.equal(average(images), before)
    fresh = timm.create_model('test_ws_resnet').eval()
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(average(images), fresh(images))


def test_what_is_kept_for_evaluation_is_freed_by_training_and_with_the_weight():
    conv, other = _conv().eval(), _conv().eval()
    with torch.no_grad():
        conv(X), other(X)
    kept = normalized_conv._kept_in_eval
    assert kept.get(conv.weight) is not None
    conv.train()
    assert kept.get(conv.weight) is None
    gc.collect()
    count = len(kept._entries)
    del other
    gc.collect()
    assert len(kept._entries) == count - 1


def test_what_is_kept_is_in_no_copy_no_state_dict_and_no_pickle(normalized):
    conv = _conv().eval()
    untouched = io.BytesIO()
    torch.save(conv, untouched)
    with torch.no_grad():
        conv(X)
        copy.deepcopy(conv)(X)
    assert normalized == [WSConv2d, WSConv2d]
    assert list(conv.state_dict()) == ['weight', 'bias']
    saved = io.BytesIO()
    torch.save(conv, saved)
    assert len(saved.getvalue()) == len(untouched.getvalue())


def test_nothing_is_kept_with_gradients_nor_of_inference_parameters(normalized):
    conv = _conv().eval()
    for _ in range(2):
        conv(X).sum().backward()
    assert len(normalized) == 2
    with torch.inference_mode():
        frozen = _conv().eval()
        for _ in range(2):
            frozen(X)
    assert len(normalized) == 4


def test_a_network_of_inference_mode_trains_on():
    conv = _conv().eval()
    with torch.inference_mode():
        conv(X)
    with torch.no_grad():
        conv(X)
    conv(X).cos().sum().backward()
    expected, conv.weight.grad = conv.weight.grad, None
    conv.train()(X).cos().sum().backward()
    assert torch.equal(conv.weight.grad, expected)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_an_ensemble_under_vmap_equals_its_members(mode):
    convs = [_conv().eval() for _ in range(3)]
    for conv in convs:
        nn.init.normal_(conv.weight)
    params, buffers = torch.func.stack_module_state(convs)
    with mode():
        both = torch.func.vmap(lambda p, b: torch.func.functional_call(convs[0], (p, b), (X,)))(params, buffers)
    torch.testing.assert_close(both, torch.stack([conv(X) for conv in convs]))


# What a forward hands over to the step.

OPTIMIZERS = {
    'AwsSGD, coupled': lambda p, **o: AwsSGD(p, momentum=0.9, **o),
    'AwsSGD, no momentum': AwsSGD,
    'AwsSGD, fused': lambda p, **o: AwsSGD(p, momentum=0.9, fused=True, **o),
    'AwsSGD, foreach': lambda p, **o: AwsSGD(p, momentum=0.9, foreach=True, **o),
    'AwsSGD, decoupled': lambda p, **o: AwsSGD(p, momentum=0.9, decoupled=True, **o),
    'AwsAdam': AwsAdam,
    'aws_lion': aws_optimizer(timm.optim.Lion),
}


def _assert_true_length(conv):
    length = handed_over.lengths_for_step([conv.weight], conv.normalization)[0].flatten()
    assert length.dtype == conv.weight.dtype
    rows = conv.weight.detach().double().flatten(1).tolist()
    expected = [reference.filter_length(row, conv.normalization) for row in rows]
    torch.testing.assert_close(length.double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


@pytest.fixture
def measured(monkeypatch):
    """Counts the weights whose filters the optimizer has to measure."""
    calls = []
    for module in (handed_over, optimizers):
        monkeypatch.setattr(module, 'filter_length', lambda *args: calls.append(args[1]) or filter_length(*args))
    return calls


def _longer(conv):
    conv.weight.mul_(3)


def _longer_data(conv):
    conv.weight.data = 3 * conv.weight.data


def _longer_loaded(conv):
    conv.load_state_dict({name: 3 * value for name, value in conv.state_dict().items()})


def _longer_parameter(conv):
    conv.weight = nn.Parameter(3 * conv.weight)


@pytest.mark.parametrize('elements', [2 ** 20, 72])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_step_after_a_forward_measures_nothing_and_equals_one_that_does(name, elements, measured, monkeypatch):
    """Whole, or two filters of 36 elements at a time."""
    monkeypatch.setattr(updates, '_ELEMENTS', elements)
    first, second = _conv(), _conv()
    ours, theirs = (OPTIMIZERS[name]([conv.weight], lr=0.1, alpha=0.5) for conv in (first, second))
    for _ in range(3):
        first(X).cos().sum().backward()
        second.weight.grad = first.weight.grad.clone()
        del measured[:]
        ours.step()
        assert not measured
        theirs.step()
        assert measured
        torch.testing.assert_close(first.weight, second.weight, rtol=1e-6, atol=1e-7)
        first.weight.grad = None


@pytest.mark.parametrize('change', [None, _longer, _longer_loaded])
@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_a_compiled_step_takes_over_what_a_forward_has_measured_unless_the_weight_has_changed(cls, change, measured):
    """A compiled graph counts its own change of the weight before it makes it."""
    torch._dynamo.reset()
    first, second = _conv(), _conv()
    ours, theirs = (cls([conv.weight], lr=torch.tensor(0.1), alpha=0.5) for conv in (first, second))
    step = torch.compile(ours.step)
    for _ in range(3):
        first(X).cos().sum().backward()
        second.weight.grad = first.weight.grad.clone()
        if change:
            for conv in (first, second):
                with torch.no_grad():
                    change(conv)
        del measured[:]
        step()
        assert measured == (['ws'] if change else [])
        theirs.step()
        # A compiled torch.optim.Adam counts its steps in a float32 tensor, which shows in the bias correction.
        torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=2e-6 if cls is AwsSGD else 2e-5)
        first.weight.grad = None


@pytest.mark.parametrize('cls', LAYERS)
def test_the_length_for_a_step_after_a_forward_is_that_in_float64(cls):
    conv = _conv(cls)
    conv(X)
    _assert_true_length(conv)


def test_a_length_is_handed_over_once_as_torch_does_not_see_a_fused_step():
    conv = _conv()
    optimizer = AwsSGD([conv.weight], lr=0.5, alpha=0.5, momentum=0.9, fused=True)
    conv(X).sum().backward()
    conv.weight.grad.add_(torch.randn_like(conv.weight))
    optimizer.step()
    _assert_true_length(conv)


@pytest.mark.parametrize('cls', [AwsSGD, AwsAdam])
def test_a_length_does_not_outlast_a_step_without_shrink(cls):
    conv = _conv()
    optimizer = cls([conv.weight], lr=0.5, alpha=0., fused=True)
    conv(X).sum().backward()
    conv.weight.grad.add_(torch.randn_like(conv.weight))
    optimizer.step()
    _assert_true_length(conv)


@pytest.mark.parametrize('change', [_longer, _longer_data, _longer_loaded, _longer_parameter, WSConv2d.double])
def test_a_weight_that_changed_since_its_forward_is_measured_anew(change):
    conv = _conv()
    conv(X)
    with torch.no_grad():
        change(conv)
    _assert_true_length(conv)


@pytest.mark.parametrize('filter', [0., 0.3, 1e-7, 1e25])
def test_filters_that_the_forward_cannot_measure_are_not_handed_over(filter, measured):
    """Of zeros, of one value, too short for the eps of the forward, too long for their squares."""
    conv = _conv()
    with torch.no_grad():
        conv.weight[0] = filter * (torch.ones(4, 3, 3) if filter in (0., 0.3) else torch.randn(4, 3, 3))
    conv(X)
    _assert_true_length(conv)
    assert measured == ['ws']


def test_nothing_is_handed_over_without_a_gradient(measured):
    conv = _conv()
    with torch.no_grad():
        conv(X)
    handed_over.lengths_for_step([conv.weight], 'ws')
    frozen = _conv().requires_grad_(False)
    frozen(X)
    handed_over.lengths_for_step([frozen.weight], 'ws')
    assert measured == ['ws', 'ws']
