"""Conversion of networks: what is converted, what is left with which reason, and what a trained one keeps."""
import copy
import logging

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from small_networks import a_conv, an_input, calibrated, relative_error
from timm.layers import BatchNormAct2d
from torch.nn.utils import prune

import timm_aws
from timm_aws import CWNConv2d, WSConv2d
from timm_aws.convert import reasons_to_leave


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
def test_same_padding_of_timms_tensorflow_models(normalization):
    model = nn.Sequential(timm.layers.Conv2dSame(4, 6, 3, stride=2), nn.BatchNorm2d(6)).double().eval()
    x = an_input()
    expected = copy.deepcopy(model)
    timm_aws.convert(model, normalization)
    rows = [reference.normalized(w.flatten().tolist(), normalization) for w in model[0].weight.detach()]
    expected[0].weight = nn.Parameter(torch.tensor(rows, dtype=torch.float64).view(6, 4, 3, 3))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-10, atol=1e-10)
    assert type(model[0].fuse()) is timm.layers.Conv2dSame
    torch.testing.assert_close(model[0].fuse()(x), model[0](x))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    assert timm_aws.normalized_weights(model) == {'0.weight': normalization}


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
        'Converted 2 of 5 convolutions of Sequential to cwn. Left: 2 (fan-in 1); 7 (no norm follows); '
        '9 (StdConv2d has a forward of its own).'
    ]
    assert [i for i, m in enumerate(model) if isinstance(m, CWNConv2d)] == [0, 4]
    assert all(p is q for p, q in zip(model.parameters(), weights))
    assert torch.equal(torch.random.get_rng_state(), state)
    model(torch.randn(1, 3, 9, 9))
    assert hooks == [1]
    assert timm_aws.normalized_weights(timm_aws.convert(model, 'wn')) == {
        '0.weight': 'wn', '4.weight': 'cwn', '9.weight': 'ws'}


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
        assert (relative_error(model(x), output.double()) < 1e-2) is invariant


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
    with pytest.raises(ValueError, match=r'0 \(shares its weight with 2\); 2 \(no norm follows\)'):
        timm_aws.convert(model, 'ws')


