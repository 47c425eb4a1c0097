"""From arrays on a card to a launch: the caller's stream, the arrays' device, nothing left changed. Needs no card."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ghostgram as gg
from ghostgram import _arrays

CPU, CUDA, MANAGED, ROCM = 1, 2, 13, 10
ADDRESS = 4096


@pytest.fixture(autouse=True)
def card(border):
    border.card(4, 0)


@pytest.fixture
def framework(border):
    """Arrays of a framework with an exchange API, as torch is."""

    class Tensor:
        __dlpack_c_exchange_api__ = border.exchange()

        def __init__(self, device=0, count=64, address=ADDRESS):
            self.device, self.count, self.address = device, count, address

    return Tensor


@pytest.fixture
def producer(border):
    """Arrays with __dlpack__ alone, or with a __cuda_array_interface__ too, as CuPy's."""

    class Array:
        def __init__(self, type=CUDA, index=0, old=False, **interface):
            self.type, self.index, self.old, self.asked = type, index, old, []
            if interface:
                self.__cuda_array_interface__ = interface

        def __dlpack_device__(self):
            return self.type, self.index

        def __dlpack__(self, **options):
            self.asked.append(options)
            if self.old and "max_version" in options:
                raise TypeError("unexpected keyword argument 'max_version'")
            return border.capsule(ADDRESS, 64, self.type, self.index)

    return Array


@pytest.mark.parametrize("device", [0, 3])
def test_a_launch_runs_on_the_callers_stream_of_the_arrays_device(border, framework, device):
    workspace = framework(device, address=1 << 20)
    assert border.run(framework(device), workspace, 256, 0) == (1 << 20, 1000 + device, device, 0)
    assert border.state() == (0, [3, 0] if device else [], 0)


def test_what_was_current_is_so_again_after_a_failure(border, framework):
    with pytest.raises(RuntimeError, match=r"^op: it failed$"):
        border.run(framework(2), framework(2), 1, 719)
    assert border.state() == (0, [2, 0], 0)  # and CUDA has no error left for the caller's next call
    border.card(4, 0)
    with pytest.raises(RuntimeError, match=r"^op: invalid device$"):
        border.run(framework(7), framework(7), 1, 0)
    assert border.state() == (0, [7, 0], 0)


@pytest.mark.parametrize(
    ("interface", "stream", "asked"),
    [
        *(({}, 0, 1), ({"stream": None}, 0, 1), ({"version": 2}, 0, 1), ({"stream": 1}, 1, 1), ({"stream": 2}, 2, 2)),
        ({"stream": 0x7F0012345678}, 0x7F0012345678, 0x7F0012345678),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_producer_orders_its_work_before_the_launch(border, producer, framework, interface, stream, asked, old):
    array = producer(index=1, old=old, **interface)
    assert border.run(array, framework(1), 256, 0)[1:3] == (stream, 1)
    assert [options["stream"] for options in array.asked] == [asked] * (1 + old)
    assert ["max_version" in options for options in array.asked] == [True, False][: 1 + old]


@pytest.mark.parametrize("type", [CPU, ROCM])
def test_other_memory_is_refused(border, producer, framework, type):
    array = producer(type)
    with pytest.raises(ValueError, match=r"^a: expected CUDA memory"):
        border.run(array, framework(), 256, 0)
    assert [set(options) for options in array.asked] == [{"max_version"} | ({"stream"} if type == ROCM else set())]


def test_managed_memory_is_the_cards(border, producer, framework):
    assert border.run(producer(MANAGED, 2), framework(2), 256, 0)[2] == 2


@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        ({"device": 1}, "memory on the device of a"),
        ({"count": 63}, "at least 256 bytes"),
        ({"address": ADDRESS + 8}, "an address that is a multiple of 16"),
    ],
)
def test_a_workspace_must_serve(border, framework, workspace, message):
    with pytest.raises(ValueError, match=rf"^workspace: expected {message}"):
        border.run(framework(), framework(**workspace), 256, 0)


def test_devices_are_counted_or_there_are_none(border):
    assert border.device_count() == 4
    border.card(0, 0)
    assert border.device_count() == 0


class Device:
    """A device of a stand-in for CuPy, and which one is current."""

    current = 0

    def __init__(self, id):
        self.id = id

    def __eq__(self, other):
        return self.id == other.id

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_):
        Device.current = self.before


class CupyArray:
    """A NumPy array that says it is CuPy's and remembers its device."""

    __module__ = "cupy"

    def __init__(self, values):
        self.values, self.device = values, Device(Device.current)

    def __getattr__(self, name):
        return getattr(self.values, name)

    def get(self):
        return self.values


def test_cupy_arrays_are_made_beside_those_of_the_caller(monkeypatch):
    cupy = SimpleNamespace(
        ndarray=CupyArray,
        empty=lambda *args: CupyArray(np.empty(*args)),
        asarray=CupyArray,
        ascontiguousarray=lambda x: CupyArray(np.ascontiguousarray(x.values)),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with Device(3):
        x = CupyArray(np.arange(6.0).reshape(2, 3).T)
    made = [
        *(_arrays.empty(x, (2,), "int64"), _arrays.unit_inner_stride(x), _arrays.contiguous(x)),
        _arrays.moved(np.ones(2), x),
    ]
    assert [y.device.id for y in made] == [3] * 4
    assert [y.values.flags.c_contiguous for y in made] == [True] * 4
    assert np.array_equal(made[1].values, x.values)
    assert _arrays.moved(made[0], x) is made[0]
    assert _arrays.unit_inner_stride(made[1]) is made[1]
    assert _arrays.contiguous(made[1]) is made[1]
    assert isinstance(_arrays.moved(x, np.empty(0)), np.ndarray)
    assert Device.current == 0


def test_ops_that_wait_stay_out_of_cuda_graphs():
    assert gg.gumbel_topk(torch.zeros(3), 1).shape == gg.grad_norms(torch.ones(1, 1), torch.ones(1, 1)).shape
    waits = {"gumbel_topk", "softmax_stats", "trajectory_match", "trajectory_match_grad"}
    for name in (*waits, "grad_norms", "grad_stats", "trajectory_match_backward"):
        tags = getattr(torch.ops.ghostgram, name).default.tags
        assert (torch.Tag.cudagraph_unsafe in tags) == (name in waits), name
