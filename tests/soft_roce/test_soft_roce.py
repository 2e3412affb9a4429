"""What needs an RDMA NIC, run where there is none: in the emulated machine of machine.py.

The transport suite, each of its cases over `verbs` and over libfabric's `verbs;ofi_rxm`, and one exchange of 4 ranks as
2 nodes over `verbs`. The programs are compiled here and run inside, one machine for all of them.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/soft_roce"), str(ROOT / "tests/transport")]

import machine  # noqa: E402
from test_transport_suite import CASES, suite  # noqa: E402, F401

SLOWNESS = 3  # limits of the cases are multiplied by this: CPU and NIC are emulated
# libfabric makes completion queues for as many peers as it expects, 256 by default; rxe's hold 32767 entries.
ENVIRONMENT = f"MOE_COMM_TEST_SLOWNESS={SLOWNESS} FI_UNIVERSE_SIZE=16"
BOOT_S, CASE_S, EXCHANGE_S = 300, 200, 400
BACKENDS = ("verbs", "fabric:verbs;ofi_rxm")
# Cases in which it matters that two NICs share the writes.
OF_TWO_NICS = ("both_ways", "slices", "wrong_secret", "full_queue", "many_immediates", "wake_up", "disconnect_one",
               "last_words", "killed_writer", "withdrawn_region", "open_and_close")  # fmt: skip

pytestmark = pytest.mark.timeout(BOOT_S + EXCHANGE_S)


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
def test_case(inside, suite, backend, case):  # noqa: F811
    print(inside.run(f"{ENVIRONMENT} {suite} {shlex.quote(backend)} {case}", CASE_S))


@pytest.mark.parametrize("case", OF_TWO_NICS)
def test_two_nics(inside, suite, case):  # noqa: F811
    print(inside.run(f"{ENVIRONMENT} {suite} verbs:rxe0+rxe1 {case}", CASE_S))


def test_endpoint_that_cannot_be_enabled(inside, suite):  # noqa: F811
    """An error with its text and no crash: rxe's completion queues are too small for libfabric's default."""
    output = inside.run(f"{suite} 'fabric:verbs;ofi_rxm' --probe; [ $? = 3 ]", CASE_S)
    assert "fi_enable: EINVAL" in output


def test_exchange(inside):
    """Over one NIC by its name: left to choose, each rank takes its part of the two, and rxe0 does not reach rxe1."""
    python = f"PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={ROOT} {shlex.quote(sys.executable)}"
    output = inside.run(f"{python} {ROOT}/tests/soft_roce/exchange.py verbs:rxe0 2>&1", EXCHANGE_S)
    print(output)
    assert output.count("calls ok") == 8, output
