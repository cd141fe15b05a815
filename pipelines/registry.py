"""Which transformers this library knows, and where a pipeline has them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_sparse.pipelines import (
    cogvideox,
    cosmos,
    flux,
    flux2,
    hunyuan_dit,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    ltx2,
    mochi,
    pixart,
    qwen_image,
    sd3,
    wan,
    z_image,
)
from dit_sparse.pipelines.family import Family

FAMILIES: dict[str, Family] = {
    "CogVideoXTransformer3DModel": cogvideox.FAMILY,
    "CosmosTransformer3DModel": cosmos.FAMILY,
    "Flux2Transformer2DModel": flux2.FAMILY,
    "FluxTransformer2DModel": flux.FAMILY,
    "HunyuanDiT2DModel": hunyuan_dit.FAMILY,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15.FAMILY,
    "HunyuanVideoTransformer3DModel": hunyuan_video.FAMILY,
    "Kandinsky5Transformer3DModel": kandinsky5.FAMILY,
    "LTX2VideoTransformer3DModel": ltx2.FAMILY,
    "LTXVideoTransformer3DModel": ltx.FAMILY,
    "MochiTransformer3DModel": mochi.FAMILY,
    "PixArtTransformer2DModel": pixart.FAMILY,
    "QwenImageTransformer2DModel": qwen_image.FAMILY,
    "SD3Transformer2DModel": sd3.FAMILY,
    "WanTransformer3DModel": wan.FAMILY,
    "WanVACETransformer3DModel": wan.FAMILY,
    "ZImageTransformer2DModel": z_image.FAMILY,
}

LINEAR = "its self-attention is linear, so there are no blocks of a softmax to leave out"
REFUSED = {"SanaTransformer2DModel": LINEAR, "SanaVideoTransformer3DModel": LINEAR}


def parts_of(pipe: Any) -> Mapping[str, Any]:
    """The components of a pipeline, or of a transformer alone."""
    return pipe.components if hasattr(pipe, "components") else {"transformer": pipe}


def known_of(parts: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Those that can be made sparse."""
    return {part: module for part, module in parts.items() if type(unwrap(module)).__name__ in FAMILIES}


def family_of(transformer: nn.Module) -> Family:
    return FAMILIES[type(unwrap(transformer)).__name__]


def unwrap(module: Any) -> Any:
    """The model inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def set_processor(module: nn.Module, processor: Any) -> None:
    # Mochi's attention has no method for it.
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def processor_of(module: nn.Module) -> Any:
    return getattr(module, "processor", None)