class _Layers(nn.Module):
    """Layers under names, and what a function does with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def _line(*layers):
    return lambda: nn.Sequential(*(layer() if isinstance(layer, type(a_conv)) else layer for layer in layers))


def _tied():
    first, second = a_conv(bias=True), a_conv()
    second.weight, second.bias = first.weight, first.bias
    return _Layers(lambda m, x: m.b(m.second(m.a(m.first(x)))), first=first, second=second, a=nn.BatchNorm2d(8),
                   b=nn.BatchNorm2d(8))


def _dead():
    conv = a_conv()
    with torch.no_grad():
        conv.weight[0], conv.weight[1], conv.weight[2] = 0, conv.weight[1] * 1e-20, conv.weight[2] * 1e4
    return nn.Sequential(conv, nn.BatchNorm2d(8))


def _dense():
    return _Layers(
        lambda m, x: m.b(torch.cat([x, m.pool(m.second(m.a(m.first(x)))), m.first(x)], 1)), first=a_conv(bias=True),
        second=a_conv(bias=True), a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(24), pool=nn.AvgPool2d(3, 1, 1))


WITH_WN = {  # a network, and why each convolution of it is left
    'a bias': (_line(lambda: a_conv(bias=True), nn.BatchNorm2d(8)), [None]),
    'long filters, large eps': (_line(lambda: a_conv(100.), nn.BatchNorm2d(8, eps=1e-2)), [None]),
    'dead filters': (_dead, [None]),
    'no gain': (_line(a_conv, nn.BatchNorm2d(8, affine=False)), [None]),
    'average pool': (_line(lambda: a_conv(bias=True), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(8)), [None]),
    'maximum pool': (_line(lambda: a_conv(bias=True), nn.MaxPool2d(2), BatchNormAct2d(8)), [None]),
    'instance norm': (_line(lambda: a_conv(bias=True), nn.InstanceNorm2d(8, eps=1e-12)), [None]),
    'instance norm with statistics': (_line(a_conv, nn.InstanceNorm2d(8, track_running_stats=True)), [None]),
    'batch norm without statistics': (_line(a_conv, nn.BatchNorm2d(8, 1e-12, track_running_stats=False)), [None]),
    'two norms': (lambda: _Layers(lambda m, x: (lambda y: m.a(y) + m.b(y))(m.conv(x)), conv=a_conv(),
                                  a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(8)), [None]),
    'used twice, a norm each': (lambda: _Layers(lambda m, x: m.b(m.conv(m.a(m.conv(x)))), conv=a_conv(bias=True),
                                                a=nn.BatchNorm2d(8), b=nn.BatchNorm2d(8)), [None]),
    'used twice, with its norm': (lambda: _Layers(lambda m, x: m.a(m.conv(m.a(m.conv(x)))), conv=a_conv(),
                                                  a=nn.BatchNorm2d(8)), [None]),
    'weight and bias shared': (_tied, [None, None]),
    'concatenated, into two norms': (_dense, [None, None]),
    'concatenated before something else': (
        lambda: _Layers(lambda m, x: m.a(torch.cat([m.conv(x), x], 1)), conv=a_conv(), a=nn.BatchNorm2d(16)),
        ['1.a has no statistics of it alone']),
    'concatenated twice': (
        lambda: _Layers(lambda m, x: m.a(torch.cat([y := m.conv(x), y], 1)), conv=a_conv(), a=nn.BatchNorm2d(16)),
        ['1.a has no statistics of it alone']),
    'a norm shared': (
        lambda: _Layers(lambda m, x: m.a(m.second(m.a(m.first(x)))), first=a_conv(), second=a_conv(),
                        a=nn.BatchNorm2d(8)), ['1.a has no statistics of it alone'] * 2),
    'group norm': (_line(a_conv, nn.GroupNorm(2, 8)), ['GroupNorm cannot take over']),
    'layer norm': (_line(a_conv, timm.layers.LayerNorm2d(8)), ['LayerNorm2d cannot take over']),
    'a norm of its own': (_line(a_conv, _Rms()), ['_Rms cannot take over']),
}


@pytest.mark.parametrize('case', WITH_WN)
def test_wn_keeps_what_a_trained_network_computes_or_leaves_the_convolution(case, recwarn, caplog):
    make, reasons = WITH_WN[case]
    torch.manual_seed(0)
    model = make()
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))  # something to convert in every case
    model = calibrated(nn.Sequential(first, model), 1, 3, 9, 9).double()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = model(x).detach()
    with caplog.at_level(logging.INFO, logger='timm_aws'):
        timm_aws.convert(model, 'wn')
    assert caplog.messages[0].count(' (') == len(set(filter(None, reasons)))
    assert all(f'({reason}' in caplog.messages[0] for reason in reasons if reason)
    assert [type(m) is nn.Conv2d for m in model[1].modules() if isinstance(m, nn.Conv2d)] == [bool(r) for r in reasons]
    assert relative_error(model(x).detach(), expected) < 1e-8
    assert not recwarn


@pytest.mark.parametrize('compute', [
    lambda conv: prune.ln_structured(conv, 'weight', 0.5, n=1, dim=1), torch.nn.utils.weight_norm,
    torch.nn.utils.spectral_norm])
def test_wn_takes_a_computed_weight_as_it_is_after_a_checkpoint_was_loaded(compute):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(compute(a_conv(3.)), nn.BatchNorm2d(8))

    torch.manual_seed(1)
    trained, loaded = calibrated(network(), 1, 8, 9, 9), network()
    with torch.no_grad():
        next(p for name, p in trained.named_parameters() if '.weight_' in name and p.ndim == 4).mul_(
            torch.linspace(1, 5, 8).view(-1, 1, 1, 1))
    trained = calibrated(trained, 1, 8, 9, 9)
    loaded.load_state_dict(trained.state_dict())
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(1))
    expected = trained(x).detach()
    converted = timm_aws.convert(loaded.eval(), 'wn')
    assert relative_error(converted(x).detach(), expected) < 1e-5


def test_gradient_checkpointing_hides_no_norm():
    model = timm.create_model('densenet121', num_classes=2)
    expected = timm_aws.normalized_weights(model, batch_norm=True)
    model.set_grad_checkpointing(True)
    assert timm_aws.normalized_weights(model, batch_norm=True) == expected
    assert len(expected) == 120


def test_looking_at_a_network_leaves_nothing_in_its_modules():
    def forward(module, x):
        module.last, module.cache['last'] = (y := module.norm(module.conv(x))), x
        return y

    model = _Layers(forward, conv=a_conv(), norm=nn.BatchNorm2d(8))
    model.last, model.cache = None, {}
    timm_aws.convert(model, 'ws')
    assert (model.last, model.cache) == (None, {})


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
def test_a_fresh_network_is_converted_whatever_its_norm_without_a_change_of_state(normalization, recwarn):
    for model in (nn.Sequential(a_conv(), nn.BatchNorm2d(8)), nn.Sequential(a_conv(), nn.GroupNorm(2, 8))):
        state = copy.deepcopy(model.state_dict())
        timm_aws.convert(model, normalization)
        assert model[0].normalization == normalization
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not [warning for warning in recwarn if 'is trained' in str(warning.message)]


@pytest.mark.parametrize('normalization', ['ws', 'cwn'])
def test_centering_warns_of_what_it_does_to_a_trained_network(normalization, recwarn):
    centered = calibrated(nn.Sequential(a_conv(), nn.BatchNorm2d(8)), 1, 8, 9, 9)
    with torch.no_grad():
        centered[0].weight.sub_(centered[0].weight.mean((1, 2, 3), keepdim=True))
        expected = centered(an_input(torch.float32).repeat(1, 2, 1, 1))
        timm_aws.convert(centered, normalization)
        assert relative_error(centered(an_input(torch.float32).repeat(1, 2, 1, 1)), expected.double()) < 1e-5
    assert not [warning for warning in recwarn if 'is trained' in str(warning.message)]
    model = calibrated(nn.Sequential(a_conv(), nn.BatchNorm2d(8)), 1, 8, 9, 9)
    with pytest.warns(UserWarning, match=f"is trained, and '{normalization}' changes the outputs of 1 of.*recalibrate"):
        timm_aws.convert(model, normalization)
    model = nn.Sequential(a_conv(), nn.GroupNorm(2, 8))
    nn.init.ones_(model[1].bias)
    with pytest.warns(UserWarning, match=f"is trained, and '{normalization}' changes the outputs of 1 of"):
        timm_aws.convert(model, normalization)


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
def test_centering_warns_where_most_filters_are_small(normalization, recwarn):
    timm_aws.convert(timm.create_model('resnet18'), normalization)
    timm_aws.convert(nn.Sequential(nn.Conv2d(25, 8, 2), nn.BatchNorm2d(8)), normalization)
    assert not recwarn
    timm_aws.convert(nn.Sequential(nn.Conv2d(11, 8, 3), nn.BatchNorm2d(8)), normalization)
    timm_aws.convert(timm.create_model('mobilenetv3_small_050'), normalization)
    expected = [] if normalization == 'wn' else [('1 of the 1', 'Sequential'), ('29 of the 34', 'MobileNetV3')]
    assert [str(warning.message) for warning in recwarn] == [
        f'{count} converted convolutions of {model} have filters of fewer than 100 elements, which lose accuracy '
        f"without the mean that {normalization!r} takes off: convert it to 'wn', which keeps it."
        for count, model in expected]


def test_a_network_of_ours_keeps_what_it_computes_from_ws_to_wn_and_back():
    model = calibrated(timm.create_model('test_ws_resnet'), 1, 3, 64, 64).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x).detach()
    for normalization in ('wn', 'cwn', 'ws'):
        timm_aws.convert(model, normalization)
        assert set(timm_aws.normalized_weights(model).values()) == {normalization}
        assert relative_error(model(x).detach(), expected) < 1e-10
