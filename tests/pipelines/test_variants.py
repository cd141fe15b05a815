"""Pipelines that share a family's transformer, and start from an image, a video or a control."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from dit_sparse import SparseConfig, sparsify
from dit_sparse.layout import TokenGrid
from tests.families import FAMILIES as TINY
from tests.families import generate


def picture(width: int, height: int, shift: int = 0) -> Image.Image:
    rows = torch.arange(height)[:, None, None] * torch.tensor([7, 3, 1])
    columns = torch.arange(width)[None, :, None] * torch.tensor([1, 5, 9])
    return Image.fromarray(((rows + columns + 20 * shift) % 256).to(torch.uint8).numpy())


@dataclass(frozen=True)
class Variant:
    """Of the pipeline `kind`, with components of a family's tiny one.

    given   by argument, what it starts from, of a width, height and number of frames
    built   by argument, how its transformer is made otherwise
    text    tokens before and after the vision tokens, and the grid of these, where not as in the family
    steps   that are run, of three
    beside  (transformer) -> other components
    """

    family: str
    kind: str
    given: Mapping[str, Callable[[int, int, int], Any]] = field(default_factory=dict)
    built: Mapping[str, Any] = field(default_factory=dict)
    text: tuple[int, int] | None = None
    grid: tuple[int, int, int] | None = None
    steps: int = 3
    beside: Callable[[Any], Mapping[str, Any]] = lambda _: {}


def image(width: int, height: int, frames: int) -> Image.Image:
    return picture(width, height)


def clip(width: int, height: int, frames: int) -> list[Image.Image]:
    return [picture(width, height, i) for i in range(frames)]


def mask(width: int, height: int, frames: int) -> Image.Image:
    half = torch.arange(width)[None] < width // 2
    return Image.fromarray((255 * half.expand(height, -1)).to(torch.uint8).numpy())


def fixed(value: Any) -> Callable[[int, int, int], Any]:
    return lambda *_: value


def controlled_by(kind: Any, **options: Any) -> Callable[[Any], Mapping[str, Any]]:
    """A ControlNet, whose own attention is not the transformer's and stays as it is."""

    def beside(transformer: Any) -> Mapping[str, Any]:
        controlnet = kind.from_transformer(transformer, **options).eval()
        for weight in controlnet.parameters():
            # Those that add to the transformer's blocks begin at zero.
            if not weight.any():
                weight.data.normal_(std=0.1)
        return {"controlnet": controlnet}

    return beside


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def of_cosmos_2(_: Any) -> Mapping[str, Any]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )
    return {"vae": vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}


# Of three steps, two are left.
PARTLY = {"strength": fixed(0.6)}

