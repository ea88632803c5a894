# SPDX-License-Identifier: Apache-2.0
"""Messages and services between daemons; made from the proto files beside this file."""
