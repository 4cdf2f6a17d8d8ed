"""The job's key-value store. It lives in the controller, so that any rank may die. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiter:
    """Who waits for a key: a request of a rank of a node."""

    node_rank: int
    global_rank: int
    request_id: int


class Store:
    """Values and those who wait for them.

    >>> store, waiter = Store(), Waiter(0, 1, 7)
    >>> store.get("q1/address", waiter) is None
    True
    >>> store.set("q1/address", b"host:1") == [waiter]
    True
    >>> _ = store.set("kept/queue", b"host:2")
    >>> store.begin_anew()
    >>> store.get("q1/address", waiter), store.get("kept/queue", waiter), store.get("before/kept/queue", waiter)
    (None, None, b'host:2')
    """

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiters: dict[str, list[Waiter]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def set(self, key: str, value: bytes) -> list[Waiter]:
        """Keep a value; return who waited for it."""
        self._values[key] = value
        return self._waiters.pop(key, [])

    def get(self, key: str, waiter: Waiter) -> bytes | None:
        """Return a value, or remember who wants it."""
        value = self._values.get(key)
        if value is None:
            self._waiters.setdefault(key, []).append(waiter)
        return value

    def drop_before(self, quorum_id: int) -> None:
        """Forget the keys ``q{N}/…`` of every quorum older than ``quorum_id``, and who waited for them."""
        for table in (self._values, self._waiters):
            for key in [key for key in table if _is_older(key, quorum_id)]:
                del table[key]

    def begin_anew(self) -> None:
        """Forget everything; only what was set under ``kept/…`` is found under ``before/kept/…``."""
        before = {key: value for key, value in self._values.items() if key.startswith("before/")}
        kept = {f"before/{key}": value for key, value in self._values.items() if key.startswith("kept/")}
        self._values = before | kept
        self._waiters.clear()


def _is_older(key: str, quorum_id: int) -> bool:
    prefix, slash, _ = key.partition("/")
    return bool(slash) and prefix[:1] == "q" and prefix[1:].isdecimal() and int(prefix[1:]) < quorum_id
