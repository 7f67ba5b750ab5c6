"""A device that is none: its tensors hold CPU data, and say that they are elsewhere.

Inside a `MockDevice` they behave as tensors on CUDA do where that differs from the CPU: they
refuse to be mixed with the CPU's, and to be drawn by its generators; what would make the host wait
is counted; and memory that nobody wrote holds NaN. So a test finds, without an accelerator, what
was left on the CPU, how often a loop waits, and what is read before it is written.

torch has room for one device that is written in Python (PrivateUse1). It is registered once for
the process, and counts as available only inside a `MockDevice`.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from tests.device.device_generator import (
    DeviceGenerator,
    PlainGenerator,
    refuse_other_generator,
)
from tests.device.host_waits import READ_BY_HOST, SIZED_BY_VALUES, HostWaits, asking_line

aten = torch.ops.aten
NAME = "mockgpu"
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.linear.default,
    aten.matmul.default,
    aten.embedding.default,
}
SCALARS = {
    aten.fill.Tensor,
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
}
"""Operations, beside the pointwise ones, that take a 0-dim tensor of the CPU."""
WRITES_BY_INDEX = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
UNWRITTEN = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operations whose result holds what the memory held before."""
BY_INDEX = {aten.index.Tensor, aten._unsafe_index.Tensor, *WRITES_BY_INDEX}


class _Module(_DummyBackendModule):
    """What stands at ``torch.mockgpu``."""

    def is_available(self) -> bool:
        return MockDevice.current is not None

    def device_count(self) -> int:
        return int(self.is_available())

    def empty_cache(self) -> None: ...


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return MockDevice.current is not None


class _Event:
    """An event of the device, which does all at once."""

    def __init__(self, device: torch.device, *, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        return 1000 * (later.seconds - self.seconds)


def _made_of_numbers(make: Any) -> Any:
    """``torch.tensor``, which reads each number of a list from the device, past the mode."""

    def tensor(data: Any, **options: Any) -> Tensor:
        listed = isinstance(data, list | tuple)
        return make(tree_map(_number, data) if listed else data, **options)  # type: ignore

    return tensor


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, DeviceTensor) else value


class DeviceTensor(Tensor):
    """A tensor that says it is on the device. data: what it holds, on the CPU."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.data_on_cpu = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return MockDevice.working().run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        if MockDevice.current is not None:
            MockDevice.current.waits.note("print")
        return f"DeviceTensor({self.data_on_cpu})"

    def tolist(self) -> Any:
        MockDevice.working().waits.note("tolist")
        return self.data_on_cpu.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.data_on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_on_cpu.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        copied = DeviceTensor(self.data_on_cpu.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied


class MockDevice(TorchDispatchMode):
    """Inside, there is an accelerator: the default device of torch's and accelerate's.

    float64: False refuses float64 on the device, as Apple's GPUs do.

    ``waits``: what made the host wait. ``synchronised``: how often somebody waited for all of the
    device's work, which is asked for and so is no fault. ``operations``: how many the device did.
    ``left_on_cpu``: matrix products that the CPU did, by the line that asked: a model's work.
    ``pinned``: the copies of tensors in pinned memory.
    """

    current: ClassVar[MockDevice | None] = None

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.waits = HostWaits()
        self.synchronised = 0
        self.operations = 0
        self.left_on_cpu: Counter[str] = Counter()
        self.pinned: list[Tensor] = []

    @classmethod
    def working(cls) -> MockDevice:
        if cls.current is None:
            raise RuntimeError(f"a tensor of {DEVICE} is used after its MockDevice ended")
        return cls.current

    def __enter__(self) -> MockDevice:
        MockDevice.current = self
        torch.Generator = DeviceGenerator  # type: ignore[misc]
        self._swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._environment = os.environ.get("ACCELERATE_TORCH_DEVICE")
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
        AcceleratorState._reset_state(reset_partial_state=True)
        _device_constructors()  # torch keeps what it finds at the first context of a device
        self._of_torch = torch.accelerator.synchronize, torch.Event, torch.tensor
        torch.tensor = _made_of_numbers(torch.tensor)
        torch.accelerator.synchronize = self._synchronise
        torch.Event = _Event  # type: ignore[misc, assignment]
        super().__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        torch.accelerator.synchronize, torch.Event, torch.tensor = self._of_torch  # type: ignore
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
        if self._environment is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = self._environment
        torch.__future__.set_swap_module_params_on_conversion(self._swapped)
        torch.Generator = PlainGenerator  # type: ignore[misc]
        MockDevice.current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check and count an operation, and let the CPU do it."""
        tensors = [*_tensors((args, kwargs))]
        ours = any(isinstance(each, DeviceTensor) for each in tensors)
        asked = kwargs.get("device")
        to_device = ours if asked is None else torch.device(asked).type == NAME
        refuse_other_generator(func, kwargs.get("generator"), NAME if to_device else "cpu")
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if not ours and not to_device:
            if func in PRODUCTS and tensors[0].device.type == "cpu":
                self.left_on_cpu[asking_line()[0]] += 1
            return func(*args, **kwargs)
        self.operations += 1
        inferred = torch.is_inference_mode_enabled() or any(each.is_inference() for each in tensors)
        if inferred and _is_composite(func):
            found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func is aten._fused_sdp_choice.default:
            return 0  # the plain formula
        self._count(func, args, kwargs, ours, to_device)
        if func not in (aten._to_copy.default, aten.copy_.default):
            _refuse_mixing(func, args, tensors)
        if asked is not None and to_device:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        found = func(*_mapped(_data, args), **_mapped(_data, kwargs))
        if func in UNWRITTEN:
            _spoil(found)
        if not to_device:
            return found
        self._refuse_float64(found)
        # a view of a tensor from before inference mode is one of before, too
        normal = func.is_view and not tensors[0].is_inference()
        with torch.inference_mode(torch.is_inference_mode_enabled() and not normal):
            found = _mapped(_on_device, found)
        made_here = func is aten._to_copy.default and not ours
        return found if made_here else return_and_correct_aliasing(func, args, kwargs, found)

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, DeviceTensor):
            return False
        place = tensor.untyped_storage().data_ptr()
        return any(place == each.untyped_storage().data_ptr() for each in self.pinned)

    def _synchronise(self, device: Any = None) -> None:
        self.synchronised += 1

    def _count(
        self, func: Any, args: Any, kwargs: dict[str, Any], ours: bool, to_device: bool
    ) -> None:
        """Note what makes the host wait."""
        if func is aten._to_copy.default and not (ours and to_device):
            if not (kwargs.get("non_blocking") and self._is_pinned(args[0])):
                self.waits.note("copy to device" if to_device else "copy to host")
        elif func is aten.copy_.default:
            target, source = (isinstance(each, DeviceTensor) for each in args[:2])
            ahead = (*args[2:], kwargs.get("non_blocking", False))[0] and self._is_pinned(args[1])
            if target != source and not ahead:
                self.waits.note("copy to device" if target else "copy to host")
        elif func in BY_INDEX:
            indices = [*_tensors(args[1])]
            fills = func in WRITES_BY_INDEX and len(indices) == 1 and not args[2].dim()
            if not fills and any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self.waits.note("mask index")
            if isinstance(args[0], DeviceTensor) and any(map(_of_cpu, indices)):
                self.waits.note("copy to device")
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.waits.note("repeat_interleave")
        elif func in READ_BY_HOST or func in SIZED_BY_VALUES:
            self.waits.note((READ_BY_HOST | SIZED_BY_VALUES)[func])

    def _refuse_float64(self, found: Any) -> None:
        wide = (torch.float64, torch.complex128)
        if not self.float64 and any(each.dtype in wide for each in _tensors(found)):
            raise TypeError(
                f"Cannot convert a {DEVICE} tensor to float64 dtype as the framework doesn't "
                "support float64. Please use float32 instead."
            )


