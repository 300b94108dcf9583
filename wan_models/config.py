"""Sizes of the Wan video transformers.

Sources: the published configurations of Wan 2.1 and 2.2. Symbols used throughout the package:
B batch, L video tokens, C model dimension, H heads, D head dimension, Lt text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one transformer.

    Attributes:
        dim: model dimension C.
        ffn_dim: inner dimension of the feed-forward.
        num_heads: heads H; the head dimension D is ``dim // num_heads``.
        num_layers: transformer blocks.
        in_channels, out_channels: latent channels in and out.
        text_dim: width of the text encoder's states (umT5-xxl: 4096).
        text_len: text tokens Lt that every prompt is padded to.
        freq_dim: width of the sinusoidal time embedding.
        patch_size: latent (frames, rows, columns) that make one token.
        eps: epsilon of every norm.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "eps":
                if not value > 0:
                    raise ValueError(f"eps={value}: use a number above 0")
            elif field.name == "patch_size":
                if len(value) != 3 or min(value) < 1:
                    raise ValueError(f"patch_size={value}: use three sizes of at least 1")
            elif value < 1:
                raise ValueError(f"{field.name}={value}: use at least 1")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension {self.head_dim} must be even: rotary turns pairs")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even: cosines, then sines")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.num_heads


WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_5B = WanConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48
)
#: The structure of the 14B text-to-video model, small enough for a CPU.
TINY = WanConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=32, freq_dim=64
)

CONFIGS = {"t2v-1.3b": WAN_1_3B, "t2v-14b": WAN_14B, "ti2v-5b": WAN_5B, "tiny": TINY}


def token_grid(
    frames: int,
    height: int,
    width: int,
    *,
    vae_stride: tuple[int, int, int] = (4, 8, 8),
    patch_size: tuple[int, int, int] = (1, 2, 2),
) -> tuple[int, int, int]:
    """Tokens along (time, rows, columns) of a video; their product is L.

    Args:
        frames: video frames, 1 more than a multiple of the VAE's temporal stride.
        height, width: in pixels.
        vae_stride: (4, 8, 8), or (4, 16, 16) for the 5B model.
        patch_size: see :class:`WanConfig`.

    Raises:
        ValueError: the sizes are not multiples of what a token covers.
    """
    if frames < 1 or (frames - 1) % vae_stride[0]:
        raise ValueError(f"frames={frames}: use 1 more than a multiple of {vae_stride[0]}")
    latent = ((frames - 1) // vae_stride[0] + 1, height // vae_stride[1], width // vae_stride[2])
    if latent[0] % patch_size[0]:
        raise ValueError(
            f"frames={frames} make {latent[0]} latent frames, no multiple of {patch_size[0]}"
        )
    for name, pixels, vae, patch in (
        ("height", height, vae_stride[1], patch_size[1]),
        ("width", width, vae_stride[2], patch_size[2]),
    ):
        if pixels < 1 or pixels % (vae * patch):
            raise ValueError(f"{name}={pixels}: use a multiple of {vae * patch}")
    return (
        latent[0] // patch_size[0], latent[1] // patch_size[1], latent[2] // patch_size[2]
    )
