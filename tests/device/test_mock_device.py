"""The mock device refuses what an accelerator refuses, and counts what makes the host wait."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional

from kdcore.models.device import put
from kdcore.training.momentum_optimizer import MomentumOptimizer
from kdcore_deepkd import DeepKDMomentum
from tests.device.host_waits import Wait
from tests.device.mock_device import DEVICE, DeviceTensor, MockDevice, on_cpu

MIXED = "Expected all tensors to be on the same device"
HERE = "tests/device/test_mock_device.py"


def ours() -> Tensor:
    return torch.arange(4.0, device=DEVICE)


MIXES: dict[str, Callable[[], Any]] = {
    "add": lambda: ours() + torch.ones(4),
    "add in place": lambda: torch.ones(4).add_(ours()),
    "add to a number of the cpu": lambda: torch.ones(()).add_(ours()[0]),
    "matmul": lambda: ours() @ torch.ones(4),
    "cat": lambda: torch.cat([ours(), torch.ones(4)]),
    "stack of numbers": lambda: torch.stack([ours()[0], torch.tensor(1.0)]),
    "where": lambda: torch.where(ours() > 1, ours(), torch.ones(4)),
    "gather": lambda: ours().gather(0, torch.tensor([0])),
    "write by mask": lambda: ours().index_put_((ours() > 1,), torch.ones(2)),
    "linear": lambda: functional.linear(ours(), torch.ones(3, 4)),
    "embedding": lambda: nn.Embedding(3, 4)(torch.tensor([1], device=DEVICE)),
    "a module's weight": lambda: nn.Linear(4, 1).to(DEVICE)(torch.ones(4)),
    "searchsorted": lambda: torch.searchsorted(ours(), torch.ones(1)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_tensors_of_two_devices_are_refused(
    device: MockDevice, mix: Callable[[], Any], inference: bool
) -> None:
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match=MIXED):
        mix()


def test_an_index_of_the_device_is_refused_by_a_tensor_of_the_cpu(device: MockDevice) -> None:
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        torch.ones(4)[torch.tensor([1, 2], device=DEVICE)]


def test_a_number_of_the_cpu_is_taken(device: MockDevice) -> None:
    one = torch.tensor(1.0)
    found = torch.where(ours() > one, ours() * one, one)
    found[found == 2] = one
    assert isinstance(found.masked_fill(found == 3, one), DeviceTensor)
    assert on_cpu(found).tolist() == [1, 1, 1, 3]
    assert not device.waits.found


def test_a_generator_belongs_to_one_device(device: MockDevice) -> None:
    with pytest.raises(RuntimeError, match="'mockgpu' device type for generator"):
        torch.rand(2, generator=torch.Generator().manual_seed(0), device=DEVICE)
    with pytest.raises(RuntimeError, match="'cpu' device type for generator"):
        torch.rand(2, generator=torch.Generator(DEVICE).manual_seed(0))
    drawn = torch.rand(2, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    same = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_cpu(drawn), same)


def _sliced(tensor: Tensor) -> Any:
    return range(int(tensor[1]))


WAITS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "item": ("item", lambda t: t[0].item()),
    "float": ("item", lambda t: float(t[0])),
    "bool": ("item", lambda t: bool((t > 1).any())),
    "if": ("item", lambda t: 1 if t[0] else 2),
    "tolist": ("tolist", lambda t: t.tolist()),
    "nonzero": ("nonzero", lambda t: t.nonzero()),
    "read by mask": ("mask index", lambda t: t[t > 1]),
    "write by mask": ("mask index", lambda t: t.index_put_((t > 2,), t[:1])),
    "cpu": ("copy to host", lambda t: t.cpu()),
    "to": ("copy to host", lambda t: t.to("cpu")),
    "copy": ("copy to host", lambda t: torch.empty(4).copy_(t)),
    "pageable": ("copy to device", lambda t: torch.ones(4).to(t.device, non_blocking=True)),
    "back": ("copy to device", lambda t: torch.ones(4).to(t.device)),
    "made of a list": ("copy to device", lambda t: torch.tensor([1, 2], device=t.device)),
    "made of numbers": ("item", lambda t: torch.tensor([0, t[0]])),
    "index of the cpu": ("copy to device", lambda t: t[torch.tensor([0, 1])]),
    "print": ("print", lambda t: str(t)),
    "unique": ("unique", lambda t: torch.unique(t)),
    "equal": ("equal", lambda t: torch.equal(t, t)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("what", "wait"), WAITS.values(), ids=WAITS.keys())
def test_a_wait_counts_once_at_its_line(
    device: MockDevice, what: str, wait: Callable[[Tensor], Any], inference: bool
) -> None:
    with torch.inference_mode(inference):
        tensor = ours()
        wait(tensor)
    line = inspect.getsourcelines(wait)[1]
    assert dict(device.waits.found) == {Wait(what, f"{HERE}:{line}"): 1}


def test_what_runs_ahead_of_the_host_is_no_wait(device: MockDevice) -> None:
    weight = ours().requires_grad_()
    loss = (weight * 2).cumsum(0).softmax(0).max()
    loss.backward()
    ours()[1:3].fill_(2.0)
    torch.arange(3, device=DEVICE)
    for inference in (False, True):
        with torch.inference_mode(inference):
            torch.ones(4).pin_memory().to(DEVICE, non_blocking=True)
    assert isinstance(weight.grad, DeviceTensor)
    assert not device.waits.found


def test_a_library_s_wait_is_told_from_ours(device: MockDevice) -> None:
    from transformers.trainer_pt_utils import nested_numpify

    nested_numpify(ours())
    (wait,) = device.waits.found
    assert wait.what == "copy to host"
    assert wait.where.startswith(HERE)
    assert (wait.through or "").startswith("transformers/trainer_pt_utils.py:")
    assert not device.waits.ours


def test_a_view_in_inference_mode_is_as_its_base(device: MockDevice) -> None:
    base = ours()
    with torch.inference_mode():
        assert not base[1:].is_inference()
        assert (base + 1)[1:].is_inference()


def test_what_nobody_wrote_shows(device: MockDevice) -> None:
    for unwritten in (torch.empty(2, device=DEVICE), ours().new_empty(2), torch.empty_like(ours())):
        assert on_cpu(unwritten).isnan().all()
    assert int(on_cpu(torch.empty(1, dtype=torch.int64, device=DEVICE))) > 2**40


def test_numpy_is_refused(device: MockDevice) -> None:
    with pytest.raises(TypeError, match="to numpy"):
        ours().numpy()


def test_float64_is_refused_where_the_device_has_none(device_without_float64: MockDevice) -> None:
    for widen in (
        lambda: ours().double(),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.ones(2, dtype=torch.float64).to(DEVICE),
        lambda: ours().sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            widen()
    assert torch.ones(2).double().dtype == torch.float64  # the CPU has it


def test_the_state_of_a_policy_is_loaded_where_there_is_no_float64(
    device_without_float64: MockDevice,
) -> None:
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    made = [
        MomentumOptimizer(torch.optim.SGD([weight], lr=0.1), DeepKDMomentum(mu=0.9)) for _ in "ab"
    ]
    made[0].backward({"task": weight.sum(), "kd": (weight**2).sum()})
    made[0].step()
    made[1].load_state_dict(made[0].state_dict())


def test_a_tensor_of_inference_mode_is_moved_outside_of_it(device: MockDevice) -> None:
    with torch.inference_mode():
        made = torch.arange(3)
    assert made.is_inference()
    assert made.to(DEVICE).device.type == torch.device(DEVICE).type


def test_float64_is_taken_elsewhere(device: MockDevice) -> None:
    assert ours().double().dtype == torch.float64


def test_a_module_moves_trains_and_is_copied(device: MockDevice) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    moved = copy.deepcopy(plain).to(DEVICE)
    for model, inputs in ((plain, torch.arange(4.0)), (moved, ours())):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(inputs).sum().backward()
        optimizer.step()
    for one, other in zip(plain.parameters(), copy.deepcopy(moved).parameters(), strict=True):
        assert other.device == DEVICE
        assert torch.equal(one, on_cpu(other))


def test_a_module_that_is_there_is_not_moved(device: MockDevice) -> None:
    """A quantised one would refuse, and the name of its device has a number that others lack."""
    there = SimpleNamespace(device=ours().device, to=pytest.fail)
    for place in (DEVICE, torch.device(DEVICE.type)):
        put(there, place)
    moves: list[torch.device] = []
    put(SimpleNamespace(device=torch.device("cpu"), to=moves.append), torch.device(DEVICE.type))
    assert moves == [torch.device(DEVICE.type)]


def test_it_is_there_inside_only() -> None:
    assert torch.accelerator.current_accelerator(check_available=True) is None
    with MockDevice():
        assert torch.accelerator.current_accelerator(check_available=True) is not None
        assert PartialState().device == DEVICE
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert PartialState().device == torch.device("cpu")
    assert not isinstance(torch.ones(1), DeviceTensor)
    assert torch.rand(1, generator=torch.Generator().manual_seed(0)).device.type == "cpu"
