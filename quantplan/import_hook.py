"""Running a function once another package's module has been imported, without importing it.

transformers has no entry points for quantization methods, so quantplan's must be registered in it; and whoever only checks a
plan must not wait for transformers to be imported. Hence: now, if the module is there, else right after its first import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


class _Watch:
    """Finds nothing itself: hands on what the other finders say of one module, with a call added after its code has run."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then, self._searching = module, then, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self._module or self._searching:
            return None
        from importlib.util import find_spec  # here, for it takes longer to import than all of quantplan's start

        self._searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: Any) -> None:
                execute(module)
                self._then()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def after_import(module: str, then: Callable[[], None]) -> None:
    """Calls `then` after `module` has been imported: at once if it has been."""
    sys.meta_path.insert(0, _Watch(module, then))
    if module in sys.modules:
        then()
