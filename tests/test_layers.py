"""The normalized layers against the slow reference and against plain layers."""
import copy
import inspect
import pickle

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_aws import CWNConv2d, WNConv2d, WSConv2d

LAYERS = [WSConv2d, WNConv2d, CWNConv2d]
ARGS = {
    'plain': {},
    'stride': {'stride': 2, 'padding': 1},
    'groups': {'groups': 2, 'padding': 1},
    'depthwise': {'groups': 4, 'padding': 'same'},
    'dilation': {'dilation': 2, 'padding': 'valid'},
    'no bias': {'bias': False},
    'reflect': {'padding': 1, 'padding_mode': 'reflect'},
    'replicate': {'padding': (2, 1), 'padding_mode': 'replicate'},
    'circular': {'padding': 'same', 'padding_mode': 'circular'},
}


def _conv(cls, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    conv = cls(4, 8, 3, **kwargs).to(dtype)
    with torch.no_grad():
        conv.weight.add_(0.1)  # so that centering has something to do
    return conv


def _input(dtype=torch.float64):
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _expected(conv, x):
    """A plain convolution in float64 with the reference's normalized weight."""
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode).double()
    rows = [reference.normalized(w.double().flatten().tolist(), conv.normalization) for w in conv.weight.detach()]
    state = {'weight': torch.tensor(rows, dtype=torch.float64).view(conv.weight.shape)}
    plain.load_state_dict(state if conv.bias is None else {**state, 'bias': conv.bias.detach().double()})
    return plain(x.double()).detach()


