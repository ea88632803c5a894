# SPDX-License-Identifier: Apache-2.0
"""GPU memory in the SDK: registered, mapped, copied by streams; see README.md.

Nothing here is imported before a Client meets GPU memory, and nothing opens the CUDA driver before
that.
"""
