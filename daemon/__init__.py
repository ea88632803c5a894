# SPDX-License-Identifier: Apache-2.0
"""The daemon: its control plane. README.md beside this file tells which module does what."""
