"""Several GPUs for one picture: each holds all of FLUX and computes its share of the tokens (`context_parallel`).

One process a GPU, called a rank. Rank 0 is the denoiser itself: what it asks of its FLUX it announces to the others
first, who do the same with theirs. Inside, attention exchanges heads for tokens (Ulysses, arXiv 2309.14509), through
diffusers' own hooks. PuLID's part is computed token by token, and needs nothing but each rank's share of the masks.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import SettingsInvalid, WorkerUnavailable
from pipeline.models.flux import IdentityFlux, IdentityRow
from pipeline.models.folding import PreparedIdentity
from pipeline.models.step_cache import StepCache

# For each other in a call that all have begun, and at start-up: longer than one of them may take to compile. gloo
# notices sooner that a process has ended, as its connections close; NCCL does not.
PATIENCE = timedelta(minutes=10)
IDLE = timedelta(days=365)  # between two pictures the others wait for rank 0, for as long as nobody asks for one
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class SharedIdentity(PreparedIdentity):
    """A prepared identity that every rank has, and knows by its number."""

    number: int = 0


class Share:
    """One rank's FLUX: every pass computes this rank's share of the tokens, and gives back the whole."""

    def __init__(self, flux: IdentityFlux, rank: int, ranks: int, address: str, device: torch.device) -> None:
        """Returns when all ranks have met at `address` (host:port), which rank 0 opens."""
        backend = "cpu:gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=ranks, timeout=PATIENCE)
        # Awaited on the CPU, whatever the device, and in a group of their own: nothing else may take so long.
        self.announcements = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=IDLE))
        self.flux, self.device = flux, device
        self._rank, self._ranks = rank, ranks
        self._config = _enable(flux.transformer, rank, ranks, device)

    def predict(  # noqa: PLR0913 - IdentityFlux's own
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text: Tensor,
        pooled: Tensor,
        ids: Tensor,
        people: Iterable[IdentityRow],
    ) -> Tensor:
        """See IdentityFlux; all ranks call it together, with the same inputs."""
        lengths = latents.shape[1], text.shape[1], self.flux.transformer.config.num_attention_heads
        uneven = any(length % self._ranks for length in lengths)
        # Each attention then exchanges the lengths of the shares, which has no graph.
        self._config.ulysses_anything = uneven
        own = [self._own_mask(person) for person in people]
        with torch.compiler.set_stance("force_eager" if uneven else "default"):
            share = self.flux.predict(latents, timestep, guidance, text, pooled, ids, own)  # (B, n, 64)
        return self._gathered(share, latents.shape[1])

    def _own_mask(self, person: IdentityRow) -> IdentityRow:
        """The person as this rank's image tokens know it."""
        if person.mask is None:
            return person
        return replace(person, mask=person.mask.tensor_split(self._ranks, dim=1)[self._rank])

    def _gathered(self, share: Tensor, tokens: int) -> Tensor:
        """All ranks' shares (B, n, C), n differing by one at most, as the whole (B, tokens, C)."""
        longest = math.ceil(tokens / self._ranks)
        padded = nn.functional.pad(share, (0, 0, 0, longest - share.shape[1])).contiguous()  # gloo wants them equal
        shares = [torch.empty_like(padded) for _ in range(self._ranks)]
        dist.all_gather(shares, padded)
        lengths = [tokens // self._ranks + (rank < tokens % self._ranks) for rank in range(self._ranks)]
        return torch.cat([part[:, :length] for part, length in zip(shares, lengths, strict=True)], dim=1)


class LeadingFlux:
    """Rank 0's FLUX: the same answers as an IdentityFlux, for which all ranks work."""

    def __init__(self, share: Share, others: Any = None) -> None:
        """`others`: whatever keeps the other ranks alive; kept for as long as this is."""
        self.transformer = share.flux.transformer
        self._share, self._others = share, others
        self._turn = threading.Lock()  # all ranks make the same calls in the same order
        self._numbers = 0
        self._unused: deque[int] = deque()
        self._lost = False

    def check(self) -> None:
        """Raises WorkerUnavailable where a rank is gone or out of step: from then on no call can succeed."""
        if self._lost:
            raise WorkerUnavailable("The GPUs of this denoiser have lost each other; send the request again.")

    def lose(self) -> None:
        """Let no other call begin, as a rank is gone."""
        self._lost = True

    def prepare(self, tokens: Tensor) -> SharedIdentity:
        """See IdentityFlux; every rank prepares, and keeps the result for as long as this one is in use."""
        try:
            with self._turn:
                self._numbers += 1
                with self._in_step():
                    self._announce("prepare", self._numbers, [tokens])
                try:
                    identity = SharedIdentity(self._share.flux.prepare(tokens).layers, self._numbers)
                except BaseException:  # nobody waits for anybody in it, so the ranks are still in step
                    self._unused.append(self._numbers)
                    raise
                weakref.finalize(identity, self._forget, self._numbers).atexit = False
            return identity
        finally:
            self._forget()

    def conditioning(self, times: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """See IdentityFlux; this rank's own work, whose result is announced with each step."""
        return self._share.flux.conditioning(times, guidance, pooled)

    def predict(  # noqa: PLR0913 - IdentityFlux's own
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        text: Tensor,
        pooled: Tensor,
        ids: Tensor,
        people: Iterable[IdentityRow] = (),
        step_cache: StepCache | None = None,
        text_ids: Tensor | None = None,  # noqa: ARG002 - each rank makes its own zeros
    ) -> Tensor:
        """See IdentityFlux; without a step cache, as each rank would decide by its own share.

        Raises WorkerUnavailable once the ranks are out of step, and SettingsInvalid where memory is short: the others
        are then in the middle of a pass that this rank has left, so that a smaller one can no longer be tried.
        """
        if step_cache is not None:
            raise ValueError("a step cache does not go with several ranks")
        people = list(people)
        rows = [(one.row, cast(SharedIdentity, one.identity).number, one.mask is not None) for one in people]
        tensors = [latents, timestep, guidance, text, pooled, ids]
        tensors += [tensor for one in people for tensor in (one.weight, one.mask)]
        try:
            with self._turn, self._in_step():
                self._announce("predict", (guidance is not None, rows), tensors)
                velocity = self._share.predict(latents, timestep, guidance, text, pooled, ids, people)
        except torch.OutOfMemoryError as error:
            raise SettingsInvalid(
                f"A pass of {len(latents)} rows of {latents.shape[1]} image tokens is too large for the GPUs that "
                "share it; set PULID_ENGINE__MAX_ROWS lower, or ask for smaller pictures."
            ) from error
        self._forget()
        return velocity

    def _forget(self, *numbers: int) -> None:
        """Let all ranks drop identities that are no longer in use: now, or when the call that is running is over."""
        self._unused.extend(numbers)
        while self._unused and not self._lost and self._turn.acquire(blocking=False):
            try:
                unused = [self._unused.popleft() for _ in range(len(self._unused))]
                with suppress(RuntimeError, WorkerUnavailable), self._in_step():  # whoever calls next is told
                    self._announce("forget", unused, [])
            finally:
                self._turn.release()

    def close(self) -> None:
        """Let the other ranks end; no call may follow."""
        self._turn.acquire()  # for good
        with self._in_step():
            self._announce("close", None, [])
        dist.destroy_process_group()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What all ranks do together: where this one fails in it, nobody knows where the others are."""
        self.check()
        try:
            yield
        except BaseException:
            self._lost = True
            raise

    def _announce(self, call: str, details: Any, tensors: Sequence[Tensor | None]) -> None:
        there = [tensor for tensor in tensors if tensor is not None]
        forms = [(tensor.shape, tensor.dtype) for tensor in there]
        dist.broadcast_object_list([(call, details, forms)], src=0, group=self._share.announcements, device=CPU)
        for tensor in there:
            dist.broadcast(tensor.to(self._share.device).contiguous(), src=0)


def follow(share: Share) -> int:
    """Do with a rank's share what rank 0 announces, until that closes; how many identities it still had.

    Raises RuntimeError where rank 0 is gone. Whatever it raises, the process has to end: only that tells the others.
    """
    identities: dict[int, PreparedIdentity] = {}
    with torch.inference_mode():
        while True:
            call, details, tensors = _heard(share)
            if call == "close":
                dist.destroy_process_group()
                return len(identities)
            if call == "prepare":
                identities[details] = share.flux.prepare(tensors.popleft())
            elif call == "forget":
                for number in details:
                    del identities[number]
            else:
                _follow_pass(share, identities, details, tensors)


def _follow_pass(
    share: Share,
    identities: Mapping[int, PreparedIdentity],
    details: tuple[bool, list[tuple[int, int, bool]]],
    tensors: deque[Tensor],
) -> None:
    guided, rows = details
    latents, timestep = tensors.popleft(), tensors.popleft()
    guidance = tensors.popleft() if guided else None
    text, pooled, ids = (tensors.popleft() for _ in range(3))
    people = [
        IdentityRow(row, identities[number], tensors.popleft(), tensors.popleft() if masked else None)
        for row, number, masked in rows
    ]
    share.predict(latents, timestep, guidance, text, pooled, ids, people)


def _heard(share: Share) -> tuple[str, Any, deque[Tensor]]:
    announced: list[Any] = [None]
    dist.broadcast_object_list(announced, src=0, group=share.announcements, device=CPU)
    call, details, forms = announced[0]
    tensors = deque(torch.empty(shape, dtype=dtype, device=share.device) for shape, dtype in forms)
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
    return call, details, tensors


def _enable(transformer: Any, rank: int, ranks: int, device: torch.device) -> Any:
    """What diffusers' enable_parallelism does, which asks for an accelerator even where the ranks are on CPUs.

    Returns diffusers' configuration, which every attention reads.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    config = ContextParallelConfig(ulysses_degree=ranks)
    parallel = ParallelConfig(context_parallel_config=config)
    mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel.setup(rank, ranks, device, mesh=mesh)
    transformer._parallel_config = parallel
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    inputs = transformer._cp_plan[""]  # the rest of the plan gathers the output, over gloo in even shares only
    apply_context_parallel(transformer, config, {"": inputs})
    return config
