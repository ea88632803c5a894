# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with guests."""

from __future__ import annotations


class VmError(RuntimeError):
    """Something of the rig went wrong; the text says what, and has the end of the console."""


class Unavailable(VmError):
    """No guest can run on this machine; the text says why and what to install."""


class GuestDied(VmError):
    """The guest has ended: its QEMU was killed, its kernel panicked, or it powered off."""


class CommandTimeout(VmError):
    """A command was not done in time; it was killed, or its guest if that took no effect."""


class CommandFailed(VmError):
    """A command ended with another status than 0; the text has what it printed."""
