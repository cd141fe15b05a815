"""Pipelines that share a family's transformer, and start from an image, a video or a control."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

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


def opened(controlnet: Any) -> Any:
    for weight in controlnet.eval().parameters():
        # Those that add to the transformer's blocks begin at zero.
        if not weight.any():
            weight.data.normal_(std=0.1)
    return controlnet


def controlled_by(kind: Any, **options: Any) -> Callable[[Any], Mapping[str, Any]]:
    """A ControlNet, whose own attention is not the transformer's and stays as it is."""
    return lambda transformer: {"controlnet": opened(kind.from_transformer(transformer, **options))}


def controlled_hunyuan_dit(transformer: Any) -> Mapping[str, Any]:
    # Its from_transformer assumes the widths that were published.
    known = inspect.signature(diffusers.HunyuanDiT2DControlNetModel).parameters
    told = {name: x for name, x in transformer.config.items() if name in known}
    return {"controlnet": opened(diffusers.HunyuanDiT2DControlNetModel(**told, transformer_num_layers=4))}


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def of_cosmos_2(_: Any) -> Mapping[str, Any]:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )
    return {"vae": vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}


def of_cosmos_25(_: Any) -> Mapping[str, Any]:
    return {
        **of_cosmos_2(_),
        "scheduler": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }


def of_qwen_edit(_: Any) -> Mapping[str, Any]:
    """What is to be edited is given to the autoencoder as a million pixels: this one makes few tokens of them."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        num_res_blocks=0,
        dim_mult=[1] * 6,
        temperal_downsample=[False] * 5,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return {"vae": vae}


def with_eyes(transformer: Any) -> Mapping[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=transformer.config.image_embed_dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    # Unlike the family's, it can encode.
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, downsample_match_channel=False
    )
    sees = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return {"vae": vae, "image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": sees}


def of_ltx_2(_: Any) -> Mapping[str, Any]:
    """The family's autoencoder cannot encode."""
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        # It would count its own wrongly.
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    return {"vae": vae}


def of_sd3(_: Any) -> Mapping[str, Any]:
    """Inpainting is for as many channels as were published."""
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=16,
        norm_num_groups=2,
        shift_factor=0.1,
    )
    return {"vae": vae}


# Of three steps, two are left.
PARTLY = {"strength": fixed(0.6)}
# 14 x 15 tokens of the autoencoder for editing.
LARGE = {"height": fixed(14 * 64), "width": fixed(15 * 64)}

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
    "cosmos 2.5, text": Variant(
        "cosmos", "Cosmos2_5_PredictBasePipeline", {}, {"in_channels": 5}, grid=(5, 7, 9), beside=of_cosmos_25
    ),
    # From an image, and to transfer, it wants torchvision.
    "cosmos 2.5, video": Variant(
        "cosmos",
        "Cosmos2_5_PredictBasePipeline",
        {"video": clip},
        {"in_channels": 5},
        grid=(5, 7, 9),
        beside=of_cosmos_25,
    ),
    "ltx2, image": Variant(
        "ltx2", "LTX2ImageToVideoPipeline", {"image": image, "image_crf": fixed(0)}, beside=of_ltx_2
    ),
    "hunyuan-video-1.5, image": Variant(
        "hunyuan-video-1.5",
        "HunyuanVideo15ImageToVideoPipeline",
        {"image": image},
        {"target_size": 128},
        beside=with_eyes,
    ),
    "hunyuan-dit, controlnet": Variant(
        "hunyuan-dit",
        "HunyuanDiTControlNetPipeline",
        {"control_image": image},
        beside=controlled_hunyuan_dit,
    ),
    "sd3, part of an image": Variant(
        "sd3",
        "StableDiffusion3InpaintPipeline",
        {"image": image, "mask_image": mask} | PARTLY,
        {"in_channels": 16, "out_channels": 16},
        steps=2,
        beside=of_sd3,
    ),
    "qwen-image, edit": Variant(
        "qwen-image", "QwenImageEditPipeline", {"image": image} | LARGE, text=(9, 15 * 16), beside=of_qwen_edit
    ),
    "qwen-image, edit plus": Variant(
        "qwen-image",
        "QwenImageEditPlusPipeline",
        {"image": lambda *size: [image(*size), image(*size)]} | LARGE,
        text=(9, 2 * 15 * 16),
        beside=of_qwen_edit,
    ),
    "qwen-image, edit a part": Variant(
        "qwen-image",
        "QwenImageEditInpaintPipeline",
        {"image": image, "mask_image": mask} | PARTLY,
        text=(9, 0),
        # What is made and what it is made from have one shape: two frames.
        grid=(2, 15, 16),
        steps=2,
        beside=of_qwen_edit,
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
