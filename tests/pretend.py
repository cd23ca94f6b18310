"""A GPU that is not there: CPU tensors that say that they are on it, and refuse to mix devices.

torch's own fake tensors cannot do this without a driver: their backward pass ends the process. Here
a tensor is a real one on the CPU with a mark. A function mode answers `device`, `.to` and the
`device=` of factories with marks. A dispatch mode sees every operation, those of the backward pass
too: all of its tensors must have one mark (numbers may come from the CPU), and its results get it.
It also counts what would make the program wait for the GPU.
"""

import contextlib
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unet

ROOT = str(Path(__file__).parent.parent)
ATEN = torch.ops.aten
MAY_MIX = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN.copy_.default}
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default}
NEW = {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


def callers():
    """(file, line) of every function that is running, the innermost first."""
    frame = sys._getframe(1)
    while frame:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def here():
    """The line of the project that asks, as "file:line"."""
    ours = (f"{file}:{line}" for file, line in callers() if os.path.dirname(file) == ROOT)
    return os.path.basename(next(ours, "a test"))


def in_clip_grad():
    return any(file.endswith("clip_grad.py") for file, _ in islice(callers(), 6))


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def place(x):
    """The device of a tensor: "cpu" without a mark."""
    return x.__dict__.get("pretended", "cpu")


def mark(values, device):
    for x in tensors(values):
        x.__dict__["pretended"] = device
    return values


class Operations(TorchDispatchMode):
    """Every operation: one device, which its results get."""

    def __init__(self, device):
        super().__init__()
        self.pretended, self.waits = device, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = tensors((args, kwargs or {}))
        places = {place(x) for x in inputs if x.dim() or place(x) != "cpu"}
        if len(places) > 1 and func not in MAY_MIX:
            found = ", ".join(f"{tuple(x.shape)} on {place(x)}" for x in inputs)
            raise RuntimeError(f"{func}: tensors on different devices: {found}")
        device = (
            place(args[0]) if func in MAY_MIX else self.pretended if places - {"cpu"} else "cpu"
        )
        if func in WAITS and device != "cpu":
            self.waits[f"{func} in {here()}"] += 1
        result = mark(func(*args, **(kwargs or {})), device)
        if device == "mps" and any(x.dtype == torch.float64 for x in tensors(result)):
            raise TypeError(f"{func}: mps has no float64")
        return result


class Functions(TorchFunctionMode):
    """What a program asks of devices, answered with marks."""

    def __init__(self, operations):
        super().__init__()
        self.operations, self.pretended = operations, operations.pretended

    def is_mine(self, device):
        return torch.device(device).type == self.pretended

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return torch.device(place(args[0]))
        if func == torch.Tensor.data.__set__:
            func(*args)
            mark(args[0], place(args[1]))
            return None
        if name == "pin_memory":
            y = args[0].clone()
            y.__dict__["pinned"] = True
            return y
        if name in ("to", "cpu", "cuda"):
            return self.move(name, args, kwargs)
        if name in ("numpy", "__array__", "tolist") and place(args[0]) != "cpu":
            if name != "tolist":
                raise TypeError("can't convert a tensor on a GPU to numpy; use .cpu() first")
            self.operations.waits[f"{name} in {here()}"] += 1
        device = kwargs.get("device")
        if device is None and name in NEW:
            device = place(args[0])
        if device is not None and self.is_mine(device):
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type == "cpu":
                raise RuntimeError(f"{name}: expected a generator on {device}, found one on cpu")
            if device_lacks(device, kwargs.get("dtype")):
                raise TypeError("mps has no float64")
            return mark(func(*args, **kwargs | {"device": "cpu"}), self.pretended)
        if device is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)

    def move(self, name, args, kwargs):
        """x.to(...), x.cpu() or x.cuda(), as a copy if the device changes."""
        x, *rest = args
        target, options = {"cpu": "cpu", "cuda": "cuda"}.get(name), []
        for value in (*rest, kwargs.pop("device", None), kwargs.pop("dtype", None)):
            if isinstance(value, str | torch.device):
                target = value
            elif isinstance(value, torch.Tensor):
                target, options = place(value), [value.dtype]
            elif isinstance(value, torch.dtype):
                options = [value]
        target = torch.device(target or place(x)).type
        blocking = not (kwargs.pop("non_blocking", False) or any(value is True for value in rest))
        dtype = options[0] if options else x.dtype
        if device_lacks(target, dtype):
            raise TypeError("mps has no float64")
        small = x.numel() * x.element_size() <= 2**16  # staged at once
        blocking = blocking or not (small or x.__dict__.get("pinned"))
        if in_clip_grad():
            target = place(x)  # it asks C++ for the device
        if target != place(x) and (target == "cpu" or blocking):
            self.operations.waits[f"copy to {target} in {here()}"] += 1
        before = place(x)
        with torch._C.DisableTorchFunction():
            y = x.to(dtype, **{k: v for k, v in kwargs.items() if v is not None})
        if target != before and y is x:
            y = x.clone() if x.requires_grad else x.detach().clone()
        return mark(y, target) if target != before else y


def device_lacks(device, dtype):
    return torch.device(device).type == "mps" and dtype == torch.float64


@contextlib.contextmanager
def device(name, monkeypatch):
    """Pretend that this machine has the device "cuda" or "mps". Yields the `Operations`."""
    autocast = torch.autocast

    def on_cpu(kind, *arguments, **more):
        return autocast("cpu" if kind == name else kind, *arguments, **more)

    monkeypatch.setattr(torch, "autocast", on_cpu)
    # a checkpointed block is computed again in the backward pass, without the marks: there `attend`
    # would take the CPU's way
    monkeypatch.setattr(unet, "attend", torch.nn.functional.scaled_dot_product_attention)
    if name == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *device: 0)
        for library in ("accelerator", "cuda"):  # a CUDA build asks the driver before each step
            check = f"_{library}_graph_capture_health_check"
            monkeypatch.setattr(torch.optim.Optimizer, check, lambda optimizer: None, raising=False)
    else:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    operations = Operations(name)
    with operations, Functions(operations):
        yield operations
