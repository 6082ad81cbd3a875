"""Signals: the first asks, the second ends the process whatever it is doing. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from oneb.train.signals import Stopped, StopRequest

PATIENCE_S = 120  # only what hangs takes so long
# Says when it has heard a signal: the listener's next look at the clock is later.
_TELLS = """
import itertools, os, time
from types import SimpleNamespace
from oneb.train import signals
clock = time.monotonic
def monotonic():
    now = clock()
    os.write(1, b"heard\\n")
    return now
signals.time = SimpleNamespace(monotonic=monotonic)
"""
# Says when it is ready, and then does what ignores Python's signal handlers: one long call into C.
_STUCK = _TELLS + """
import hashlib
with signals.StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
_POLITE = _TELLS + """
clock = itertools.count(0, 0.5).__next__  # however long this process is held up between two signals
with signals.StopRequest() as stop:
    print("ready", flush=True)
    while stop.signum is None:
        time.sleep(0.01)
    input()  # the step's rest, and its save
raise SystemExit(stop.exit_code)
"""


def start(code, **options):
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def send(process, signum):
    """Send it, and wait until it has been heard."""
    process.send_signal(signum)
    assert process.stdout.readline() == "heard\n"


@pytest.mark.parametrize("signum", StopRequest.SIGNALS)
def test_the_second_signal_ends_a_process_that_is_stuck_in_c(signum):
    process = start(_STUCK)
    send(process, signal.SIGTERM)
    time.sleep(1.1)  # the second one is none before that
    assert process.poll() is None
    process.send_signal(signum)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signum
    assert "second signal" in told


@pytest.mark.parametrize("signum", StopRequest.SIGNALS)
def test_the_first_signal_lets_the_step_end(signum):
    process = start(_POLITE)
    send(process, signum)
    # A terminal sends Ctrl-C to the process and to whoever started it, who may pass it on: that is no second one.
    send(process, signum)
    assert process.communicate("\n", timeout=PATIENCE_S)[1] == ""
    assert process.returncode == 128 + signum


def test_nohup_outlives_its_terminal():
    process = start(_POLITE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    send(process, signal.SIGTERM)
    process.communicate("\n", timeout=PATIENCE_S)
    assert process.returncode == 143


def test_only_what_is_interruptible_is_broken_off():
    with StopRequest() as stop:
        with pytest.raises(Stopped), stop.interruptible():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert (stop.signum, stop.exit_code) == (signal.SIGTERM, 143)
        with pytest.raises(Stopped), stop.interruptible():
            pytest.fail("a signal has come before")
        with stop.interruptible(when=False):
            pass
    with StopRequest() as stop, stop.interruptible():
        with stop.interruptible(when=False):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert stop.signum == signal.SIGINT


def test_what_was_there_before_is_there_again():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    for _ in range(3):
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
