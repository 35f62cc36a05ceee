"""Jobs beside the training: their order, their errors, and snapshots that do not change."""

from __future__ import annotations

import errno
import sys
import threading
import time
import weakref
from functools import partial

import pytest
import torch

from models.errors import InputError
from training.writer import BackgroundWriter, on_host, packed, snapshot


def test_jobs_run_in_order_beside_the_caller() -> None:
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    writer.submit(lambda: done.append(gate.wait(10)))
    writer.submit(lambda: done.append("second"))
    assert done == []
    gate.set()
    writer.close()
    assert done == [True, "second"]


def test_second_interrupt_waits_for_nothing() -> None:
    gate = threading.Event()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.submit(lambda: gate.wait(60) or None)
        raise KeyboardInterrupt
    gate.set()


def test_full_disk_is_one_line_and_stops_what_follows() -> None:
    writer, done = BackgroundWriter(), []

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/checkpoints/last.pt")

    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    with pytest.raises(InputError, match=r"last.pt: cannot be written: No space .*--resume auto"):
        writer.close()
    assert done == []


def test_a_fault_of_ours_keeps_its_type() -> None:
    writer = BackgroundWriter()

    def fail() -> None:
        raise KeyError("weights")

    writer.submit(fail)
    with pytest.raises(KeyError):
        writer.close()


def test_snapshot_keeps_values_and_the_rest() -> None:
    tensor = torch.zeros(3)
    state = {"a": [tensor, 5], "b": {"name": "x", "c": (tensor, None)}}
    copy = snapshot(state)
    tensor += 1
    assert copy["a"][1] == 5 and copy["b"]["name"] == "x" and copy["b"]["c"][1] is None
    assert torch.equal(copy["a"][0], torch.zeros(3))
    assert torch.equal(copy["b"]["c"][0], torch.zeros(3))


def test_packed_tensors_share_one_buffer() -> None:
    sources = [torch.randn(3, 5).T, torch.tensor(2.0), torch.empty(0), torch.randn(17)]
    copies = packed(sources)
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert len({copy.data_ptr() % 64 for copy in copies}) == 1


@pytest.mark.gpu
def test_snapshot_reaches_the_host_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.writer._PIECE", 7)
    state = [torch.randn(3, 5, device="cuda"), torch.tensor(7, device="cuda"), torch.ones(2), "x"]
    state += [torch.ones(9, device="cuda"), torch.empty(0, device="cuda")]
    for copy, original in zip(on_host(snapshot(state)), state, strict=True):
        if isinstance(original, torch.Tensor):
            assert copy.device.type == "cpu" and torch.equal(copy, original.cpu())
            assert copy.untyped_storage().nbytes() == copy.nbytes
        else:
            assert copy == original


def test_a_job_that_is_done_holds_nothing() -> None:
    tensor = torch.zeros(3)
    held = weakref.ref(tensor)
    with BackgroundWriter() as writer:
        writer.submit(partial(torch.sum, tensor))
        del tensor
        for _ in range(1000):
            if held() is None:
                return
            time.sleep(0.005)
    pytest.fail("the job's tensor is still there")


def test_a_job_leaves_python_to_the_training() -> None:
    before, during = sys.getswitchinterval(), []
    with BackgroundWriter() as writer:
        writer.submit(lambda: during.append(sys.getswitchinterval()))
    assert during[0] < before / 10
    assert sys.getswitchinterval() == before
