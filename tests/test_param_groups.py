"""Which parameters are normalized weights, the groups made of it, and their alpha."""
import logging

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.prune
from torch.nn.utils import parametrizations, weight_norm
from torch.overrides import TorchFunctionMode

import timm_aws
from timm_aws import AwsAdam, AwsSGD, CWNConv2d, WNConv2d, WSConv2d


def test_normalized_weights_of_every_kind_of_layer():
    model = nn.ModuleDict({
        'ws': WSConv2d(3, 4, 3),
        'wn': WNConv2d(3, 4, 3),
        'cwn': CWNConv2d(3, 4, 3),
        'std': timm.layers.StdConv2d(3, 4, 3),
        'std_same': timm.layers.StdConv2dSame(3, 4, 3),
        'scaled': timm.layers.ScaledStdConv2d(3, 4, 3),
        'scaled_same': timm.layers.ScaledStdConv2dSame(3, 4, 3),
        'old': weight_norm(nn.Conv2d(3, 4, 3)),
        'old_linear': weight_norm(nn.Linear(3, 4)),
        'new': parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        'whole': weight_norm(nn.Conv2d(3, 4, 3), dim=None),  # one length for all filters
        'columns': parametrizations.weight_norm(nn.Linear(3, 4), dim=1),
        'plain': nn.Conv2d(3, 4, 3),
    })
    found = timm_aws.normalized_weights(model)
    assert found == {
        'ws.weight': 'ws',
        'wn.weight': 'wn',
        'cwn.weight': 'cwn',
        'std.weight': 'ws',
        'std_same.weight': 'ws',
        'scaled.weight': 'ws',
        'scaled_same.weight': 'ws',
        'old.weight_v': 'wn',
        'old_linear.weight_v': 'wn',
        'new.parametrizations.weight.original1': 'wn',
    }
    assert set(found) <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    'name', ['old.weight_v', 'new.parametrizations.weight.original1', 'std.weight', 'scaled.weight'])
def test_output_does_not_depend_on_the_length_of_what_is_found(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({
        'old': weight_norm(nn.Conv2d(3, 4, 3)),
        'new': parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        'std': timm.layers.StdConv2d(3, 4, 3),
        'scaled': timm.layers.ScaledStdConv2d(3, 4, 3),
    })
    layer, x = model[name.split('.')[0]], torch.randn(1, 3, 8, 8)
    before = layer(x)
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(3)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)


class _Norm(nn.InstanceNorm2d):
    """A norm under a name that has to be tried."""


