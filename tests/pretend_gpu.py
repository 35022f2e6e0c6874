"""A pretended GPU: tensors that say they are on cuda, compute on the CPU, and refuse what a real one refuses.

Tensors of the two places do not mix (but for single numbers, indices and copies) and numpy does not see into those over there. While
a CUDA graph is recorded nothing is computed, numbers on the CPU are frozen, and looking at a value is an error; a replay does the
recorded operations again, in the same memory. So every line that is meant for a GPU runs, and what comes out can be compared with the
CPU. Kernels, rounding, memory and speed of a real one cannot be seen here.
"""

import contextlib
import functools
import sys

import pytest
import torch
from torch.nn.utils import clip_grad
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CPU, CUDA, SECOND, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1), torch.device("mps", 0)
NOT_ON_MPS = ("poisson", "_standard_gamma")
place = CUDA                                                           # where tensors say they are
FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm",
             "empty_strided", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
ANSWERS = {"is_available": True, "device_count": 2, "current_device": 0, "mem_get_info": (2**36, 2**36), "get_device_name": "a pretended GPU",
           "max_memory_allocated": 0, "synchronize": None, "set_rng_state": None, "manual_seed": None, "manual_seed_all": None,
           "is_bf16_supported": True, "is_current_stream_capturing": False}


def over_there(device: object) -> bool:
    """Whether a device or its name is the GPU."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type == place.type


class There(torch.Tensor):
    """A tensor of the pretended GPU; ``elem`` holds its values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor):
        if place == MPS and elem.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made = torch.Tensor._make_wrapper_subclass(cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype)
        made.elem = elem
        return made

    device = property(lambda self: place)
    is_cuda = property(lambda self: place.type == "cuda")
    is_cpu = property(lambda self: False)

    def cpu(self, *_, **__):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def pin_memory(self, *_):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, **_):
        return f"There({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Graph:
    """A recording: what to do, in order."""

    def __init__(self):
        self.todo, self.operations = [], 0                             # views are no operation of a GPU

    def replay(self) -> None:
        for again in self.todo:
            again()


