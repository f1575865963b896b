"""Addresses stay, pages go and come back: what the kernel says of an arena, and what autograd does over it."""

import gc
import mmap

import pytest
import torch

from memplan import memory
from memplan.errors import MemplanError
from memplan.runtime import arena as arenas
from memplan.runtime.arena import Arena
from memplan.runtime.tenants import ArenaTenant, moved_in

MIB = 2**20
CHUNK = 2 * MIB


def test_resident_memory_falls_and_returns() -> None:
    gc.collect()
    before = memory.resident()
    there = Arena.reserve(128 * MIB)
    values = there.tensor(0, (32 * MIB,), torch.float32)
    assert there.resident == 0 and memory.resident() - before < 4 * MIB  # addresses alone
    for _ in range(3):
        address = values.data_ptr()
        there.map()
        assert there.resident == 128 * MIB
        assert abs(memory.resident() - before - 128 * MIB) < 4 * MIB
        values.fill_(1.5)
        there.release()
        assert there.resident == 0 and abs(memory.resident() - before) < 4 * MIB
        assert values.data_ptr() == address


def test_mapping_leaves_what_is_there_alone() -> None:
    there = Arena.reserve(4 * CHUNK)
    values = there.tensor(0, (4 * CHUNK,), torch.uint8)
    there.map(CHUNK, CHUNK)
    values[CHUNK : 2 * CHUNK] = 7
    there.map()
    there.map()
    assert there.resident == 4 * CHUNK and bool((values[CHUNK : 2 * CHUNK] == 7).all())


def test_chunks_go_one_by_one() -> None:
    there = Arena.reserve(4 * CHUNK)
    values = there.tensor(0, (4 * CHUNK,), torch.uint8)
    there.map()
    values.fill_(5)
    there.release(CHUNK, 2 * CHUNK)
    there.release(CHUNK, 2 * CHUNK)
    assert there.resident == 2 * CHUNK
    assert bool((values[:CHUNK] == 5).all()) and bool((values[3 * CHUNK :] == 5).all())
    there.map(2 * CHUNK)
    assert there.resident == 3 * CHUNK


def test_a_module_trains_over_it_with_views_and_gradients(one_thread: None) -> None:
    """A model and its optimizer's states leave and come back between steps: bit for bit the training that stays."""

    def trained(between) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        x = torch.linspace(-1, 1, 32 * 64).view(32, 64)

        def step() -> None:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        step()
        done = between(net, optimizer)
        for _ in range(3):
            done()
            step()
        return [p.detach().clone() for p in net.parameters()]

    def moved(net, optimizer):
        states = (s for states in optimizer.state.values() for s in states.values())
        tenant = moved_in([*net.parameters(), *states])
        assert tenant.resident == tenant.arena.size
        places = [p.data_ptr() for p in net.parameters()]

        def away() -> None:
            assert tenant.release() == tenant.arena.size and tenant.resident == 0
            tenant.restore()
            assert [p.data_ptr() for p in net.parameters()] == places

        return away

    stayed = trained(lambda net, optimizer: lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(stayed, trained(moved), strict=True))


def test_moving_in_keeps_values_strides_and_objects() -> None:
    tensors = [torch.arange(6.0).view(2, 3).T, torch.tensor(3), torch.empty(0, 4), torch.arange(12)[::2]]
    values, places = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    tenant = moved_in([*tensors, tensors[0]])
    tenant.release()
    tenant.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    assert tensors[0].stride() == (1, 3) and tensors[0].data_ptr() != places[0]
    tied = torch.ones(8)
    with pytest.raises(MemplanError, match="share a storage"):
        moved_in([torch.ones(3), tied, tied.view(2, 4)])


def test_tensors_are_storages_of_their_own() -> None:
    """A write to one is no write to what backward needs of another."""
    there = Arena.reserve(CHUNK)
    there.map()
    a, b = (there.tensor(k * 64, (16,), torch.float32).fill_(2.0) for k in range(2))
    a.requires_grad_()
    loss = (a * a).sum()
    b.add_(1)
    loss.backward()
    assert a.untyped_storage().nbytes() == 64 and bool((a.grad == 4).all())
    assert there.tensor(0, (2, 3), torch.bfloat16, (1, 2)).stride() == (1, 2)
    assert there.tensor(0, (0, 3), torch.float64).shape == (0, 3)


def test_tensors_keep_the_addresses() -> None:
    there = Arena.reserve(CHUNK)
    there.map()
    values = there.tensor(0, (CHUNK,), torch.uint8).fill_(3)
    del there
    gc.collect()
    assert bool((values == 3).all())


def test_a_copy_is_of_what_was_last_there() -> None:
    tenant = ArenaTenant(Arena.reserve(CHUNK), "copy")
    tenant.restore()
    values = tenant.arena.tensor(0, (CHUNK,), torch.uint8)
    for value in (1, 2, 3):
        values.fill_(value)
        assert (tenant.release(), tenant.release()) == (CHUNK, 0)
        assert (tenant.restore(), tenant.restore()) == (CHUNK, 0)
        assert bool((values == value).all())


def test_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Arena.reserve(4 * CHUNK)
    there.map(0, CHUNK)
    monkeypatch.setattr(arenas, "free_bytes", lambda device: 2 * CHUNK)
    with pytest.raises(
        MemplanError, match=r"cannot map 6.291 MB: 4.194 MB of memory are free; release something first"
    ):
        there.map()
    assert there.resident == CHUNK
    there.map(0, 3 * CHUNK)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Arena.reserve(0), "cannot reserve 0 bytes"),
        (lambda: Arena.reserve(1, 100), f"chunks of a multiple of {mmap.PAGESIZE} bytes"),
        (lambda: Arena.reserve(2**62), "cannot reserve 4611686.0 TB of addresses: Cannot allocate memory"),
        (lambda: Arena.reserve(CHUNK).map(100), "no range of 2097052 bytes at 100"),
        (lambda: Arena.reserve(CHUNK).release(0, 2 * CHUNK), "no range of 4194304 bytes at 0"),
        (lambda: Arena.reserve(CHUNK).tensor(1, (2,), torch.float32), "no tensor of 8 bytes can be at offset 1"),
        (lambda: Arena.reserve(CHUNK).tensor(0, (CHUNK,), torch.float16), "no tensor of 4194304 bytes"),
        (lambda: ArenaTenant(Arena.reserve(1), "recompute"), "'recompute' has a function to fill it"),
        (lambda: ArenaTenant(Arena.reserve(1), "copy", list), "'nothing' and 'copy' have none"),
    ],
)
def test_bad_input(call, says: str) -> None:
    with pytest.raises(MemplanError) as refused:
        call()
    assert says in str(refused.value).splitlines()[0]