def on_cpu(tensor: Tensor) -> Tensor:
    """What a tensor holds, for a test to look at: no wait."""
    return _data(tensor)


def _refuse_mixing(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises RuntimeError, as CUDA does, for tensors of both places."""
    cpus = [each for each in tensors if _of_cpu(each)]
    if func in BY_INDEX:
        if _of_cpu(args[0]):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        indices = {id(each) for each in _tensors(args[1])}
        cpus = [each for each in cpus if id(each) not in indices]
    written = [each for each in tensors if _of_cpu(each) and func._schema.is_mutable]
    takes_scalars = func in SCALARS or func in BY_INDEX or torch.Tag.pointwise in func.tags
    allowed = takes_scalars and not (written and written[0] is args[0])
    if any(each.dim() or not allowed for each in cpus):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({func}, cpu: {[list(each.shape) for each in cpus]})"
        )


def _spoil(made: Tensor) -> None:
    """Fill memory that nobody has written with what would show."""
    if made.is_floating_point():
        made.fill_(torch.nan)
    elif not made.is_complex() and made.dtype != torch.bool:
        made.fill_(torch.iinfo(made.dtype).max)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether autograd would have taken it apart, as it does outside of inference mode."""
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _of_cpu(tensor: Tensor) -> bool:
    return not isinstance(tensor, DeviceTensor) and tensor.device.type == "cpu"


def _data(tensor: Tensor) -> Tensor:
    return tensor.data_on_cpu if isinstance(tensor, DeviceTensor) else tensor


def _on_device(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, DeviceTensor) else DeviceTensor(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among an operation's arguments; torch's own walk knows more types, and takes longer."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors([*value.values()])


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An operation's arguments with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(change, each) for name, each in value.items()}
    return value


def _without_mode(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what torch asks of the device itself, past the mode."""
    return MockDevice.working().run(func, args, kwargs)


def _implemented(func: Any) -> Any:
    return lambda *args, **kwargs: _without_mode(func, *args, **kwargs)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
DEVICE = torch.device(NAME, 0)
_EVERY = torch.library.Library("_", "IMPL")
_EVERY.fallback(_without_mode, "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
for _name in ("empty_strided", "empty.memory_format", "copy_"):
    _base, _, _overload = _name.partition(".")
    _packet = getattr(aten, _base)
    _ATEN.impl(_name, _implemented(getattr(_packet, _overload or "default")), "PrivateUse1")
