"""The shrink of a whole group of weights in one launch on a GPU, in Triton.

Taken weight by weight, the shrink is six launches or more for each of the 53 weights of a ResNet-50, where torch's own
update is a handful for all of them. Here one program measures and shrinks one filter, of whichever weight. It finds the
filter in a table on the device: address of the filter, address of what is shrunk, number of elements. rule.py has the
equations, and `_shrink_at_once` in optimizers.py says what is shrunk in which reading.
"""
import torch
import triton
import triton.language as tl

from .rule import NORMALIZATIONS

__all__ = ['GroupShrink', 'fits']

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 1024  # elements that a program reads at once


@triton.jit
def _shrink_filter(
        table,
        alpha,
        lr,
        dtype: tl.constexpr,
        centered: tl.constexpr,
        per_element: tl.constexpr,
        decoupled: tl.constexpr,
        lr_on_device: tl.constexpr,
        block: tl.constexpr,
):
    """Measures one filter in float32, and adds alpha * length * W to its target or shrinks W itself."""
    row = table + 3 * tl.program_id(0).to(tl.int64)
    weight = tl.load(row).to(tl.pointer_type(dtype))
    target = tl.load(row + 1).to(tl.pointer_type(dtype))
    size = tl.load(row + 2)
    lanes = tl.arange(0, block)

    # In two passes, the mean first: the difference of two moments would cancel where the mean is large.
    mean = 0.
    if centered:
        sums = tl.full((block,), 0., tl.float32)
        for start in range(0, size, block):
            sums += tl.load(weight + start + lanes, start + lanes < size, 0.).to(tl.float32)
        mean = tl.sum(sums) / size
    sums = tl.full((block,), 0., tl.float32)
    for start in range(0, size, block):
        w = tl.load(weight + start + lanes, start + lanes < size, 0.).to(tl.float32)
        w = tl.where(start + lanes < size, w - mean, 0.)
        sums += w * w
    square = tl.sum(sums)
    length = tl.sqrt(square / size if per_element else square)

    if decoupled:
        rate = tl.load(lr).to(tl.float32) if lr_on_device else lr
        factor = tl.maximum(1 - rate * alpha * length, 0., propagate_nan=tl.PropagateNan.ALL)
    else:
        factor = alpha * length
    for start in range(0, size, block):
        inside = start + lanes < size
        w = tl.load(weight + start + lanes, inside).to(tl.float32)
        if decoupled:
            tl.store(target + start + lanes, (factor * w).to(dtype), inside)
        else:
            out = tl.load(target + start + lanes, inside).to(tl.float32) + factor * w
            tl.store(target + start + lanes, out.to(dtype), inside)


def fits(weight: torch.Tensor) -> bool:
    """Whether the kernel takes a weight: in a type that it knows, each filter one block of memory without gaps."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim, torch.contiguous_format)
    return (type(weight) is torch.nn.Parameter and weight.dtype in TYPES and weight.numel() > 0
            and (weight.is_contiguous() or weight.is_contiguous(memory_format=last)))


class GroupShrink:
    """Shrinks weights of one dtype on one device in one launch, and keeps the table of their filters.

    The table is made at the first call, and again when a tensor has moved; no call waits for the device. A CUDA graph
    can be captured of a call that finds its table made, and is good while no tensor moves.
    """
    def __init__(self) -> None:
        self._made_for: list[tuple] = []
        self._copies: list[torch.Tensor] = []

    def copy(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies gradients, in the memory format of their weights, to where the table finds them at each step."""
        kinds, copied = (
            [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
            for tensors in (grads, self._copies))
        if kinds != copied:
            self._copies = [torch.empty_like(grad) for grad in grads]
        torch._foreach_copy_(self._copies, grads)
        return self._copies

    def __call__(
            self,
            weights: list[torch.Tensor],
            targets: list[torch.Tensor],
            normalization: str,
            alpha: float,
            lr: float | torch.Tensor | None = None,
    ) -> None:
        """Multiplies weights by 1 - lr * alpha * length, at least 0, or adds alpha * length * W to their targets.

        Args:
            weights: Weights that `fits` holds for.
            targets: What is added to, in dtype and memory format of the weights; the weights to be multiplied.
            normalization: 'ws', 'wn' or 'cwn'.
            alpha: Shrink coefficient, times any other number.
            lr: Learning rate, a number or a tensor of one element; None to add.

        Raises:
            RuntimeError: If a CUDA graph is being captured and the table is still to be made.
        """
        made_for = [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in (*weights, *targets)]
        if made_for != self._made_for:
            self._table, self._made_for = _table(weights, targets), made_for
            if targets is not self._copies:
                self._copies = []  # of the first step, before there was a momentum buffer
        with torch.cuda.device_of(weights[0]):
            _shrink_filter[(len(self._table),)](
                self._table,
                float(alpha),
                lr.to(weights[0].device, non_blocking=True) if isinstance(lr, torch.Tensor) else float(lr or 0),
                dtype=TYPES[weights[0].dtype],
                centered=NORMALIZATIONS[normalization].centered,
                per_element=NORMALIZATIONS[normalization].per_element,
                decoupled=lr is not None,
                lr_on_device=isinstance(lr, torch.Tensor),
                block=BLOCK,
            )


def _table(weights: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Returns (filters, 3) on the device: address of a filter, address of its target, number of its elements."""
    device, rows = weights[0].device, []
    if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        raise RuntimeError('There is no table of the filters yet: take two steps before the capture of a CUDA graph.')
    for weight, target in zip(weights, targets):
        size = weight.numel() // len(weight)
        start = torch.arange(len(weight), device='cpu') * (size * weight.itemsize)
        columns = start + weight.data_ptr(), start + target.data_ptr(), torch.full_like(start, size)
        rows.append(torch.stack(columns, 1))
    table = torch.cat(rows)
    return table.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else table
