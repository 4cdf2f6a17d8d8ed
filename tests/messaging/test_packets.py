"""Packets over a pair of sockets, one end of which dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from lightning_flashrl.messaging.packets import CHUNK_BYTES, PacketChannel, make_pair, split
from lightning_flashrl.supervisor.root_link import Born, Messages


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = make_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_last_words_arrive_though_something_was_left_unread(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    channel = PacketChannel(ours)
    channel.send(b"never read")
    last_words = [b"first", b"x" * (CHUNK_BYTES + 1)]
    for packet in (packet for words in last_words for packet in split(words)):
        theirs.send(packet)
    theirs.close()
    assert channel.receive() == last_words
    assert not channel.is_open


def test_a_request_arrives_though_its_sender_left_something_unread(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    root, supervisor = Messages(ours), Messages(theirs)
    root.send(Born(1))
    supervisor.send(Born(2))
    theirs.close()
    assert root.receive() is not None
    assert root.receive() is None


def test_a_received_descriptor_is_not_inherited(pair: tuple[socket.socket, socket.socket]) -> None:
    root, supervisor = map(Messages, pair)
    read, write = os.pipe()
    supervisor.send(Born(1), write)
    received = root.receive()
    assert received is not None
    assert not os.get_inheritable(received[1])
    for fd in (read, write, received[1]):
        os.close(fd)
