# SPDX-License-Identifier: Apache-2.0
"""In a source tree alone: what is generated lies here, the package itself in ``client/kv``.

Without this file, Python would take this folder for a namespace package, and never find that one.
"""

from pathlib import Path

_FOLDER = Path(__file__).parents[3] / "client" / "kv"
__path__ = [str(_FOLDER), *__path__]  # type: ignore[name-defined]
exec(compile((_FOLDER / "__init__.py").read_bytes(), _FOLDER / "__init__.py", "exec"))
