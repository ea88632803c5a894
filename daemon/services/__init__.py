# SPDX-License-Identifier: Apache-2.0
"""The gRPC faces of the daemon: thin, they translate messages and leave decisions to the cores."""
