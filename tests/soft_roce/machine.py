"""A virtual machine with an RDMA NIC made of software (Soft-RoCE: Linux' rdma_rxe), for tests without hardware.

    python tests/soft_roce/machine.py 'ibv_devinfo && ib_write_bw --help'   # runs it inside, returns its status

Data flow: Debian's stock kernel and the modules it needs are unpacked once into build/soft_roce (kernel, initramfs);
QEMU emulates a CPU (TCG: no KVM needed), mounts this machine's / read-only over 9p, and init.sh makes the devices rxe0
(10.77.0.1) and rxe1 (10.77.1.1), with a wire between them, and carries out what comes over a serial port. Programs run
inside are those of this machine.

Facts: Debian's *cloud* kernels have no rdma_rxe. It needs crc32_generic, or `rdma link add` says "No such file or
directory". It refuses `lo`, hence a veth pair. /dev/kvm may be there and hang at boot, hence TCG. Everything inside is
10 to 50 times slower than outside, and files come over 9p: importing torch takes a minute.
"""

import gzip
import lzma
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "soft_roce"
MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "ib_uverbs",
    "rdma_ucm",
    "crc32_generic",
    "rdma_rxe",
    "veth",
    "sch_tbf",
)
PACKAGES = {  # a program of it, package
    "qemu-system-x86_64": "qemu-system-x86",
    "/bin/busybox": "busybox-static",
    "ip": "iproute2",
    "rdma": "iproute2",
    "ibv_devinfo": "ibverbs-utils",
    "ib_write_bw": "perftest",
    "fi_info": "libfabric-bin",
}
PROVIDERS = ("librdmacm1", "ibverbs-providers")  # libraries that programs inside open
BOOT_S, MEMORY_MB = 240, 6144


class Unavailable(Exception):
    """Why there can be no such machine here."""


# --- building ------------------------------------------------------------------------------------


def _call(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-4:]
        raise Unavailable(f"{' '.join(command)}: " + " / ".join(lines))
    return done.stdout