def _relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('args', ARGS)
@pytest.mark.parametrize('cls', LAYERS)
def test_forward_equals_reference(cls, args):
    conv, x = _conv(cls, **ARGS[args]), _input()
    assert _relative_error(conv(x), _expected(conv, x)) < 1e-12


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize('cls', LAYERS)
def test_forward_in_lower_precision(cls, dtype, tolerance, memory_format):
    conv = _conv(cls, dtype, padding=1).to(memory_format=memory_format)
    x = _input(dtype).to(memory_format=memory_format)
    out = conv(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    assert _relative_error(out, _expected(conv, x)) < tolerance


@pytest.mark.parametrize('cls', LAYERS)
def test_normalized_weight_and_gradient_keep_the_memory_format_and_are_those_of_the_contiguous_weight(cls):
    contiguous, channels_last = _conv(cls), _conv(cls).to(memory_format=torch.channels_last)
    upstream = torch.randn_like(contiguous.weight)
    for conv in (contiguous, channels_last):
        weight = conv.normalized_weight()
        weight.backward(upstream.to(memory_format=torch.preserve_format))
        assert weight.stride() == conv.weight.stride()
    assert channels_last.weight.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(contiguous.normalized_weight(), channels_last.normalized_weight(), rtol=1e-12, atol=0)
    torch.testing.assert_close(contiguous.weight.grad, channels_last.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('cls', LAYERS)
def test_forward_under_autocast(cls):
    conv, x = _conv(cls, torch.float32), _input(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    assert _relative_error(out, _expected(conv, x)) < 2e-2
    out.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize('cls', LAYERS)
def test_gradient_equals_that_of_the_formula(cls):
    conv, x = _conv(cls, padding=1), _input()
    weight = conv.weight.detach().clone().requires_grad_()
    centered = weight if cls is WNConv2d else weight - weight.mean((1, 2, 3), keepdim=True)
    length = centered.square().sum((1, 2, 3), keepdim=True).sqrt()
    normalized = centered / (length / 36 ** 0.5 if cls is WSConv2d else length)
    expected, = torch.autograd.grad(F.conv2d(x, normalized, conv.bias, padding=1).cos().sum(), weight)
    conv(x).cos().sum().backward()
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(conv, {'weight': w}, (x[:1],)), (weight,))


@pytest.mark.parametrize('scale', [1e-2, 1e-1, 10., 1e3])
@pytest.mark.parametrize('init', ['he', 'default'])
@pytest.mark.parametrize('cls', LAYERS)
def test_output_and_gradient_direction_do_not_depend_on_the_scale_of_the_weight(cls, init, scale):
    torch.manual_seed(0)
    conv = cls(512, 512, 3, padding=1)
    if init == 'he':
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    scaled = copy.deepcopy(conv)
    with torch.no_grad():
        scaled.weight.mul_(scale)
    x = torch.randn(1, 512, 4, 4)
    outputs = [layer(x) for layer in (conv, scaled)]
    for out in outputs:
        out.cos().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4 * outputs[0].abs().max().item())
    first, second = (F.normalize(layer.weight.grad.flatten(1), dim=1) for layer in (conv, scaled))
    assert (first - second).norm(dim=1).max() < 1e-4


def test_trained_wide_layer_is_invariant_where_timm_is_not():
    """timm's StdConv2d adds 1e-6 to the variance: at std 1e-4 its filters come out at a tenth of their size."""
    torch.manual_seed(0)
    ours, theirs = WSConv2d(64, 64, 3), timm.layers.StdConv2d(64, 64, 3)
    for conv in (ours, theirs):
        nn.init.normal_(conv.weight, std=1e-4)
    assert abs(ours.normalized_weight().std().item() - 1) < 1e-3
    assert theirs(torch.randn(1, 64, 8, 8)).std() < 0.2 * ours(torch.randn(1, 64, 8, 8)).std()


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize('bias', [False, True])
def test_torchs_fusion_with_a_batch_norm_gives_a_plain_convolution_with_the_same_output(cls, bias):
    conv, x = _conv(cls, bias=bias).eval(), _input()
    norm = nn.BatchNorm2d(8).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    fused = nn.utils.fuse_conv_bn_eval(conv, norm)
    assert type(fused) is nn.Conv2d
    assert _relative_error(fused(x), norm(conv(x)).detach()) < 1e-12
    assert type(conv) is type(copy.deepcopy(conv)) is type(pickle.loads(pickle.dumps(conv))) is cls


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize('value', [0., 0.05, -3.])
def test_constant_filters_give_finite_outputs_and_gradients(cls, value):
    conv = cls(4, 8, 3)
    nn.init.constant_(conv.weight, value)
    conv(_input(torch.float32)).sum().backward()
    assert torch.isfinite(conv(_input(torch.float32))).all()
    assert torch.isfinite(conv.weight.grad).all()


@pytest.mark.parametrize('cls', LAYERS)
def test_keys_are_those_of_a_plain_convolution(cls):
    plain = nn.Conv2d(4, 8, 3)
    conv = cls(4, 8, 3)
    conv.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(conv.state_dict(), strict=True)
    assert list(conv.state_dict()) == ['weight', 'bias']


@pytest.mark.parametrize('cls', LAYERS)
def test_single_element_filters_are_refused(cls):
    with pytest.raises(ValueError, match=r'fan-in 1: use nn.Conv2d'):
        cls(4, 4, 1, groups=4)


@pytest.mark.parametrize('cls', LAYERS)
def test_export_fx_and_torchscript_give_the_same_output(cls):
    conv, x = _conv(cls, torch.float32, padding=1), _input(torch.float32)
    expected = conv(x)
    torch.testing.assert_close(torch.export.export(conv, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(conv)(x), expected)
    torch.testing.assert_close(torch.jit.script(conv)(x), expected)


@pytest.mark.parametrize('cls', LAYERS)
def test_compiles_without_a_graph_break(cls):
    conv, x = _conv(cls, torch.float32, padding=1), _input(torch.float32)
    compiled = torch.compile(conv, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x), rtol=1e-5, atol=1e-5)
    compiled(x).cos().sum().backward()
    first, conv.weight.grad = conv.weight.grad, None
    conv(x).cos().sum().backward()
    torch.testing.assert_close(first, conv.weight.grad, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize('args', ARGS)
@pytest.mark.parametrize('cls', LAYERS)
def test_fuse_gives_a_plain_convolution_with_the_same_output(cls, args):
    conv, x = _conv(cls, torch.float32, **ARGS[args]).eval(), _input(torch.float32)
    plain = conv.fuse()
    assert type(plain) is nn.Conv2d
    assert not plain.training
    assert _relative_error(plain(x), conv(x).detach().double()) < 1e-5
    plain.weight.detach().zero_()
    assert conv.weight.abs().sum() > 0


@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('cls', LAYERS)
def test_a_trace_has_operators_that_core_ml_and_openvino_know(cls, format):
    """Core ML has no rule for aten::view_as, for example."""
    conv = _conv(cls, torch.float32).eval().to(memory_format=format)
    graph = torch.jit.trace(conv, _input(torch.float32)).inlined_graph
    operators = {node.kind().removeprefix('aten::') for node in graph.nodes() if node.kind().startswith('aten::')}
    assert operators <= {
        'Int', '_convolution', 'add', 'flatten', 'layer_norm', 'mean', 'mul', 'permute', 'pow', 'rsqrt', 'size',
        'square', 'view'}


@pytest.mark.parametrize('cls', [WSConv2d, WNConv2d, CWNConv2d])
def test_layers_are_made_as_torchs_are(cls):
    assert inspect.signature(cls) == inspect.signature(nn.Conv2d)
    conv = torch.nn.utils.skip_init(cls, 3, 8, 3, device='cpu')
    assert (type(conv), conv.weight.shape) == (cls, (8, 3, 3, 3))
