# SPDX-License-Identifier: Apache-2.0
"""The demo: two daemons, two clients, a real model."""
