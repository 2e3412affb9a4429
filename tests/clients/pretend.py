"""Runs a few files of a framework as they are, on a machine where the rest of it cannot be imported."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType


class Pretended(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules `real` of `package` in `folder`, and its others as modules of `constants` (or of nothing).

    A name that is not among the constants can be imported, and fails when it is called.
    """

    def __init__(self, package, folder, real, constants):
        self.package, self.folder, self.real, self.constants = package, folder, real, constants

    def install(self):
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            file = self.folder.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: self.other(spec.name, name)
        return module

    def exec_module(self, module):
        vars(module).update(self.constants.get(module.__name__, {}))

    def other(self, module, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{module}.{name}" in self.real | self.constants.keys():
            return importlib.import_module(f"{module}.{name}")

        def called(*_, **__):
            raise AssertionError(f"{module}.{name} is used, but it has no stand-in")

        return called
