"""Recalibration: the statistics of batch norms, estimated from images."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_networks import calibrated, relative_error

import timm_aws


def _network_to_recalibrate():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return model.train()


@pytest.mark.parametrize('as_batch', [lambda x: x, lambda x: (x, torch.zeros(4)), lambda x: [x.double(), {}]])
def test_recalibrate_averages_the_statistics_of_batches(as_batch):
    model = _network_to_recalibrate()
    batches = torch.randn(3, 4, 3, 9, 9)
    with torch.no_grad():
        model[1].running_mean.fill_(7)
        assert timm_aws.recalibrate(model, map(as_batch, batches), batches=2) is model
        outputs = [model[0](x) for x in batches[:2]]
        variances, means = zip(*(torch.var_mean(y, (0, 2, 3)) for y in outputs))
        torch.testing.assert_close(model[1].running_mean, sum(means) / 2)
        torch.testing.assert_close(model[1].running_var, sum(variances) / 2)
        # Without dropout, as in evaluation.
        hidden = [F.batch_norm(y, None, None, training=True) for y in outputs]
        torch.testing.assert_close(model[4].running_mean, sum(model[3](y).mean((0, 2, 3)) for y in hidden) / 2)
    assert all(module.training for module in model.modules())
    assert [model[1].momentum, model[4].momentum] == [0.1, 0.1]


def test_recalibrate_leaves_frozen_norms_and_the_modes_of_everything():
    model = _network_to_recalibrate()
    model[1].eval()
    frozen = copy.deepcopy(model[1].state_dict())

    def loader():
        yield torch.randn(4, 3, 9, 9)
        raise OSError('no such image')

    with pytest.raises(OSError, match='no such image'):
        timm_aws.recalibrate(model, loader())
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model[4].momentum == 0.1
    assert all(torch.equal(value, frozen[name]) for name, value in model[1].state_dict().items())
    assert model[4].running_mean.any()


def test_recalibrate_refuses_what_it_cannot_do():
    model = _network_to_recalibrate()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'2 batch norms.*from no images'):
        timm_aws.recalibrate(model, [])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match='Conv2d has 0 batch norms'):
        timm_aws.recalibrate(nn.Conv2d(3, 4, 3), [torch.randn(4, 3, 9, 9)])


def test_recalibration_brings_a_converted_network_back():
    """The filters have small means: what is left of the error is theirs."""
    model = calibrated(timm.create_model('test_resnet', num_classes=7), 1, 3, 64, 64)
    images = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 4:
                param.sub_(0.9 * param.mean((1, 2, 3), keepdim=True))
        timm_aws.recalibrate(model, [images])
        expected = model.eval()(images).double()
        with pytest.warns(UserWarning, match='is trained'):
            timm_aws.convert(model, 'ws')
        converted = relative_error(model(images), expected)
        timm_aws.recalibrate(model, [images])
        assert relative_error(model(images), expected) < 0.5 * converted
