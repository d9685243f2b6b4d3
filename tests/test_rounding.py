"""Weight rounding against naive float64 versions and against what it promises."""

import pytest
import torch

from qdiff_engine import numerics
from qdiff_engine.rounding import _DAMP, gptq, nearest, search_scale, second_moments


def _correlated(vectors: int, k: int, seed: int = 0) -> torch.Tensor:
    """Inputs [P, K] whose channels share directions and have unequal sizes, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(max(2, k // 4), k, generator=generator)
    shared = torch.randn(vectors, len(mixing), generator=generator) @ mixing
    size = torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]
    return (shared + 0.3 * torch.randn(vectors, k, generator=generator)) * size


def _output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((weight - rounded).double() @ inputs.double().T).square().mean())


def _naive_gptq(weight: torch.Tensor, scale: torch.Tensor, inputs: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ by its definition: solve for the best update of the remaining weights after every column, in float64."""
    low, high = numerics.weight_range(bits)
    x = inputs.double()
    hessian = x.T @ x / len(x)
    hessian += _DAMP * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    remaining = torch.argsort((x * x).mean(0), descending=True, stable=True).tolist()
    w, values = weight.double().clone(), torch.zeros_like(weight, dtype=torch.int8)
    while remaining:
        k = remaining[0]
        q = torch.round(w[:, k] / scale.double()).clamp(low, high)
        values[:, k] = q.to(torch.int8)
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        error = (w[:, k] - q * scale.double()) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 17), (8, 63), (5, 200)])
def test_gptq_equals_its_definition(n: int, k: int, bits: int) -> None:
    weight, inputs = torch.randn(n, k), _correlated(3 * k + 8, k)
    result = gptq(weight, bits, inputs)
    expected = _naive_gptq(weight, result.scale, inputs, bits)
    differing = (result.values != expected).float().mean()
    assert differing <= 0.002, "float32 sweeps may see a rounding tie differently, and nothing else"


def test_gptq_with_a_hessian_of_more_vectors_than_it_is_given() -> None:
    weight, inputs = torch.randn(4, 60), _correlated(400, 60)
    few = inputs[:30]  # fewer than K: their own second moments would not do
    result = gptq(weight, 4, few, second_moments(inputs))
    assert torch.equal(result.scale, search_scale(weight, 4, few))
    differing = (result.values != _naive_gptq(weight, result.scale, inputs, 4)).float().mean()
    assert differing <= 0.005, "float32 sweeps may see a rounding tie differently, and nothing else"


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_has_less_output_error_than_nearest(bits: int) -> None:
    weight, inputs = torch.randn(16, 96), _correlated(1000, 96)
    errors = [_output_error(weight, f(weight, bits, inputs).dequantize(), inputs) for f in (gptq, nearest)]
    assert errors[0] * 1.5 < errors[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scale_is_never_worse_than_the_full_range_and_mostly_better(bits: int) -> None:
    weight, inputs = torch.randn(12, 40), _correlated(200, 40)
    full = weight.abs().amax(1) / numerics.weight_range(bits)[1]
    for given in (None, inputs):
        scale = search_scale(weight, bits, given)
        probe = torch.eye(40) if given is None else given

        def loss(s: torch.Tensor, probe: torch.Tensor = probe) -> torch.Tensor:
            error = numerics.quantize_weight(weight, s, bits).float() * s[:, None] - weight
            return (error @ probe.T).square().sum(1)

        assert bool((loss(scale) <= loss(full) * (1 + 1e-5)).all())
        assert float(loss(scale).sum()) < (0.9 if bits == 4 else 0.995) * float(loss(full).sum())


def test_zero_and_tiny_weights_are_defined() -> None:
    weight = torch.zeros(3, 2, 3, 3)
    weight[1] = 1e-42
    weight[2] = torch.randn(2, 3, 3)
    for rounder in (nearest, gptq):
        result = rounder(weight, 4, torch.randn(50, 18))
        assert bool((result.values[:2] == 0).all())
        assert bool((result.scale > 0).all())


def test_gptq_survives_dead_and_identical_channels() -> None:
    inputs = torch.randn(64, 1).expand(64, 12).clone()
    inputs[:, 5:] = 0
    result = gptq(torch.randn(4, 12), 4, inputs)
    assert bool(torch.isfinite(result.dequantize()).all())
