# SPDX-License-Identifier: Apache-2.0
"""Benchmarks; never part of the test suite. README.md says how to run them."""
