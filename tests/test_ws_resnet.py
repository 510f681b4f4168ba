"""The models: equal to timm's twins in everything but the normalization, and at home in timm's interfaces."""
import pytest
import timm
import torch
import torch.nn as nn
from timm.models.resnet import ResNet

import timm_aws
from timm_aws import CWNConv2d, WNConv2d, WSConv2d

TWINS = {
    'ws_resnet18': 'resnet18',
    'ws_resnet34': 'resnet34',
    'ws_resnet50': 'resnet50',
    'ws_resnet101': 'resnet101',
    'ws_resnet152': 'resnet152',
    'ws_resnext50': 'resnext50_32x4d',
    'ws_resnext101': 'resnext101_32x4d',
    'ws_seresnet50': 'seresnet50',
    'ws_seresnet101': 'seresnet101',
    'wn_resnet50': 'resnet50',
    'cwn_resnet50': 'resnet50',
    'test_ws_resnet': 'test_resnet',
}
CONVS = {'ws': WSConv2d, 'wn': WNConv2d, 'cwn': CWNConv2d}


def _plain_convs(model):
    return {name for name, module in model.named_modules() if type(module) is nn.Conv2d}


def test_every_model_has_a_twin():
    assert {name for name in timm_aws.list_models() if not name.endswith('_aws')} == set(TWINS)
    assert timm.list_models('ws_resnet34', include_tags=True) == ['ws_resnet34.untrained']
    assert timm.models.get_pretrained_cfg('ws_resnet50').tag == 'untrained', 'of several tags this is the default'


@pytest.mark.parametrize('name', TWINS)
def test_keys_shapes_and_counts_equal_the_twin(name):
    with torch.device('meta'):
        ours, twin = timm.create_model(name), timm.create_model(TWINS[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in twin.parameters())
    assert ours.feature_info == twin.feature_info
    assert ours.group_matcher() == twin.group_matcher()
    left = {n for n in _plain_convs(twin) if '.se.' in n}
    assert _plain_convs(ours) == left
    kind = CONVS['ws' if 'ws_' in name else name.split('_')[0]]
    assert sum(type(m) is kind for m in ours.modules()) == len(_plain_convs(twin)) - len(left)


@pytest.mark.parametrize('name', ['ws_resnet18', 'ws_seresnet50', 'test_ws_resnet'])
def test_weights_load_strictly_both_ways(name):
    ours, twin = timm.create_model(name), timm.create_model(TWINS[name])
    ours.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(ours.state_dict(), strict=True)


def test_initialization_draws_the_same_numbers_as_the_twin():
    torch.manual_seed(0)
    ours = timm.create_model('ws_resnet18')
    torch.manual_seed(0)
    twin = timm.create_model('resnet18')
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), twin.parameters()))


def test_output_is_that_of_the_twin_with_standardized_weights():
    torch.manual_seed(0)
    ours, twin = timm.create_model('test_ws_resnet'), timm.create_model('test_resnet')
    state = dict(ours.state_dict())
    for name in timm_aws.normalized_weights(ours):
        std, mean = torch.std_mean(state[name], dim=(1, 2, 3), correction=0, keepdim=True)
        state[name] = (state[name] - mean) / std
    twin.load_state_dict(state)
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kwargs', [
    {'num_classes': 0},
    {'num_classes': 10, 'in_chans': 1},
    {'global_pool': 'catavgmax'},
    {'output_stride': 8},
    {'drop_rate': 0.1, 'drop_path_rate': 0.1, 'drop_block_rate': 0.1},
    {'norm_layer': 'groupnorm'},
    {'norm_layer': 'layernorm2d'},
    {'act_layer': 'silu', 'zero_init_last': False},
    {'aa_layer': timm.layers.BlurPool2d},
    {'replace_stem_pool': True, 'stem_type': 'deep_tiered', 'stem_width': 32},
    {'avg_down': True, 'down_kernel_size': 3},
    {'block_args': {'attn_layer': 'eca'}},
    {'block_args': {'attn_layer': 'cbam'}},
    {'normalization': 'cwn'},
])
def test_keywords_of_timms_resnet(kwargs):
    """All but those that no norm follows are normalized: attention's own convolutions."""
    model = timm.create_model('ws_resnet18', **kwargs).train()
    twin = timm.create_model('resnet18', **{k: v for k, v in kwargs.items() if k != 'normalization'})
    assert list(model.state_dict()) == list(twin.state_dict())
    assert _plain_convs(model) <= {n for n in _plain_convs(twin) if '.se.' in n}
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64)
    assert model(x).shape == twin(x).shape
    model.reset_classifier(5, 'max')
    assert model(x).shape == (2, 5)
    conv = {'ws': WSConv2d, 'cwn': CWNConv2d}[kwargs.get('normalization', 'ws')]
    assert type(model.layer1[0].conv1) is conv


