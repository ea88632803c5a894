# SPDX-License-Identifier: Apache-2.0
"""An engine of ``transferd demo kv`` as a process: attached and registered until it ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import transferd
from transferd.client.demo.kvengine import READY_S, tell
from transferd.kv.router import Registration

if TYPE_CHECKING:
    from collections.abc import Callable

    from transferd.kv.router import Engine as Member


def run(
    make: Callable[[transferd.Client, str], Any],
    describe: Callable[[Any, str], Member],
    serve: Callable[[Any], None],
) -> int:
    """Is an engine; its arguments: address of its daemon, of the router, its name.

    Args:
        make: Makes it.
        describe: Tells what the router is told of it.
        serve: Does what the driver asks for until it hangs up.

    Returns:
        Exit status.
    """
    daemon, router, name = sys.argv[1:4]
    try:
        with transferd.Client(daemon, name=name) as client:
            engine = make(client, name)
            try:
                with (
                    engine.rank,
                    Registration(router, describe(engine, name), engine.load) as registration,
                ):
                    registration.wait(READY_S)
                    tell("ready")
                    serve(engine)
            finally:
                engine.close()
    except transferd.TransferdError as error:
        tell("error", text=f"{name}: {error}")
        return 1
    return 0
