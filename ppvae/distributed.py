"""Ranks of a `torch.distributed` process group: shards of data, exchange between ranks, launch of a command on all."""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from ppvae.errors import PpvaeError, TrainingError, UsageError

if dist.is_available():
    # its default arguments bind the group of the time of its import: imported later, as by torch.compile, it keeps a
    # destroyed group and its threads alive, which may abort the process at exit
    import torch.distributed.nn.functional

Fail = Callable[[str, int], int]
DISTRIBUTED_COMMANDS = ("evaluate", "fit")  # commands of the command line whose work is sharded


@final
class DistributedContext:
    """The rank of this process and the size of its process group: rank 0 of 1 where there is none.

    Evaluation shards blocks of data; a block has noise of its own, so that the result does not depend on the rank that
    computes it. Training shards the rows of each batch, sums loss and gradients over the ranks before the optimizer's
    step (Li et al. 2020, arXiv 2006.15704) and keeps parameters equal on all ranks to the last bit.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        self.has_exchanged = False

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def noise_key(self) -> tuple[int, ...]:
        """The part of a seed's key that separates the noise of ranks; empty on rank 0, as in a single process."""
        return (self.rank,) if self.rank else ()

    def block_indices(self, count: int) -> range:
        """The indices, of `count` blocks, that this rank computes."""
        return range(self.rank, count, self.size)

    def shard_batch(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This rank's rows of a batch, every `size`-th; empty where the batch has fewer rows than there are ranks."""
        # contiguous: oneDNN takes ten times as long for rows with gaps between them
        return batch if self.size == 1 else tuple(t[self.rank :: self.size].contiguous() for t in batch)

    def gather_blocks(
        self, parts: Mapping[int, Mapping[str, Tensor]], key: Mapping[str, Any]
    ) -> list[dict[str, Tensor]]:
        """The results of all blocks in order, on every rank, from {block index: results} of each rank.

        `key` identifies the computation (parameters, data, settings) and must be equal on all ranks.

        Raises:
            PpvaeError: another rank failed, computes something else, or does not answer.
        """
        if self.size == 1:
            return [dict(parts[number]) for number in sorted(parts)]
        arrays = {f"{n}/{name}": value.cpu().numpy() for n, part in parts.items() for name, value in part.items()}
        content = json.dumps(dict(key), sort_keys=True, default=str).encode()
        all_arrays = self.all_gather_arrays(arrays | {"key": _encode(hashlib.sha256(content).hexdigest())})
        for rank, received in enumerate(all_arrays):
            if "error" in received:
                raise PpvaeError(f"process {rank} of {self.size} failed: {_decode(received['error'])}")
        digests = [_decode(received.pop("key")) for received in all_arrays]
        if other := [rank for rank, value in enumerate(digests) if value != digests[0]]:
            raise PpvaeError(
                f"process {other[0]} of {self.size} evaluates other parameters, data or settings than process 0: "
                f"expected the same call on each, on the same run"
            )
        out: dict[int, dict[str, Tensor]] = {}
        for received in all_arrays:
            for path, array in received.items():
                number, _, name = path.partition("/")
                out.setdefault(int(number), {})[name] = torch.from_numpy(array)
        return [out[number] for number in sorted(out)]

    def all_gather_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Named arrays of every rank, on every rank; sent as NumPy's .npz, without pickle."""
        self.has_exchanged = True
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        device = _collective_device()
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(device)
        with _collective(PpvaeError, f"expected the same call on all {self.size} of them"):
            length = torch.tensor([len(content)], device=device)
            lengths = [torch.zeros_like(length) for _ in range(self.size)]
            dist.all_gather(lengths, length)
            padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
            padded[: len(content)] = content
            received = [torch.zeros_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded)
        return [_read_arrays(t[: int(n)]) for t, n in zip(received, lengths, strict=True)]

    def broadcast_from_rank_zero(self, tensors: Sequence[Tensor]) -> None:
        """Copies the values of rank 0 into the tensors of every rank, in place."""
        if self.size > 1:
            with torch.no_grad(), _collective():
                for t in tensors:
                    value = t.detach().contiguous()
                    dist.broadcast(value, 0)
                    t.copy_(value)

    def broadcast_state_from_rank_zero(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state dict (tensors and plain values) of rank 0, on every rank."""
        if self.size == 1:
            return state
        buffer = io.BytesIO()
        torch.save(state, buffer)
        device = _collective_device()
        content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(device)
        length = torch.tensor([len(content)], device=device)
        with _collective():
            dist.broadcast(length, 0)
            content = content if self.is_rank_zero else torch.zeros(int(length), dtype=torch.uint8, device=device)
            dist.broadcast(content, 0)
        out: dict[str, Any] = torch.load(io.BytesIO(content.cpu().numpy().tobytes()), weights_only=True)
        return out

    def all_reduce_gradients(self, numbers: Sequence[float], params: Sequence[Tensor], failed: bool) -> list[float]:
        """Sums over the ranks: of `numbers`, returned in the precision of `params`, and of gradients, left in `.grad`.

        A parameter that has a gradient on one rank gets one on all. A rank with an exception passes `failed`.

        Raises:
            TrainingError: another rank failed; parameters and gradients of this one are unchanged.
        """
        if self.size == 1:
            return list(numbers)
        trained = [p for p in params if p.requires_grad]
        dtypes = list(dict.fromkeys(p.dtype for p in trained))
        first = next((d for d in dtypes if d in (torch.float32, torch.float64)), torch.float64)
        head = [float(failed), *numbers, *(float(p.grad is not None) for p in trained)]
        device = trained[0].device if trained else torch.device("cpu")
        message = _flatten([torch.tensor(head, dtype=first, device=device)], trained, first)
        with _collective():
            dist.all_reduce(message)
        failures, *sums = message[: len(head)].tolist()
        if failures and not failed:
            raise TrainingError(f"another of the {self.size} processes failed: its message says why")
        if failures:
            return sums[: len(numbers)]
        totals = {first: message[len(head) :]}
        for dtype in dtypes:
            if dtype != first:
                totals[dtype] = _flatten([], trained, dtype)
                with _collective():
                    dist.all_reduce(totals[dtype])
        places = dict.fromkeys(dtypes, 0)
        for p, count in zip(trained, sums[len(numbers) :], strict=True):
            start = places[p.dtype]
            places[p.dtype] = end = start + p.numel()
            if count:
                total = totals[p.dtype][start:end].view_as(p)
                p.grad = total if p.is_contiguous() else torch.empty_like(p).copy_(total)
        return sums[: len(numbers)]

    def any_rank(self, flag: bool) -> bool:
        return self.all_reduce_gradients([float(flag)], [], failed=False)[0] > 0

    def check_same_parameters(self, tensors: Sequence[Tensor]) -> None:
        """Raises TrainingError unless the tensors are equal on all ranks, to the last bit."""
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for t in tensors:
            digest.update(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        if other := self._ranks_unlike_rank_zero(digest.digest()):
            raise TrainingError(
                f"process {other[0]} of {self.size} has other parameters than process 0: expected the same pair, data "
                f"and settings on every one"
            )

    def check_same_settings(self, settings: str) -> None:
        """Raises UsageError unless the description of data and settings is equal on all ranks."""
        if self.size > 1 and (other := self._ranks_unlike_rank_zero(hashlib.sha256(settings.encode()).digest())):
            raise UsageError(
                f"process {other[0]} of {self.size} was called with other data or settings than process 0: expected "
                f"the same call on every one"
            )

    def _ranks_unlike_rank_zero(self, digest: bytes) -> list[int]:
        value = torch.tensor(list(digest), dtype=torch.uint8, device=_collective_device())
        received = [torch.zeros_like(value) for _ in range(self.size)]
        with _collective():
            dist.all_gather(received, value)
        return [rank for rank, other in enumerate(received) if not torch.equal(other, received[0])]

    def barrier(self) -> None:
        if self.size > 1:
            with _collective():
                dist.barrier()


@contextlib.contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """The context of a computation that ends in `gather_blocks`; an exception on one rank is raised on all ranks."""
    context = DistributedContext()
    try:
        yield context
    except Exception as error:
        if context.size > 1 and not context.has_exchanged:
            text = str(error) if isinstance(error, PpvaeError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(PpvaeError):
                context.all_gather_arrays({"error": _encode(" ".join(text.split())[:500])})
        raise


def leave_process_group() -> bool:
    """Destroys the process group, where there is one; True on rank 0, which alone goes on to write files."""
    rank = DistributedContext().rank
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return rank == 0


def progress_disabled(progress: bool | None) -> bool | None:
    """tqdm's `disable`: None leaves the bar out where the output is not a terminal; only rank 0 has one."""
    if DistributedContext().rank > 0:
        return True
    return None if progress is None else not progress


def run_on_all_ranks(command: str, args: list[str], run: Callable[[str, list[str], Fail], int], fail: Fail) -> int:
    """Runs a command of the command line on every rank that `torchrun` started.

    Only rank 0 prints, and an error is printed once.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if command not in DISTRIBUTED_COMMANDS:
        commands = " and ".join(DISTRIBUTED_COMMANDS)
        text = f"ppvae {command}: expected one process, found {size}; only ppvae {commands} share their work"
        return fail(text, 2) if rank == 0 else 0  # with another status, torchrun would end rank 0 before it prints
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    store = next(iter(dist.rendezvous("env://")))[0]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank,
        world_size=size, timeout=timedelta(days=30),  # blocks may take long; torchrun ends all ranks when one fails
    )  # fmt: skip
    stderr = sys.stderr

    def fail_once(text: str, status: int) -> int:
        try:
            is_first = store.add("errors", 1) == 1
        except RuntimeError:  # the rank that hosts the store has ended
            is_first = rank == 0
        if is_first:
            with contextlib.redirect_stderr(stderr):
                fail(text, status)
        return status

    with open(os.devnull, "w") as devnull, contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(devnull))
            stack.enter_context(contextlib.redirect_stderr(devnull))
        status = run(command, args, fail_once)
    if dist.is_initialized() and not (status and on_cuda):  # NCCL would wait for ranks that failed
        dist.destroy_process_group()  # otherwise its threads may abort the process at exit
    return status


@contextlib.contextmanager
def _collective(
    error_type: type[PpvaeError] = TrainingError, note: str = "the last checkpoint is kept"
) -> Iterator[None]:
    """A collective operation, which raises RuntimeError where another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())[:120]
        raise error_type(f"another process of the group does not answer ({text}); {note}") from error


def _flatten(head: list[Tensor], params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A vector of `head` and the gradients of those parameters that have a dtype, zeros where there is none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params if p.dtype == dtype]
    return torch.cat([*head, *(g.reshape(-1) for g in grads)])


def _collective_device() -> torch.device:
    """The device of tensors that the backend can send: the CPU where the backend has it."""
    on_cpu = "cpu:" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _read_arrays(content: Tensor) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content.cpu().numpy().tobytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _decode(characters: np.ndarray) -> str:
    return characters.tobytes().decode()
