"""Sizes of the Wan video transformers.

Sources: the published configurations of Wan 2.1 and 2.2. Symbols used throughout the package:
B batch, L video tokens, C model dimension, H heads, D head dimension, Lt text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

#: Tokens of one image from the CLIP ViT-H encoder: 16 x 16 patches and the class token.
CLIP_TOKENS = 257


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
        image_dim: width of the image encoder's states (CLIP ViT-H: 1280); 0 without image branch.
        images: images that the image branch takes: 1, or 2 (first and last frame), whose tokens
            get learned positions.
        vace_layers: main blocks to which a VACE block adds its hint; empty without VACE.
        vace_channels: channels of the VACE context (two latents of 16, a mask of 64).
        vae_stride: video (frames, rows, columns) behind one latent position.
        token_timesteps: whether the model is used with one time step per token. Every model takes
            both forms; this one was trained with it.

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
    image_dim: int = 0
    images: int = 1
    vace_layers: tuple[int, ...] = ()
    vace_channels: int = 96
    vae_stride: tuple[int, int, int] = (4, 8, 8)
    token_timesteps: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "eps":
                if not value > 0:
                    raise ValueError(f"eps={value}: use a number above 0")
            elif field.name in ("patch_size", "vae_stride"):
                if len(value) != 3 or min(value) < 1:
                    raise ValueError(f"{field.name}={value}: use three sizes of at least 1")
            elif field.name == "image_dim":
                if value < 0:
                    raise ValueError(f"image_dim={value}: use a width, or 0 for no image branch")
            elif field.name == "vace_layers":
                self._check_vace_layers()
            elif field.name != "token_timesteps" and value < 1:
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

    @property
    def image_tokens(self) -> int:
        """Image tokens Li; 0 without image branch."""
        return CLIP_TOKENS * self.images if self.image_dim else 0

    def tiny(self) -> WanConfig:
        """The same structure at sizes for a CPU; the head dimension stays 128, as kernels want.

        Two blocks, or three of which two have VACE hints.
        """
        return replace(
            self,
            dim=256,
            ffn_dim=512,
            num_heads=2,
            num_layers=3 if self.vace_layers else 2,
            text_dim=64,
            text_len=32,
            freq_dim=64,
            image_dim=64 if self.image_dim else 0,
            vace_layers=(0, 2) if self.vace_layers else (),
        )

    def _check_vace_layers(self) -> None:
        layers = self.vace_layers
        if list(layers) != sorted(set(layers)) or (
            layers and not 0 <= layers[0] <= layers[-1] < self.num_layers
        ):
            raise ValueError(
                f"vace_layers={layers}: use rising block numbers from 0 to {self.num_layers - 1}"
            )


WAN_1_3B = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_5B = WanConfig(
    dim=3072,
    ffn_dim=14336,
    num_heads=24,
    num_layers=30,
    in_channels=48,
    out_channels=48,
    vae_stride=(4, 16, 16),
    token_timesteps=True,
)
#: Noise, a mask of 4 and the condition's latents side by side: 36 channels.
_IMAGE_14B = replace(WAN_14B, in_channels=36)
#: The structure of the 14B text-to-video model, small enough for a CPU.
TINY = WAN_14B.tiny()

#: Every transformer by name. The two A14B models are one expert each; both experts are alike.
CONFIGS = {
    "t2v-1.3b": WAN_1_3B,
    "t2v-14b": WAN_14B,
    "i2v-14b": replace(_IMAGE_14B, image_dim=1280),
    "flf2v-14b": replace(_IMAGE_14B, image_dim=1280, images=2),
    "t2v-a14b": WAN_14B,
    "i2v-a14b": _IMAGE_14B,
    "ti2v-5b": WAN_5B,
    "vace-1.3b": replace(WAN_1_3B, vace_layers=tuple(range(0, 30, 2))),
    "vace-14b": replace(WAN_14B, vace_layers=tuple(range(0, 40, 5))),
    "tiny": TINY,
}


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
