# SPDX-License-Identifier: Apache-2.0
"""What daemons say to each other."""
