"""The swap itself: which block is in which buffer, and what fills it next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from wan_models.block_swap.block import (
    SwappedBlock,
    check_tensor,
    loading_hook,
    own_tensors,
    tensors_of,
    values_hook,
)
from wan_models.block_swap.copier import BUFFERS, Copier
from wan_models.block_swap.memory import empty_slab, moved


class BlockSwap:
    """Keeps the last ``count`` blocks in host memory and runs them out of two device buffers.

    While attached, every tensor of a swapped block is a view of a fixed place in one of two
    buffers, always the same one: block by block alternate. Before a block runs, its bytes are in
    the buffer; after it has run, the buffer is filled with the next block that uses it. Nothing
    about the tensors changes from step to step, neither address nor strides, device or identity,
    so blocks compiled by ``block.compile()`` or ``torch.compile(block)`` are compiled once.

    Everything else that belongs to the model, or to the sequence of blocks, is moved to
    ``device``. Tensors of one element (scales, strengths) stay on the device for good, so
    changing them in place works. Layers attached to a swapped block later are taken in when it
    next runs. ``state_dict()`` gives the values of swapped tensors, from host memory; the tensors
    themselves hold whichever block used the buffer last. On a CPU the same code runs with plain
    copies.

    The blocks get a subclass of their class whose ``__call__`` does this, all of them alike, so
    that swapped and resident blocks share compiled code. It surrounds the compiled code, which
    hooks would be part of. A block has to be called, not its ``forward``. ``detach()`` undoes all
    of it. Other lists of blocks get a BlockSwap of their own, attached first:
    ``BlockSwap(model.vace_blocks, 4, device)``.

    Args:
        model_or_blocks: a module with a list of blocks called ``blocks``, or such a list.
        count: how many of the last blocks are swapped; 0 changes nothing. Two buffers hold as
            much as two blocks, so memory is saved from 3 on.
        device: where blocks are computed, a CUDA device or the CPU.

    Raises:
        ValueError: no blocks, ``count`` out of range, or a device of another type.
    """

    def __init__(
        self,
        model_or_blocks: nn.Module | Sequence[nn.Module],
        count: int,
        device: torch.device | str,
    ) -> None:
        blocks = model_or_blocks
        self._prefix = ""
        if isinstance(model_or_blocks, nn.Module) and not isinstance(
            model_or_blocks, (nn.ModuleList, nn.Sequential)
        ):
            blocks = getattr(model_or_blocks, "blocks", None)
            self._prefix = "blocks."
        if not isinstance(blocks, (Sequence, nn.ModuleList, nn.Sequential)) or not all(
            isinstance(block, nn.Module) for block in blocks
        ):
            raise ValueError(
                f"{type(model_or_blocks).__name__} has no blocks: use a module with a list of "
                "modules called blocks, or a list of modules"
            )
        self._blocks = list(blocks)
        if len({id(block) for block in self._blocks}) < len(self._blocks):
            raise ValueError("a block is in the list twice: its two runs would need two buffers")
        if not 0 <= count <= len(self._blocks):
            raise ValueError(f"count={count}: use 0 to {len(self._blocks)}, the number of blocks")
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={device}: use a CUDA device or the CPU")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device}: this machine has no CUDA device")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.count = count
        self._model = model_or_blocks if isinstance(model_or_blocks, nn.Module) else None
        self._swapped: list[SwappedBlock] = []
        self._order: dict[int, int | None] = {}
        self._slabs: list[torch.Tensor] = []
        self._holds: list[int | None] = []
        self._copier: Copier | None = None
        self._classes: dict[type, type] = {}
        self._moved: list[tuple[torch.Tensor, torch.device]] = []
        self._handles: list[Any] = []

    @property
    def attached(self) -> bool:
        """Whether the blocks are swapped now."""
        return self._copier is not None

    @property
    def buffer_bytes(self) -> int:
        """Device memory that the buffers take."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def host_bytes(self) -> int:
        """Host memory that the swapped blocks take."""
        return sum(swapped.host.nbytes for swapped in self._swapped)

    def __enter__(self) -> BlockSwap:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def device_of(self, name: str) -> torch.device:
        """Where a tensor of this name in the model belongs before :meth:`attach`: the CPU for a
        swapped block's, otherwise the device. For :func:`wan_models.checkpoint.load`.

        Raises:
            ValueError: this was made of a list of blocks, which have no names.
        """
        if not self._prefix:
            raise ValueError("a list of blocks has no names: make the BlockSwap of the model")
        parts = name.split(".", 2)
        first = len(self._blocks) - self.count
        swapped = len(parts) == 3 and f"{parts[0]}." == self._prefix and int(parts[1]) >= first
        return torch.device("cpu") if swapped else self.device

    @torch.inference_mode(False)
    @torch.no_grad()
    def attach(self) -> BlockSwap:
        """Move the last blocks to host memory and the rest to the device. Returns itself.

        Raises:
            RuntimeError: already attached, here or by another BlockSwap.
            ValueError: tensors without memory, of a subclass of ``torch.Tensor``, spread over
                several devices within a block, or shared by a swapped block and anything else.
        """
        if self.attached or any(hasattr(type(block), "_block_swap") for block in self._blocks):
            raise RuntimeError("the blocks are swapped already: detach() first")
        first = len(self._blocks) - self.count
        planned = [
            _planned(f"{self._prefix or 'block '}{first + i}", block)
            for i, block in enumerate(self._blocks[first:])
        ]
        rest = self._rest(planned)
        self._copier = Copier(self.device)
        try:
            self._fit_buffers(max((swapped.nbytes() for swapped in planned), default=0), planned)
            for i, swapped in enumerate(planned):  # one by one: what is packed frees its memory
                self._swapped.append(swapped)
                swapped.pack(pin=self.device.type == "cuda")
                swapped.point_to(self._slabs[i % BUFFERS])
            for tensor in rest:
                if tensor.device != self.device:
                    self._moved.append((tensor, tensor.device))
                    tensor.data = moved(tensor, self.device)
        except BaseException:
            self._restore()
            raise
        self._order = {id(block): None for block in self._blocks[:first]}
        self._order |= {id(swapped.block): i for i, swapped in enumerate(planned)}
        self._start()
        for block in self._blocks:
            block.__class__ = self._class_for(type(block))
        for swapped in planned:
            self._handles.append(
                swapped.block.register_state_dict_post_hook(values_hook(swapped))
            )
            self._handles.append(
                swapped.block.register_load_state_dict_pre_hook(loading_hook(swapped))
            )
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def detach(self) -> None:
        """Give every tensor back its memory, values and device, and the blocks their class.

        Raises:
            RuntimeError: not attached; or, after everything else is done, a swapped tensor was
                replaced, moved, cast or written to in the meantime, which is lost.
        """
        if not self.attached:
            raise RuntimeError("the blocks are not swapped: attach() first")
        self._copier.finish()
        lost = None
        for i, swapped in enumerate(self._swapped):
            try:
                swapped.unknown(self._slabs[i % BUFFERS])
            except RuntimeError as error:
                lost = lost or error
        for block in self._blocks:
            block.__class__ = type(block).__mro__[1]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restore()
        if lost is not None:
            raise lost

    def _restore(self) -> None:
        """Give back what has been moved so far, block by block."""
        for swapped in self._swapped:
            swapped.give_back()
        for tensor, home in self._moved:
            tensor.data = moved(tensor, home)
        self._copier.finish()
        self._swapped, self._slabs, self._holds, self._moved = [], [], [], []
        self._order, self._copier = {}, None

    def _rest(self, planned: list[SwappedBlock]) -> list[torch.Tensor]:
        """What goes to the device for good: all but the swapped blocks' tensors, and of these
        the ones of one element."""
        owner: dict[int, str] = {}
        single: list[torch.Tensor] = []
        for swapped in planned:
            for names, tensor in tensors_of(swapped.block):
                name = f"{swapped.name}.{names[0]}"
                if id(tensor) in owner:
                    raise ValueError(f"{owner[id(tensor)]} and {name} are one tensor: swapped "
                                     "blocks cannot share tensors")
                owner[id(tensor)] = name
                if tensor.numel() <= 1:
                    single.append(tensor)
        inside = {id(module) for swapped in planned for module in swapped.block.modules()}
        roots = [self._model] if self._model is not None else self._blocks
        rest = []
        for root in roots:
            for prefix, module in root.named_modules():
                if id(module) in inside:
                    continue
                for name, tensor in own_tensors(module):
                    if id(tensor) in owner:
                        raise ValueError(
                            f"{owner[id(tensor)]} is also {'.'.join(filter(None, (prefix, name)))},"
                            " which is not swapped: swapped blocks cannot share tensors"
                        )
                    if tensor.device != self.device:
                        check_tensor(".".join(filter(None, (prefix, name))), tensor)
                    rest.append(tensor)
        return rest + single

    def _fit_buffers(self, size: int, swapped: list[SwappedBlock]) -> None:
        """Buffers of ``size`` bytes at least; the ones there are stay if they are large enough."""
        if not self._slabs or self._slabs[0].numel() < size:
            self._slabs = [empty_slab(size, self.device) for _ in swapped[:BUFFERS]]

    def _start(self) -> None:
        """Fill every buffer with its first block."""
        self._holds = [None] * len(self._slabs)
        for buffer in range(len(self._slabs)):
            # The memory may have just been freed by kernels that are still to run.
            self._copier.release(buffer)
            self._fill(buffer, buffer)

    def _fill(self, buffer: int, index: int) -> None:
        self._copier.fill(buffer, self._swapped[index].host, self._slabs[buffer])
        self._holds[buffer] = index

    def _class_for(self, base: type) -> type:
        """A subclass of ``base`` that runs its calls through this object; made once, since
        compiled code is bound to the class."""
        if base not in self._classes:

            def __call__(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return self._run(block, base.__call__, args, kwargs)

            members = {
                "__call__": __call__,
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "_block_swap": self,
            }
            self._classes[base] = type(base.__name__, (base,), members)
        return self._classes[base]

    def _run(
        self, block: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        index = self._before(block)
        try:
            return call(block, *args, **kwargs)
        finally:
            self._after(index)

    @torch.compiler.disable(reason="block swap copies between blocks: compile block by block")
    def _before(self, block: nn.Module) -> int | None:
        if id(block) not in self._order:
            raise RuntimeError(
                f"this {type(block).__name__} is a copy of a swapped block and has no values of "
                "its own: copy it after detach()"
            )
        index = self._order[id(block)]
        if index is None:
            return None
        swapped = self._swapped[index]
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{swapped.name} is swapped and its weights will be overwritten, so no gradient "
                "can be computed: run it under torch.no_grad() or torch.inference_mode()"
            )
        buffer = index % BUFFERS
        if swapped.unknown(self._slabs[buffer]):
            self._take_in()
        if self._holds[buffer] != index:  # blocks left out or called in another order
            self._fill(buffer, index)
        self._copier.acquire(buffer)
        return index

    @torch.compiler.disable(reason="block swap copies between blocks: compile block by block")
    def _after(self, index: int | None) -> None:
        if index is None:
            return
        buffer = index % BUFFERS
        self._copier.release(buffer)
        following = index + BUFFERS if index + BUFFERS < len(self._swapped) else buffer
        if following != index:
            self._fill(buffer, following)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_in(self) -> None:
        """Plan anew with the layers attached since."""
        self._copier.finish()
        late = [
            (swapped, unknown)
            for i, swapped in enumerate(self._swapped)
            if (unknown := swapped.unknown(self._slabs[i % BUFFERS]))
        ]
        for swapped, unknown in late:
            for names, tensor in tensors_of(swapped.block):
                if names[0] in unknown:
                    check_tensor(f"{swapped.name}.{names[0]}", tensor)
                    if tensor.numel() <= 1 and tensor.device != self.device:
                        self._moved.append((tensor, swapped.home))
                        tensor.data = moved(tensor, self.device)
        for swapped, _ in late:
            swapped.pack(pin=self.device.type == "cuda")
        self._fit_buffers(max(swapped.host.nbytes for swapped in self._swapped), self._swapped)
        for i, swapped in enumerate(self._swapped):
            swapped.point_to(self._slabs[i % BUFFERS])
        self._start()


def _planned(name: str, block: nn.Module) -> SwappedBlock:
    tensors = tensors_of(block)
    for names, tensor in tensors:
        check_tensor(f"{name}.{names[0]}", tensor)
    devices = {tensor.device for _, tensor in tensors}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no device: it has none"
        raise ValueError(f"{name} has tensors on {found}: move it to one device first")
    return SwappedBlock(name, block, devices.pop())
