"""The update rules as slow loops over Python floats (float64), one element at a time, to hold the fast paths against.

Written from the equations alone: Eq. 20 and 21 for the shrink, the formulas in torch's documentation for the rest.
"""
import math

import torch


def filter_length(elements: list[float], normalization: str) -> float:
    """Length of one filter, given as its elements."""
    if normalization == 'wn':
        return math.sqrt(math.fsum(w * w for w in elements))
    mean = math.fsum(elements) / len(elements)
    squares = math.fsum((w - mean) ** 2 for w in elements)
    return math.sqrt(squares / len(elements)) if normalization == 'ws' else math.sqrt(squares)


def normalized(elements: list[float], normalization: str) -> list[float]:
    """One filter, normalized."""
    mean = 0. if normalization == 'wn' else math.fsum(elements) / len(elements)
    length = filter_length(elements, normalization)
    return [(w - mean) / length for w in elements]


def _rows(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.detach().double().reshape(tensor.shape[0], -1).tolist()


def _shrink(filters, grads, lr, alpha, normalization, decoupled, maximize) -> list[list[float]]:
    """Applies the shrink, to the filters in place or to the gradients, which are returned in the sense of descent."""
    gammas = [alpha * filter_length(elements, normalization) for elements in filters]
    grads = [[-x if maximize else x for x in row] for row in grads]
    if not decoupled:
        return [[x + gamma * w for x, w in zip(row, ws)] for row, ws, gamma in zip(grads, filters, gammas)]
    for elements, gamma in zip(filters, gammas):
        elements[:] = [w * max(0., 1 - lr * gamma) for w in elements]
    return grads


def sgd(
        weight: torch.Tensor,
        grads: list[torch.Tensor],
        lrs: list[float],
        *,
        alpha: float,
        normalization: str,
        decoupled: bool,
        momentum: float = 0.,
        dampening: float = 0.,
        nesterov: bool = False,
        maximize: bool = False,
) -> torch.Tensor:
    """Takes one step for each gradient; returns the last weight in float64."""
    filters, buffers = _rows(weight), None
    for grad, lr in zip(grads, lrs):
        g = _shrink(filters, _rows(grad), lr, alpha, normalization, decoupled, maximize)
        if momentum == 0:
            buffers = g
        elif buffers is None:
            buffers = [list(row) for row in g]
        else:
            buffers = [
                [momentum * b + (1 - dampening) * x for b, x in zip(buffer, row)] for buffer, row in zip(buffers, g)]
        for elements, row, buffer in zip(filters, g, buffers):
            for i in range(len(elements)):
                elements[i] -= lr * (row[i] + momentum * buffer[i] if nesterov else buffer[i])
    return torch.tensor(filters, dtype=torch.float64).view(weight.shape)


def adam(
        weight: torch.Tensor,
        grads: list[torch.Tensor],
        lrs: list[float],
        *,
        alpha: float,
        normalization: str,
        decoupled: bool,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        maximize: bool = False,
) -> torch.Tensor:
    """Takes one step for each gradient; returns the last weight in float64."""
    filters = _rows(weight)
    m = [[0.] * len(elements) for elements in filters]
    v = [[0.] * len(elements) for elements in filters]
    v_max = [[0.] * len(elements) for elements in filters]
    for step, (grad, lr) in enumerate(zip(grads, lrs), start=1):
        g = _shrink(filters, _rows(grad), lr, alpha, normalization, decoupled, maximize)
        for f, row in enumerate(g):
            for i, x in enumerate(row):
                m[f][i] = betas[0] * m[f][i] + (1 - betas[0]) * x
                v[f][i] = betas[1] * v[f][i] + (1 - betas[1]) * x * x
                v_max[f][i] = max(v_max[f][i], v[f][i])
                second = (v_max if amsgrad else v)[f][i] / (1 - betas[1] ** step)
                filters[f][i] -= lr * m[f][i] / (1 - betas[0] ** step) / (math.sqrt(second) + eps)
    return torch.tensor(filters, dtype=torch.float64).view(weight.shape)
