"""Losses on their way from a GPU to the watch over them: right, in order, and without waiting for the GPU."""

from __future__ import annotations

import math

import pytest
import torch

from oneb.train.watch import Reading, Readings


def test_readings_on_the_cpu_are_here_at_once():
    readings = Readings(torch.device("cpu"))
    loss, norm, scale = torch.tensor(3.25), torch.tensor(0.5), torch.tensor(1024.0)
    readings.add(7, 128, loss, norm)
    readings.add(8, 256, loss, norm, scale)
    loss.zero_()
    assert readings.arrived() == [Reading(7, 128, 3.25, 0.5), Reading(8, 256, 3.25, 0.5, 1024.0)]
    assert readings.arrived(wait=True) == []
    assert Reading(0, 1, math.inf, 1.0).skipped
    assert Reading(0, 1, 1.0, math.nan).skipped
    assert not Reading(0, 1, 1.0, 1.0).skipped


def test_readings_leave_in_order_whenever_their_copies_are_done(monkeypatch):
    """The device is imagined: a copy is done when the test says so, or once somebody waits for it."""
    done, waited = set(), []

    class Event:
        def record(self):
            self.step = len(recorded_events)
            recorded_events.append(self.step)

        def query(self):
            return self.step in done

        def synchronize(self):
            if self.step not in done:
                waited.append(self.step)
            done.add(self.step)

    recorded_events: list[int] = []
    empty, ones = torch.empty, torch.ones
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory: empty(*shape))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    readings = Readings(torch.device("cuda"), max_outstanding=4)

    def add(step):
        readings.add(step, 64, torch.tensor(float(step)), torch.tensor(1.0))

    def steps(wait=False):
        return [(reading.step, reading.loss) for reading in readings.arrived(wait)]

    for step in range(3):
        add(step)
    done.update({1, 2})
    assert steps() == []  # not before step 0's
    done.add(0)
    add(3)
    assert steps() == [(0, 0.0), (1, 1.0), (2, 2.0)]
    for step in range(4, 7):
        add(step)
    assert waited == []
    add(7)  # a fifth: it waits for the oldest, and for no other
    add(8)
    assert waited == [3, 4]
    done.add(6)
    assert steps() == [(3, 3.0), (4, 4.0)]
    assert steps(wait=True) == [(step, float(step)) for step in range(5, 9)]
    assert waited == [3, 4, 5, 7, 8]
    assert steps(wait=True) == []


@pytest.mark.gpu
def test_readings_never_wait_for_the_gpu():
    """Right values of 300 steps, with a GPU that is behind; adding and asking synchronise nothing."""
    device = torch.device("cuda")
    readings = Readings(device, max_outstanding=400)
    matrix = torch.randn(4096, 4096, device=device)
    loss, scale = torch.zeros((), device=device), torch.ones((), device=device)
    readings.add(0, 64, loss, loss)  # the first use of kernels loads them
    readings.arrived(wait=True)
    here = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(300):
            matrix = matrix @ matrix * 0.01  # enough work that the host runs ahead
            loss += 1
            scale *= 2 if step == 100 else 1
            readings.add(step, 64, loss, loss * 0.5, scale)
            here += readings.arrived()
        at_the_end = len(here)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here += readings.arrived(wait=True)
    assert at_the_end < 300  # or nothing was shown
    assert here == [Reading(step, 64, step + 1.0, (step + 1) / 2, 2.0 if step >= 100 else 1.0) for step in range(300)]


@pytest.mark.gpu
def test_readings_keep_no_more_than_so_many_under_way():
    readings = Readings(torch.device("cuda"), max_outstanding=3)
    loss = torch.zeros((), device="cuda")
    for step in range(50):
        loss += 1
        readings.add(step, 64, loss, loss)
        assert len(readings._under_way) <= 3
    assert [(reading.step, reading.loss) for reading in readings.arrived(wait=True)] == [
        (step, step + 1.0) for step in range(50)]
