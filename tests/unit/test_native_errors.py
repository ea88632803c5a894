# SPDX-License-Identifier: Apache-2.0
"""Errors of native calls."""

import errno

import pytest

from transferd.native.errors import NativeError, check


def test_results_that_are_not_negative_pass() -> None:
    assert check(0, "call") == 0
    assert check(7, "call") == 7


def test_error_tells_call_reason_and_number() -> None:
    with pytest.raises(NativeError) as caught:
        check(-errno.ENOENT, "open a domain group", "libfabric.so.1 was not found")
    assert caught.value.errno == errno.ENOENT
    assert str(caught.value) == "open a domain group: libfabric.so.1 was not found (ENOENT)"


def test_error_without_a_sentence_says_what_the_system_says() -> None:
    with pytest.raises(OSError, match=r"map: Cannot allocate memory \(ENOMEM\)"):
        check(-errno.ENOMEM, "map")
