"""`import deep_ep` finds moe_comm.deep_ep when asked, in each of the three ways, and never otherwise.

Each check runs in processes of its own: what is tested is how an interpreter starts and finds modules.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a framework asks, whichever way the name came.
ASK = """
import importlib.metadata, importlib.util, pickle, sys
spec = importlib.util.find_spec("deep_ep")
assert spec.name == "deep_ep" and spec.origin.endswith("moe_comm/deep_ep/__init__.py"), spec
assert spec.loader is not None and spec.submodule_search_locations
assert "moe_comm.deep_ep" not in sys.modules  # nothing is imported to find it
import deep_ep
import moe_comm.deep_ep
assert deep_ep.Config is moe_comm.deep_ep.Config
assert deep_ep is moe_comm.deep_ep
assert importlib.util.find_spec("deep_ep.events") and not importlib.util.find_spec("deep_ep.no_such")
import deep_ep.events
from deep_ep import config
import moe_comm.deep_ep.config
assert deep_ep.events is moe_comm.deep_ep.events and config is moe_comm.deep_ep.config
assert pickle.loads(pickle.dumps(deep_ep.EventHandle)) is moe_comm.deep_ep.EventHandle
assert b"moe_comm" in pickle.dumps(deep_ep.EventHandle)  # a name that is importable without being asked
assert importlib.metadata.version("deep_ep") == importlib.metadata.version("deep-ep") == deep_ep.__version__
assert importlib.metadata.metadata("deep_ep")["Name"] == "deep_ep"
from deep_ep_cpp import Config, EventHandle
assert Config is deep_ep.Config and EventHandle is deep_ep.EventHandle
for name in ("deep_ep", "deep_ep.events", "deep_ep_cpp"):
    assert importlib.util.find_spec(name)
    assert sys.modules[name].__name__.startswith(sys.modules[name].__spec__.parent)
from deep_ep.hybrid_ep_buffer import HybridEPBuffer, indices_to_map
from deep_ep.buffers.elastic import ElasticBuffer
from deep_ep.utils import EventHandle as same, EventOverlap
assert (HybridEPBuffer, ElasticBuffer, same) == (deep_ep.HybridEPBuffer, deep_ep.ElasticBuffer, EventHandle)
import importlib; importlib.reload(config)
try:
    import deep_ep.no_such
except ModuleNotFoundError:
    print("asked")
"""

CHILDREN = """
import multiprocessing, sys
import deep_ep  # also in a child, that imports this file

def child(event):
    import deep_ep_cpp
    assert type(event) is deep_ep.EventHandle is deep_ep_cpp.EventHandle
    print("child of", multiprocessing.get_start_method(), flush=True)

if __name__ == "__main__":
    assert sys.argv[1:] == ["--some", "argument"], sys.argv
    assert not ONLY_BY_PREPARATION or not __import__("os").environ.pop("MOE_COMM_AS_DEEP_EP", None) is None
    for method in ("spawn", "forkserver"):
        multiprocessing.set_start_method(method, force=True)
        process = multiprocessing.Process(target=child, args=(deep_ep.EventHandle(),))
        process.start()
        process.join()
        assert process.exitcode == 0
