"""How exact the best classes of a teacher are, and what they cost on disk."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcore.components.registry import installed
from kdcore.data.best_classes import CachedLogits, best_classes
from kdcore.data.caches.manifest import Manifest
from kdcore.data.caches.teacher_cache import TeacherCache, write_shard
from kdcore.method.protocols import Gate
from kdcore.method.records import LogitBatch
from kdcore.models.assembly import Assembly
from kdcore.specs.parts.training import MethodSpec
from kdcore.training.method import build_objective


def stored(logits: Tensor, k: int) -> CachedLogits:
    ids, logp, tail = best_classes(logits, k)
    return CachedLogits(ids, logp.float(), tail.float(), logits.shape[1])


def made(cached: CachedLogits) -> Tensor:
    return cached.logits(slice(None))


def peaked(count: int = 400, classes: int = 300, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits from flat to so peaked that the tail is nothing."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.01, 20, count)[:, None]
    return (torch.randn(count, classes, generator=generator) * scale).to(dtype).float()


@pytest.mark.parametrize("k", [2, 8, 32, 299, 300])
def test_the_best_classes_are_exact_and_the_others_share_their_mass(k: int) -> None:
    logits = peaked()
    logp, found = logits.double().log_softmax(-1), made(stored(logits, k)).double()
    best, ids = logp.topk(k)
    others = torch.ones_like(logp, dtype=torch.bool).scatter(1, ids, False)
    # 11 bits, then steps between equals; the errors of all add up in the first probability
    close = {"rtol": 2.0**-11 + k * 2.0**-22, "atol": 1e-6}
    torch.testing.assert_close(found.gather(1, ids)[:, 1:], best[:, 1:], **close)
    first = found.gather(1, ids)[:, 0].exp()
    torch.testing.assert_close(first, best[:, 0].exp(), rtol=0, atol=3e-3)
    mass = logp.exp().where(others, 0).sum(-1)
    torch.testing.assert_close(found.exp().where(others, 0).sum(-1), mass, rtol=4e-3, atol=1e-6)
    for row, other in zip(found, others, strict=True):
        assert len(row[other].unique()) <= 1


@pytest.mark.parametrize("k", [2, 8, 32, 300])
def test_the_kl_to_the_cached_distribution_is_bounded_by_the_tail(k: int) -> None:
    logits = peaked()
    logp = logits.double().log_softmax(-1)
    found = made(stored(logits, k)).double().log_softmax(-1)
    distance = (logp.exp() * (logp - found)).sum(-1)
    others = torch.ones_like(logp, dtype=torch.bool).scatter(1, logp.topk(k).indices, False)
    mass = logp.exp().where(others, 0).sum(-1)
    tail = (logp - mass.log()[:, None]).where(others, -torch.inf)
    even = tail + math.log(max(1, 300 - k))
    exact = mass * (tail.exp() * even).where(others & (mass > 0)[:, None], 0).sum(-1)
    torch.testing.assert_close(distance, exact, rtol=0, atol=2e-3)
    assert (distance <= mass * math.log(max(1, 300 - k)) + 2e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", [1, 2, 5, 7])
def test_the_greedy_gate_cannot_tell_a_cache_from_the_teacher(
    needed: int, dtype: torch.dtype
) -> None:
    """Also where float16 makes equal what differs, and where a coarse teacher has true ties."""
    spec = MethodSpec.model_validate({"gates": [{"name": "speckd", "k": needed}]})
    (gate,) = build_objective(spec, Assembly(installed())).gates.values()
    assert isinstance(gate, Gate)
    live = peaked(2000, dtype=dtype)
    student = live + torch.randn(live.shape, generator=torch.Generator().manual_seed(1)) * 2
    seen = [
        LogitBatch(
            student[None],
            logits[None],
            torch.zeros(1, 2000, dtype=torch.int64),
            torch.ones(1, 2000, dtype=torch.bool),
            0.0,
            torch.Generator(),
            torch.arange(2000)[None],
        )
        for logits in (live, made(stored(live, 8)))
    ]
    assert 0.1 < gate(seen[0]).mean() < 0.9
    assert torch.equal(gate(seen[0]), gate(seen[1]))


@pytest.mark.parametrize(("classes", "most"), [(1000, 130), (70_000, 194)])
def test_bytes_a_token_on_disk(tmp_path: Path, classes: int, most: int) -> None:
    manifest = Manifest(1, "", "", "", 1, 32, classes, "uint16" if classes < 2**16 else "int32", "")
    best = best_classes(peaked(50, classes), 32)
    rows = [(bytes([n]) * 16, 50) for n in range(100)]
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    write_shard(tmp_path, manifest, rows, [best] * 100)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    cache = TeacherCache(tmp_path)
    assert cache.positions == 5000
    assert size / cache.positions <= most
    read = cache.logits([rows[3][0], rows[7][0]], torch.device("cpu"))
    assert torch.equal(read.ids, torch.cat([best[0]] * 2))
    assert torch.equal(read.logp.half(), torch.cat([best[1]] * 2))
