"""`moe-comm doctor`: what this host has, what it can use, and how to get what is missing.

Data flow: the `*_section` functions look (at /proc, /sys, the engine) and return plain values;
`main` prints them as tables or, with `--json`, as they are. Nothing has to be there: each absence is
a finding with a fix, never an exception. NICs are looked at by the engine's own short probes.

Importing moe_comm needs the engine. Where that is what is broken: `python moe_comm/doctor.py`.
"""

import ctypes
import importlib
import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

Section = dict[str, Any]

_BUILD_FIX = "build the package: `make test`, or `pip install -e .`"


def _read(path: str | Path) -> str:
    """The text of a file of /proc or /sys, stripped; empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _sysfs() -> Path:
    """Where the engine looks for NICs, too."""
    return Path(os.environ.get("MOE_COMM_SYSFS") or "/sys")


def _version(package: str) -> str | None:
    """The installed version, found without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _size(num_bytes: float) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}"


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


# --- host and software ---------------------------------------------------------------------------


def _release() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def host_section() -> Section:
    """CPUs, NUMA nodes, memory. A container's limits come from cgroup v2."""
    memory = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)

    def mem(key: str) -> str:  # lines read `MemTotal:  131 kB`
        return _size(int(memory[key].split()[0]) * 1024) if key in memory else "unknown"

    cpu_limit = (_read("/sys/fs/cgroup/cpu.max") or "max").split()
    memory_limit = _read("/sys/fs/cgroup/memory.max")
    models = [s for s in _read("/proc/cpuinfo").splitlines() if s.startswith("model name")]
    section = {
        "name": platform.node(),
        "system": f"{_release()}, {platform.system()} {platform.release()} {platform.machine()}",
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cpus": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "memory": f"{mem('MemTotal')}, {mem('MemAvailable')} available",
    }
    if cpu_limit[0] != "max":
        section["cpu_limit"] = f"{int(cpu_limit[0]) / int(cpu_limit[1]):g} CPUs (cgroup)"
    if memory_limit.isdigit():
        section["memory_limit"] = f"{_size(int(memory_limit))} (cgroup)"
    return section


def software_section() -> Section:
    """Versions; packages that only some uses need are listed when installed."""
    section: Section = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "moe_comm": _version("moe_comm") or "not installed",
        "engine": _engine()[1] or "built",
        "torch": _version("torch") or "not installed",
        "numpy": _version("numpy") or "not installed",
    }
    for package in ("transformers", "triton", "cupy-cuda12x", "cupy-cuda13x", "mpi4py", "deep_ep"):
        if version := _version(package):
            section[package] = version
    return section


# --- devices -------------------------------------------------------------------------------------


def _nvml_devices() -> list[Section]:
    """One entry per GPU. Raises whatever pynvml does."""
    pynvml = importlib.import_module("pynvml")
    pynvml.nvmlInit()
    try:
        devices = []
        for gpu_idx in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(gpu_idx)
            name = pynvml.nvmlDeviceGetName(gpu)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
            devices.append(
                {
                    "name": name.decode() if isinstance(name, bytes) else name,
                    "memory": _size(pynvml.nvmlDeviceGetMemoryInfo(gpu).total),
                    "compute_capability": f"{major}.{minor}",
                }
            )
        return devices
    finally:
        pynvml.nvmlShutdown()


def gpu_section() -> Section:
    """GPUs by NVML, and whether this torch can use them. `fix` says what is missing."""
    has_driver = Path("/proc/driver/nvidia/version").exists()
    section: Section = {"driver": None, "devices": [], "torch_cuda": False, "mode": "", "fix": ""}
    if not has_driver:
        section["fix"] = "no NVIDIA driver: everything runs on CPU tensors"
        return section
    section["driver"] = _read("/proc/driver/nvidia/version").splitlines()[0]
    try:
        section["devices"] = _nvml_devices()
    except ImportError:
        section["fix"] = "pynvml is not installed: pip install nvidia-ml-py"
    except Exception as error:  # pynvml.NVMLError, whose module may be half there
        section["fix"] = f"NVML: {error}"
    try:
        torch = importlib.import_module("torch")
        section["torch_cuda"] = torch.cuda.is_available()
        if section["torch_cuda"]:
            section["mode"] = (
                "host-staged by copy: CUDA tensors travel through pinned host memory; "
                'Buffer(device="cuda"): kernels read and write the windows'
            )
        if torch.version.cuda is None:
            section["fix"] = (
                "this torch is a CPU build: pip install --force-reinstall torch (default index)"
            )
    except ImportError as error:
        section["fix"] = f"torch: {error}"
    return section