class _DeviceOfACpuGenerator(TorchFunctionMode):
    """Refuses what a CUDA default device refuses: random numbers there, from a generator of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand) and kwargs.get('generator') and kwargs.get('device') is None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return func(*args, **kwargs)


def test_layers_are_tried_on_the_cpu_whatever_the_default_device():
    def network():
        return nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3, bias=False), _Norm(4))

    expected = timm_aws.normalized_weights(network(), batch_norm=True)
    assert set(expected.values()) == {'wn'}
    with _DeviceOfACpuGenerator():
        assert timm_aws.normalized_weights(network(), batch_norm=True) == expected
        assert timm_aws.normalized_weights(timm.create_model('test_ws_resnet'))


class _Odd(nn.Module):
    """A layer of a user's own, with other names and kinds of sizes than torch's."""

    def __init__(self, **sizes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 3, 3))
        self.__dict__.update(sizes)


@pytest.mark.parametrize('sizes', [
    {'in_channels': 3, 'kernel_size': 3}, {'in_channels': 3, 'kernel_size': (3, 3)}, {'in_features': None}])
def test_layers_of_other_sizes_are_not_normalized_and_raise_nothing(sizes):
    model = nn.Sequential(_Odd(**sizes), WSConv2d(3, 4, 3))
    assert timm_aws.normalized_weights(model) == {'1.weight': 'ws'}


def test_weights_before_a_norm_of_other_channels_are_not_before_a_norm():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(5)

        def forward(self, x):
            return self.norm(self.conv(x).permute(0, 2, 1, 3))

    assert timm_aws.normalized_weights(Turned(), batch_norm=True) == {}


def test_normalized_weights_of_wrapped_models_have_the_names_of_the_wrapper():
    model = timm.create_model('test_ws_resnet')
    assert set(timm_aws.normalized_weights(nn.Sequential(model))) == {
        f'0.{name}' for name in timm_aws.normalized_weights(model)}
    assert set(timm_aws.normalized_weights(torch.compile(model))) == {
        f'_orig_mod.{name}' for name in timm_aws.normalized_weights(model)}


def test_param_groups_aws():
    model = timm.create_model('ws_seresnet50')
    groups = timm_aws.param_groups_aws(model, alpha=0.5, weight_decay=0.25, no_weight_decay_list=['fc.weight'])
    by_name = {name: group for group in groups for name in group['param_names']}
    assert list(by_name) == list(dict.fromkeys(by_name))
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        index = by_name[name]['param_names'].index(name)
        assert by_name[name]['params'][index] is param

    def choice(name):
        return tuple(by_name[name][key] for key in ('alpha', 'normalization', 'weight_decay'))

    assert choice('layer1.0.conv2.weight') == (0.5, 'ws', 0.)
    assert choice('layer1.0.se.fc1.weight') == (0., None, 0.25)
    assert choice('layer1.0.se.fc1.bias') == (0., None, 0.)
    assert choice('bn1.weight') == (0., None, 0.)
    assert choice('fc.weight') == (0., None, 0.)
    for optimizer in (AwsSGD(groups, lr=0.1, momentum=0.9), AwsAdam(timm_aws.param_groups_aws(model))):
        assert sum(len(g['params']) for g in optimizer.param_groups if g['alpha']) == 53


def test_param_groups_aws_refuses_a_model_without_normalized_weights():
    with pytest.raises(ValueError, match='ResNet has no normalized weights'):
        timm_aws.param_groups_aws(timm.create_model('test_resnet'))


def test_alpha_like_decay_of_filters_of_known_length():
    """Stds 2, 2, 2 and 4, 4, 4 and 8, 8, 8: the median layer's filters shrink as under the decay."""
    model = nn.Sequential(*(WSConv2d(1, 3, (1, 2), bias=False) for _ in range(3)), nn.Linear(2, 2))
    with torch.no_grad():
        for conv, std in zip(model, (2., 4., 8.)):
            conv.weight.copy_(torch.tensor([5. - std, 5. + std]).expand(3, 1, 1, 2))
    assert timm_aws.alpha_like_decay(model, 1e-2) == pytest.approx(1e-2 / 4)


def test_alpha_like_decay_of_the_papers_network_is_about_its_best_alpha():
    alpha = timm_aws.alpha_like_decay(timm.create_model('ws_resnet50'), 1e-4)
    assert 0.5 * 2.5e-3 < alpha < 2.5e-3


def test_alpha_like_decay_needs_filters_with_a_length():
    model = WSConv2d(1, 3, 2)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match='initialized'):
        timm_aws.alpha_like_decay(model, 1e-4)
    with pytest.raises(ValueError, match='Linear has no normalized weights'):
        timm_aws.alpha_like_decay(nn.Linear(2, 2), 1e-4)


