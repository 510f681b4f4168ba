"""The normalized weight that a layer caches in evaluation: when it does, and that it follows every change."""
import copy
import io
import weakref

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import timm_aws
from timm_aws import AwsSGD, CWNConv2d, WNConv2d, WSConv2d

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


def _swap(weight):
    weight.copy_(weight.flip(1))


def _balanced(weight):
    """Leaves the sum of every row and every column of the filters where it was."""
    weight[0, 0, 0, 0] += 5
    weight[0, 0, 0, 1] -= 5
    weight[1, 0, 0, 0] -= 5
    weight[1, 0, 0, 1] += 5


def _last_bit(weight):
    element = weight[3, 2, 1, 0]
    element.copy_(torch.nextafter(element, torch.full_like(element, torch.inf)))


def _sign_of_zero(weight):
    weight[0, 0, 0, 0].neg_()


@pytest.mark.parametrize('edit', [_swap, _balanced, _last_bit, _sign_of_zero])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_evaluation_follows_edits_of_data_that_no_sum_shows(edit, memory_format, dtype, normalized):
    """Small integers, of which no sum is rounded."""
    conv = _conv().to(dtype, memory_format=memory_format).eval()
    conv.weight.copy_(torch.arange(conv.weight.numel()).view(conv.weight.shape) % 7)
    conv(X.to(dtype))
    edit(conv.weight.data)
    output = conv(X.to(dtype))
    assert len(normalized) == 2
    assert torch.equal(output, _fresh(conv))


@torch.no_grad()
def test_evaluation_follows_edits_of_a_weight_with_an_odd_number_of_bytes():
    """Three filters of 3 elements of 2 bytes are no whole number of 64-bit words."""
    conv = WSConv2d(1, 3, (1, 3)).bfloat16().eval()
    image = X[:, :1].bfloat16()
    conv(image)
    conv.weight.data[2, 0, 0, 2] += 1
    assert torch.equal(conv(image), F.conv2d(image, conv.normalized_weight(), conv.bias))


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


def test_the_cache_is_freed_by_training_and_holds_no_reference_to_the_weight():
    conv = _conv().eval()
    with torch.no_grad():
        conv(X)
    weight = weakref.ref(conv.weight)
    normalized = weakref.ref(conv._cached[2])
    conv.train()
    assert normalized() is None
    conv.weight = None
    assert weight() is None


def test_a_layer_can_be_swapped_to_another_dtype_after_a_forward():
    """torch swaps a parameter only if nothing else refers to it."""
    conv = _conv().eval()
    with torch.no_grad():
        conv(X)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        conv.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert conv.weight.dtype is torch.bfloat16


def test_the_cache_is_in_no_copy_no_state_dict_and_no_pickle(normalized):
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


def test_nothing_is_cached_with_gradients(normalized):
    conv = _conv().eval()
    for _ in range(2):
        conv(X).sum().backward()
    assert len(normalized) == 2


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


@pytest.mark.parametrize('cls', [WSConv2d, WNConv2d, CWNConv2d])
def test_a_forward_with_fake_tensors_leaves_nothing_behind(cls):
    conv, x = cls(3, 8, 3).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = conv(x)
        for _ in range(2):
            with FakeTensorMode(allow_non_fake_inputs=True):
                conv(x)
            assert torch.equal(conv(x), expected)
