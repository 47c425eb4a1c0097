"""On a GPU alone: kernels keep to the caller's stream, and can be captured in a CUDA graph and replayed on new inputs.

Without one the shim says half of it: work on another stream is an error there, and its headers know no allocation and
no synchronisation that a launcher could call.
"""

from functools import partial

import pytest
import torch

from extension import CUDA_OPS
from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.compare import error_over_bound
from gpu import DTYPES, TRITON_OPS, spec_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="capture and streams need a CUDA device")
ROOMS = [("cuda", op) for op in CUDA_OPS] + [("triton", op) for op in TRITON_OPS]
WAIT = 100_000_000  # clocks that a stream is kept busy: some 50 ms, in which a kernel on another stream is long done


def memories(args):
    """All that the arrays of a call span, flat, each memory once."""
    flat = [y for x in args for y in (x if isinstance(x, list) else [x]) if isinstance(y, torch.Tensor)]
    once = {x.untyped_storage().data_ptr(): x for x in flat if x.is_cuda and x.numel()}
    return [x.new_empty(0).set_(x.untyped_storage()) for x in once.values()]


def hide(held, real):
    """Floating inputs become 0.5; everything else is as it was."""
    for x, value in zip(held, real, strict=True):
        x.fill_(0.5) if x.is_floating_point() else x.copy_(value)


def show(held, real):
    """The inputs that count."""
    for x, value in zip(held, real, strict=True):
        x.copy_(value)


def captured(run, *call):
    """Captures a call while its inputs are hidden, and replays it once they are there."""
    held = memories(call)
    real = [x.clone() for x in held]
    hide(held, real)
    run(*call)  # compiles, allocates and loads what a capture must not
    hide(held, real)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*call)
    show(held, real)
    graph.replay()
    torch.cuda.synchronize()


def on_a_side_stream(run, *call):
    """Runs a call on a stream that is busy for a while, and only then has the inputs."""
    held = memories(call)
    real = [x.clone() for x in held]
    hide(held, real)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(WAIT)
        show(held, real)
        run(*call)
    side.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [captured, on_a_side_stream])
@pytest.mark.parametrize(("backend", "op"), ROOMS)
def test_agrees_with_reference(backend, op, way, dtype, available, monkeypatch):
    available(op, backend)
    run = _dispatch.run

    def instead(op, name, *args):
        if name == backend:
            way(run, op, name, *args)
        else:
            run(op, name, *args)

    monkeypatch.setattr(_dispatch, "run", instead)
    for case in getattr(spec_of(op), backend.upper()).showing[:3]:
        worst = error_over_bound(op, case, dtype, backend, partial(layouts.torch_array, device="cuda"))
        assert max(worst.values()) <= 1, (case.id, worst)
