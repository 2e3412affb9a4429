"""The pool of results: what is reused, what never is, what is given back."""

import gc
import threading

import pytest
import torch

import moe_comm
from moe_comm import memory
from moe_comm.memory import LEAST_BYTES, new_tensor

SHAPE = (300, 128)  # bf16: 75 KiB


@pytest.fixture(autouse=True)
def empty():
    gc.collect()
    moe_comm.empty_cache()
    assert memory.kept_bytes() == 0


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.float64], ids=str
)
def test_a_tensor_like_any_other(dtype):
    made = new_tensor((1000, 96), dtype)
    made.fill_(3)
    assert made.shape == (1000, 96) and made.dtype == dtype and made.is_contiguous()
    assert made.data_ptr() % 4096 == 0 and not made.requires_grad
    assert torch.equal(made.float(), torch.full((1000, 96), 3.0))
    assert torch.equal(made.clone().float(), made.float())


def test_small_ones_are_not_ours():
    del_me = new_tensor((LEAST_BYTES // 2 - 1,), torch.bfloat16)
    del del_me
    assert memory.kept_bytes() == 0 and new_tensor((0, 7), torch.int32).shape == (0, 7)


def test_memory_of_a_dead_tensor_is_used_again_and_of_a_living_one_never():
    first = new_tensor(SHAPE, torch.bfloat16).fill_(1)
    view = first[7:9]
    address = first.data_ptr()
    del first
    second = new_tensor(SHAPE, torch.bfloat16).fill_(2)
    assert second.data_ptr() != address and view.eq(1).all()  # the view keeps all of it
    del view
    assert memory.kept_bytes() >= 2 * 300 * 128
    assert new_tensor(SHAPE, torch.bfloat16).data_ptr() == address


def test_calls_of_about_the_same_size_share_blocks():
    del_me = new_tensor((1000, 128), torch.bfloat16)
    address = del_me.data_ptr()
    del del_me
    assert new_tensor((998, 128), torch.bfloat16).data_ptr() == address
    assert new_tensor((500, 128), torch.bfloat16).data_ptr() != address


def test_what_is_kept_is_bounded_and_given_back():
    big = 64 << 20  # untouched: no memory yet
    tensors = [new_tensor((big,), torch.uint8) for _ in range(3)]
    del tensors
    assert memory.kept_bytes() == 3 * big
    other = new_tensor(
        (big + big // 2,), torch.uint8
    )  # of another size: two of the three make room
    assert memory.kept_bytes() == big
    another = new_tensor((big,), torch.uint8)
    assert memory.kept_bytes() == 0
    del other, another
    assert memory.kept_bytes() == 2 * big + big // 2
    moe_comm.empty_cache()
    assert memory.kept_bytes() == 0


def test_threads_never_get_the_same_block():
    errors = []

    def work(number):
        for i in range(300):
            mine = new_tensor((LEAST_BYTES + 4096 * (i % 3),), torch.uint8).fill_(number)
            if not mine.eq(number).all():
                errors.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_no_memory_is_an_error():
    with pytest.raises(MemoryError):
        new_tensor((1 << 50,), torch.uint8)
