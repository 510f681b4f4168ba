"""Conversion of networks, and folding: what is converted, what is left with which reason, and equal outputs."""
import copy
import logging

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d

import timm_aws
from timm_aws import CWNConv2d, WSConv2d
from timm_aws.convert import fold_normalization, reasons_to_leave


def _input(dtype=torch.float64):
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _relative_error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


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


class _Passes(nn.Module):
    """Returns what a function of a convolution, a norm and an image returns."""

    def __init__(self, norm, forward):
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm, forward

    def forward(self, x):
        return self.function(self, x)


class _Rms(nn.Module):
    """A norm of somebody's own, under a name that says nothing."""

    def forward(self, x):
        return x / x.square().mean((1, 2, 3), keepdim=True).sqrt()


class _NormGate(nn.Module):
    """Called a norm, and none."""

    def forward(self, x):
        return x * x.square().mean((1, 2, 3), keepdim=True).sigmoid()


def _eval(norm):
    norm.eval()
    return norm


def _straight(m, x):
    return m.norm(m.conv(x))


FLOWS = {  # the norm, the forward, whether the length of the filters has no say in it
    'batch norm': (nn.BatchNorm2d(8), _straight, True),
    'sync batch norm': (nn.SyncBatchNorm(8), _straight, True),
    'group norm': (nn.GroupNorm(2, 8), _straight, True),
    'instance norm': (nn.InstanceNorm2d(8), _straight, True),
    'a norm of its own': (_Rms(), _straight, True),
    'batch norm without statistics': (_eval(nn.BatchNorm2d(8, track_running_stats=False)), _straight, True),
    'batch norm that stays in evaluation': (_eval(nn.BatchNorm2d(8)), _straight, False),
    'frozen batch norm of torchvision': (torchvision.ops.FrozenBatchNorm2d(8), _straight, False),
    'frozen batch norm of timm': (timm.layers.FrozenBatchNormAct2d(8), _straight, False),
    'response norm': (nn.LocalResponseNorm(2), _straight, False),
    'global response norm': (timm.layers.grn.GlobalResponseNorm(8, channels_last=False), _straight, False),
    'evolving norm': (timm.layers.EvoNorm2dS0(8, groups=4), _straight, False),
    'a gate called a norm': (_NormGate(), _straight, False),
    'other channels, batch norm': (nn.BatchNorm2d(16), lambda m, x: m.norm(torch.cat([m.conv(x), x], 1)), True),
    'other channels, group norm': (nn.GroupNorm(1, 16), lambda m, x: m.norm(torch.cat([m.conv(x), x], 1)), False),
    'other channels, a group each': (nn.GroupNorm(16, 16), lambda m, x: m.norm(torch.cat([m.conv(x), x], 1)), True),
    'other images': (nn.BatchNorm2d(8), lambda m, x: m.norm(torch.cat([m.conv(x), x])), False),
    'a penalty': (nn.BatchNorm2d(8), lambda m, x: m.norm(m.conv(x)) + m.conv.weight.square().sum(), False),
    'a second use': (nn.BatchNorm2d(8), lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1), False),
    'its shape': (nn.BatchNorm2d(8), lambda m, x: (lambda y: m.norm(y).view(y.shape))(m.conv(x)), True),
}


@pytest.mark.parametrize('name', FLOWS)
def test_convert_takes_a_convolution_exactly_where_its_length_has_no_say(name):
    norm, forward, invariant = FLOWS[name]
    model = _Passes(norm, forward)
    left = reasons_to_leave(model)['conv']
    assert (left is None) is invariant
    if not isinstance(norm, nn.SyncBatchNorm):  # runs on a GPU alone
        x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
        output = model(x)
        with torch.no_grad():
            model.conv.weight.mul_(10)
        assert (_relative_error(model(x), output.double()) < 1e-2) is invariant


def test_a_network_in_evaluation_is_converted_as_it_will_train():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert reasons_to_leave(model) == {'0': None}
    assert not model[1].training


def test_looking_at_norms_draws_no_random_numbers_and_leaves_their_statistics():
    model = _Passes(nn.Sequential(nn.Identity(), _Rms()), _straight)
    model.norm.append(nn.BatchNorm2d(8, momentum=None))
    state, statistics = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
    reasons_to_leave(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())


def test_a_weight_that_a_plain_layer_shares_is_left():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU())
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r'0 \(shares its weight with 2\), 2 \(no norm follows\)'):
        timm_aws.convert(model, 'ws')
