# SPDX-License-Identifier: Apache-2.0
"""What a connector counts, in the form that vLLM hands on: a dict of numbers and lists."""

from __future__ import annotations

from typing import Any

WHYS = ("read", "aborted", "lease")  # anything else is the end of the session
SECONDS_KEPT = 4096  # of one interval; more are counted, and not in the quantiles

Data = dict[str, Any]


def empty() -> Data:
    """Makes an interval in which nothing was."""
    return {"received": {}, "sent": {}, "tokens": 0, "bytes": 0, "seconds": []}


class Stats:
    """Counts of one worker since the last take.

    Args:
        token_bytes: Of a token's cache at this rank.
    """

    def __init__(self, token_bytes: int) -> None:
        self.token_bytes = token_bytes
        self._data = empty()

    def received(self, outcome: str, tokens: int, seconds: float) -> None:
        """A transfer to this rank has ended."""
        counts = self._data["received"]
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome == "complete":
            self._data["tokens"] += tokens
            self._data["bytes"] += tokens * self.token_bytes
            if len(self._data["seconds"]) < SECONDS_KEPT:
                self._data["seconds"].append(seconds)

    def sent(self, why: str) -> None:
        """Blocks of a request that was computed here are free."""
        counts = self._data["sent"]
        why = why if why in WHYS else "lost"
        counts[why] = counts.get(why, 0) + 1

    def take(self) -> Data | None:
        """Returns the counts and begins anew; None: there was nothing."""
        if is_empty(self._data):
            return None
        data, self._data = self._data, empty()
        return data


def is_empty(data: Data) -> bool:
    """Tells whether nothing was counted."""
    return not data.get("received") and not data.get("sent")


def add(one: Data, other: Data) -> Data:
    """Adds two intervals, or two workers."""
    total = empty()
    for data in (one, other):
        for kind in ("received", "sent"):
            for key, count in data.get(kind, {}).items():
                total[kind][key] = total[kind].get(key, 0) + count
        for key in ("tokens", "bytes"):
            total[key] += data.get(key, 0)
        total["seconds"] = [*total["seconds"], *data.get("seconds", ())][:SECONDS_KEPT]
    return total


def summary(data: Data) -> dict[str, int | float]:
    """Makes what vLLM's log shows."""
    seconds = sorted(data.get("seconds", ()))
    failed = sum(n for outcome, n in data["received"].items() if outcome != "complete")
    found: dict[str, int | float] = {
        "received": data["received"].get("complete", 0),
        "not received": failed,
        "sent": sum(data["sent"].values()),
        "received MiB": round(data["bytes"] / (1 << 20), 3),
    }
    if seconds:
        found["median ms"] = round(seconds[len(seconds) // 2] * 1e3, 3)
        found["p99 ms"] = round(seconds[len(seconds) * 99 // 100] * 1e3, 3)
    return found
