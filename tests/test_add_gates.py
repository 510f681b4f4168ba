"""The start of ws_seresnet50's training: it computes what the trained ws_resnet50 computes, and its gates learn."""
import sys

import add_gates
import pytest
import timm
import torch
from outputs import ROOT

import timm_aws  # noqa: F401  # registers the models

FOLDER = ROOT / 'weights' / 'ws_resnet50.aws_tin200'


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """The folder that the script writes."""
    output = tmp_path_factory.mktemp('start')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['add_gates.py', str(FOLDER), str(output)])
        add_gates.main()
    return output / FOLDER.name


@pytest.fixture
def model(start):
    """The network as train.py's --initial-checkpoint makes it."""
    return timm.create_model('ws_seresnet50', num_classes=200, checkpoint_path=str(start / 'model.safetensors'))


def test_at_the_start_the_outputs_are_those_of_the_network_without_gates(model):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = timm.create_model('ws_resnet50_aws', pretrained=True).eval()(images)
        assert torch.equal(model.eval()(images), expected)  # doubled and halved: no bit is lost


def test_every_gate_is_a_half_and_learns_from_the_first_step(model):
    gates = []
    for block in [*model.layer1, *model.layer2, *model.layer3, *model.layer4]:
        block.se.gate.register_forward_hook(lambda module, inputs, output: gates.append(output.detach()))
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert len(gates) == 16 and all((gate == 0.5).all() for gate in gates)
    assert all(block.se.fc2.weight.grad.abs().sum() > 0 for block in [*model.layer1, *model.layer4])


def test_the_folder_tells_export_where_the_weights_come_from(start):
    for name in ('config.json', 'results.json'):
        assert (start / name).read_bytes() == (FOLDER / name).read_bytes()
