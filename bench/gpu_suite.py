"""Everything that needs a GPU, by one command, in under nine minutes, without a network, from a plain checkout.

    python bench/gpu_suite.py [--out bench/results] [--only build,tests,…] [--dry-run]

Needs torch with CUDA, triton, cupy (NVRTC), pybind11, setuptools and g++; pytest for the tests, matplotlib for plots,
compute-sanitizer for its step: what is missing is said, and its steps are not run. Steps, each a process with a time
limit of its own, so that what fails or hangs costs its own result only:

    build      the engine, in place            tests      pytest -m gpu
    exchange   tests/ep --through cuda         figures    bench/gpu_figures.py, one process for each
    sanitizer  memcheck and racecheck of the fused kernels, small

Writes DATE_DEVICE_gpu_suite.json and PNG plots: device, clocks, versions, commit, and for each step its end, its time
and its result or the tail of what it printed. The file is written after each step. Ends with 1 if a step failed.
--dry-run: on the CPU, tiny; figures are marked so and mean nothing; what it cannot run it lists as not measured.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("copy", "rows", "small", "ring", "sweep", "staged", "calls")
LIMIT_S = 530  # of everything
LIMITS_S = {"build": 150, "tests": 170, "exchange": 90, "sanitizer": 60, "figures": 75}
GPU_TESTS = (
    "tests/kernels/test_cuda_launch.py",
    "tests/kernels/test_device_ring.py",
    "tests/kernels/test_kernel_buffer.py",
    "tests/kernels/test_kernel_rounds.py",
    "tests/kernels/test_kernel_masks.py",
    "tests/kernels/test_window_memory.py",
    "tests/unit/test_doctor.py",
    "tests/ep/test_staging.py",
)
EP_TESTS = ("test_exchange", "test_hooks", "test_handles", "test_lanes", "test_wrong_input")
PACKAGES = (
    "torch",
    "triton",
    "cupy",
    "pybind11",
    "setuptools",
    "pytest",
    "hypothesis",
    "matplotlib",
)


def links() -> Path:
    """A folder in which moe_comm and moe_comm.kernels are this checkout's, without an installation."""
    package = ROOT / "build/gpu_suite/moe_comm"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*(ROOT / "moe_comm").iterdir(), ROOT / "kernels"]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return package.parent


