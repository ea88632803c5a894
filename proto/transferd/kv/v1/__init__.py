# SPDX-License-Identifier: Apache-2.0
"""Messages of KV-cache transfer; made from the proto files beside this file."""
