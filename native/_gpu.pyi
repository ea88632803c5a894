# SPDX-License-Identifier: Apache-2.0
"""Made by native/build.py; cffi knows the types only when it runs."""

from typing import Any

ffi: Any
lib: Any
