"""Whole models against a float64 reference and against diffusers; shapes, layouts, compiling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from wan_models import CONFIGS, TINY, BlockConditions, WanConfig, WanModel, model_inputs
from wan_models.attention import CrossConditions
from wan_models.embeddings import embed_time, pad_text, time_embedding, time_projection
from wan_models.head import Head, unpatchify
from wan_models.layers import WideLinear, time_frequencies

GRID = (3, 4, 5)
#: Published totals in billions of parameters, and tensors.
TOTALS = {
    "t2v-1.3b": (1.419, 825),
    "t2v-14b": (14.288, 1095),
    "t2v-a14b": (14.288, 1095),
    "i2v-14b": (16.395, 1303),
    "flf2v-14b": (16.396, 1304),
    "i2v-a14b": (14.289, 1095),
    "ti2v-5b": (4.9998, 825),
    "vace-1.3b": (2.154, 825 + 2 + 15 * 29 + 2),
    "vace-14b": (17.338, 1095 + 2 + 8 * 29 + 2),
}


def tiny(name: str) -> WanConfig:
    return CONFIGS[name].tiny()


def random_model(config: WanConfig, seed: int = 0) -> WanModel:
    """Weights at which every part of the model moves the result."""
    torch.manual_seed(seed)
    model = WanModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        norm = "norm" in name or name.startswith(("img_emb.proj.0", "img_emb.proj.4"))
        if norm and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith(("modulation", "emb_pos")):
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# -- the formulas in float64, from the parameters by their official names ------------------------


class Reference:
    """The whole model written from the formulas, without any of its modules."""

    def __init__(self, model: WanModel) -> None:
        self.config = model.config
        self.of = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def __call__(self, latents, timesteps, context, image=None, vace=None, scale=1.0):
        config = self.config
        _, _, frames, rows, columns = latents.shape
        grid = (frames, rows // 2, columns // 2)
        x = self.patches("patch_embedding", latents)
        half = config.freq_dim // 2
        angles = timesteps.double()[..., None] * 10000.0 ** (-torch.arange(half) / half).double()
        s = torch.cat([angles.cos(), angles.sin()], -1)
        e = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", s)))
        e0 = self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, -1))
        if timesteps.dim() == 1:
            e, e0 = e[:, None], e0[:, None]
        text = torch.zeros(len(context), config.text_len, config.text_dim, dtype=torch.float64)
        for row, prompt in zip(text, context, strict=True):
            row[: len(prompt)] = prompt
        text = self.linear("text_embedding.2", gelu_tanh(self.linear("text_embedding.0", text)))
        if image is not None:
            image = self.embed_image(image.double())
        turn = rotations(grid, config.head_dim)
        hints = {}
        if vace is not None:
            c = self.patches("vace_patch_embedding", vace)
            c = self.linear("vace_blocks.0.before_proj", c) + x
            for number, layer in enumerate(config.vace_layers):
                c = self.block(f"vace_blocks.{number}", c, e0, text, None, turn)
                hints[layer] = scale * self.linear(f"vace_blocks.{number}.after_proj", c)
        for index in range(config.num_layers):
            x = self.block(f"blocks.{index}", x, e0, text, image, turn) + hints.get(index, 0)
        shift, scale = (self.of["head.modulation"] + e[:, :, None]).unbind(2)
        y = self.linear("head.head", layer_norm(x, config.eps) * (1 + scale) + shift)
        out = torch.zeros(len(x), config.out_channels, *latents.shape[2:], dtype=torch.float64)
        for token in range(x.shape[1]):
            t, rest = divmod(token, grid[1] * grid[2])
            r, c = divmod(rest, grid[2])
            patch = y[:, token].view(len(x), 2, 2, config.out_channels)
            out[:, :, t, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch.permute(0, 3, 1, 2)
        return out

    def block(self, name, x, e0, text, image, turn):
        eps = self.config.eps
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (
            self.of[f"{name}.modulation"] + e0
        ).unbind(2)
        y = layer_norm(x, eps) * (1 + scale_sa) + shift_sa
        q, k, v = self.qkv(f"{name}.self_attn", y, y)
        attended = attend(turned(q, turn), turned(k, turn), v)
        x = x + gate_sa * self.linear(f"{name}.self_attn.o", attended)
        y = self.affine(f"{name}.norm3", layer_norm(x, eps))
        cross = f"{name}.cross_attn"
        q, k, v = self.qkv(cross, y, text)
        attended = attend(q, k, v)
        if image is not None:
            k = self.norm(f"{cross}.norm_k_img", self.linear(f"{cross}.k_img", image))
            v = self.linear(f"{cross}.v_img", image)
            attended = attended + attend(q, self.heads(k), self.heads(v))
        x = x + self.linear(f"{cross}.o", attended)
        y = layer_norm(x, eps) * (1 + scale_ff) + shift_ff
        inner = gelu_tanh(self.linear(f"{name}.ffn.0", y))
        return x + gate_ff * self.linear(f"{name}.ffn.2", inner)

    def qkv(self, name, x, source):
        q = self.norm(f"{name}.norm_q", self.linear(f"{name}.q", x))
        k = self.norm(f"{name}.norm_k", self.linear(f"{name}.k", source))
        return self.heads(q), self.heads(k), self.heads(self.linear(f"{name}.v", source))

    def heads(self, x):
        return x.view(*x.shape[:2], self.config.num_heads, -1)

    def linear(self, name, x):
        return x @ self.of[f"{name}.weight"].t() + self.of[f"{name}.bias"]

    def norm(self, name, x):
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + self.config.eps).sqrt() * self.of[f"{name}.weight"]

    def affine(self, name, x):
        return x * self.of[f"{name}.weight"] + self.of[f"{name}.bias"]

    def patches(self, name, latents):
        weight, bias = self.of[f"{name}.weight"], self.of[f"{name}.bias"]
        frames, rows, columns = latents.shape[2:]
        tokens = [
            torch.einsum(
                "bcij,ocij->bo",
                latents[:, :, t, r : r + 2, c : c + 2].double(),
                weight[:, :, 0],
            )
            for t in range(frames)
            for r in range(0, rows, 2)
            for c in range(0, columns, 2)
        ]
        return torch.stack(tokens, 1) + bias

    def embed_image(self, image):
        if "img_emb.emb_pos" in self.of:
            image = image + self.of["img_emb.emb_pos"]
        y = self.affine("img_emb.proj.0", layer_norm(image, 1e-5))
        y = self.linear("img_emb.proj.1", y)
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        return self.affine("img_emb.proj.4", layer_norm(self.linear("img_emb.proj.3", y), 1e-5))


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def attend(q, k, v):
    scores = torch.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(2)


def rotations(grid, head_dim):
    """(L, 1, D/2) complex: D = 128 gives 22 pairs to time and 21 to rows and columns each."""
    side = 2 * (head_dim // 6)
    angles = []
    for t in range(grid[0]):
        for r in range(grid[1]):
            for c in range(grid[2]):
                token = [
                    position * 10000.0 ** (-2 * torch.arange(width // 2).double() / width)
                    for position, width in ((t, head_dim - 2 * side), (r, side), (c, side))
                ]
                angles.append(torch.cat(token))
    angles = torch.stack(angles)[:, None]
    return torch.polar(torch.ones_like(angles), angles)


def turned(x, turn):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize(
    "name", ["t2v-14b", "i2v-14b", "flf2v-14b", "i2v-a14b", "ti2v-5b", "vace-1.3b"]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_model_equals_the_formulas(name, batch):
    config = tiny(name)
    model = random_model(config)
    inputs = model_inputs(config, GRID, batch=batch, text_tokens=20)
    arguments = inputs[:-1]
    expected = Reference(model)(*arguments)
    out = model(*arguments)
    assert out.dtype == torch.float32
    assert out.shape == (batch, config.out_channels, 3, 8, 10)
    assert relative_error(out.double(), expected) < 1e-5


def test_the_comparison_feels_every_input():
    config = replace(tiny("i2v-14b"), vace_layers=(0, 1))
    model = random_model(config)
    inputs = model_inputs(config, GRID, batch=2)
    out = model(*inputs)
    changed = {
        name: model(*inputs._replace(**{name: getattr(inputs, name).flip(0)}))
        for name in ("latents", "timesteps", "context", "image", "vace")
    }
    for name, result in changed.items():
        assert relative_error(result, out) > 1e-3, name


def test_hints_have_their_strengths():
    config = tiny("vace-14b")
    model = random_model(config)
    inputs = model_inputs(config, GRID)
    plain = model(*inputs._replace(vace=None))
    half = model(*inputs, vace_scale=0.5)
    expected = Reference(model)(*inputs[:-1], scale=0.5)
    assert relative_error(half.double(), expected) < 1e-5
    assert torch.equal(model(*inputs, vace_scale=torch.tensor(0.5)), half)
    assert torch.equal(model(*inputs, vace_scale=torch.tensor([0.5, 0.5])), half)
    assert torch.equal(model(*inputs, vace_scale=0.0), plain)
    first_alone = model(*inputs, vace_scale=torch.tensor([0.5, 0.0]))
    assert relative_error(first_alone, half) > 1e-3


def test_an_image_model_runs_without_an_image():
    config = tiny("i2v-14b")
    model = random_model(config)
    inputs = model_inputs(config, GRID, batch=2)._replace(image=None)
    expected = Reference(model)(*inputs[:-1])
    assert relative_error(model(*inputs).double(), expected) < 1e-5


@pytest.mark.parametrize("name", ["t2v-14b", "i2v-14b"])
def test_guidance_away_from_the_same_text_changes_nothing(name):
    config = tiny(name)
    model = random_model(config)
    inputs = model_inputs(config, GRID, batch=2)
    plain = model(*inputs)

    def guided(text: torch.Tensor) -> torch.Tensor:
        cross = CrossConditions(nag_context=model.embed_text(text))
        return model(*inputs._replace(conditions=BlockConditions(cross=cross)))

    assert relative_error(guided(inputs.context), plain) < 1e-5
    assert relative_error(guided(inputs.context.flip(0)), plain) > 1e-2


# -- diffusers -----------------------------------------------------------------------------------

#: Official names to those of diffusers, as substrings, one after the other.
DIFFUSERS_NAMES = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("before_proj", "proj_in"),
    ("after_proj", "proj_out"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("self_attn.norm", "attn1.norm"),
    ("cross_attn.norm", "attn2.norm"),
    ("self_attn.", "attn1.to_"),
    ("cross_attn.", "attn2.to_"),
)


def diffusers_model(model: WanModel) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    config = model.config
    options = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "eps": config.eps,
    }
    if config.image_dim:
        options |= {"image_dim": config.image_dim, "added_kv_proj_dim": config.dim}
    if config.images > 1:
        options["pos_embed_seq_len"] = config.image_tokens
    if config.vace_layers:
        layers = {"vace_layers": list(config.vace_layers)}
        theirs = WanVACETransformer3DModel(
            **options, **layers, vace_in_channels=config.vace_channels
        )
    else:
        theirs = WanTransformer3DModel(**options)
    converted = {}
    for name, tensor in model.state_dict().items():
        for official, diffusers in DIFFUSERS_NAMES:
            name = name.replace(official, diffusers)
        converted[name] = tensor
    theirs.load_state_dict(converted)
    return theirs.eval()


@pytest.mark.parametrize(
    "name", ["t2v-14b", "i2v-14b", "flf2v-14b", "ti2v-5b", "vace-14b"]
)
def test_model_equals_diffusers(name):
    config = replace(tiny(name), text_len=512)  # diffusers counts on it where it parts the image's
    model = random_model(config)
    inputs = model_inputs(config, GRID, batch=2)
    options = {}
    if inputs.image is not None:
        # diffusers joins the two images of a sample; it takes them apart.
        options["encoder_hidden_states_image"] = inputs.image.reshape(-1, 257, config.image_dim)
    if inputs.vace is not None:
        scales = torch.full((len(config.vace_layers),), 0.7)
        options |= {"control_hidden_states": inputs.vace, "control_hidden_states_scale": scales}
    with torch.no_grad():
        theirs = diffusers_model(model)(
            inputs.latents, inputs.timesteps, inputs.context, return_dict=False, **options
        )[0]
    ours = model(*inputs, vace_scale=0.7)
    assert relative_error(ours, theirs) < 1e-4


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_and_tensor_counts(name):
    with torch.device("meta"):
        model = WanModel(CONFIGS[name])
    parameters = [parameter.numel() for parameter in model.parameters()]
    billions, tensors = TOTALS[name]
    assert sum(parameters) / 1e9 == pytest.approx(billions, abs=0.0005)
    assert len(parameters) == tensors
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def official_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    c, ffn, out = config.dim, config.ffn_dim, 4 * config.out_channels
    shapes = {"patch_embedding.weight": (c, config.in_channels, 1, 2, 2)}
    shapes |= {"patch_embedding.bias": (c,), "head.modulation": (1, 2, c)}

    def linear(name: str, n: int, k: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n, k), (n,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, *, image: bool) -> None:
        shapes[f"{name}.modulation"] = (1, 6, c)
        norm(f"{name}.norm3", c)
        for attn in ("self_attn", "cross_attn"):
            for leaf in "qkvo":
                linear(f"{name}.{attn}.{leaf}", c, c)
            shapes[f"{name}.{attn}.norm_q.weight"] = shapes[f"{name}.{attn}.norm_k.weight"] = (c,)
        if image:
            linear(f"{name}.cross_attn.k_img", c, c)
            linear(f"{name}.cross_attn.v_img", c, c)
            shapes[f"{name}.cross_attn.norm_k_img.weight"] = (c,)
        linear(f"{name}.ffn.0", ffn, c)
        linear(f"{name}.ffn.2", c, ffn)

    linear("text_embedding.0", c, config.text_dim)
    linear("text_embedding.2", c, c)
    linear("time_embedding.0", c, config.freq_dim)
    linear("time_embedding.2", c, c)
    linear("time_projection.1", 6 * c, c)
    linear("head.head", out, c)
    for index in range(config.num_layers):
        block(f"blocks.{index}", image=bool(config.image_dim))
    if config.image_dim:
        norm("img_emb.proj.0", 1280)
        linear("img_emb.proj.1", 1280, 1280)
        linear("img_emb.proj.3", c, 1280)
        norm("img_emb.proj.4", c)
    if config.images == 2:
        shapes["img_emb.emb_pos"] = (1, 514, 1280)
    if config.vace_layers:
        shapes["vace_patch_embedding.weight"] = (c, 96, 1, 2, 2)
        shapes["vace_patch_embedding.bias"] = (c,)
        linear("vace_blocks.0.before_proj", c, c)
    for number in range(len(config.vace_layers)):
        block(f"vace_blocks.{number}", image=False)
        linear(f"vace_blocks.{number}.after_proj", c, c)
    return shapes


@pytest.mark.parametrize("name", ["t2v-14b", "flf2v-14b", "ti2v-5b", "vace-1.3b"])
def test_names_and_shapes_are_the_official_ones(name):
    with torch.device("meta"):
        model = WanModel(CONFIGS[name])
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == official_shapes(CONFIGS[name])


# -- parts ---------------------------------------------------------------------------------------


def test_time_frequencies_fixtures():
    embedded = time_frequencies(torch.tensor([0.0, 875.0]), 256)
    assert torch.equal(embedded[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    angles = 875 * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(embedded[1, :128].double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(embedded[1, 128:].double(), angles.sin(), atol=1e-7, rtol=0)


def test_time_embedding_of_each_token_and_of_the_sample():
    torch.manual_seed(0)
    embedding, projection = time_embedding(64, 32), time_projection(32)
    timesteps = torch.tensor([[0.0, 10.0, 999.0], [500.0, 500.0, 1.5]])
    with torch.no_grad():
        e, e0 = embed_time(timesteps, embedding, projection, 64)
        single, single0 = embed_time(timesteps[:, 2], embedding, projection, 64)
        first = F.silu(embedding[0](time_frequencies(timesteps, 64)))
        expected = projection[1](F.silu(embedding[2](first))).view(2, 3, 6, 32)
    assert e.shape == (2, 3, 32)
    torch.testing.assert_close(e0, expected)
    torch.testing.assert_close(e[:, 2], single)
    torch.testing.assert_close(e0[:, 2], single0)


def test_the_time_embedding_is_fp32_whatever_its_weights():
    torch.manual_seed(0)
    layer = WideLinear(64, 32).bfloat16()
    x = torch.randn(3, 64)
    expected = x.double() @ layer.weight.double().t() + layer.bias.double()
    assert relative_error(layer(x).double(), expected) < 1e-6
    model = WanModel(TINY).bfloat16()
    e, e0 = embed_time(
        torch.tensor([3.0]), model.time_embedding, model.time_projection, TINY.freq_dim
    )
    assert e.dtype == e0.dtype == torch.float32


def test_head_equals_its_formula():
    torch.manual_seed(0)
    head = Head(32, 24).bfloat16()
    x, e = torch.randn(2, 5, 32).bfloat16(), torch.randn(2, 32)
    shift, scale = (head.modulation.double() + e.double()[:, None]).unbind(1)
    y = layer_norm(x.double(), 1e-6).bfloat16().double() * (1 + scale[:, None]) + shift[:, None]
    expected = y @ head.head.weight.double().t() + head.head.bias.double()
    with torch.no_grad():
        out, of_tokens = head(x, e), head(x, e[:, None].expand(-1, 5, -1))
    assert out.dtype == torch.bfloat16
    assert relative_error(out.double(), expected) < 2**-7
    assert torch.equal(out, of_tokens)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_unpatchify_puts_every_value_where_its_patch_lies(patch):
    grid, channels = (2, 3, 4), 5
    tokens = torch.arange(2 * 25 * patch[0] * patch[1] * patch[2] * channels).view(2, 25, -1)
    out = unpatchify(tokens, grid, patch)  # one token of padding
    assert out.shape == (2, channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    for t, r, c in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        values = tokens[:, (t * 3 + r) * 4 + c].view(2, *patch, channels)
        for i in range(patch[0]):
            for j in range(patch[1]):
                for k in range(patch[2]):
                    at = out[:, :, t * patch[0] + i, r * patch[1] + j, c * patch[2] + k]
                    assert torch.equal(at, values[:, i, j, k])


def test_prompts_are_padded_with_zero_rows():
    torch.manual_seed(0)
    prompts = [torch.randn(5, 8), torch.randn(12, 8)]
    padded = pad_text(prompts, 12, 8)
    assert torch.equal(padded[0, :5], prompts[0])
    assert torch.equal(padded[0, 5:], torch.zeros(7, 8))
    assert torch.equal(padded[1], prompts[1])
    assert torch.equal(pad_text(prompts[0][None], 12, 8), padded[:1])
    config = tiny("t2v-14b")
    model, inputs = random_model(config), model_inputs(config, GRID, batch=2, text_tokens=9)
    both = model(*inputs)
    listed = model(*inputs._replace(context=list(inputs.context)))
    assert torch.equal(both, listed)


@pytest.mark.parametrize("name", ["t2v-14b", "ti2v-5b", "vace-14b"])
def test_tokens_of_padding_change_nothing(name):
    config = tiny(name)
    model, inputs = random_model(config), model_inputs(config, GRID, batch=2)
    padded = inputs
    if config.token_timesteps:
        padded = inputs._replace(timesteps=F.pad(inputs.timesteps, (0, 4)))
    assert relative_error(model(*padded, seq_len=64), model(*inputs)) < 1e-5
    assert relative_error(model(*inputs, seq_len=60), model(*inputs)) < 1e-5


def test_the_residual_stream_lies_in_rows():
    """The patches come column by column; every block gets the same layout, so one compile serves.
    """
    config = tiny("t2v-14b")
    model, inputs = random_model(config), model_inputs(config, GRID, batch=2)
    strides = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride()))
    model(*inputs)
    assert strides == [(60 * 256, 256, 1)] * 2


@pytest.mark.parametrize("name", ["i2v-14b", "ti2v-5b", "vace-14b"])
def test_bf16_models_return_fp32_near_the_fp32_model(name):
    config = tiny(name)
    model, inputs = random_model(config), model_inputs(config, GRID, batch=2)
    expected = model(*inputs)
    seen = []
    half = model.bfloat16()
    half.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    out = half(*inputs)  # inputs of any float type
    assert out.dtype == torch.float32
    assert seen == [torch.bfloat16]
    assert relative_error(out, expected) < 0.05


def test_norms_and_patches_may_stay_in_fp32():
    """As some checkpoints have them."""
    model, inputs = random_model(TINY).bfloat16(), model_inputs(TINY, GRID)
    expected = model(*inputs)
    model.patch_embedding.float()
    for block in model.blocks:
        block.modulation.data = block.modulation.data.float()
        for norm in (block.norm3, block.self_attn.norm_q, block.cross_attn.norm_k):
            norm.float()
    out = model(*inputs)
    assert model.dtype == torch.bfloat16
    assert relative_error(out, expected) < 0.02


# -- compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2v-14b", "i2v-14b", "ti2v-5b"])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_blocks_share_a_compile_and_so_do_resolutions(name, batch):
    config = replace(tiny(name), num_layers=5)
    model = random_model(config)
    first, second = (model_inputs(config, grid, batch=batch) for grid in ((3, 4, 5), (2, 7, 9)))
    expected = [model(*first), model(*second)]
    counter = CompileCounter()
    model.compile_blocks(backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert torch.equal(model(*first), expected[0])
        assert counter.frame_count == 1
        assert torch.equal(model(*second), expected[1])
    assert counter.frame_count == 1


def test_equal_blocks_share_a_static_compile():
    config = replace(TINY, num_layers=12)
    model = random_model(config)
    counter = CompileCounter()
    model.compile_blocks(backend=counter, fullgraph=True)
    with torch.no_grad():
        model(*model_inputs(config, GRID))
    assert counter.frame_count == 1


def test_vace_blocks_compile_with_and_without_their_first_projection():
    config = replace(tiny("vace-14b"), num_layers=6, vace_layers=(0, 1, 2, 4))
    model = random_model(config)
    counter = CompileCounter()
    model.compile_blocks(backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grid in ((3, 4, 5), (2, 7, 9)):
            inputs = model_inputs(config, grid)
            out = model(*inputs)
            expected = Reference(model)(*inputs[:-1])
            assert relative_error(out.double(), expected) < 1e-5
            assert counter.frame_count == 3  # main, first, other


def test_a_whole_model_compiles_once_for_every_resolution():
    config = replace(tiny("i2v-14b"), vace_layers=(0,), num_layers=1, token_timesteps=True)
    model = random_model(config)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grid in ((3, 4, 5), (2, 7, 9)):
            inputs = model_inputs(config, grid, batch=2)
            assert torch.equal(compiled(*inputs), model(*inputs))
            assert counter.frame_count == 1


def test_a_whole_model_compiles_under_contig_safe():
    model = random_model(TINY).bfloat16()
    compiled = torch.compile(
        model, backend="contig_safe", fullgraph=True, options={"inner": "aot_eager"}
    )
    inputs = model_inputs(TINY, GRID, batch=2)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), model(*inputs))


# -- bad input -----------------------------------------------------------------------------------


def call(config: WanConfig, grid: tuple[int, int, int] = GRID, **changes: object) -> None:
    with torch.device("meta"):
        model = WanModel(config)
    options = {name: changes.pop(name) for name in ("seq_len", "vace_scale") if name in changes}
    inputs = model_inputs(config, grid, batch=2, device="meta")
    model(*inputs._replace(**changes), **options)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: call(TINY, latents=meta(2, 36, 3, 8, 10)), r"use \(B, 16, T, rows, columns\)"),
        (lambda: call(TINY, latents=meta(16, 3, 8, 10)), r"latents have shape \(16, 3, 8, 10\)"),
        (lambda: call(TINY, latents=meta(2, 16, 3, 8, 9)), r"multiples of \(1, 2, 2\)"),
        (lambda: call(TINY, timesteps=meta(2, 59)), r"use \(2,\), or \(2, 60\)"),
        (lambda: call(TINY, timesteps=meta(3)), r"timesteps have shape \(3,\)"),
        (lambda: call(TINY, timesteps=meta(2, 60), seq_len=64), r"use \(2,\), or \(2, 64\)"),
        (lambda: call(TINY, context=meta(2, 33, 64)), "context has 33 tokens: use at most 32"),
        (lambda: call(TINY, context=meta(2, 32, 65)), r"use \(B, Lt, 64\)"),
        (lambda: call(TINY, context=[meta(3, 32, 64)]), r"or a list of \(Lt, 64\)"),
        (lambda: call(TINY, context=[]), "context is empty"),
        (lambda: call(TINY, context=[meta(9, 64)]), "1 prompts for 2 samples"),
        (lambda: call(TINY, image=meta(2, 257, 64)), "no image branch"),
        (lambda: call(TINY, vace=meta(2, 96, 3, 8, 10)), "no VACE blocks"),
        (
            lambda: call(tiny("flf2v-14b"), image=meta(2, 257, 64)),
            r"image has shape \(2, 257, 64\): use \(2, 514, 64\)",
        ),
        (
            lambda: call(tiny("vace-14b"), vace=meta(2, 96, 3, 8, 8)),
            r"vace has shape .*: use \(2, 96, 3, 8, 10\)",
        ),
        (lambda: call(tiny("vace-14b"), vace_scale=meta(3)), r"use \(\) or \(2,\)"),
        (lambda: call(TINY, seq_len=59), "seq_len=59: the latents make 60 tokens"),
        (
            lambda: call(TINY, conditions=BlockConditions(motion=meta(2, 24, 256))),
            "no block has motion_attn",
        ),
        (lambda: model_inputs(TINY, GRID, addons=["talk"]), "add-on 'talk': use one of"),
        (lambda: replace(TINY, vace_layers=(1, 0)), "rising block numbers from 0 to 1"),
        (lambda: replace(TINY, vace_layers=(0, 2)), "rising block numbers from 0 to 1"),
        (lambda: replace(TINY, image_dim=-1), "image_dim=-1"),
        (lambda: replace(TINY, vae_stride=(4, 8)), "vae_stride"),
    ],
)
def test_bad_input_is_named(broken, message):
    with pytest.raises(ValueError, match=message) as raised:
        broken()
    assert "\n" not in str(raised.value)
