# SPDX-License-Identifier: Apache-2.0
"""The kernels of this process: loaded once for each device, whatever sessions come and go.

The driver loads a module, and unloads it, only when no stream of the context waits: behind one that
waits for a word, it would wait for ever. So they are loaded when a session first meets a device,
before anything can wait for a word of it, and stay until the process ends.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

from transferd.client.cuda import nvrtc

if TYPE_CHECKING:
    from transferd.client.cuda.driver import Driver


class Kernels(NamedTuple):
    """Kernels of a device's context."""

    pages: int
    targets: int
    plan_pages: int
    plan_slices: int
    bump: int


_lock = threading.Lock()  # guards what follows, and is held while they are loaded
# By the driver, of which a process has one.
_loaded: weakref.WeakKeyDictionary[Driver, dict[int, Kernels]] = weakref.WeakKeyDictionary()


def kernels(driver: Driver, device: int) -> Kernels:
    """Loads the kernels of a device, compiling them if they are not kept yet.

    Raises:
        Unavailable: NO_NVRTC.
        Internal: NVRTC refused the source.
        CudaError: The driver refused them.
    """
    with _lock:
        of_devices = _loaded.setdefault(driver, {})
        if device not in of_devices:
            image = nvrtc.cubin(driver.capability(device), driver.version())
            # This reference to the context is never given back: the module lives in it.
            with driver.entered(driver.context_retain(device)):
                module = driver.module_load(image)
                of_devices[device] = Kernels(
                    *(driver.function(module, f"tfd_{name}") for name in Kernels._fields)
                )
        return of_devices[device]
