"""How good a model is: perplexity, KL divergence and top-1 agreement.

The package itself can be called, because `quantplan.evaluate` is both this package and the public function: Python binds
the name to the package when a module in it is first imported, and callers must not depend on which came first.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from quantplan.evaluate.metrics import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
