# SPDX-License-Identifier: Apache-2.0
"""The short ways of copies by streams, one native call each, on a driver of host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import transferd
from transferd import Write
from transferd.client.cuda.driver import CudaError
from transferd.native.names import JobStatus

from support.cuda_memory import LENGTH, granted, memory
from support.waiting import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transferd import Client

    from support.fakecuda import FakeCuda

pytestmark = pytest.mark.slow

OK = JobStatus.OK


PAGES = np.array([3, 1, 7, 0])
# What the short way leaves to the long one, or both refuse; by what is changed, and the error.
UNUSUAL: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"src_pages": PAGES.tolist()}, ""),
    ({"src_pages": np.arange(8)[::2]}, ""),
    ({"dst_pages": PAGES.astype(">i8")}, "big-endian"),
    ({"src_pages": np.ma.masked_array(PAGES)}, "masked"),
    ({"src_pages": PAGES.reshape(2, 2)}, "dimensions"),
    ({"src_pages": PAGES.astype(float)}, "convert it to int64"),
    ({"src_pages": PAGES[:3]}, "as many"),
    ({"src_pages": PAGES - 1}, r"src_pages\[3\] is -1"),
    ({"dst_pages": PAGES + 1017}, r"dst_pages\[2\] is 1024"),
    ({"page_bytes": 0}, "page_bytes"),
    ({"page_bytes": "4096"}, "page_bytes"),
    ({"src_stride": 1.5}, "src_stride"),
    ({"dst_stride": -1}, "dst_stride"),
    ({"src_offset": LENGTH + 1}, "src_offset"),
    ({"dst_offset": None}, "dst_offset"),
    ({"imm": 1 << 20}, "imm"),
    ({"count": "pages"}, "count"),
    ({"priority": "high"}, "priority"),
    ({"deadline_s": 0}, "deadline_s"),
    ({"dst": "a string"}, "descriptor"),
]


@pytest.mark.parametrize(("changed", "error"), UNUSUAL)
def test_the_short_way_of_pages_refuses_as_the_long_one(
    cuda: FakeCuda, sender: Client, receiver: Client, changed: dict[str, Any], error: str
) -> None:
    region = sender.register(memory(cuda))
    _, _, grant = granted(receiver, cuda)
    usual: dict[str, Any] = {"src_pages": PAGES, "dst_pages": PAGES, "page_bytes": 4096, "imm": 1}
    usual |= {"src": region, "dst": grant.descriptor}
    assert sender.write_pages(**usual).wait(WAIT_S) is OK
    submit, longs = sender._session.gpu().copier.submit, []
    sender._session.gpu().copier.submit = lambda *a: longs.append(a) or submit(*a)  # type: ignore[method-assign,func-returns-value]
    if error:
        with pytest.raises(transferd.InvalidRequest, match=error):
            sender.write_pages(**(usual | changed))
    else:
        assert sender.write_pages(**(usual | changed)).wait(WAIT_S) is OK
        receiver.counter(1).wait(8, WAIT_S)
    assert len(longs) == ((bool(changed) and not error) or error.startswith(("src_pages", "dst_p")))
    region.close()
    with pytest.raises(transferd.InvalidRequest, match="closed"):
        sender.write_pages(**usual)


def test_a_stream_of_the_caller_that_is_known(
    cuda: FakeCuda, sender: Client, receiver: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is looked at by the driver each time: its handle may be another's, or be captured."""
    source = sender.register(memory(cuda))
    _, _, grant = granted(receiver, cuda)
    stream = cuda.stream()
    plan = sender.plan(Write(src=source[0:64], dst=grant.descriptor, imm=1, stream=stream))

    def jobs() -> Iterator[Callable[[], transferd.Job]]:
        yield lambda: sender.write(source[0:64], grant.descriptor, imm=1, stream=stream)
        yield lambda: sender.write_pages(
            source, PAGES, grant.descriptor, PAGES, 64, imm=1, count="job", stream=stream
        )
        yield plan.launch

    for make in jobs():
        assert make().wait(WAIT_S) is OK
    copier, longs = sender._session.gpu().copier, []
    submit = copier.submit

    def counted(*arguments: Any) -> Any:
        longs.append(arguments)
        return submit(*arguments)

    monkeypatch.setattr(copier, "submit", counted)
    for make in jobs():
        assert make().wait(WAIT_S) is OK
    assert not longs
    cuda.capturing.add(stream)
    for make in jobs():
        with pytest.raises(transferd.InvalidRequest, match="cuda_bump"):
            make()
    cuda.capturing.clear()
    cuda.stream_ids[stream] = 7
    for make in jobs():
        assert make().wait(WAIT_S) is OK
    assert len(longs) == 1  # and is known again
    cuda.fail("cuStreamGetId", 400, 2)
    with pytest.raises(CudaError, match="cuStreamGetId"):
        sender.write(source[0:64], grant.descriptor, imm=1, stream=stream)
    plan.close()
    assert receiver.counter(1).value == 9