def window_section() -> Section:
    """Where windows and rings of a GPU would lie here, and why."""
    try:
        kind, why = importlib.import_module("moe_comm.window_memory").window_memory()
    except ImportError as error:
        kind, why = "host memory", str(error)
    return {"kind": kind, "why": why}


def nic_section() -> list[Section]:
    """RDMA devices that the kernel knows, whether or not a library can open them."""
    nics = []
    for device in sorted((_sysfs() / "class/infiniband").glob("*")):
        port = device / "ports" / "1"
        driver = device / "device" / "driver"
        nics.append(
            {
                "name": device.name,
                "driver": driver.resolve().name if driver.exists() else "unknown",
                "link": _read(port / "link_layer"),
                "state": _read(port / "state"),
                "rate": _read(port / "rate"),
                "numa_node": _read(device / "device" / "numa_node"),
            }
        )
    return nics


def nic_choice_section() -> list[Section]:
    """NICs that fabric:efa and verbs take if given none: {for, nics, why}, of each GPU and of a rank without one."""
    engine, problem = _engine()
    if engine is None:
        return [{"for": "all", "nics": [], "why": problem}]
    section = []
    kinds = {nic["driver"] == "efa" for nic in nic_section()}
    for efa in sorted(kinds):
        name = "fabric:efa" if efa else "verbs"
        for gpu in [*engine.gpus(), ""]:
            try:
                nics, why = engine.choose_nics(efa=efa, gpu=gpu)
            except Exception as error:
                nics, why = [], str(error)
            section.append({"for": f"{name}, {gpu or 'no GPU'}", "nics": nics, "why": why})
    return section


# --- transports ----------------------------------------------------------------------------------


def _engine() -> tuple[Any, str]:
    """(moe_comm._engine, "") or (None, why not)."""
    try:
        return importlib.import_module("moe_comm._engine"), ""
    except ImportError as error:
        return None, f"not built ({error}): {_BUILD_FIX}"


def _rdma_device_fix() -> str:
    if any(Path("/dev/infiniband").glob("uverbs*")):
        return ""
    if nic_section():
        return (
            "no /dev/infiniband/uverbs*: modprobe ib_uverbs; "
            "in a container, start it with --device=/dev/infiniband"
        )
    return (
        "no RDMA NIC: /sys/class/infiniband is empty; "
        "with a NIC, load its driver (mlx5_ib, efa, bnxt_re, ...)"
    )


def _efa_fix() -> str:
    if any(nic["driver"] == "efa" for nic in nic_section()):
        return ""
    return (
        "no EFA device: on AWS, attach an EFA interface and install the EFA driver with libfabric"
    )


def _libfabric_fix() -> str:
    return "" if _can_load("libfabric.so.1") else "libfabric not found: apt-get install libfabric1"


def _libibverbs_fix() -> str:
    if _can_load("libibverbs.so.1"):
        return ""
    return "libibverbs not found: apt-get install libibverbs1 ibverbs-providers"


def _first_fix(name: str) -> str:
    """What the transport of this name needs first and this host lacks, with the way to get it."""
    needs: list[Callable[[], str]] = []
    if name.startswith("fabric"):
        needs.append(_libfabric_fix)
    if "verbs" in name:
        needs += [_libibverbs_fix, _rdma_device_fix]
    if "efa" in name:
        needs += [_efa_fix, _rdma_device_fix]
    return next((fix for need in needs if (fix := need())), "")


def transport_section() -> list[Section]:
    """One entry {name, available, detail, reason, fix} per transport that the engine knows."""
    engine, problem = _engine()
    if engine is None:
        return [_transport("all", False, reason="the engine is not built", fix=_BUILD_FIX)]
    try:
        found = list(engine.transports())
    except Exception as error:
        problem = f"moe_comm._engine.transports(): {type(error).__name__}: {error}"
        return [_transport("all", False, reason=problem, fix=_BUILD_FIX)]
    section = [
        _transport(
            entry.get("name", "?"),
            bool(entry.get("available")),
            detail=entry.get("detail", ""),
            reason=entry.get("reason", ""),
            fix="" if entry.get("available") else _first_fix(entry.get("name", "")),
        )
        for entry in found
    ]
    if not any(entry["name"].startswith("fabric") for entry in section):
        fix = f"apt-get install libfabric-dev (1.17 or newer), then {_BUILD_FIX}"
        section.append(_transport("fabric", False, reason="the engine has none", fix=fix))
    return section


def _transport(
    name: str, available: bool, *, detail: str = "", reason: str = "", fix: str = ""
) -> Section:
    return {
        "name": name,
        "available": available,
        "detail": detail,
        "reason": reason,
        "fix": fix,
    }


# --- limits --------------------------------------------------------------------------------------


