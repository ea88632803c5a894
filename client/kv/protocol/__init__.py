# SPDX-License-Identifier: Apache-2.0
"""The protocol between decoder and prefiller ranks. Sans-IO: no thread, no client, no clock."""