class _Standardized(nn.Linear):
    """A layer of somebody's own that standardizes its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(x, weight / weight.std(1, keepdim=True), self.bias)


class _Positive(nn.Module):
    def forward(self, weight):
        return weight.exp()


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _parametrized(layer, parametrization):
    nn.utils.parametrize.register_parametrization(layer, 'weight', parametrization)
    return layer


def _pruned(layer):
    nn.utils.prune.l1_unstructured(layer, 'weight', amount=0.3)
    return layer


JUDGED = {  # a layer, and what is found in it
    'ours, pruned': (lambda: _pruned(WNConv2d(4, 6, 3)), {'weight_orig': 'wn'}),
    "timm's, pruned": (lambda: _pruned(timm.layers.StdConv2d(4, 6, 3)), {'weight_orig': 'ws'}),
    'plain, pruned': (lambda: _pruned(nn.Conv2d(4, 6, 3)), {}),
    'ours, doubled': (
        lambda: _parametrized(CWNConv2d(4, 6, 3), _Double()), {'parametrizations.weight.original': 'cwn'}),
    'ours, of exponentials': (lambda: _parametrized(WSConv2d(4, 6, 3), _Positive()), {}),
    'weight norm of a linear layer': (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), {'parametrizations.weight.original1': 'wn'}),
    'weight norm over all filters at once': (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6), dim=None), {}),
    'spectral norm, which takes the whole weight': (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), {}),
    'a class of its own': (lambda: _Standardized(4, 6), {'weight': 'ws'}),
    'plain': (lambda: nn.Linear(4, 6), {}),
}


@pytest.mark.parametrize('name', JUDGED)
def test_a_layer_is_judged_by_what_it_does_with_its_weight(name):
    make, expected = JUDGED[name]
    layer = make()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    state = torch.random.get_rng_state()
    assert timm_aws.normalized_weights(layer) == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_pruned_network_is_shrunk_and_not_decayed():
    model = timm.create_model('test_ws_resnet', num_classes=3)
    for module in model.modules():
        if isinstance(module, WSConv2d):
            _pruned(module)
    optimizer = timm.optim.create_optimizer_v2(model, 'aws_sgd', lr=0.1, weight_decay=0.1)
    for group in optimizer.param_groups:
        for name in group['param_names']:
            expected = (2.5e-3, 'ws', 0.) if name.endswith('weight_orig') else (0., None)
            assert (group['alpha'], group['normalization'], group['weight_decay'])[:len(expected)] == expected


@pytest.mark.parametrize(('name', 'count'), [('resnetv2_50x1_bit', 53), ('nfnet_l0', 57)])
def test_timms_standardized_networks_need_no_conversion(name, count):
    model = timm.create_model(name)
    groups = timm.optim.create_optimizer_v2(model, 'aws_sgd', lr=0.1).param_groups
    shrunk = [param for group in groups if group['alpha'] for param in group['params']]
    assert len(shrunk) == count == sum(isinstance(module, timm.layers.StdConv2d | timm.layers.ScaledStdConv2d)
                                       for module in model.modules())


@pytest.mark.parametrize(('name', 'last'), [
    ('test_ws_resnet', 'global_pool'), ('resnetv2_50x1_bit', 'norm'), ('tf_efficientnet_b0', 'bn2')])
def test_a_trace_has_the_normalized_weights_of_the_network(name, last):
    model = timm.create_model(name).eval()
    if name.startswith('tf'):
        timm_aws.convert(model, 'ws')
    expected = timm_aws.normalized_weights(model)
    found = timm_aws.normalized_weights(timm.models.GraphExtractNet(model, [last]))
    assert {name.removeprefix('graph_module.'): normalization for name, normalization in found.items()} == expected
    assert len(expected) > 10


def test_a_trace_has_each_normalization_and_no_plain_weight():
    model = nn.Sequential(
        WSConv2d(3, 4, 3), nn.BatchNorm2d(4), WNConv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(),
        _Standardized(4 * 16, 3))
    traced = torch.fx.symbolic_trace(model)
    # A centered filter's length is measured as 'ws' where the trace does not tell 'cwn' from it.
    assert timm_aws.normalized_weights(traced) == {'0.weight': 'ws', '2.weight': 'wn', '6.weight': 'ws'}


@pytest.mark.parametrize('order', [1, -1])
def test_a_weight_that_a_plain_layer_uses_too_is_not_normalized(order):
    layers = [WSConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)][::order]
    layers[1].weight = layers[0].weight
    assert timm_aws.normalized_weights(nn.Sequential(*layers, WSConv2d(4, 4, 3))) == {'2.weight': 'ws'}


def test_a_weight_that_two_normalized_layers_share_is_found_once():
    layers = [WSConv2d(4, 4, 3), WSConv2d(4, 4, 3)]
    layers[1].weight = layers[0].weight
    assert timm_aws.normalized_weights(nn.Sequential(*layers)) == {'0.weight': 'ws'}


def test_torchscript_is_refused():
    with pytest.raises(ValueError, match=r'TorchScript.*before torch\.jit\.script'):
        timm_aws.normalized_weights(torch.jit.script(nn.Sequential(WSConv2d(3, 4, 3))))


def test_alpha_zero_leaves_the_weight_decay_that_was_asked_for():
    model = timm.create_model('test_ws_resnet', num_classes=3)
    optimizer = timm.optim.create_optimizer_v2(model, 'aws_sgd', lr=0.1, alpha=0., weight_decay=0.1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), before[name] * (1 - 0.1 * 0.1 * (param.ndim > 1)))


class _ChannelRms(nn.Module):
    """A norm of somebody's own that takes each channel by itself and leaves its mean."""

    def forward(self, x):
        return x / x.square().mean((0, 2, 3), keepdim=True).sqrt()