def run(command: list[str], limit_s: float, environment: dict[str, str]) -> dict:
    """{ok, seconds, output or why}. The process and its children end with the limit."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {"ok": False, "seconds": 0.0, "why": str(error), "output": ""}
    why = ""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        why = f"over its limit of {limit_s:.0f} s"
    if process.returncode and not why:
        why = f"exit code {process.returncode}"
    return {
        "ok": not why,
        "seconds": round(time.monotonic() - start, 2),
        "why": why,
        "output": output,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        there = importlib.util.find_spec(name) is not None
        found[name] = "installed" if there else None
        for package in (name, "cupy-cuda13x", "cupy-cuda12x") if name == "cupy" else (name,):
            try:
                found[name] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
    for tool in ("g++", "nvcc", "compute-sanitizer"):
        found[tool] = shutil.which(tool)
    return found


def device_facts(dry: bool) -> dict:
    if dry:
        return {"name": "dry run on the CPU"}
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    got = run(command, 20, dict(os.environ))
    values = [value.strip() for value in got["output"].strip().split(",")]
    keys = query.split(",")
    return dict(zip(keys, values, strict=False)) if got["ok"] else {"name": "unknown", "why": got}


class Suite:
    def __init__(self, out: Path, dry: bool) -> None:
        self.dry, self.start = dry, time.monotonic()
        commit = run(["git", "rev-parse", "--short", "HEAD"], 10, dict(os.environ))["output"]
        self.versions = versions()
        self.report: dict = {
            "commit": commit.strip(), "date": datetime.date.today().isoformat(), "dry_run": dry,
            "device": device_facts(dry), "versions": self.versions, "steps": {},
        }  # fmt: skip
        name = re.sub(r"\W+", "-", self.report["device"]["name"]).strip("-")
        self.path = out / f"{self.report['date']}_{name}_gpu_suite.json"
        out.mkdir(parents=True, exist_ok=True)
        # PYTHONPATH may name where cupy and triton are
        found = [str(links()), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found)), "PYTHONSAFEPATH": "1",
            "XDG_CACHE_HOME": str(ROOT / "build/gpu_suite/cache"),
        }  # fmt: skip

    def missing(self, *names: str) -> str:
        lacking = [name for name in names if not self.versions.get(name)]
        return f"not run: no {', '.join(lacking)}" if lacking else ""

    def step(
        self, name: str, command: list[str], limit_s: float, *needs: str, is_json: bool = False
    ) -> dict:
        """Runs it unless something is missing or time is up; keeps and writes what came of it."""
        left = LIMIT_S - (time.monotonic() - self.start)
        why = self.missing(*needs) or ("" if left > 5 else "not run: no time left")
        if why:
            got = {"ok": None, "seconds": 0.0, "why": why, "output": ""}
        else:
            got = run(command, min(limit_s, left), self.environment)
        output = got.pop("output")
        if is_json and got["ok"]:
            try:
                got["result"] = json.loads(output.strip().splitlines()[-1])
            except (ValueError, IndexError):
                got |= {"ok": False, "why": "printed no JSON"}
        if not is_json or not got["ok"]:
            got["tail"] = output[-3000:]
        self.report["steps"][name] = got
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")
        said = {True: "ok", False: "FAILED", None: "-"}[got["ok"]]
        print(f"{name:20} {said:7} {got['seconds']:7.1f} s  {got['why']}", flush=True)
        if got["ok"] is False:
            print(output[-1500:], flush=True)
        return got

    def pytest(self, name: str, *arguments: str) -> None:
        """Without this repository's pytest options: their plugins may be missing. Its last line counts what was run."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "-rs",
            *arguments,
        ]
        got = self.step(name, command, LIMITS_S[name], "pytest")
        lines = got["tail"].strip().splitlines()
        last = lines[-1] if lines else ""
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", last)
        got["counts"] = {kind: int(number) for number, kind in counts}
        if got["ok"] and not got["counts"].get("passed") and not self.dry:
            got |= {"ok": False, "why": "no test was run"}

    def all(self, only: set[str]) -> int:
        python, dry = sys.executable, ["--dry-run"] if self.dry else []
        if "build" in only:
            command = [python, "setup.py", "-q", "build_ext", "--inplace"]
            self.step("build", command, LIMITS_S["build"], "pybind11", "setuptools", "g++")
            links()  # the engine is there now
        if "tests" in only:
            self.pytest("tests", "-m", "gpu", *GPU_TESTS)
        if "figures" in only:
            for figure in FIGURES:
                command = [python, str(ROOT / "bench/gpu_figures.py"), figure, *dry]
                needs = ("torch",) if self.dry else ("torch", "triton", "cupy")
                self.step(f"figures {figure}", command, LIMITS_S["figures"], *needs, is_json=True)
        if "exchange" in only:
            files = [f"tests/ep/{name}.py" for name in EP_TESTS]
            if self.missing("hypothesis"):  # what needs it is left out, and that is said
                left_out = [f for f in files if "from hypothesis" in (ROOT / f).read_text()]
                self.report["left out"] = f"{', '.join(left_out)}: no hypothesis"
                files = [f for f in files if f not in left_out]
            self.pytest("exchange", "--through", "far" if self.dry else "cuda", *files)
        if "sanitizer" in only:
            check = [python, str(ROOT / "bench/gpu_figures.py"), "check", *dry]
            if self.dry:
                self.step("check, unsanitized", check, LIMITS_S["sanitizer"])
            for tool in () if self.dry else ("memcheck", "racecheck"):
                wrapped = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *check]
                needs = "compute-sanitizer", "cupy"
                self.step(f"sanitizer {tool}", wrapped, LIMITS_S["sanitizer"], *needs)
        plots(self.report, self.path, self.versions)
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")
        print(f"{self.report['seconds']} s, {self.path}")
        return int(any(step["ok"] is False for step in self.report["steps"].values()))


def plots(report: dict, path: Path, found: dict) -> None:
    """Bytes/s against blocks, and each kernel's share of the copy."""
    if not found.get("matplotlib"):
        report["plots"] = "not drawn: no matplotlib"
        return
    if report["dry_run"]:
        report["plots"] = "not drawn: dry run"
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report["plots"] = []
    title = f"{report['device']['name']}, {report['commit']}"
    swept = report["steps"].get("figures sweep", {}).get("result", {})
    points = sorted((int(k[7:]), v["gb_s"]) for k, v in swept.items() if k.startswith("blocks="))
    if points:
        plt.figure()
        plt.plot(*zip(*points, strict=True), marker="o", label="pack, fused, T = 4096")
        plt.axhline(swept["copy"]["gb_s"], ls="--", color="gray", label="device-to-device copy")
        plt.xlabel("blocks (SMs)")
        plt.ylabel("10⁹ bytes/s, read and written")
        plt.title(title)
        plt.legend()
        plt.savefig(path.with_name(path.stem + "_sweep.png"), dpi=120)
        report["plots"].append(path.stem + "_sweep.png")
    rows = report["steps"].get("figures rows", {}).get("result", {})
    bars = {k: v["of_copy"] for k, v in rows.items() if "of_copy" in v}
    if bars:
        plt.figure(figsize=(8, 5))
        plt.barh(list(bars), [100 * v for v in bars.values()])
        plt.axvline(80, ls="--", color="gray")
        plt.xlabel("% of the copy's bytes/s, T = 4096")
        plt.title(title)
        plt.tight_layout()
        plt.savefig(path.with_name(path.stem + "_rows.png"), dpi=120)
        report["plots"].append(path.stem + "_rows.png")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--only", default="build,figures,tests,exchange,sanitizer")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    return Suite(options.out, options.dry_run).all(set(options.only.split(",")))


if __name__ == "__main__":
    sys.exit(main())
