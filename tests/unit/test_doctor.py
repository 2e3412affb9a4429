"""What doctor says of this process's settings."""

import pytest

from moe_comm import doctor


@pytest.mark.parametrize("value, is_warned", [("1", True), ("8", False), (None, None)])
def test_one_queue_to_the_gpu(monkeypatch, value, is_warned):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    found = [limit for limit in doctor.limit_section() if limit["name"] == name]
    if value is None:
        assert not found
    else:
        assert found[0]["value"] == value and ("unset it" in found[0]["fix"]) == is_warned


def test_mode_of_cuda_tensors():
    section = doctor.gpu_section()
    assert ("host-staged by copy" in section["mode"]) == section["torch_cuda"]


@pytest.mark.gpu
def test_mode_with_a_gpu():
    assert "host-staged by copy" in doctor.gpu_section()["mode"]
