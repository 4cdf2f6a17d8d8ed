from __future__ import annotations

import os
import signal

import zmq

from lightning_flashrl.messaging.loop import EventLoop


def test_descriptors_and_sockets_call_back() -> None:
    loop, seen = EventLoop(), []
    read, write = os.pipe()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(0)
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://test")
    right.connect("inproc://test")
    loop.add_reader(read, lambda: seen.append(os.read(read, 1)))
    loop.add_reader(left, lambda: seen.append(left.recv()))
    os.write(write, b"a")
    right.send(b"b")
    loop.run_until(lambda: len(seen) == 2)
    assert sorted(seen) == [b"a", b"b"]
    loop.remove(read)
    loop.remove(left)
    loop.remove(left)
    for sock in (left, right):
        sock.close()
    context.term()
    os.close(read)
    os.close(write)


def test_timers_fire_in_order_and_may_be_cancelled() -> None:
    loop, seen = EventLoop(), []
    loop.call_later(0.02, lambda: seen.append("late"))
    loop.call_later(0.01, lambda: seen.append("early"))
    loop.call_later(0.0, lambda: seen.append("never")).cancel()
    loop.call_every(0.005, lambda: seen.append("again"))
    loop.run_until(lambda: "late" in seen)
    assert [word for word in seen if word != "again"] == ["early", "late"]
    assert seen.count("again") >= 2


def test_a_writer_is_called_while_it_is_set() -> None:
    loop, seen = EventLoop(), []
    read, write = os.pipe()
    loop.set_writer(write, lambda: (seen.append(1), loop.set_writer(write, None)))
    loop.call_later(0.02, lambda: seen.append(2))
    loop.run_until(lambda: 2 in seen)
    assert seen == [1, 2]
    os.close(read)
    os.close(write)


def test_signals_become_callbacks() -> None:
    loop, seen = EventLoop(), []
    with loop.catch_signals((signal.SIGUSR1, signal.SIGUSR2), seen.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        loop.run_until(lambda: len(seen) == 2)
    assert sorted(seen) == [signal.SIGUSR1, signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
