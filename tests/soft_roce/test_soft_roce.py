"""What needs an RDMA NIC, run where there is none: in the emulated machine of machine.py.

The transport suite, each of its cases over `verbs` and over libfabric's `verbs;ofi_rxm`, and exchanges of 4 ranks as 2
nodes over `verbs`, with and without faults. Programs are compiled here and run inside, one machine for all of them.
"""

import ast
import re
import shlex
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/soft_roce"), str(ROOT / "tests/transport")]

import machine  # noqa: E402
from test_transport_suite import CASES, suite  # noqa: E402, F401

SLOWNESS = 3  # limits of the cases are multiplied by this: CPU and NIC are emulated
# libfabric makes completion queues for as many peers as it expects, 256 by default; rxe's hold 32767 entries.
ENVIRONMENT = f"MOE_COMM_TEST_SLOWNESS={SLOWNESS} FI_UNIVERSE_SIZE=16"
BOOT_S, CASE_S = 300, 200
ROW_S, RANKS_S, REPORT = 150, 750, "/run/ranks.xml"
BACKENDS = ("verbs", "fabric:verbs;ofi_rxm")
# Cases in which it matters that two NICs share the writes.
OF_TWO_NICS = ("both_ways", "slices", "wrong_secret", "full_queue", "many_immediates", "wake_up", "disconnect_one",
               "last_words", "killed_writer", "withdrawn_region", "open_and_close")  # fmt: skip

FAULTS_OF_CASES = {
    "full_queue": "full send queue",
    "sleeping_reader": "exhausted receive queue",
    "withdrawn_region": "stale key of an engine",
    "nobody_there": "refused, of an engine",
}

pytestmark = pytest.mark.timeout(BOOT_S + CASE_S)


class Lazy:
    """A machine that is booted when first used, and again after a command that did not end."""

    def __init__(self):
        self.machine: machine.Machine | None = None

    def run(self, command: str, timeout_s: float) -> str:
        """The output. Fails where the command fails or does not end."""
        if self.machine is None:
            self.machine = machine.Machine()
        try:
            status, output = self.machine.run(command, timeout_s)
        except TimeoutError as error:
            self.machine = None
            pytest.fail(str(error), pytrace=False)
        if status:
            pytest.fail(f"exit status {status} of {command}\n{output}", pytrace=False)
        return output

    def stop(self) -> None:
        if self.machine is not None:
            self.machine.stop()


@pytest.fixture(scope="session")
def inside(suite):  # noqa: F811
    """Runs commands in the machine. After the suite was compiled: files that appear later may stay unseen inside."""
    try:
        machine.build()
    except machine.Unavailable as why:
        (machine.BUILD.parent / "test-rdma.skipped").write_text(f"{why}\n")
        pytest.skip(f"no Soft-RoCE machine here: {why}")
    lazy = Lazy()
    yield lazy
    lazy.stop()


def test_machine_has_a_nic(inside):
    output = inside.run("ibv_devinfo -d rxe0 && fi_info -p 'verbs;ofi_rxm'", CASE_S)
    assert "PORT_ACTIVE" in output and "domain: rxe0" in output
    sending = "ib_write_bw -d rxe0 -x 1 -F -n 20 -s 4096"
    output = inside.run(f"({sending} >/dev/null &); sleep 3; {sending} 10.77.0.1", CASE_S)
    assert re.search(r"^ *4096 +20 ", output, re.MULTILINE), output


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_case(inside, suite, matrix, backend, case):  # noqa: F811
    print(inside.run(f"{ENVIRONMENT} {suite} {shlex.quote(backend)} {case}", CASE_S))
    if backend == "verbs" and case in FAULTS_OF_CASES:
        matrix(FAULTS_OF_CASES[case], "", "verbs", "passes")


@pytest.mark.parametrize("case", OF_TWO_NICS)
def test_two_nics(inside, suite, case):  # noqa: F811
    print(inside.run(f"{ENVIRONMENT} {suite} verbs:rxe0+rxe1 {case}", CASE_S))


