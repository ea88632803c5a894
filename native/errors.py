# SPDX-License-Identifier: Apache-2.0
"""Errors of native calls."""

import errno
import os


class NativeError(OSError):
    """A native call returned ``-errno``.

    Attributes:
        errno: The positive error number.
        what: The call that failed, for people.
        detail: The sentence that the native code gave; empty where it gave none.
    """

    def __init__(self, code: int, what: str, detail: str = "") -> None:
        """Makes the error.

        Args:
            code: Positive error number.
            what: The call that failed.
            detail: The native code's own sentence.
        """
        super().__init__(code, detail or os.strerror(code))
        self.what = what
        self.detail = detail

    def __str__(self) -> str:
        """Says what failed, with which error, and why."""
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.what}: {self.strerror} ({name})"


def check(result: int, what: str, detail: str = "") -> int:
    """Passes the result of a native call on, or raises.

    Args:
        result: What the call returned: 0 or more, or ``-errno``.
        what: The call, for people.
        detail: The native code's own sentence, if it has one.

    Returns:
        ``result`` when it is not negative.

    Raises:
        NativeError: ``result`` is negative.
    """
    if result < 0:
        raise NativeError(-result, what, detail)
    return result