def install_packages() -> None:
    """What the machine is made of and what runs in it. Raises Unavailable."""
    found = {
        name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in PACKAGES
    }
    missing = sorted({package for name, package in PACKAGES.items() if not found[name]})
    if not shutil.which("dpkg") or not shutil.which("apt-get"):
        raise Unavailable("the machine is made of Debian packages, and there is no apt-get here")
    for package in PROVIDERS:
        if subprocess.run(["dpkg", "-s", package], capture_output=True).returncode:
            missing.append(package)
    if not missing:
        return
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    print(f"installing {' '.join(missing)}", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _call(*as_root, "apt-get", "update", env=environment)
    _call(
        *as_root, "apt-get", "install", "-y", "--no-install-recommends", *missing, env=environment
    )


def _kernel_package() -> str:
    depends = _call("apt-cache", "depends", "linux-image-amd64")
    found = re.search(r"Depends: (linux-image-[\w.+-]+)", depends)
    if not found:
        raise Unavailable(
            "apt knows no linux-image-amd64: run apt-get update; the machine is x86-64"
        )
    return found[1]


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _in_load_order(tree: Path) -> list[tuple[str, bytes]]:
    """(name, contents) of MODULES and of all they depend on, these first."""
    files = {p.name.split(".")[0].replace("-", "_"): p for p in tree.rglob("*.ko*")}
    builtin = {
        Path(line).name.split(".")[0].replace("-", "_")
        for path in tree.rglob("modules.builtin")
        for line in path.read_text().splitlines()
    }
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in files:
            raise Unavailable(f"this kernel has no module {name}")
        data = _read_module(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in (depends[1].decode() if depends else "").split(","):
            if other:
                add(other.replace("-", "_"))
        order[name] = data

    for name in MODULES:
        add(name)
    return list(order.items())


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """An archive in the "newc" format: (path, mode, contents)."""
    out = bytearray()

    def pad() -> None:
        out.extend(bytes(-len(out) % 4))

    for number, (path, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")]):
        name = path.encode() + b"\0"
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        out.extend(b"070701" + b"".join(b"%08x" % f for f in fields) + name)
        pad()
        out.extend(data)
        pad()
    return bytes(out)


def build() -> None:
    """Kernel and initramfs in build/soft_roce, unless they are there. Raises Unavailable."""
    install_packages()
    BUILD.mkdir(parents=True, exist_ok=True)
    kernel, modules = BUILD / "vmlinuz", BUILD / "modules"
    asked, wanted = modules / "asked", " ".join(MODULES)
    if not asked.exists() or asked.read_text() != wanted:
        package = _kernel_package()
        print(f"unpacking {package} into {BUILD}", flush=True)
        for old in BUILD.glob("linux-image-*.deb"):
            old.unlink()
        _call("apt-get", "download", package, cwd=BUILD)
        tree = BUILD / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        (deb,) = BUILD.glob("linux-image-*.deb")
        _call("dpkg", "-x", str(deb), str(tree))
        shutil.copy(next(tree.glob("boot/vmlinuz-*")), kernel)
        shutil.rmtree(modules, ignore_errors=True)
        modules.mkdir()
        loaded = _in_load_order(tree)
        for name, data in loaded:
            (modules / f"{name}.ko").write_bytes(data)
        (modules / "order").write_text("".join(f"{name}.ko\n" for name, _ in loaded))
        asked.write_text(wanted)
        shutil.rmtree(tree)
        deb.unlink()
    folder, program, file = 0o040755, 0o100755, 0o100644
    entries = [(name, folder, b"") for name in ("bin", "modules", "dev", "proc", "sys", "host")]
    entries.append(("bin/busybox", program, Path("/bin/busybox").read_bytes()))
    entries.append(("init", program, (HERE / "init.sh").read_bytes()))
    entries += [(f"modules/{p.name}", file, p.read_bytes()) for p in sorted(modules.iterdir())]
    (BUILD / "initramfs.gz").write_bytes(gzip.compress(_cpio(entries), 1))


# --- running -------------------------------------------------------------------------------------


class Machine:
    """A booted machine. Raises Unavailable if it does not start."""

    def __init__(self, memory_mb: int = MEMORY_MB):
        build()
        self.console = BUILD / "console.log"  # the kernel's messages
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"),
            *("-m", str(memory_mb), "-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(BUILD / "vmlinuz"), "-initrd", str(BUILD / "initramfs.gz")),
            *("-append", "console=ttyS0 quiet panic=-1 oops=panic"),
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            *("-serial", f"file:{self.console}", "-serial", "stdio"),
        ]
        with open(BUILD / "qemu.log", "w") as log:
            self._qemu = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self._left = b""
        try:
            self._read_until_mark(BOOT_S, show=False)
        except TimeoutError:
            self.stop()
            raise Unavailable(f"it did not boot within {BOOT_S} s; see {self.console}") from None

    def run(self, command: str, timeout_s: float = 600, show: bool = False) -> tuple[int, str]:
        """(exit status, output) of one line of bash. Raises TimeoutError, with the output; the machine is gone then."""
        assert "\n" not in command
        assert self._qemu.stdin
        self._qemu.stdin.write(command.encode() + b"\n")
        self._qemu.stdin.flush()
        try:
            return self._read_until_mark(timeout_s, show)
        except TimeoutError:
            self.stop()
            raise

    def _read_until_mark(self, timeout_s: float, show: bool) -> tuple[int, str]:
        output, deadline = self._left, time.monotonic() + timeout_s
        assert self._qemu.stdout
        while not (mark := re.search(rb"\x1e(\w+)\n", output)):
            left = deadline - time.monotonic()
            ready = select.select([self._qemu.stdout], [], [], max(left, 0))[0]
            new = os.read(self._qemu.stdout.fileno(), 65536) if ready else b""
            if not new:
                why = "the machine ended" if ready else f"no end after {timeout_s} s"
                text = output.decode(errors="replace")
                raise TimeoutError(f"{why}; output so far:\n{text}\n{self._kernel_messages()}")
            output += new
            if show:
                sys.stdout.write(new.split(b"\x1e")[0].decode(errors="replace"))
                sys.stdout.flush()
        self._left = output[mark.end() :]
        status = 0 if mark[1] == b"ready" else int(mark[1])
        return status, output[: mark.start()].decode(errors="replace")

    def _kernel_messages(self) -> str:
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n".join(["last messages of its kernel:", *text.splitlines()[-15:]])

    def stop(self) -> None:
        self._qemu.kill()
        self._qemu.wait()
        for stream in (self._qemu.stdin, self._qemu.stdout):
            if stream:
                stream.close()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> int:
    try:
        with Machine() as machine:
            return machine.run(" ".join(sys.argv[1:]), timeout_s=3600, show=True)[0]
    except Unavailable as why:
        print(f"no Soft-RoCE machine here: {why}", file=sys.stderr)
        return 77


if __name__ == "__main__":
    sys.exit(main())