def _eval(norm):
    norm.eval()
    return norm


BATCH_NORMS = {  # a norm of 8 channels, and whether it makes a convolution count, one without bias and one with
    'batch': (lambda: nn.BatchNorm2d(8), True, True),
    'cumulative': (lambda: nn.BatchNorm2d(8, momentum=None), True, True),
    'batch, without statistics, in evaluation': (
        lambda: _eval(nn.BatchNorm2d(8, track_running_stats=False)), True, True),
    'batch, in evaluation': (lambda: _eval(nn.BatchNorm2d(8)), False, False),
    'batch, with activation': (lambda: timm.layers.BatchNormAct2d(8), True, True),
    'batch, frozen': (lambda: timm.layers.FrozenBatchNormAct2d(8), False, False),
    'sync': (lambda: nn.SyncBatchNorm(8), True, True),
    'sync, with activation': (
        lambda: timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(8)), True, True),
    'instance': (lambda: nn.InstanceNorm2d(8), True, True),
    'instance, with statistics': (lambda: nn.InstanceNorm2d(8, track_running_stats=True), True, True),
    'group': (lambda: nn.GroupNorm(2, 8), False, False),
    'group, of all channels': (lambda: timm.layers.GroupNorm1(8), False, False),
    'layer': (lambda: timm.layers.LayerNorm2d(8), False, False),
    'rms': (lambda: timm.layers.RmsNorm2d(8), False, False),
    'evolving, of the batch': (lambda: timm.layers.EvoNorm2dB0(8), True, False),
    'evolving, of the sample': (lambda: timm.layers.EvoNorm2dS0(8, groups=2), False, False),
    'filter response': (lambda: timm.layers.FilterResponseNormAct2d(8), True, False),
    "somebody's own": (_ChannelRms, True, False),
}


@pytest.mark.parametrize('name', BATCH_NORMS)
def test_a_norm_counts_exactly_where_the_output_does_not_depend_on_the_length_of_each_filter(name):
    make, *expected = BATCH_NORMS[name]
    for bias, invariant in zip((False, True), expected):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=bias), make())
        if bias:
            nn.init.uniform_(model[0].bias, 1, 3)
        state = torch.random.get_rng_state()
        assert timm_aws.normalized_weights(model, batch_norm=True) == ({'0.weight': 'wn'} if invariant else {})
        assert timm_aws.normalized_weights(model) == {}
        assert torch.equal(torch.random.get_rng_state(), state)
        x = torch.randn(4, 4, 6, 6)
        before = model(x)
        with torch.no_grad():
            model[0].weight.mul_(torch.logspace(0, 2, 8).view(-1, 1, 1, 1))
        assert torch.allclose(model(x), before, rtol=1e-2, atol=1e-2) is invariant


def test_group_norm_of_one_channel_each_counts():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.GroupNorm(8, 8))
    assert timm_aws.normalized_weights(model, batch_norm=True) == {'0.weight': 'wn'}


