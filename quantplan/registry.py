"""A registry: names to classes. The first look-up imports the folder of members; nobody imports a member by name."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from quantplan.errors import did_you_mean, fail

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name. Built-ins come from `quantplan/<folder>/`, one file each, found by importing the
    folder; a name that is not built in is looked for in the entry-point group `quantplan.<folder>`."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind, self.folder = kind, folder
        self._members: dict[str, type[T]] = {}
        self._imported = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: the class is known as `name`, and gets it as its attribute `name`. Names are unique."""

        def add(cls: type[T]) -> type[T]:
            if name in self._members:
                raise ValueError(f"two {self.kind}s are named {name!r}")
            self._members[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        """The built-in names, sorted."""
        self._import_folder()
        return sorted(self._members)

    def __iter__(self) -> Iterator[type[T]]:
        return (self._members[name] for name in self.names())

    def __contains__(self, name: object) -> bool:
        self._import_folder()
        return name in self._members or (isinstance(name, str) and self._load_entry_point(name))

    def get(self, name: str) -> type[T]:
        """The class called `name`. Raises QuantplanError QP107 with the nearest name when there is none."""
        if name not in self:
            raise fail("QP107", f"unknown {self.kind} '{name}'", did_you_mean(name, self._members))
        return self._members[name]

    def _import_folder(self) -> None:
        if not self._imported:
            self._imported = True
            package = importlib.import_module(f"quantplan.{self.folder}")
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"quantplan.{self.folder}.{module}")

    def _load_entry_point(self, name: str) -> bool:
        from importlib.metadata import entry_points

        for entry in entry_points(group=f"quantplan.{self.folder}", name=name):
            self._members.setdefault(name, entry.load())
            return True
        return False
