# SPDX-License-Identifier: Apache-2.0
"""The command ``transferd``: the daemon's own commands, and the demo, which is a client.

Here because neither of the two may import the other.
"""

import importlib
import sys

# Word after `transferd` -> module whose main() takes over. Everything else is the daemon's.
CLIENT_COMMANDS = {"demo": "transferd.client.demo.main"}
DAEMON = "transferd.daemon.main"

CLIENT_HELP = """
Further commands:
  demo          Two daemons, two clients: moves a real model and checks it.
"""


def main() -> None:
    """Runs the command line; ends the process with its exit status."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    module = CLIENT_COMMANDS.get(word, DAEMON)
    if module != DAEMON:
        sys.argv[:2] = [f"transferd {word}"]
    run = importlib.import_module(module).main
    try:
        status = run()
    finally:
        if module == DAEMON and word in ("", "-h", "--help"):
            print(CLIENT_HELP, end="")
    sys.exit(status)


if __name__ == "__main__":
    main()
