"""Makes `import deep_ep` find `moe_comm.deep_ep`: a finder on `sys.meta_path`, put there only when asked.

Three ways to ask: `moe_comm.install_as_deep_ep()`; `python -m moe_comm.as_deep_ep script.py …`; and the environment
variable MOE_COMM_AS_DEEP_EP=1, at which one line in site-packages (as_deep_ep.pth) looks when python starts. That line
runs this file before the package is imported, so it imports nothing of it, and little else.

`deep_ep` and all its submodules are the same module objects as `moe_comm.deep_ep` and its submodules, so classes,
patches and pickles are the same by either name. Pickles name `moe_comm.deep_ep…`, which is always importable.
Rejected: entries in `sys.modules`, which `importlib.util.find_spec` and submodules do not survive.

Processes started from here have the name, too: by the environment variable, which is set for them, where the line in
site-packages is installed; and by what `multiprocessing` tells a child before it imports the main module.

A `deep_ep` that is really installed is never hidden unless told to (`override`): importing it then raises.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import importlib.metadata

VARIABLE = "MOE_COMM_AS_DEEP_EP"  # "" or "0": no; "override": also hide a deep_ep that is installed; else: yes
ALIASES = {"deep_ep": "moe_comm.deep_ep", "deep_ep_cpp": "moe_comm.deep_ep._C"}
VERSION = (
    "2.1.0"  # what `importlib.metadata.version("deep_ep")` says; `moe_comm.deep_ep.__version__`
)


def install_as_deep_ep(*, override: bool = False) -> None:
    """From now on, `import deep_ep` (and `deep_ep_cpp`) in this process, and in those it starts, gives
    `moe_comm.deep_ep`. Call it before the first import of a framework that asks for `deep_ep`. Again: does nothing.

    override: also where another `deep_ep` is installed or imported; modules that hold it keep it.
    Raises: ImportError, saying where, if there is another one.
    """
    finder = _installed()
    if not (override or (finder and finder.override)):
        for name in ALIASES:
            (finder or AliasFinder()).refuse_other(name)
    finder = _install(override)
    os.environ[VARIABLE] = "override" if finder.override else "1"
    _tell_children(finder)


def install_from_environment() -> None:
    """As the variable says. Another `deep_ep` is refused when it is imported, not now: sys.path is not complete yet."""
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0"):
        _install(value == "override")


def _installed() -> "AliasFinder | None":
    return next((finder for finder in sys.meta_path if _is_alias(finder)), None)  # type: ignore[return-value]


def _is_alias(finder: object) -> bool:
    """By name: python reads the .pth of a virtual environment twice, and this file is run each time."""
    return (type(finder).__module__, type(finder).__name__) == (__name__, "AliasFinder")


def _install(override: bool) -> "AliasFinder":
    finder = _installed()
    if finder is None:
        finder = AliasFinder()
        sys.meta_path.insert(0, finder)
    if override and not finder.override:
        finder.override = True
        for name in list(sys.modules):
            if name.partition(".")[0] in ALIASES and not _is_ours(name):
                del sys.modules[name]
    return finder


class AliasFinder(MetaPathFinder):
    """Finds the names of ALIASES and what lies below them, and the metadata of a distribution `deep_ep`."""

    def __init__(self) -> None:
        self.override = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        if top not in ALIASES:
            return None
        if rest:  # the parent is imported by now
            found = importlib.util.find_spec(f"{ALIASES[top]}.{rest}")
            if found is None:
                return None
            origin, locations = found.origin, found.submodule_search_locations
        else:  # nothing is imported to find it
            if not self.override:
                self.refuse_other(top)
            package = os.path.join(os.path.dirname(os.path.abspath(__file__)), "deep_ep")
            is_package = top == "deep_ep"
            origin = os.path.join(package, "__init__.py" if is_package else "_C.py")
            locations = [package] if is_package else None
        spec = ModuleSpec(fullname, AliasLoader(), origin=origin)
        spec.submodule_search_locations = locations
        return spec

    def refuse_other(self, name: str) -> None:
        """Raises ImportError if a module of this name was imported that is not ours, or could be found without us."""
        where = None
        if name in sys.modules and not _is_ours(name):
            where = getattr(sys.modules[name], "__file__", None) or "(imported already)"
        for finder in sys.meta_path:
            if where is None and not _is_alias(finder) and hasattr(finder, "find_spec"):
                found = finder.find_spec(name, None)
                where = None if found is None else found.origin  # None: a mere directory
        if where is not None:
            raise ImportError(
                f"{name}: expected none beside moe_comm, found {where}: uninstall it, or hide it with "
                f"{VARIABLE}=override or moe_comm.install_as_deep_ep(override=True)",
                name=name,
            )

    def find_distributions(
        self, context: Any = None
    ) -> "Iterator[importlib.metadata.Distribution]":
        """One for the name `deep_ep`; none for a listing of what is installed."""
        name = getattr(context, "name", None)
        if name is not None and name.lower().replace("-", "_").replace(".", "_") == "deep_ep":
            yield _distribution()


class AliasLoader(Loader):
    """Gives the module of the true name, untouched."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        top, dot, rest = spec.name.partition(".")
        module = importlib.import_module(ALIASES[top] + dot + rest)
        self._true_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._true_spec  # the import system set that of the other name


def _is_ours(name: str) -> bool:
    top, dot, rest = name.partition(".")
    return sys.modules[name] is sys.modules.get(ALIASES[top] + dot + rest)


def _distribution() -> "importlib.metadata.Distribution":
    from importlib.metadata import Distribution
    from pathlib import Path

    class AliasDistribution(Distribution):
        def read_text(self, filename: str) -> str | None:
            texts = {
                "METADATA": f"Metadata-Version: 2.1\nName: deep_ep\nVersion: {VERSION}\n",
                "top_level.txt": "\n".join(ALIASES) + "\n",
            }
            return texts.get(filename)

        def locate_file(self, path: Any) -> Path:
            return Path(__file__).resolve().parent.parent / path

    return AliasDistribution()


# --- children --------------------------------------------------------------------------------------------

_IN_CHILD = """
import sys
from importlib import util
module = sys.modules.get("moe_comm.alias")
if module is None:
    spec = util.spec_from_file_location("moe_comm.alias", {path!r})
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
module.install_as_deep_ep(override={override})
"""


class _InstallWhenRead:
    """Pickled, it is the text above, run by who reads it; whatever his sys.path."""

    def __init__(self, override: bool):
        self._override = override

    def __reduce__(self) -> tuple:
        code = _IN_CHILD.format(path=os.path.abspath(__file__), override=self._override)
        return exec, (code, {})


def _tell_children(finder: AliasFinder) -> None:
    """What `multiprocessing` (spawn, forkserver) pickles for a child to read first gets one entry more."""
    from multiprocessing import spawn

    prepare = spawn.get_preparation_data
    if getattr(prepare, "tells_of_deep_ep", False):
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"deep_ep": _InstallWhenRead(finder.override), **prepare(name)}

    get_preparation_data.tells_of_deep_ep = True  # type: ignore[attr-defined]
    spawn.get_preparation_data = get_preparation_data
