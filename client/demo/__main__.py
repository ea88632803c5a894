# SPDX-License-Identifier: Apache-2.0
"""``python -m transferd.client.demo``."""

from transferd.client.demo.main import main

main()
