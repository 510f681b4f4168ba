"""The weight gradient of scripts/small_maps.py, against torch's own."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_maps import conv2d

SCRIPT = Path(__file__).parent.parent / 'scripts' / 'small_maps.py'


def gradients(convolution, size, kernel, stride, padding, **options):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(5, 6, *size, dtype=torch.double, generator=generator, requires_grad=True)
    weight = torch.randn(
        8, 6 // options.get('groups', 1), *kernel, dtype=torch.double, generator=generator, requires_grad=True)
    out = convolution(input, weight, stride=stride, padding=padding, **options)
    upstream = torch.randn(out.shape, dtype=torch.double, generator=generator)
    return out.grad_fn.name(), (out, *torch.autograd.grad(out, (input, weight), upstream))


@pytest.mark.parametrize(('kernel', 'stride', 'padding'), [
    ((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 1), 1, 0), ((1, 1), 2, 0), ((7, 7), 2, 3), ((3, 3), (1, 2), (2, 1)),
    ((1, 5), (3, 1), (0, 2)), ((3, 3), 3, 2), ((5, 5), 1, 4), ((3, 3), 1, 0)])
@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 4), (4, 4), (1, 7)])
def test_gradients_are_those_of_torch(size, kernel, stride, padding):
    if any(length + 2 * (padding[axis] if isinstance(padding, tuple) else padding) < kernel[axis]
           for axis, length in enumerate(size)):
        pytest.skip('the kernel does not fit')
    _, expected = gradients(torch.conv2d, size, kernel, stride, padding)
    name, found = gradients(conv2d, size, kernel, stride, padding)
    assert ('_Convolution' in name) == (expected[0].shape[2:].numel() <= 16)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('size', 'options'), [
    ((8, 8), {}), ((2, 2), {'groups': 2}), ((4, 4), {'dilation': 2}), ((2, 2), {'bias': torch.ones(8).double()})])
def test_the_rest_is_left_to_torch(size, options):
    name, found = gradients(conv2d, size, (3, 3), 1, 1, **options)
    assert name == 'ConvolutionBackward0'
    for one, other in zip(found, gradients(torch.conv2d, size, (3, 3), 1, 1, **options)[1]):
        assert torch.equal(one, other)


def test_autocast_is_left_to_torch():
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out = conv2d(torch.randn(2, 4, 2, 2), weight, padding=1)
    assert (out.dtype, out.grad_fn.name()) == (torch.bfloat16, 'ConvolutionBackward0')


def test_script_trains_with_it(tmp_path):
    """A layer of our own and one of torch's; argv is the script's own."""
    (tmp_path / 'script.py').write_text('''
import sys, torch, timm_aws
for layer in (timm_aws.WSConv2d(4, 4, 3, bias=False), torch.nn.Conv2d(4, 4, 3, bias=False)):
    print(sys.argv, layer(torch.randn(2, 4, 3, 3)).grad_fn.name())
''')
    done = subprocess.run(
        [sys.executable, str(SCRIPT), 'script.py', '--x'], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "['script.py', '--x'] _ConvolutionBackward\n" * 2
