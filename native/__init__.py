# SPDX-License-Identifier: Apache-2.0
"""The native halves of transferd: C code behind cffi.

Two extension modules, so that a client process loads no provider code:

* :mod:`transferd.native.daemon_half` is the data plane; only ``transferd.daemon.dataplane``
  imports it.
* :mod:`transferd.native.client_half` is the shared-memory half that the SDK uses.

Nothing is imported here: the build runs before either extension exists.
"""
