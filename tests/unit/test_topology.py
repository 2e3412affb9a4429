"""Which NICs a rank takes (csrc/topology.cpp), on machines as tests/recorded describes them, and on this one."""

import os
from pathlib import Path

import pytest

from moe_comm import TransportError, _engine, doctor
from moe_comm.group import survey
from moe_comm.nics import agreed_interface

RECORDED = Path(__file__).resolve().parents[1] / "recorded"


@pytest.fixture
def sysfs(tmp_path):
    """`sysfs("p5")`: a folder with what tests/recorded/p5.txt says of /sys."""

    def expand(name: str) -> str:
        for line in (RECORDED / f"{name}.txt").read_text().splitlines():
            if line.startswith("#"):
                continue
            path, kind, text = line.partition(" -> ") if " -> " in line else line.partition(" = ")
            place = tmp_path / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if kind == " -> ":
                place.symlink_to(text)
            else:
                place.write_text(text + "\n")
        return str(tmp_path)

    return expand


def nics(sysfs: str, **request) -> list[str]:
    return _engine.choose_nics(sysfs=sysfs, **{"efa": False, "cpus": [], **request})[0]


def of_gpus(sysfs: str, efa: bool) -> list[list[str]]:
    return [nics(sysfs, efa=efa, gpu=gpu) for gpu in _engine.gpus(sysfs)]


def test_p5_four_for_each_gpu(sysfs) -> None:
    root = sysfs("p5")
    chosen = of_gpus(root, efa=True)
    assert len(chosen) == 8
    assert chosen[0] == ["rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0"]
    assert chosen[7] == ["rdmap198s0", "rdmap199s0", "rdmap200s0", "rdmap201s0"]
    assert len({name for group in chosen for name in group}) == 32


def test_p5en_two_gpus_divide_the_four_of_their_switch(sysfs) -> None:
    chosen = of_gpus(sysfs("p5en"), efa=True)
    assert chosen[:2] == [["rdmap85s0", "rdmap86s0"], ["rdmap87s0", "rdmap88s0"]]
    assert [len(group) for group in chosen] == [2] * 8
    assert len({name for group in chosen for name in group}) == 16


def test_h100_one_for_each_gpu_and_none_of_another_network(sysfs) -> None:
    root = sysfs("h100_cx7")
    eight = [f"mlx5_{i}" for i in (0, 3, 4, 5, 6, 9, 10, 11)]
    assert of_gpus(root, efa=False) == [[name] for name in eight]
    ranks = [nics(root, place=i, num_places=8) for i in range(8)]
    assert ranks == [[name] for name in eight]  # not the slower Ethernet, nor what is down


def test_gb200_shares_no_switch_so_numa_nodes_decide(sysfs) -> None:
    assert of_gpus(sysfs("gb200"), efa=False) == [["mlx5_0"], ["mlx5_1"], ["mlx5_4"], ["mlx5_5"]]


def test_vm_without_topology_divides_all(sysfs) -> None:
    root = sysfs("vm")
    assert of_gpus(root, efa=False) == [["mlx5_0"], ["mlx5_1"], ["mlx5_2"], ["mlx5_3"]]
    assert nics(root) == ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]
    assert nics(root, place=1, num_places=2) == ["mlx5_2", "mlx5_3"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8, 16, 32, 64])
