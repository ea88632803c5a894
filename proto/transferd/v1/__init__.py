# SPDX-License-Identifier: Apache-2.0
"""Messages and services that clients use; made from the proto files beside this file."""
