"""The shrink of one weight against the slow reference."""
import pytest
import reference
import torch

from timm_aws.rule import NORMALIZATIONS, add_shrink, filter_length, shrink_multiplier


def _weight(dtype=torch.float32, offset=0.):
    torch.manual_seed(0)
    return (torch.randn(5, 3, 2, 4, dtype=torch.float64) * 0.05 + offset).to(dtype)


@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_filter_length_equals_reference(normalization, memory_format, dtype):
    weight = _weight(dtype).to(memory_format=memory_format)
    length = filter_length(weight, normalization)
    expected = [reference.filter_length(row.double().flatten().tolist(), normalization) for row in weight]
    assert length.shape == (5, 1, 1, 1)
    assert length.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(length.flatten().double(), torch.tensor(expected).double(), rtol=5e-7, atol=0)


@pytest.mark.parametrize('normalization', ['ws', 'cwn'])
def test_filter_length_does_not_cancel_where_the_mean_is_thirty_times_the_deviation(normalization):
    weight = _weight(offset=1.5)
    expected = [reference.filter_length(row.double().flatten().tolist(), normalization) for row in weight]
    length = filter_length(weight, normalization).flatten().double()
    torch.testing.assert_close(length, torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize('shape', [(4, 7), (4, 7, 3), (4, 2, 3, 2, 2)])
def test_filter_length_takes_any_number_of_dimensions(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    expected = [reference.filter_length(row.flatten().tolist(), 'ws') for row in weight]
    torch.testing.assert_close(filter_length(weight, 'ws').flatten(), torch.tensor(expected).double())


def test_multiplier_stops_at_zero():
    assert shrink_multiplier(torch.tensor([[1.], [0.25]]), lr=0.5, alpha=4.).tolist() == [[0.], [0.5]]


def test_add_shrink_leaves_gradient_and_weight_alone_and_keeps_the_format_of_the_weight():
    weight = _weight().to(memory_format=torch.channels_last)
    grad = torch.randn(weight.shape)
    before = weight.clone(), grad.clone()
    out = add_shrink(grad, weight, filter_length(weight, 'ws'), alpha=2.)
    assert torch.equal(weight, before[0])
    assert torch.equal(grad, before[1])
    assert out.stride() == weight.stride()
    torch.testing.assert_close(out, grad + 2. * filter_length(weight, 'ws') * weight)