class _Flow(nn.Module):
    """Two convolutions without bias, one with, a batch and a group norm, and a function that uses them."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.other = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.biased = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.group_norm, self.pool = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.AvgPool2d(2, padding=1)
        self.norm8, self.function = nn.BatchNorm2d(8), forward

    def forward(self, x):
        return self.function(self, x)


FLOWS = {  # what is computed, and the convolutions that are found in it
    'a pool between': (lambda m, x: m.norm(m.pool(m.conv(x))), {'conv'}),
    'a pool that pads, after a bias': (lambda m, x: m.norm(m.pool(m.biased(x))), set()),
    'an activation between': (lambda m, x: m.norm(m.conv(x).relu()), set()),
    'another use of the output': (lambda m, x: m.norm(y := m.conv(x)) + y, set()),
    'two norms, each for each channel': (lambda m, x: m.norm(y := m.conv(x)) + m.norm8(torch.cat([y, x], 1)), {'conv'}),
    'a second norm, of groups': (lambda m, x: m.norm(y := m.conv(x)) + m.group_norm(y), set()),
    'a sum before the norm': (lambda m, x: m.norm(m.conv(x) + m.other(x)), set()),
    'a penalty': (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.square().sum(), set()),
    'no norm behind the other': (lambda m, x: m.other(m.norm(m.conv(x))), {'conv'}),
    'the same one twice': (lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))), {'conv'}),
}


@pytest.mark.parametrize('name', FLOWS)
def test_only_a_convolution_of_which_norms_take_all_counts(name):
    forward, expected = FLOWS[name]
    found = timm_aws.normalized_weights(_Flow(forward), batch_norm=True)
    assert found == {f'{conv}.weight': 'wn' for conv in expected}


def test_a_weight_that_something_else_uses_too_does_not_count():
    model = _Flow(lambda m, x: m.other(m.norm(m.conv(x))))
    model.other.weight = model.conv.weight
    assert timm_aws.normalized_weights(model, batch_norm=True) == {}


class _Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class _Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).exp()


LAYERS = {  # a layer before batch norm, and what is found in it
    'same padding': (lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2, bias=False), {'0.weight': 'wn'}),
    'one by one, strided': (lambda: nn.Conv2d(4, 6, 1, stride=2), {'0.weight': 'wn'}),
    'depthwise': (lambda: nn.Conv2d(6, 6, 3, groups=6), {'0.weight': 'wn'}),
    'filters of one element': (lambda: nn.Conv2d(6, 6, 1, groups=6), {}),
    'a forward that is linear in the weight': (lambda: _Doubled(4, 6, 3), {'0.weight': 'wn'}),
    'a forward that is not': (lambda: _Shifted(4, 6, 3), {}),
    'pruned': (lambda: _pruned(nn.Conv2d(4, 6, 3)), {'0.weight_orig': 'wn'}),
    'of exponentials': (lambda: _parametrized(nn.Conv2d(4, 6, 3), _Positive()), {}),
    'weight norm': (lambda: weight_norm(nn.Conv2d(4, 6, 3)), {'0.weight_v': 'wn'}),
    'standardized': (lambda: WSConv2d(4, 6, 3), {'0.weight': 'ws'}),
}


@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_before_batch_norm_is_judged_by_what_it_does_with_its_weight(name):
    make, expected = LAYERS[name]
    assert timm_aws.normalized_weights(nn.Sequential(make(), nn.BatchNorm2d(6)), batch_norm=True) == expected


def test_linear_layers_before_batch_norm_do_not_count():
    assert timm_aws.normalized_weights(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), batch_norm=True) == {}


@pytest.mark.parametrize(('name', 'count'), [
    ('test_resnet', 15), ('test_efficientnet', 13), ('test_byobnet', 14), ('densenet121', 120)])
def test_the_training_loss_is_the_same_for_filters_times_a_hundredth_to_a_hundred(name, count):
    model = timm.create_model(name, num_classes=3).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-20
    found = timm_aws.normalized_weights(model, batch_norm=True)
    assert (len(found), set(found.values())) == (count, {'wn'})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)

    def loss():
        torch.manual_seed(0)  # of dropout
        return nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).item()

    before = loss()
    with torch.no_grad():
        for weight_name in found:
            weight = model.get_parameter(weight_name)
            exponents = torch.rand(len(weight), 1, 1, 1, generator=generator, dtype=torch.float64) * 4 - 2
            weight.mul_(10 ** exponents)
    assert loss() == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize(('eps', 'length', 'share'), [
    (1e-5, 1., 0.999995), (1e-5, 0.0222, 0.99), (1e-3, 0.222, 0.99), (1e-5, 1e-5 ** 0.5, 0.5 ** 0.5)])
def test_how_short_a_filter_may_get_before_the_eps_of_its_norm_shows(eps, length, share):
    model = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1, eps=eps)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([length, 0.]).view(1, 2, 1, 1))
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert model(x / x[:, 0].std(correction=0)).std(correction=0).item() == pytest.approx(share, rel=1e-5)


def test_a_wrapped_or_traced_network_has_the_convolutions_before_batch_norm_of_the_network():
    model = timm.create_model('test_resnet')
    expected = timm_aws.normalized_weights(model, batch_norm=True)
    for prefix, wrapped in (('0.', nn.Sequential(model)), ('_orig_mod.', torch.compile(model))):
        assert timm_aws.normalized_weights(wrapped, batch_norm=True) == {
            prefix + name: normalization for name, normalization in expected.items()}
    assert timm_aws.normalized_weights(torch.fx.symbolic_trace(model), batch_norm=True) == expected


def test_a_part_of_a_network_that_stays_in_evaluation_does_not_count():
    model = timm.create_model('test_resnet')
    expected = timm_aws.normalized_weights(model, batch_norm=True)
    model.layer1.eval()
    assert timm_aws.normalized_weights(model, batch_norm=True) == {
        name: normalization for name, normalization in expected.items() if not name.startswith('layer1')}
    assert timm_aws.normalized_weights(model.eval(), batch_norm=True) == expected


@pytest.mark.parametrize('value', ['False', 1, None])
def test_batch_norm_is_true_or_false(value):
    with pytest.raises(TypeError, match=f'Invalid batch_norm: {value!r}'):
        timm_aws.normalized_weights(nn.Linear(2, 2), batch_norm=value)


def _of_std(std):
    """A network with one filter of that standard deviation."""
    model = nn.Sequential(WSConv2d(1, 1, (1, 2), bias=False), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[-std, std]]]]))
    return model


def test_like_decay_sets_alpha_and_logs_it(caplog):
    with caplog.at_level(logging.INFO, logger='timm_aws'):
        groups = timm_aws.param_groups_aws(_of_std(0.25), like_decay=1e-3)
    assert {(group['normalization'], group['alpha']) for group in groups} == {(None, 0.), ('ws', 4e-3)}
    assert [record.levelname for record in caplog.records] == ['INFO'] * 2
    assert 'alpha=0.004 ' in caplog.messages[0]
    assert caplog.messages[1].startswith('1 of 2 weights of Sequential are normalized')


def test_like_decay_of_a_plain_network_is_that_of_its_convolutions_before_batch_norm():
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2)), nn.BatchNorm2d(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[3., 4.]]]]))
    groups = timm_aws.param_groups_aws(model, like_decay=1e-2, batch_norm=True)
    assert {(group['normalization'], group['alpha']) for group in groups} == {(None, 0.), ('wn', 2e-3)}
    assert timm_aws.alpha_like_decay(model, 1e-2, batch_norm=True) == pytest.approx(2e-3)


@pytest.mark.parametrize(('std', 'options', 'logged'), [
    (0.04, {}, None), (1., {}, '2.5e-03'), (1e-3, {}, '2.5e-06'), (1., {'alpha': 2.5e-3}, None)])
def test_the_default_alpha_is_logged_where_it_means_an_unusual_decay(std, options, logged, caplog):
    groups = timm_aws.param_groups_aws(_of_std(std), **options)
    assert {group['alpha'] for group in groups} == {0., 2.5e-3}
    assert [record.levelname for record in caplog.records] == (['WARNING'] if logged else [])
    assert not logged or f'a weight decay of {logged} would' in caplog.text


def test_networks_without_values_get_the_default_alpha_and_no_alpha_like_decay(caplog):
    with torch.device('meta'):
        model = _of_std(1.)
    assert {group['alpha'] for group in timm_aws.param_groups_aws(model)} == {0., 2.5e-3}
    assert not caplog.messages
    with pytest.raises(ValueError, match='median length of nan'):
        timm_aws.param_groups_aws(model, like_decay=1e-4)


@pytest.mark.parametrize(('options', 'message'), [
    ({'alpha': 0.1, 'like_decay': 1e-4}, r'alpha=0.1 and like_decay=0.0001 both set alpha'),
    ({'like_decay': -1.}, r'Invalid weight decay for alpha: -1.0'),
    ({'like_decay': float('nan')}, r'Invalid weight decay for alpha: nan'),
])
def test_like_decay_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        timm_aws.param_groups_aws(_of_std(1.), **options)
