"""Errors that a GPU would not forgive, planted: what two ranks do for ``test_checking.py``.

Each function is called with a process group of its own, which its error may leave unusable.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


def refusals(names: list[str]) -> list[str]:
    """What the functions of this module with these names raise; "" for nothing."""
    lines = []
    for name in names:
        group = dist.new_group([0, 1])
        try:
            globals()[name](group)
            lines.append("")
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
    return lines


def _here(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda")


def cpu_tensor_to_nccl(group: Group) -> None:
    dist.all_reduce(torch.ones(4), group=group)


def tensors_of_two_devices(group: Group) -> None:
    torch.add(torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1"))


def tensors_of_host_and_device(group: Group) -> None:
    torch.add(torch.ones(2, device="cuda:0"), torch.ones(2))


def index_of_another_device(group: Group) -> None:
    torch.ones(4, device="cuda:0").gather(0, torch.zeros(2, dtype=torch.int64, device="cuda:1"))


def sizes_differ(group: Group) -> None:
    dist.all_reduce(_here(4 + dist.get_rank()), group=group)


def types_differ(group: Group) -> None:
    dtype = torch.float32 if dist.get_rank() else torch.bfloat16
    dist.all_reduce(_here(4).to(dtype), group=group)


def collectives_differ(group: Group) -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(_here(4), group=group)
    else:
        dist.broadcast(_here(4), src=0, group=group)


def rank_leaves(group: Group) -> None:
    """Rank 1 is done without the second collective."""
    dist.all_reduce(_here(4), group=group)
    if dist.get_rank() == 0:
        dist.all_reduce(_here(4), group=group)
    else:
        dist.destroy_process_group(group)


def rank_is_elsewhere(group: Group) -> None:
    """Rank 1 has gone on to the next collective, of another group."""
    dist.all_reduce(_here(4), group=group)
    dist.all_reduce(_here(4))
    dist.all_reduce(_here(4), group=None if dist.get_rank() else group)
    dist.all_reduce(_here(4), group=group if dist.get_rank() else None)


def swapped_sends(group: Group) -> None:
    """Both send first: neither can, before the other receives."""
    other = 1 - dist.get_rank()
    dist.send(_here(4), other, group=group)
    dist.recv(_here(4), other, group=group)


def receive_first(group: Group) -> None:
    other = 1 - dist.get_rank()
    dist.recv(_here(4), other, group=group)
    dist.send(_here(4), other, group=group)


def message_of_another_size(group: Group) -> None:
    if dist.get_rank() == 0:
        dist.send(_here(4), 1, group=group)
    else:
        dist.recv(_here(5), 0, group=group)


def _dangling() -> torch.Tensor:
    """A tensor on memory that has been freed, as a library makes it from a kept address."""
    owner = _here(1024)
    address, size = owner.data_ptr(), owner.untyped_storage().nbytes()
    del owner
    storage = torch._C._construct_storage_from_data_pointer(
        address, torch.device("cuda", torch.cuda.current_device()), size
    )
    return torch.empty(0, device="cuda").set_(storage, 0, (1024,), (1,))


def freed_and_read(group: Group) -> None:
    _dangling().sum()


def freed_and_written(group: Group) -> None:
    _dangling().zero_()


def freed_and_copied_to_the_host(group: Group) -> None:
    _dangling().cpu()


def freed_and_sent(group: Group) -> None:
    dist.all_reduce(_dangling(), group=group)


def read_before_written(group: Group) -> None:
    """The side stream's result is read without waiting for it."""
    side = torch.cuda.Stream()
    x = _here(1024)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.mul_(2)
    x.sum()


def side_stream_does_not_wait(group: Group) -> None:
    x = _here(1024)
    with torch.cuda.stream(torch.cuda.Stream()):
        x.sum()


def collective_not_waited_for(group: Group) -> None:
    x = _here(1024)
    dist.all_reduce(x, async_op=True, group=group)
    x.sum()


def overwritten_while_sent(group: Group) -> None:
    out = torch.empty(2048, device="cuda")
    dist.all_gather_into_tensor(out, _here(1024), async_op=True, group=group)
    out.zero_()


def all_in_order(group: Group) -> None:
    """The same with their waits."""
    rank, main, side = dist.get_rank(), torch.cuda.current_stream(), torch.cuda.Stream()
    x = _here(1024)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        x.mul_(2)
    main.wait_stream(side)
    work = dist.all_reduce(x, async_op=True, group=group)
    y = _here(8).sum()  # beside it
    work.wait()
    received = torch.empty_like(x)
    operations = [
        dist.P2POp(dist.isend, x, 1 - rank, group),
        dist.P2POp(dist.irecv, received, 1 - rank, group),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    if rank == 0:
        dist.send(received, 1, group=group)
    else:
        dist.recv(received, 0, group=group)
    event = torch.cuda.Event()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        received.add_(1)
        event.record()
    event.synchronize()
    indexed = received[torch.tensor([0, 1])]  # indices of the host are allowed
    assert float(indexed.sum() + y) == 18.0
