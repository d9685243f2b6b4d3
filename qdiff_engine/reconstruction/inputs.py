"""What a layer multiplies over the learning set, as far as rounding needs it: mean, covariance, and a few vectors."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.inputs import multiplied, output_places
from ..graph.ir import Node

_MOST = 16384  # vectors that enter a layer's covariance
_PROBE = 512  # vectors kept as they are


@dataclass(frozen=True)
class SegmentInputs:
    """What a layer's K segment multiplies.

    Args:
        mean: float32 [K].
        vectors: float32 [P, K], a few of them without the mean.
        covariance: float64 [K, K], E[(x - mean)(x - mean)^T] over all that was seen; None where it was not measured.
    """

    mean: Tensor
    vectors: Tensor
    covariance: Tensor | None = None

    @classmethod
    def of(cls, vectors: Tensor) -> SegmentInputs:
        """From ``vectors`` [P, K], of any floating dtype."""
        mean = vectors.double().mean(0).float()
        return cls(mean, vectors.float() - mean)

    @classmethod
    def streamed(cls, batches: Iterable[Tensor], covariance: bool = True) -> SegmentInputs:
        """From float32 vectors [p, K] that come batch by batch; memory does not grow with their number."""
        total, products, origin, count = None, None, None, 0
        kept: list[Tensor] = []
        stride = 1  # between the vectors that are kept: every batch is heard alike
        for x in batches:
            origin = x.mean(0) if origin is None else origin  # near the mean: float32 products lose nothing
            moved = x - origin
            total = moved.double().sum(0) if total is None else total + moved.double().sum(0)
            if covariance:
                part = (moved.T @ moved).double()
                products = part if products is None else products.add_(part)
            some = x[-count % stride :: stride]
            kept.append(some if stride == 1 else some.clone())  # a view would keep the whole batch
            count += len(x)
            while sum(map(len, kept)) > 4 * _PROBE:
                kept, stride = [torch.cat(kept)[::2]], 2 * stride
        if total is None or origin is None:
            raise ValueError("batches must hold at least one vector, got none")
        offset = total / count
        mean = (origin.double() + offset).float()
        spread = None if products is None else products / count - torch.outer(offset, offset)
        return cls(mean, probe(torch.cat(kept), _PROBE) - mean, spread)


def probe(vectors: Tensor, most: int) -> Tensor:
    """At most ``most`` of ``vectors`` [P, K], evenly."""
    return vectors if len(vectors) <= most else vectors[torch.linspace(0, len(vectors) - 1, most).long()]


def layer_vectors(node: Node, segment: int, shape: torch.Size, batches: list[Tensor]) -> Iterator[Tensor]:
    """[p, K] float32, batch by batch: what a layer's K segment multiplies, at random places spread evenly.

    Args:
        node: the layer; ``shape``: of the segment's weight.
        batches: its inputs. All places are taken where there are no more than 16384.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{node.kwargs['layer']}:{segment}".encode()))
    totals = [output_places(node, x) for x in batches]
    share = min(1.0, _MOST / sum(totals))
    for x, total in zip(batches, totals, strict=True):
        places = torch.randperm(total, generator=generator)[: max(1, round(total * share))]
        yield multiplied(node, tuple(shape), x, places)
