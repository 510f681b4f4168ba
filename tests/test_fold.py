"""Folding into plain convolutions: equal outputs, over timm's families too, all or nothing."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from small_networks import an_input, calibrated, relative_error
from timm.layers import BatchNormAct2d

import timm_aws
from timm_aws import CWNConv2d, WSConv2d
from timm_aws.fold import fold_normalization

# Of timm's families of CNNs: those that fold parts of themselves, then one of each other build; some are newer than the
# oldest timm.
FAMILIES = list(filter(timm.is_model, [
    'repvgg_a0', 'mobileone_s0', 'fastvit_t8', 'repvit_m1', 'levit_128s', 'efficientvit_m0', 'tiny_vit_5m_224',
    'shvit_s1', 'ghostnetv3_050', 'repghostnet_050', 'lcnetv2_base', 'efficientvim_m1', 'iformer_t',
    'densenet121', 'dla46_c', 'dpn48b', 'hrnet_w18_small', 'inception_next_atto', 'mixnet_s', 'mobilenetv3_small_050',
    'regnety_002', 'resnest14d',
]))


@pytest.mark.parametrize('name', FAMILIES)
def test_wn_keeps_what_a_trained_network_computes_and_folding_keeps_it_too(name):
    model = timm.create_model(name, num_classes=7)
    size = model.default_cfg['input_size'][-1] if model.default_cfg.get('fixed_input_size') else 64
    calibrated(model, 1, 3, size, size).double()  # fifty layers of rounding would hide a small mistake
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        timm_aws.convert(model, 'wn')
        assert relative_error(model(x), expected) < 1e-7
        assert timm.utils.reparameterize_model(model, inplace=True) is model
        assert not timm_aws.normalized_weights(model)
        model.float().train().eval()  # attention has cached biases in float64
        assert relative_error(model(x.float()), expected) < 1e-4  # timm makes some layers in float32


@pytest.mark.parametrize('name', [
    'test_ws_resnet', 'ws_resnet18', 'ws_seresnet50', 'wn_resnet50', 'resnet18d', 'tf_efficientnet_b0', 'resnetv2_50'])
def test_reparameterize_model_folds_normalization_and_batch_norm(name):
    model = timm.create_model(name, num_classes=7)
    if not timm_aws.normalized_weights(model):
        timm_aws.convert(model, 'ws')
    calibrated(model, 1, 3, 64, 64).double()  # fifty layers of rounding would hide a small mistake
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x).detach()
    folded = timm.utils.reparameterize_model(model)
    assert not timm_aws.normalized_weights(folded)
    assert relative_error(folded(x), expected) < 1e-10
    if name != 'resnetv2_50':  # pre-activation: batch norms that no convolution feeds
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.equal(model(x), expected)


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

    block = calibrated(Block(), 1, 4, 9, 9)
    x = an_input(torch.float32)
    expected = block(x).detach().double()
    folded = fold_normalization(copy.deepcopy(block))
    assert [type(m) for m in folded.children()] == [nn.Conv2d, nn.BatchNorm2d] * 2
    assert relative_error(folded(x), expected) < 1e-5


def test_folding_of_norm_act_keeps_the_activation():
    model = calibrated(nn.Sequential(WSConv2d(4, 4, 3), BatchNormAct2d(4)), 1, 4, 9, 9)
    x = an_input(torch.float32)
    expected = model(x).detach().double()
    folded = fold_normalization(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert folded(x).min() == 0
    assert relative_error(folded(x), expected) < 1e-5


def test_a_fold_that_raises_half_way_leaves_the_network_whole():
    class Refuses(nn.Conv2d):
        def fuse(self):
            raise RuntimeError('not this one')

    model = calibrated(nn.Sequential(WSConv2d(4, 4, 3), nn.BatchNorm2d(4), Refuses(4, 4, 3)), 1, 4, 9, 9)
    x = an_input(torch.float32)
    expected, layers = model(x), list(model)
    with pytest.raises(RuntimeError, match='not this one'):
        timm.utils.reparameterize_model(model, inplace=True)
    assert list(model) == layers
    assert torch.equal(model(x), expected)


def test_folding_of_a_layer_under_two_names_and_of_a_pruned_one():
    shared = WSConv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4), CWNConv2d(4, 4, 3), nn.BatchNorm2d(4))
    nn.utils.prune.l1_unstructured(model[4], 'weight', 0.5)
    nn.utils.prune.l1_unstructured(model[4], 'bias', 1)
    with torch.no_grad():
        calibrated(model, 1, 4, 9, 9)
        expected = model(an_input(torch.float32)).double()
        # A checkpoint that is loaded changes the parameter, not yet the weight that pruning makes of it.
        state = copy.deepcopy(model.state_dict())
        nn.init.normal_(model[4].weight_orig)
    model(an_input(torch.float32))
    model.load_state_dict(state)
    with torch.no_grad():
        folded = timm.utils.reparameterize_model(model)
        assert not timm_aws.normalized_weights(folded)
        assert folded[0] is folded[2]
        assert [type(m) for m in folded] == [nn.Conv2d, nn.BatchNorm2d] * 2 + [nn.Conv2d, nn.Identity]
        assert relative_error(folded(an_input(torch.float32)), expected) < 1e-5
        assert list(folded[4].state_dict()) == ['weight', 'bias']


def test_norms_of_a_network_in_evaluation_are_folded_within_a_wrapper_in_training():
    network = calibrated(timm.create_model('test_ws_resnet', num_classes=2), 1, 3, 32, 32)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wrapper = nn.Sequential(network, nn.Softmax(1))
    expected = wrapper(x).detach().double()
    folded = timm.utils.reparameterize_model(wrapper)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert folded.training and not folded[0].training
    assert relative_error(folded(x).detach(), expected) < 1e-4