"""


def run(
    *command: str, python: str = sys.executable, cwd: str = "/", fails: bool = False, **env: str
) -> str:
    given = {k: v for k, v in os.environ.items() if k != "MOE_COMM_AS_DEEP_EP"} | env
    given = {k: v for k, v in given.items() if v}
    done = subprocess.run([python, *command], cwd=cwd, env=given, capture_output=True, text=True)
    assert bool(done.returncode) == fails, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def children(path: Path, by_preparation: bool) -> str:
    script = path / "children.py"
    script.write_text(f"ONLY_BY_PREPARATION = {by_preparation}\n{CHILDREN}")
    return str(script)


# --- from inside a program -----------------------------------------------------------------------


def test_install() -> None:
    assert "asked" in run("-c", f"import moe_comm; moe_comm.install_as_deep_ep()\n{ASK}")
    twice = (
        "import moe_comm; [moe_comm.install_as_deep_ep() for _ in range(2)]; import deep_ep, sys\n"
    )
    assert "[1]" in run("-c", f"{twice}print([sum('Alias' in repr(f) for f in sys.meta_path)])")


def test_nothing_happens_unless_asked() -> None:
    assert "No module named 'deep_ep'" in run("-c", "import moe_comm, deep_ep", fails=True)
    code = "import moe_comm, sys; assert not [f for f in sys.meta_path if 'Alias' in repr(f)]"
    run("-c", code)


def test_another_deep_ep_is_refused_unless_overridden(tmp_path: Path) -> None:
    other = tmp_path / "deep_ep"
    other.mkdir()
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)]))
    run(
        "-c",
        "import moe_comm; moe_comm.install_as_deep_ep(); import deep_ep.config",
        PYTHONPATH=paths,
    )
    (other / "__init__.py").write_text(
        "import sys\nreal = True\n"
    )  # now it is more than a directory
    code = (
        "import moe_comm\ntry: moe_comm.install_as_deep_ep()\nexcept ImportError as e: print(e)\n"
    )
    said = run("-c", f"{code}import deep_ep, os; assert deep_ep.real and not os.environ.get('MOE_COMM_AS_DEEP_EP')",
               PYTHONPATH=paths)  # fmt: skip
    assert f"found {other}/__init__.py" in said and "override" in said
    said = run("-c", f"import deep_ep\n{code}", PYTHONPATH=paths)
    assert f"found {other}/__init__.py" in said
    code = "import deep_ep.config; assert not hasattr(deep_ep, 'real'); print('hidden')"
    force = "import deep_ep, moe_comm; moe_comm.install_as_deep_ep(override=True)"
    assert "hidden" in run("-c", f"{force}\n{code}", PYTHONPATH=paths)
    script = tmp_path / "script.py"
    script.write_text(code)
    (tmp_path / "there").mkdir()
    runner = ("-m", "moe_comm.as_deep_ep")
    assert "hidden" in run(*runner, "--override", str(script), PYTHONPATH=paths)
    assert "found" in run(*runner, str(script), PYTHONPATH=paths, fails=True)


# --- python -m moe_comm.as_deep_ep ---------------------------------------------------------------


def test_run_a_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(
        "import beside, sys\n" + ASK.replace('"moe_comm.deep_ep" not in', '"deep_ep" not in')
        + "assert sys.argv == [__file__, '-x', 'y'] and __name__ == '__main__', sys.argv\n"
        "assert sys.modules['__main__'].__file__ == __file__\nsys.exit(int('0'))\n"
    )  # fmt: skip
    assert "asked" in run("-m", "moe_comm.as_deep_ep", str(script), "-x", "y")
    script.write_text("import sys; sys.exit(3)")
    run("-m", "moe_comm.as_deep_ep", str(script), fails=True)


def test_run_a_module(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "program.py").write_text(
        "from . import __name__ as package\nimport deep_ep, sys\nprint(package, sys.argv[1:], __name__)\n"
    )
    said = run("-m", "moe_comm.as_deep_ep", "-m", "package.program", "-m", "1", cwd=str(tmp_path))
    assert "package ['-m', '1'] __main__" in said
    assert "usage:" in run("-m", "moe_comm.as_deep_ep", fails=True)


def test_children_of_a_script(tmp_path: Path) -> None:
    """Their main module imports deep_ep, and neither variable nor site-packages helps."""
    said = run("-m", "moe_comm.as_deep_ep", children(tmp_path, True), "--some", "argument")
    assert "child of spawn" in said and "child of forkserver" in said


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import deep_ep, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "text = f'rank {dist.get_rank()} of {dist.get_world_size()} {deep_ep.__version__} {sys.argv[1:]}'\n"
        "open(f'{__file__}.{dist.get_rank()}', 'w').write(text)\n"
        "dist.destroy_process_group()\n"
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*launch, "-m", "moe_comm.as_deep_ep", str(script), "--flag")
    for rank in range(2):
        said = (tmp_path / f"script.py.{rank}").read_text()
        assert said == f"rank {rank} of 2 2.1.0 ['--flag']"


# --- MOE_COMM_AS_DEEP_EP, in a wheel and in an editable install -------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is made from, with the objects of an earlier build: only what changed is compiled."""
    place = tmp_path_factory.mktemp("source")
    for name in ("moe_comm", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, place / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, place)
    for objects in (ROOT / "build").glob("engine-*"):
        shutil.copytree(objects, place / "build" / objects.name)
    return place


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The interpreter of a fresh environment with this package installed; everything else from the present one."""
    place = tmp_path_factory.mktemp(request.param)
    run("-m", "venv", "--without-pip", str(place / "venv"))
    python = str(place / "venv" / "bin" / "python")
    site = Path(
        run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python).strip()
    )
    (site / "present.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # torch; no .pth of it is read
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python)
    clean = {"PYTHONPATH": ""}
    home = source if request.param == "editable" else place
    if request.param == "editable":
        run(*pip, "install", *options, "-e", str(source), **clean)
    else:
        run(*pip, "wheel", *options, "-w", str(place), str(source), **clean)
        (wheel,) = place.glob("moe_comm-*.whl")
        run(*pip, "install", *options, str(wheel), **clean)
    found = run("-c", "import moe_comm; print(moe_comm.__file__)", python=python, **clean)
    assert found.startswith(str(home))
    return python


@pytest.mark.timeout(600)
def test_variable(installed: str, tmp_path: Path) -> None:
    clean = {"PYTHONPATH": "", "python": installed}
    ask = f"import sys; assert 'torch' not in sys.modules\n{ASK}"
    assert "asked" in run("-c", ask, MOE_COMM_AS_DEEP_EP="1", **clean)
    for off in ("", "0"):
        said = run("-c", "import deep_ep", MOE_COMM_AS_DEEP_EP=off, fails=True, **clean)
        assert "No module named 'deep_ep'" in said
    script = children(tmp_path, False)
    said = run(script, "--some", "argument", MOE_COMM_AS_DEEP_EP="1", **clean)
    assert "child of spawn" in said and "child of forkserver" in said


@pytest.mark.timeout(600)
def test_start_of_python_imports_nothing(installed: str) -> None:
    def imported(**env: str) -> set[str]:
        said = run("-X", "importtime", "-c", "pass", python=installed, PYTHONPATH="", **env)
        return {line.rpartition("|")[2].strip() for line in said.splitlines() if "|" in line}

    site = Path(
        run(
            "-c", "import moe_comm.alias as a; print(a.__file__)", python=installed, PYTHONPATH=""
        ).strip()
    )
    line = (site.parent / "as_deep_ep.pth").read_text()
    assert line.count("\n") == 1
    quiet = imported()
    assert not {name for name in quiet if name.startswith(("torch", "moe_comm", "multiprocessing"))}
    asked = imported(MOE_COMM_AS_DEEP_EP="1") - quiet
    assert not {
        n for n in asked if n.startswith(("torch", "moe_comm", "multiprocessing", "numpy"))
    }, asked


@pytest.mark.timeout(600)
def test_variable_and_another_deep_ep(installed: str, tmp_path: Path) -> None:
    (tmp_path / "deep_ep.py").write_text("")
    there = {"python": installed, "PYTHONPATH": str(tmp_path)}
    said = run("-c", "import deep_ep", MOE_COMM_AS_DEEP_EP="1", fails=True, **there)
    assert (
        f"ImportError: deep_ep: expected none beside moe_comm, found {tmp_path}/deep_ep.py" in said
    )
    run("-c", "import deep_ep.config", MOE_COMM_AS_DEEP_EP="override", **there)
    run("-c", "import deep_ep; assert deep_ep.__file__.startswith('/')", **there)