VARIANTS = {
    "cogvideox, image": Variant(
        "cogvideox-1.5", "CogVideoXImageToVideoPipeline", {"image": image}, {"in_channels": 8}
    ),
    "cogvideox, video": Variant(
        "cogvideox-5b", "CogVideoXVideoToVideoPipeline", {"video": clip, "strength": fixed(0.7)}, steps=2
    ),
    "cogvideox, control": Variant(
        "cogvideox-5b",
        "CogVideoXFunControlPipeline",
        {"control_video": clip},
        {"in_channels": 8},
    ),
    "hunyuan-video, skyreels": Variant(
        "hunyuan-video", "HunyuanSkyreelsImageToVideoPipeline", {"image": image}, {"in_channels": 8}
    ),
    "hunyuan-video, image": Variant(
        "hunyuan-video",
        "HunyuanVideoImageToVideoPipeline",
        {"image": image},
        {"in_channels": 9, "image_condition_type": "latent_concat"},
    ),
    "hunyuan-video, first frame": Variant(
        "hunyuan-video",
        "HunyuanVideoImageToVideoPipeline",
        {"image": image},
        {"image_condition_type": "token_replace"},
    ),
    "ltx, image": Variant("ltx", "LTXImageToVideoPipeline", {"image": image}),
    "flux, image": Variant("flux", "FluxImg2ImgPipeline", {"image": image} | PARTLY, steps=2),
    "flux, part of an image": Variant(
        "flux", "FluxInpaintPipeline", {"image": image, "mask_image": mask} | PARTLY, steps=2
    ),
    "flux, control": Variant(
        "flux", "FluxControlPipeline", {"control_image": image}, {"in_channels": 32, "out_channels": 16}
    ),
    "flux, fill": Variant(
        "flux",
        "FluxFillPipeline",
        {"image": image, "mask_image": mask, "strength": fixed(1.0)},
        {"in_channels": 16 + 16 + 256, "out_channels": 16},
    ),
    "flux, kontext": Variant(
        "flux",
        "FluxKontextPipeline",
        {"image": image, "_auto_resize": fixed(False), "max_area": fixed(224 * 240)},
        text=(9, 210),
    ),
    "flux2, image": Variant("flux2", "Flux2KleinPipeline", {"image": image}, text=(9, 210)),
    "flux2, dev": Variant("flux2", "Flux2Pipeline", {}, {"guidance_embeds": True}),
    "qwen-image, image": Variant("qwen-image", "QwenImageImg2ImgPipeline", {"image": image} | PARTLY, steps=2),
    "qwen-image, part of an image": Variant(
        "qwen-image", "QwenImageInpaintPipeline", {"image": image, "mask_image": mask} | PARTLY, steps=2
    ),
    "sd3, image": Variant("sd3", "StableDiffusion3Img2ImgPipeline", {"image": image} | PARTLY, steps=2),
    "cosmos, video": Variant(
        "cosmos", "CosmosVideoToWorldPipeline", {"video": lambda *size: clip(*size)[:9]}, {"in_channels": 5}
    ),
    "z-image, image": Variant("z-image", "ZImageImg2ImgPipeline", {"image": image} | PARTLY, steps=2),
    "kandinsky5, image": Variant(
        "kandinsky5",
        "Kandinsky5I2VPipeline",
        # It scales the first four latents by the others.
        {"image": image, "num_frames": fixed(21)},
        {"visual_cond": True, "in_visual_dim": 4},
        grid=(6, 7, 9),
    ),
    "flux, controlnet": Variant(
        "flux",
        "FluxControlNetPipeline",
        {"control_image": image},
        beside=controlled_by(diffusers.FluxControlNetModel, num_layers=1, num_single_layers=1, **HEADS),
    ),
    "sd3, controlnet": Variant(
        "sd3",
        "StableDiffusion3ControlNetPipeline",
        {"control_image": image},
        beside=controlled_by(diffusers.SD3ControlNetModel, num_layers=1, num_extra_conditioning_channels=0),
    ),
    "qwen-image, controlnet": Variant(
        "qwen-image",
        "QwenImageControlNetPipeline",
        {"control_image": image},
        beside=controlled_by(diffusers.QwenImageControlNetModel, num_layers=1, **HEADS),
    ),
    "cosmos 2, text": Variant(
        "cosmos",
        "Cosmos2TextToImagePipeline",
        {"height": fixed(224), "width": fixed(256)},
        grid=(1, 14, 16),
        beside=of_cosmos_2,
    ),
    "cosmos 2, video": Variant(
        "cosmos",
        "Cosmos2VideoToWorldPipeline",
        {"image": image},
        {"in_channels": 5},
        # Unlike Cosmos 1's autoencoder, four frames are one.
        grid=(5, 7, 9),
        beside=of_cosmos_2,
    ),
    "pixart-alpha": Variant(
        "pixart-sigma",
        "PixArtAlphaPipeline",
        {},
        {"use_additional_conditions": True, "sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 48},
    ),
}


def make(variant: Variant) -> Any:
    torch.manual_seed(0)
    base = TINY[variant.family].make()
    transformer = base.transformer
    if variant.built:
        told = {name: x for name, x in transformer.config.items() if not name.startswith("_")}
        transformer = type(transformer)(**told | variant.built)
    if getattr(base.vae.config, "shift_factor", 0.0) is None:
        base.vae.register_to_config(shift_factor=0.1)
    for weight in transformer.eval().parameters():
        # Gates that are closed at first would hide whatever attention does.
        if not weight.any():
            weight.data.normal_(std=0.1)
    kind = getattr(diffusers, variant.kind)
    own = {**base.components, "transformer": transformer} | dict(variant.beside(transformer))
    wanted = inspect.signature(kind).parameters
    return kind(**{name: own.get(name) for name, p in wanted.items() if name in own or p.default is p.empty})


def run(variant: Variant, pipe: Any) -> torch.Tensor:
    # Some sample from the autoencoder without the generator that they are given.
    torch.manual_seed(1)
    tiny = TINY[variant.family]
    said = {"num_frames": 1} | tiny.sizes[0][0]
    given = {name: of(said["width"], said["height"], said["num_frames"]) for name, of in variant.given.items()}
    known = inspect.signature(type(pipe).__call__).parameters

    class Fewer:
        """The pipeline without arguments of the family's call that it does not take."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pipe, name)

        def __call__(self, **options: Any) -> Any:
            return pipe(**{name: x for name, x in options.items() if name in known})

    return generate(variant.family, Fewer(), **given)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_pipeline_of_the_same_transformer(name):
    variant = VARIANTS[name]
    tiny, pipe = TINY[variant.family], make(variant)
    stock = run(variant, pipe)
    with sparsify(pipe, "anchor", density=1.0, dense_steps=0) as session:
        torch.testing.assert_close(run(variant, pipe), stock, atol=1e-3, rtol=1e-3)
        assert session.generation.grid == TokenGrid(*(variant.grid or tiny.sizes[0][1]))
        assert session.generation.text == (variant.text or tiny.text)
        pipe.set_attn_processor(SparseConfig("anchor", density=0.15, dense_steps=0))
        sparse, report = run(variant, pipe), session.report()
        assert [r.phase for r in report.steps] == ["anchor", "sparse", "sparse"][: variant.steps]
        assert report.density < 0.4 and not report.fallbacks
        assert sparse.isfinite().all() and not torch.equal(sparse, stock)
        assert torch.equal(run(variant, pipe), sparse)
    assert torch.equal(run(variant, pipe), stock)


def test_keys_of_an_image_that_are_kept_from_step_to_step_are_refused():
    """Its processors store them in the model's blocks, and mask them."""
    pipe = make(Variant("flux2", "Flux2KleinKVPipeline"))
    with pytest.raises(ValueError, match="has Flux2KVAttnProcessor, which would be lost"):
        sparsify(pipe)