def _ulimit(which: int) -> int | None:
    """The soft limit; None: unlimited."""
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def limit_section() -> list[Section]:
    """Limits that shared and registered memory meet: {name, value, fix}; no fix: all is well."""
    limits: list[Section] = []

    def add(name: str, value: str, bad: bool = False, fix: str = "") -> None:
        limits.append({"name": name, "value": value or "unknown", "fix": fix if bad else ""})

    overcommit = _read("/proc/sys/vm/overcommit_memory")
    add(
        *("vm.overcommit_memory", overcommit, overcommit == "2"),
        "windows count in full against the commit limit: "
        "lower MOE_COMM_WINDOW_BYTES, or sysctl vm.overcommit_memory=0",
    )
    maps = _read("/proc/sys/vm/max_map_count")
    add(
        *("vm.max_map_count", maps, maps.isdigit() and int(maps) < 65530),
        "each peer's window is a mapping: sysctl vm.max_map_count=65530",
    )
    noexec = _read("/proc/sys/vm/memfd_noexec")
    if noexec:
        add("vm.memfd_noexec", noexec)
    ptrace = _read("/proc/sys/kernel/yama/ptrace_scope")
    if ptrace:
        add("kernel.yama.ptrace_scope", ptrace)
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").exists() else None
    size = (
        f"{_size(shm.f_frsize * shm.f_blocks)} (windows are memfds and do not use it)"
        if shm
        else ""
    )
    add("/dev/shm", size)

    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if connections:
        add(
            *("CUDA_DEVICE_MAX_CONNECTIONS", connections, connections == "1"),
            "all streams share one queue to the GPU: what waits for a peer holds up the work behind it, "
            "of other streams too; unset it, or 8",
        )

    memlock = _ulimit(resource.RLIMIT_MEMLOCK)
    add(
        *("ulimit -l (memlock)", "unlimited" if memlock is None else _size(memlock)),
        memlock is not None and memlock < 2**30 and os.geteuid() != 0,
        "RDMA NICs register locked memory: `* - memlock unlimited` in /etc/security/limits.conf, "
        "for a container --ulimit memlock=-1",
    )
    files = _ulimit(resource.RLIMIT_NOFILE)
    add(
        *("ulimit -n (files)", "unlimited" if files is None else str(files)),
        files is not None and files < 1024,
        "each peer takes a few descriptors: ulimit -n 65536",
    )
    return limits


# --- output --------------------------------------------------------------------------------------


def report() -> Section:
    """All sections, as plain values."""
    return {
        "host": host_section(),
        "software": software_section(),
        "gpus": gpu_section(),
        "windows": window_section(),
        "nics": nic_section(),
        "nic_choice": nic_choice_section(),
        "transports": transport_section(),
        "limits": limit_section(),
    }


def _print_tables(found: Section) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)

    def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            grid.add_column(column, overflow="fold")
        for row in rows:
            grid.add_row(*map(escape, row))
        console.print(grid)

    for title in ("host", "software"):
        table(title, ["", ""], [[k.replace("_", " "), str(v)] for k, v in found[title].items()])

    gpus = found["gpus"]
    rows = [
        [g["name"], g["memory"], f"compute capability {g['compute_capability']}"]
        for g in gpus["devices"]
    ]
    rows += [
        [n["name"], n["rate"], f"{n['driver']}, {n['link']}, {n['state']}"] for n in found["nics"]
    ]
    if gpus["driver"]:
        about = gpus["fix"] or gpus["mode"]
        rows.append(["CUDA in torch", "yes" if gpus["torch_cuda"] else "no", about])
    else:
        rows.append(["GPU", "none", gpus["fix"]])
    rows.append(["windows of a GPU", found["windows"]["kind"], found["windows"]["why"]])
    if not found["nics"]:
        rows.append(["RDMA NIC", "none", "TCP and shared memory need none"])
    table("devices", ["device", "found", "about"], rows)

    rows = [[c["for"], " ".join(c["nics"]) or "none", c["why"]] for c in found["nic_choice"]]
    if rows:
        table("NICs that one rank of this host takes", ["for", "NICs", "why"], rows)

    rows = []
    for t in found["transports"]:
        why = "; ".join(text for text in (t["reason"], t["fix"]) if text)
        rows.append(
            [t["name"], "yes" if t["available"] else "no", t["detail"] if t["available"] else why]
        )
    table("transports", ["transport", "usable", "about, or what is missing and the fix"], rows)
    rows = [[limit["name"], limit["value"], limit["fix"] or "ok"] for limit in found["limits"]]
    table("limits", ["limit", "value", "what to do"], rows)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def main(as_json: bool) -> None:
    """Show the host, its devices and transports, and how to get those that are missing."""
    found = report()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_tables(found)


if __name__ == "__main__":
    main()