def test_ranks_get_as_many_as_each_other(sysfs, num_ranks) -> None:
    """NIC i talks to the peer's NIC i. At most four; where they suffice, no NIC has two ranks."""
    root = sysfs("p5")
    chosen = [nics(root, efa=True, place=i, num_places=num_ranks) for i in range(num_ranks)]
    assert {len(group) for group in chosen} == {min(4, max(1, 32 // num_ranks))}
    used = [name for group in chosen for name in group]
    assert max(used.count(name) for name in used) == max(1, -(-num_ranks // 32))


def test_cpuset_keeps_a_rank_at_its_numa_node(sysfs) -> None:
    root = sysfs("h100_cx7")
    names, why = _engine.choose_nics(efa=False, cpus=[60, 61], place=1, num_places=4, sysfs=root)
    assert names == ["mlx5_9"]
    assert "NUMA node" in why and "share 2 of 4" in why
    assert nics(root, cpus=[0, 60], place=0, num_places=8) == ["mlx5_0"]  # may run anywhere


def test_own_cpuset_is_asked(sysfs) -> None:
    """Without `cpus`: sched_getaffinity of the caller."""
    root, usable = sysfs("h100_cx7"), os.sched_getaffinity(0)
    node = Path(root) / "devices/system/node"
    (node / "node1/cpulist").write_text(",".join(map(str, sorted(usable))))
    (node / "node0/cpulist").write_text("1000-1007")
    assert _engine.choose_nics(efa=False, sysfs=root)[0][0] == "mlx5_6"


def test_no_nic_is_said_with_what_to_do(sysfs) -> None:
    root = sysfs("no_nic")
    with pytest.raises(TransportError, match=r"no EFA NIC in /sys/class/infiniband: on AWS"):
        nics(root, efa=True)
    with pytest.raises(TransportError, match=r"no RDMA NIC in /sys/class/infiniband: load"):
        nics(root)


def test_nics_that_are_down_are_named(sysfs) -> None:
    root = sysfs("vm")
    for state in Path(root).glob("devices/**/ports/1/state"):
        state.write_text("1: DOWN\n")
    with pytest.raises(TransportError, match="no NIC with an active port: mlx5_0, mlx5_1"):
        nics(root)


def down(root: str, name: str) -> None:
    (Path(root) / f"class/infiniband/{name}/ports/1/state").write_text("1: DOWN\n")


def test_a_nic_that_is_down_moves_no_other_rank(sysfs) -> None:
    """GPU 7's own NIC is down: it takes one of its NUMA node; as many as the others have, who keep theirs."""
    root = sysfs("h100_cx7")
    down(root, "mlx5_11")
    chosen = of_gpus(root, efa=False)
    assert chosen[:7] == [[f"mlx5_{i}"] for i in (0, 3, 4, 5, 6, 9, 10)]
    assert chosen[7] in (["mlx5_6"], ["mlx5_9"], ["mlx5_10"])


def test_p5_with_a_nic_down_takes_three_for_each_gpu(sysfs) -> None:
    root = sysfs("p5")
    down(root, "rdmap201s0")
    chosen = of_gpus(root, efa=True)
    assert chosen[0] == ["rdmap79s0", "rdmap80s0", "rdmap81s0"]
    assert chosen[7] == ["rdmap198s0", "rdmap199s0", "rdmap200s0"]


def test_gb200_with_a_nic_down_shares_the_other_of_its_cpu(sysfs) -> None:
    root = sysfs("gb200")
    down(root, "mlx5_5")
    assert of_gpus(root, efa=False) == [["mlx5_0"], ["mlx5_1"], ["mlx5_4"], ["mlx5_4"]]


def test_efa_and_others_are_told_apart(sysfs) -> None:
    root = sysfs("vm")
    driver = Path(root) / "class/infiniband/mlx5_2/device/driver"
    driver.unlink()
    (Path(root) / "bus/pci/drivers/efa").mkdir()
    driver.symlink_to(Path(root) / "bus/pci/drivers/efa")
    assert nics(root, efa=True) == ["mlx5_2"]
    assert nics(root, efa=False) == ["mlx5_0", "mlx5_1", "mlx5_3"]


def test_wrong_requests(sysfs) -> None:
    root = sysfs("vm")
    with pytest.raises(
        ValueError, match="gpu: expected a PCI address of a GPU of this host, got 1"
    ):
        nics(root, gpu="1")
    with pytest.raises(ValueError, match="place: expected one below 2, got 2"):
        nics(root, place=2, num_places=2)


def test_engine_says_what_is_missing(sysfs, monkeypatch) -> None:
    monkeypatch.setenv("MOE_COMM_SYSFS", sysfs("no_nic"))
    for transport, text in (("fabric:efa", "no EFA NIC"), ("verbs", "no RDMA NIC")):
        with pytest.raises(TransportError, match=text):
            _engine.Engine(transport=transport)


def test_doctor_shows_what_a_rank_takes_and_why(sysfs, monkeypatch) -> None:
    monkeypatch.setenv("MOE_COMM_SYSFS", sysfs("gb200"))
    section = doctor.nic_choice_section()
    assert [entry["nics"] for entry in section[:4]] == [
        ["mlx5_0"],
        ["mlx5_1"],
        ["mlx5_4"],
        ["mlx5_5"],
    ]
    assert section[1]["for"] == "verbs, 0009:01:00.0"
    assert "NUMA node 0; share 2 of 2, by GPU" in section[1]["why"]
    assert section[4]["for"] == "verbs, no GPU" and section[4]["nics"]
    assert {nic["driver"] for nic in doctor.nic_section()} == {"mlx5_core"}


def opened_nics(rank, group, roots, place, interface):
    """What this rank's engine is told, on a host and at a place of its own."""
    os.environ["MOE_COMM_SYSFS"] = roots[rank]
    try:
        return agreed_interface(group, "verbs", interface[rank], place[rank], None)
    except TransportError as error:
        return str(error)


def test_hosts_with_unequal_numbers_of_ranks_take_as_many_nics(sysfs, run_ranks) -> None:
    """Of 4 NICs, one of 4 ranks takes one and one of 2 ranks would take two."""
    vm = sysfs("vm")
    assert nics(vm, place=1, num_places=2) == ["mlx5_2", "mlx5_3"]
    found = run_ranks(opened_nics, 2, [vm, vm], [(3, 4), (1, 2)], ["", "gid=3"])
    assert found == ["mlx5_3", "mlx5_2,gid=3"]


def test_hosts_with_other_nics_take_as_many(sysfs, run_ranks, tmp_path) -> None:
    vm = sysfs("vm")
    (tmp_path / "other").mkdir()
    found = run_ranks(opened_nics, 2, [vm, str(tmp_path / "other")], [(0, 2), (0, 1)], ["", ""])
    assert found == ["mlx5_0", ""]  # the second: what the library finds, which is one
    found = run_ranks(opened_nics, 2, [vm, vm], [(0, 2), (0, 1)], ["", ""])
    assert found == ["mlx5_0+mlx5_1"] * 2


def test_named_nics_of_unequal_number_are_an_error_on_every_rank(sysfs, run_ranks) -> None:
    vm = sysfs("vm")
    found = run_ranks(opened_nics, 2, [vm, vm], [(0, 1), (0, 1)], ["mlx5_0", "mlx5_1+mlx5_2"])
    assert found[0] == found[1]
    assert "got 2 on rank 1 (mlx5_1+mlx5_2) and 1 on rank 0 (mlx5_0)" in found[0]
    found = run_ranks(opened_nics, 2, [vm, vm], [(0, 1), (0, 1)], ["mlx5_3", ""])
    assert found == ["mlx5_3", "mlx5_0"]


def places(rank, group, ranks_per_node):
    return survey(group, ranks_per_node, {}).place


def test_pretended_nodes_divide_the_nics_each_for_itself(run_ranks) -> None:
    """So that rail peers, who talk to each other, have the same."""
    assert run_ranks(places, 4, 2) == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert run_ranks(places, 4, 0) == [(0, 4), (1, 4), (2, 4), (3, 4)]
