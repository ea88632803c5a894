# SPDX-License-Identifier: Apache-2.0
"""One module for each NAME of run.py; its ``measure`` gives the rows."""