def test_features_only_keeps_the_normalized_layers():
    model = timm.create_model('ws_resnet18', features_only=True, out_indices=(1, 3))
    assert [f.shape for f in model(torch.randn(1, 3, 64, 64))] == [(1, 64, 16, 16), (1, 256, 4, 4)]
    assert len(timm_aws.normalized_weights(model)) == 15  # the stem and three stages


def test_gradient_checkpointing_gives_the_same_gradients():
    model = timm.create_model('test_ws_resnet').double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second)


def test_forward_intermediates_end_in_the_features():
    model = timm.create_model('ws_resnet18').eval()
    x = torch.randn(1, 3, 64, 64)
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [i.shape[1] for i in intermediates] == [64, 64, 128, 256, 512]


def test_cfg_and_missing_weights():
    model = timm.create_model('ws_resnet50')
    assert isinstance(model, ResNet)
    assert model.pretrained_cfg['architecture'] == 'ws_resnet50'
    assert model.pretrained_cfg['input_size'] == (3, 224, 224)
    assert model.pretrained_cfg['paper_ids'] == 'doi:10.1609/aaai.v34i04.5904'
    with pytest.raises(RuntimeError, match='No pretrained weights exist for ws_resnet50'):
        timm.create_model('ws_resnet50', pretrained=True)


@pytest.mark.parametrize('in_chans', [4, 5])
def test_a_pretrained_stem_gives_the_same_for_repeated_channels(in_chans):
    trained, other = (
        timm.create_model('ws_resnet50_aws', pretrained=True, in_chans=chans).eval() for chans in (3, in_chans))
    x = torch.randn(2, 3, 64, 64)
    expected = trained.bn1(trained.conv1(x))
    actual = other.bn1(other.conv1(torch.cat([x, x], 1)[:, :in_chans]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_unknown_normalization_raises():
    with pytest.raises(ValueError, match="'bn', choose one of"):
        timm.create_model('ws_resnet18', normalization='bn')


@pytest.mark.parametrize('normalization', ['ws', 'wn', 'cwn'])
def test_unfolded_model_exports_to_onnx(tmp_path, normalization):
    onnx = pytest.importorskip('onnx')
    model = timm.create_model('test_ws_resnet', normalization=normalization).eval()
    torch.onnx.export(model, (torch.randn(1, 3, 64, 64),), str(tmp_path / 'm.onnx'), dynamo=False)
    onnx.checker.check_model(onnx.load(tmp_path / 'm.onnx'))


def test_weights_of_one_normalization_are_not_loaded_into_another():
    with pytest.raises(ValueError, match=r"^The weights of ws_resnet50\.aws_tin200 were trained with 'ws', not with "
                                         r"normalization='wn': leave it out, then call timm_aws\.convert"):
        timm.create_model('ws_resnet50_aws', pretrained=True, normalization='wn')


def test_folded_model_exports_to_onnx_as_plain_convolutions(tmp_path):
    onnx = pytest.importorskip('onnx')
    model = timm.utils.reparameterize_model(timm.create_model('test_ws_resnet').eval())
    torch.onnx.export(model, (torch.randn(1, 3, 64, 64),), str(tmp_path / 'm.onnx'), dynamo=False)
    kinds = {node.op_type for node in onnx.load(tmp_path / 'm.onnx').graph.node}
    assert 'Conv' in kinds
    assert not {'BatchNormalization', 'LayerNormalization', 'ReduceMean'} & kinds