def test_endpoint_that_cannot_be_enabled(inside, suite):  # noqa: F811
    """An error with its text and no crash: rxe's completion queues are too small for libfabric's default."""
    output = inside.run(f"{suite} 'fabric:verbs;ofi_rxm' --probe; [ $? = 3 ]", CASE_S)
    assert "fi_enable: EINVAL" in output


# Rows of tests/faults.
FAULTS = (
    "test_fault_matrix.py::test_killed[verbs-killed before its send-node-dispatch]",
    "test_fault_matrix.py::test_killed[verbs-killed before its send-rank-combine]",
    "test_fault_matrix.py::test_killed[verbs-killed during its send-node-dispatch]",
    "test_fault_matrix.py::test_killed[verbs-killed after its send-rank-dispatch]",
    "test_fault_matrix.py::test_killed[verbs-killed after its send-node-combine]",
    "test_fault_matrix.py::test_killed[verbs-killed as forwarder-node-dispatch]",
    "test_fault_matrix.py::test_killed[verbs-killed as forwarder-node-combine]",
    "test_fault_matrix.py::test_exits_after_its_last_combine[verbs-node]",
    "test_fault_matrix.py::test_exits_after_its_last_combine[verbs-rank]",
    "test_fault_matrix.py::test_link_is_cut[verbs-node-dispatch]",
    "test_fault_matrix.py::test_link_is_cut[verbs-rank-combine]",
    "test_fault_matrix.py::test_stopped[verbs-node-dispatch]",
    "test_fault_survived.py::test_nobody_dies[verbs-node]",
    "test_fault_survived.py::test_opening[verbs-connection refused-rank]",
    "test_fault_survived.py::test_opening[verbs-no memory to register-rank]",
    "test_fault_survived.py::test_opening[verbs-other secret-rank]",
    "test_fault_survived.py::test_stale_key[verbs-rank]",
)
RANKS = (f"{ROOT}/tests/soft_roce/in_machine.py::test_exchange",
         *(f"{ROOT}/tests/faults/{name}" for name in FAULTS))  # fmt: skip


@pytest.fixture(scope="session")
def of_ranks(inside):
    """{name: what pytest says of it inside}. One run for all: importing torch takes a minute in there."""
    settings = {
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "MOE_COMM_TEST_START": "fork", "MOE_COMM_TEST_BACKENDS": "verbs", "MOE_COMM_TEST_NICS": "rxe0 rxe1",
        "MOE_COMM_TEST_SLOWNESS": str(SLOWNESS),
    }  # fmt: skip
    command = [
        *("env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, "-m", "pytest"),
        *("-v", "--color=no", "-p", "pytest_timeout", "--timeout", str(ROW_S), "-p", "no:cacheprovider"),
        *("-o", "faulthandler_timeout=0", "--rootdir", str(ROOT), "--junitxml", REPORT, *RANKS),
    ]  # fmt: skip
    output = inside.run(f"{shlex.join(command)} 2>&1; cat {REPORT}", RANKS_S)
    text, mark, report = output.partition("<?xml")
    assert mark, f"pytest ended without a report:\n{text}"
    return {case.get("name"): case for case in xml.fromstring(mark + report).iter("testcase")}


@pytest.mark.timeout(BOOT_S + RANKS_S + 100)
@pytest.mark.parametrize("name", [name.partition("::")[2] for name in RANKS])
def test_ranks(of_ranks, request, name):
    """Exchanges of 4 ranks as 2 nodes, a NIC each: with a known result, and with faults."""
    case = of_ranks[name]
    for kind in ("failure", "error", "skipped"):
        for found in case.iter(kind):
            pytest.fail(f"{kind}, inside: {found.get('message')}\n{found.text}", pytrace=False)
    print("".join(found.text for found in case.iter("system-out")))
    for cell in case.iter("property"):
        request.node.user_properties.append(("cell", ast.literal_eval(cell.get("value"))))
