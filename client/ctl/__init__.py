# SPDX-License-Identifier: Apache-2.0
"""transferctl: looking into a daemon, and measuring it."""
