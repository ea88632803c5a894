# SPDX-License-Identifier: Apache-2.0
"""Tells which rails a daemon would have, while things change; run as a program, by test_devices.py.

Its argument is a JSON list of steps: a configuration as YAML, a command of the shell that changes
something before and one that changes it back. Prints a JSON list of what was chosen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from transferd.daemon import config
from transferd.daemon.topology import NoRailError, rails_of_this_host

ELSEWHERE = "192.0.2.7"  # as peer_address: no interface of ours has it


def choose(text: str) -> dict[str, Any]:
    """Chooses, and tells."""
    try:
        choice = rails_of_this_host(config.parse(text), ELSEWHERE)
    except NoRailError as error:
        return {"refusal": str(error)}
    return {
        "provider": choice.provider,
        "fallback": choice.fallback,
        "rails": {verdict.nic.name: verdict.why for verdict in choice.rails},
        "unused": {verdict.nic.name: verdict.why for verdict in choice.unused},
    }


def main(steps: list[list[str]]) -> None:
    """Takes the steps."""
    told = []
    for text, change, back in steps:
        subprocess.run(change, shell=True, check=True)
        try:
            told.append(choose(text))
        finally:
            subprocess.run(back, shell=True, check=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