class Generator(torch.Generator):
    """Of either place; the draws are the CPU's."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.there = over_there(device)
        return made


class Stream:
    """All work is done in the order in which it is asked for."""

    def __init__(self, device=None):
        self.device = torch.device("cuda", current[-1] if device is None or device.index is None else device.index)

    def wait_stream(self, _): ...

    def is_capturing(self):
        return bool(recording)


@contextlib.contextmanager
def current_device(device):
    current.append(device.index or 0)
    try:
        yield
    finally:
        current.pop()


waits: list[str] = []                                                  # why Python waited for the GPU, or the GPU for Python
current: list[int] = [0]                                               # number of the GPU that is meant where none is named
recording: list[Graph] = []                                            # the one in progress
untouched: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}           # memory that a recording wrote to, and what was there


@contextlib.contextmanager
def record(graph: Graph, stream: Stream | None = None, capture_error_mode: str = "global"):
    """Stands for `torch.cuda.graph`: afterwards all is as if nothing had been computed."""
    assert capture_error_mode == "thread_local", "another thread that draws would break the recording"
    if {(stream or Stream()).device.index, current[-1]} != {place.index}:
        raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")
    state = torch.get_rng_state()
    recording.append(graph)
    try:
        yield
    finally:
        recording.pop()
        for memory, was in untouched.values():
            memory.copy_(was)
        untouched.clear()
        torch.set_rng_state(state)


STAND_INS = {"Stream": Stream, "current_stream": Stream, "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": record, "device": current_device,
             "get_rng_state": lambda *_: torch.get_rng_state()}


def write_down(func, args, kwargs, outs) -> None:
    """Results of a replay go where those of the recording lie; views lie there already."""
    fresh = [r.alias_info is None for r in func._schema.returns] if hasattr(func, "_schema") else [True]
    fresh *= len(outs) if len(fresh) == 1 else 1                       # one list of tensors

    def again() -> None:
        for is_fresh, old, new in zip(fresh, outs, tree_flatten(func(*args, **kwargs))[0]):
            if is_fresh and isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    recording[-1].todo.append(again)
    recording[-1].operations += any(fresh) or bool(written(func, args))


def written(func, args) -> list[torch.Tensor]:
    """The arguments that an operation changes."""
    found = [value for a, value in zip(func._schema.arguments, args) if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)]


def run(func, args, kwargs):
    """One operation, with at least one tensor of the pretended GPU."""
    name, asked = func.overloadpacket.__name__, tree_flatten((args, kwargs))[0]
    if place == MPS and name in NOT_ON_MPS:
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device")
    tensors = [x for x in asked if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if not isinstance(x, There) and x.dim() > 0]
    indexed = "index" in name and isinstance(args[0], There)           # tensors over there take indices from here
    if here and name != "copy_" and not indexed:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")
    looks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    if "index" in name:                                                # whole numbers do not decide a shape, truth values do
        looks = any(x.dtype == torch.bool for x in tensors[1:])
    if recording and (here or looks):
        raise RuntimeError(f"operation not permitted when stream is capturing ({name})")
    waits.extend([name] if looks or any(not getattr(x, "pinned", False) for x in here) else [])

    def value(x):
        return x.elem if isinstance(x, There) else x.clone() if isinstance(x, torch.Tensor) and recording else x

    args, kwargs = tree_map(value, (args, kwargs))
    kwargs = {k: CPU if k == "device" and v is not None else v for k, v in kwargs.items()}
    changed = written(func, args)
    if recording:
        for x in changed:
            untouched.setdefault(x.data_ptr(), (x, x.clone()))
    out = func(*args, **kwargs)
    outs, form = tree_flatten(out)
    if recording:
        write_down(func, args, kwargs, outs)
    given = {id(x.elem): x for x in tensors if isinstance(x, There)} | {id(x): x for x in tensors if not isinstance(x, There)}
    kept = {id(x) for x in changed}                                    # come back as the very tensors that were given
    return tree_unflatten([given[id(x)] if id(x) in kept else There(x) if isinstance(x, torch.Tensor) else x for x in outs], form)


class Travel(torch.autograd.Function):
    """To the GPU, or back from there."""

    @staticmethod
    def forward(ctx, x):
        if recording:
            raise RuntimeError("operation not permitted when stream is capturing (a copy between CPU and GPU)")
        ctx.back = isinstance(x, There)
        return x.elem.clone() if ctx.back else There(x.clone())

    @staticmethod
    def backward(ctx, slope):
        return There(slope) if ctx.back else slope.elem


def pretend(monkeypatch: pytest.MonkeyPatch, kind: torch.device = CUDA) -> None:
    """From here to the end of the test there is a GPU: NVIDIA's, or Apple's, which lacks float64 and some draws, and records nothing."""
    monkeypatch.setattr(sys.modules[__name__], "place", kind)
    waits.clear()
    plain_to = torch.Tensor.to

    def to(self, *args, device=None, dtype=None, non_blocking=False, **options):
        for a in args:
            like = isinstance(a, torch.Tensor)
            device = a.device if like else a if isinstance(a, (str, torch.device)) else device
            dtype = a.dtype if like else a if isinstance(a, torch.dtype) else dtype
        travels = device is not None and over_there(device) != isinstance(self, There)
        waits.extend(["to"] if travels and not (getattr(self, "pinned", False) and non_blocking) else [])
        moved = Travel.apply(self) if travels else self
        return plain_to(moved, dtype=dtype, **options) if dtype is not None or options else moved

    def pin_memory(self):
        kept = self.clone()
        kept.pinned = True
        return kept

    def factory(make):
        @functools.wraps(make)
        def made(*args, **kwargs):
            if not over_there(kwargs.get("device")):
                return make(*args, **kwargs)
            if kwargs.get("generator") is not None and not kwargs["generator"].there:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            grad = kwargs.pop("requires_grad", False)
            kwargs["device"] = CPU
            args = tree_map(lambda x: x.elem if isinstance(x, There) else x, args)
            out = make(*args, **kwargs)
            if recording:
                write_down(make, args, kwargs, [out])
            return There(out).requires_grad_(grad)
        return made

    def by_place(group):
        return lambda *args, **kwargs: {(place if isinstance(found[0][0][0], There) else at, kind): found
                                        for (at, kind), found in group(*args, **kwargs).items()}

    one_hot, autocast, adam = torch.nn.functional.one_hot, torch.autocast, torch.optim.Optimizer
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, factory(getattr(torch, name)))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == MPS)
    for name, answer in ({} if kind == MPS else ANSWERS).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name, stand_in in ({} if kind == MPS else STAND_INS).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # what optimisers ask: a build of torch for CUDA would look for a driver
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: kind)
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda _, **options: autocast("cpu", **options))
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda x, n=-1: There(one_hot(x.elem, n)) if isinstance(x, There) else one_hot(x, n))
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    monkeypatch.setattr(adam, "_group_tensors_by_device_and_dtype", staticmethod(by_place(adam._group_tensors_by_device_and_dtype)))
    monkeypatch.setattr(clip_grad, "_has_foreach_support", lambda tensors, device: True)
    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", by_place(clip_grad._group_tensors_by_device_and_dtype))
