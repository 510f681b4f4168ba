"""The normalized layers, conversion of networks and folding, against the slow reference and against plain layers."""
import copy
import logging

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

import timm_aws
from timm_aws import CWNConv2d, WNConv2d, WSConv2d
from timm_aws.convert import fold_normalization, reasons_to_leave

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


def _calibrated(model, *shape):
    """Gives batch norms statistics and affine parameters of their own, with activations of a sane size."""
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None  # cumulative average: one pass sets the statistics
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, *shape[1:]))
    return model.eval()


@pytest.mark.parametrize('name', [
    'test_ws_resnet', 'ws_resnet18', 'ws_seresnet50', 'wn_resnet50', 'resnet18d', 'tf_efficientnet_b0', 'resnetv2_50'])
@pytest.mark.parametrize('inplace', [False, True])
def test_reparameterize_model_folds_normalization_and_batch_norm(name, inplace):
    model = timm.create_model(name, num_classes=7)
    if not timm_aws.normalized_weights(model):
        timm_aws.convert(model, 'ws')
    _calibrated(model, 1, 3, 64, 64).double()  # fifty layers of rounding would hide a small mistake
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x).detach()
    folded = timm.utils.reparameterize_model(model, inplace=inplace)
    assert (folded is model) == inplace
    assert not timm_aws.normalized_weights(folded)
    assert _relative_error(folded(x), expected) < 1e-10
    if name != 'resnetv2_50':  # pre-activation: batch norms that no convolution feeds
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    if not inplace:
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
def test_same_padding_of_timms_tensorflow_models(normalization):
    model = nn.Sequential(timm.layers.Conv2dSame(4, 6, 3, stride=2), nn.BatchNorm2d(6)).double().eval()
    x = _input()
    expected = copy.deepcopy(model)
    timm_aws.convert(model, normalization)
    rows = [reference.normalized(w.flatten().tolist(), normalization) for w in model[0].weight.detach()]
    expected[0].weight = nn.Parameter(torch.tensor(rows, dtype=torch.float64).view(6, 4, 3, 3))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-10, atol=1e-10)
    assert type(model[0].fuse()) is timm.layers.Conv2dSame
    torch.testing.assert_close(model[0].fuse()(x), model[0](x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    assert timm_aws.normalized_weights(model) == {'0.weight': normalization}


def test_folding_keeps_what_cannot_be_folded():
    class Block(nn.Module):
        """One batch norm behind a convolution that something else looks at too, one without statistics."""

        def __init__(self):
            super().__init__()
            self.shared, self.norm1 = WSConv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.conv, self.norm2 = WSConv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x):
            x = self.shared(x)
            x = self.norm1(x) + x
            return self.norm2(self.conv(x))

    block = _calibrated(Block(), 1, 4, 9, 9)
    x = _input(torch.float32)
    expected = block(x).detach().double()
    folded = fold_normalization(copy.deepcopy(block))
    assert [type(m) for m in folded.children()] == [nn.Conv2d, nn.BatchNorm2d] * 2
    assert _relative_error(folded(x), expected) < 1e-5


def test_folding_of_norm_act_keeps_the_activation():
    model = _calibrated(nn.Sequential(WSConv2d(4, 4, 3), BatchNormAct2d(4)), 1, 4, 9, 9)
    x = _input(torch.float32)
    expected = model(x).detach().double()
    folded = fold_normalization(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert folded(x).min() == 0
    assert _relative_error(folded(x), expected) < 1e-5


class _Preact(nn.Module):
    """Defines a norm right behind a convolution whose output it never sees."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm3(self.conv2(self.norm2(self.conv1(self.norm1(x)))) + x)


def test_convert_follows_the_data_not_the_order_of_definition():
    assert reasons_to_leave(_Preact()) == {'conv1': None, 'conv2': 'no norm follows'}


def test_convert_reports_every_reason(caplog):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8), nn.Identity(), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 4, 1), nn.ReLU(),
        timm.layers.StdConv2d(4, 4, 1), nn.BatchNorm2d(4),
    )
    weights = list(model.parameters())
    hooks = []
    model[0].register_forward_hook(lambda *_: hooks.append(1))
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, logger='timm_aws'):
        assert timm_aws.convert(model, 'cwn') is model
    assert caplog.messages == [
        'Converted 2 of 5 convolutions of Sequential to cwn. Left: 2 (fan-in 1), 7 (no norm follows), '
        '9 (StdConv2d has a forward of its own).'
    ]
    assert [i for i, m in enumerate(model) if isinstance(m, CWNConv2d)] == [0, 4]
    assert all(p is q for p, q in zip(model.parameters(), weights))
    assert torch.equal(torch.random.get_rng_state(), state)
    model(torch.randn(1, 3, 9, 9))
    assert hooks == [1]
    assert timm_aws.normalized_weights(timm_aws.convert(model, 'wn')) == {
        '0.weight': 'wn', '4.weight': 'wn', '9.weight': 'ws'}


@pytest.mark.parametrize(('model', 'normalization', 'message'), [
    (nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), 'bn', "'bn', choose one of 'ws', 'wn', 'cwn'"),
    (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), 'ws', r'it has 0 \(no norm follows\)'),
    (nn.Linear(3, 3), 'ws', 'no nn.Conv2d at all'),
])
def test_convert_refuses(model, normalization, message):
    with pytest.raises(ValueError, match=message):
        timm_aws.convert(model, normalization)


def test_module_that_cannot_be_traced_is_looked_into_by_itself():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.last = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.last(self.body(x)) if x.mean() > 0 else self.body(x)

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Choice(), Choice(), nn.Conv2d(4, 4, 3))
    assert {name for name, reason in reasons_to_leave(model).items() if reason is None} == {'0', '2.body.0', '3.body.0'}
    assert {name for name, reason in reasons_to_leave(Choice()).items() if reason is None} == {'body.0'}


# Convolutions that a norm follows and those that none does, as timm's sources have them.
@pytest.mark.parametrize(('name', 'converted', 'left'), [
    ('resnet50', 53, 0),
    ('seresnet50', 53, 32),  # two in each of 16 SE gates
    ('resnext50_32x4d', 53, 0),
    ('efficientnet_b0', 49, 32),  # two in each of 16 SE gates
    ('tf_efficientnet_b0', 49, 32),  # the same with TensorFlow's padding
    ('mobilenetv3_small_100', 34, 19),  # two in each of 9 SE gates, conv_head
    ('densenet121', 120, 0),
    ('resnetv2_50', 33, 21),  # conv3 of 16 blocks and 4 downsamples go into an addition, head.fc
    ('convnext_tiny', 19, 3),  # the stem and 18 depthwise convolutions have a norm, 3 downsamples do not
    ('xception41', 84, 0),
    ('mobileone_s0', 170, 21),  # 1x1 depthwise branches, fan-in 1
    ('vgg16_bn', 13, 2),
])
def test_convert_on_timm_models(name, converted, left):
    model = timm.create_model(name)
    timm_aws.convert(model, 'ws')
    assert sum(isinstance(m, WSConv2d) for m in model.modules()) == converted
    assert sum(type(m) is nn.Conv2d for m in model.modules()) == left
