# SPDX-License-Identifier: Apache-2.0
"""Guests with RDMA devices of software; see README.md."""
