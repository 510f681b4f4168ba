"""Which parameters are normalized weights, and the groups made of it."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.utils.prune
from torch.nn.utils import parametrizations, weight_norm

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


@pytest.mark.parametrize('model', [nn.Linear(2, 2), WSConv2d(1, 3, 2)])
def test_alpha_like_decay_needs_filters_with_a_length(model):
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    with pytest.raises(ValueError, match='initialized'):
        timm_aws.alpha_like_decay(model, 1e-4)


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
