"""Self-attention of a Wan block, in all its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from wan_models.attention import auto, fp8_arithmetic, fp8_fused, fp8_values, fp16
from wan_models.attention.base import QKVAttention, check_grid
from wan_models.attention.kernels import attention, check_mode
from wan_models.attention.norm_rope import fits, norm_rope
from wan_models.attention.speakers import reference_map
from wan_models.layers import WanRMSNorm
from wan_models.quant.linear import QuantizedLinear
from wan_models.quant.producers import State, all_take_rows
from wan_models.quant.rows import QuantizedRows
from wan_models.quant.rows_linear import deferred, rows_linear
from wan_models.rope import apply_rope

if TYPE_CHECKING:
    from wan_models.attention.radial import RadialPattern

KeyValue = tuple[torch.Tensor, torch.Tensor]


class WanSelfAttention(QKVAttention):
    """q, k, v and o projections, RMS norm of q and k over the whole width, 3-D rotary.

    Args:
        dim: model dimension C.
        num_heads: heads H.
        eps: of the norms.
        mode: attention kernel, see :func:`wan_models.attention.kernels.attention`.
    """

    def project(
        self, x: torch.Tensor, rope: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each (B, L, H, D), of x (B, L, C); q and k turned if there is a table."""
        q = self._turned(self.norm_q, self.q, x, rope)
        k = self._turned(self.norm_k, self.k, x, rope)
        return q, k, self.heads(self.v(x))

    def _turned(
        self, norm: nn.Module, projection: nn.Module, x: State, rope: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, L, H, D) of x (B, L, C): projected, normed, and turned if there is a table."""
        if rope is not None and self._in_one_pass(norm, projection, rope, x.shape[1]):
            return self._turned_in_one_pass(norm, projection, x, rope)
        made = self.heads(norm(projection(x)))
        return made if rope is None else apply_rope(made, rope)

    def _in_one_pass(
        self, norm: nn.Module, projection: nn.Module, rope: torch.Tensor, tokens: int
    ) -> bool:
        """Whether norm and rotary may be one pass: such a layer is for inference, and rounds more
        than that pass does. What is wrong with a table that does not fit, ``apply_rope`` says."""
        if type(norm) is not WanRMSNorm or not all_take_rows([projection]):
            return False
        return fits(projection.out_features, rope, self.num_heads, tokens)

    @staticmethod
    def _turned_in_one_pass(
        norm: WanRMSNorm, projection: QuantizedLinear, x: State, rope: torch.Tensor,
        scale: bool = False, dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """What :func:`wan_models.attention.norm_rope.norm_rope` makes of the projection of x."""
        weight, eps = norm.weight, norm.constant_eps()
        # Sums are bf16, so they have the digits of a layer in bf16 alone.
        if isinstance(x, QuantizedRows) and x.dtype == torch.bfloat16:
            sums, *rest = deferred(x, *projection.operands(), projection.bias)
            return norm_rope(sums, weight, rope, eps, scale, dtype, *rest)
        return norm_rope(projection(x), weight, rope, eps, scale, dtype)

    def forward(
        self, x: State, rope: torch.Tensor, seq_lens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: (B, L, C); rope: from :func:`wan_models.rope.rope_table`; seq_lens: (B,) valid
        tokens of each sample. Returns (B, L, C).

        In mode ``"fp8"`` the norms, the rotary and the quantisation of q and k are one op with the
        attention (:mod:`wan_models.attention.fp8_fused`), which agrees with the steps by
        themselves within rounding. v is quantised before q and k are made, which then do not share
        the memory with v in 16 bits. In mode ``"fp16"`` on quantised rows q, k and v are made as
        its kernel takes them."""
        if self._makes_fp16(x, rope, seq_lens):
            return self.o(self._attend_fp16(x, rope).flatten(2))
        v = self.v(x)
        if self._fuses(v, rope, seq_lens):
            v = fp8_values.run(v, 2 * rope.shape[-1], seq_lens)
            norms = self.norm_q.weight, self.norm_k.weight
            out = fp8_fused.attend(self.q(x), self.k(x), *v, *norms, rope, self._eps(), seq_lens)
        else:
            q = self._turned(self.norm_q, self.q, x, rope)
            k = self._turned(self.norm_k, self.k, x, rope)
            out = self.attend(q, k, self.heads(v), seq_lens)
        return self.o(out.flatten(2))

    def _makes_fp16(
        self, x: State, rope: torch.Tensor | None, seq_lens: torch.Tensor | None
    ) -> bool:
        """Whether our 16-bit kernel is asked for, and q, k and v can be made as it takes them."""
        if self.mode != "fp16" or rope is None or seq_lens is not None:
            return False
        if not isinstance(x, QuantizedRows) or not all_take_rows([self.v]):
            return False
        pairs = (self.norm_q, self.q), (self.norm_k, self.k)
        if not all(self._in_one_pass(*pair, rope, x.shape[1]) for pair in pairs):
            return False
        check_mode(self.mode, x.device, dtype=x.dtype, head_dim=2 * rope.shape[-1])
        return True

    def _attend_fp16(self, x: QuantizedRows, rope: torch.Tensor) -> torch.Tensor:
        """(B, L, H, D) of x (B, L, C), in its dtype."""
        half = torch.float16
        v = rows_linear(x, *self.v.operands(), self.v.bias, half)
        q = self._turned_in_one_pass(self.norm_q, self.q, x, rope, True, half)
        k = self._turned_in_one_pass(self.norm_k, self.k, x, rope, False, half)
        return fp16.fp16_attention(q, k, self.heads(v), None, x.dtype)

    @torch.compiler.assume_constant_result
    def _eps(self) -> float | None:
        """Of both norms, if it is one. A constant of a graph, see
        :class:`wan_models.layers.ConstantEps`."""
        return self.norm_q.eps if self.norm_q.eps == self.norm_k.eps else None

    def _fuses(
        self, v: torch.Tensor, rope: torch.Tensor | None, seq_lens: torch.Tensor | None
    ) -> bool:
        """Whether our 8-bit kernel is asked for, and what stands before it is what it does.

        v (B, L, C) shows what q and k will be."""
        if self.mode not in ("fp8", "auto_fp8") or rope is None:
            return False
        heads = self.heads(v)
        alike = type(self.norm_q) is type(self.norm_k) is WanRMSNorm
        if not alike or self._eps() is None:
            return False
        if heads.shape[-1] not in fp8_arithmetic.HEAD_DIMS or 2 * rope.shape[-1] != heads.shape[-1]:
            return False  # what is wrong, the kernel itself says
        check_mode(self.mode, v.device, dtype=v.dtype, head_dim=heads.shape[-1])
        return auto.resolve(
            self.mode, heads, heads, seq_lens,
            lambda name: attention(heads, heads, heads, mode=name, k_lens=seq_lens),
        ) == "fp8"

    def forward_ip(
        self,
        x: torch.Tensor,
        rope: torch.Tensor,
        ip: torch.Tensor | None = None,
        ip_rope: torch.Tensor | None = None,
        cache: KeyValue | None = None,
    ) -> tuple[torch.Tensor, KeyValue]:
        """Video tokens attend to a reference's tokens too, and those to themselves alone.

        The reference does not change with the time step, so its keys and values of the first
        step serve all later ones.

        Args:
            x: (B, L, C).
            rope: table of the video tokens.
            ip: (B, Li, C), the reference's tokens; not read where there is a cache.
            ip_rope: their table; None leaves them unturned.
            cache: keys and values that an earlier step returned.

        Returns:
            (B, L + Li, C), or (B, L, C) with a cache; and the reference's keys and values, each
            (B, Li, H, D). No kernel gets the memory of these, so none can change them.

        Raises:
            ValueError: neither ``ip`` nor ``cache``, or a cache for other sizes.
        """
        q, k, v = self.project(x, rope)
        if cache is not None:
            k_ip, v_ip = cache
            self._check_cache(k, k_ip, v_ip)
        elif ip is not None:
            q_ip, k_ip, v_ip = self.project(ip, ip_rope)
        else:
            raise ValueError("forward_ip: give the reference's tokens, or the cache of a step")
        keys, values = torch.cat([k, k_ip], dim=1), torch.cat([v, v_ip], dim=1)
        out = self.attend(q, keys, values)
        if cache is None:
            # The joined copies, because some kernels write to their keys: k_ip is to be kept.
            tokens = x.shape[1]
            alone = self.attend(q_ip, keys[:, tokens:], values[:, tokens:])
            out = torch.cat([out, alone], dim=1)
        return self.o(out.flatten(2)), (k_ip, v_ip)

    def forward_radial(
        self, x: torch.Tensor, rope: torch.Tensor, pattern: RadialPattern, dense: bool = False
    ) -> torch.Tensor:
        """Attention to the key blocks that a radial pattern keeps.

        Args:
            x: (B, L, C).
            rope: table of the video tokens.
            pattern: see :class:`wan_models.attention.radial.RadialPattern`.
            dense: attend to all keys by the kernel of :attr:`mode`, as early steps and blocks do.

        Returns:
            (B, L, C).
        """
        q, k, v = self.project(x, rope)
        if dense:
            return self.o(self.attend(q, k, v).flatten(2))
        return self.o(attention(q, k, v, mode="radial", radial=pattern).flatten(2))

    def forward_multitalk(
        self,
        x: torch.Tensor,
        rope: torch.Tensor,
        grid: tuple[int, int, int],
        ref_masks: torch.Tensor,
        seq_lens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward`, and how much each token looks at each speaker in the first frame.

        Args:
            x: (B, L, C).
            rope: table of the video tokens.
            grid: tokens along (time, rows, columns).
            ref_masks: (classes, rows * columns), see
                :func:`wan_models.attention.speakers.reference_masks`.
            seq_lens: (B,) valid tokens of each sample.

        Returns:
            (B, L, C); and maps (classes, L) fp32, or (B, classes, L) for more than one sample.

        Raises:
            ValueError: masks for another number of tokens than a frame has, or fewer tokens than
                the grid holds.
        """
        if x.shape[1] < grid[0] * grid[1] * grid[2]:
            check_grid(x.shape[1], grid, "forward_multitalk")
        q, k, v = self.project(x, rope)
        out = self.o(self.attend(q, k, v, seq_lens).flatten(2))
        maps = reference_map(q, k[:, : grid[1] * grid[2]], ref_masks)
        return out, maps.squeeze(0)

    def forward_split(
        self, x: torch.Tensor, rope: torch.Tensor, grid: tuple[int, int, int], chunks: int
    ) -> torch.Tensor:
        """Contiguous groups of frames attend each to itself; earlier groups take what is over.

        Args:
            x: (B, L, C).
            rope: table of the video tokens.
            grid: tokens along (time, rows, columns); their product is L.
            chunks: groups, at least 1 and at most the frames. The first T mod ``chunks`` groups
                have one frame more than the others.

        Returns:
            (B, L, C).

        Raises:
            ValueError: L is not what the grid holds, or ``chunks`` is out of range.
        """
        check_grid(x.shape[1], grid, "forward_split")
        frames, frame = grid[0], grid[1] * grid[2]
        if not 1 <= chunks <= frames:
            raise ValueError(f"chunks={chunks}: use 1 to {frames}, the latent frames")
        q, k, v = self.project(x, rope)
        parts, start = [], 0
        for index in range(chunks):
            length = frames // chunks + (index < frames % chunks)
            group = slice(start * frame, (start + length) * frame)
            parts.append(self.attend(q[:, group], k[:, group], v[:, group]))
            start += length
        return self.o(torch.cat(parts, dim=1).flatten(2))

    @staticmethod
    def _check_cache(k: torch.Tensor, k_ip: torch.Tensor, v_ip: torch.Tensor) -> None:
        batch, _, heads, width = k.shape
        fits = k_ip.dim() == 4 and (k_ip.shape[0], *k_ip.shape[2:]) == (batch, heads, width)
        if not fits or k_ip.shape != v_ip.shape:
            raise ValueError(
                f"forward_ip: cache has shapes {tuple(k_ip.shape)} and {tuple(v_ip.shape)}: use "
                f"({batch}, Li, {heads}, {width}) twice"
            )
