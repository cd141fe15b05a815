"""Which model is meant, whether all of it is there and safe to load, and what sizes it takes; no weight is read."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

# Components that a pipeline may be told to load with these libraries' own classes; anything else is foreign code.
_LIBRARIES = ("diffusers", "transformers")

_COMPONENT_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ModelFiles:
    """The configuration files of one diffusers pipeline.

    source        what from_pretrained takes: a directory or a Hugging Face id
    index         model_index.json
    transformers  component name -> (class name, config.json) of each transformer the pipeline has
    vae           the config.json of its autoencoder
    """

    source: str
    index: dict[str, Any]
    transformers: dict[str, tuple[str, dict[str, Any]]]
    vae: dict[str, Any]

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()


@dataclass(frozen=True)
class PublishedModel:
    """The shape of a model whose weights need not be at hand, and the size it is mostly used at."""

    class_name: str
    transformers: int
    transformer: dict[str, Any]
    vae: dict[str, Any]
    height: int
    width: int
    num_frames: int


@dataclass(frozen=True)
class Size:
    """What a model's height and width are multiples of, and what its number of frames is 1 more than a multiple of;
    None makes images."""

    pixels: int
    frames: int | None = None


def _wan(
    heads: int, layers: int, ffn_dim: int, size: tuple[int, int, int], *, spatial: int = 8, transformers: int = 1
) -> PublishedModel:
    num_frames, height, width = size
    return PublishedModel(
        class_name="WanTransformer3DModel",
        transformers=transformers,
        transformer={
            "patch_size": [1, 2, 2],
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "num_layers": layers,
            "ffn_dim": ffn_dim,
        },
        vae={"scale_factor_spatial": spatial, "scale_factor_temporal": 4},
        height=height,
        width=width,
        num_frames=num_frames,
    )


def _model(class_name: str, size: tuple[int, int, int], transformer: dict[str, Any], **vae: Any) -> PublishedModel:
    """size is num_frames, height and width; transformer and vae are what differs from what the family assumes."""
    num_frames, height, width = size
    return PublishedModel(class_name, 1, transformer, vae, height, width, num_frames)


def _heads(heads: int, head_dim: int, layers: int, **options: Any) -> dict[str, Any]:
    return dict(num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers) | options


def _cogvideox(heads: int, layers: int, size: tuple[int, int, int], **options: Any) -> PublishedModel:
    return _model("CogVideoXTransformer3DModel", size, _heads(heads, 64, layers, patch_size=2, **options))


def _sd3(heads: int, **options: Any) -> PublishedModel:
    # As many layers as heads.
    return _model("SD3Transformer2DModel", (1, 1024, 1024), _heads(heads, 64, heads, patch_size=2, **options))


PUBLISHED = {
    "wan2.1-1.3b": _wan(12, 30, 8960, (81, 480, 832)),
    "wan2.1-14b": _wan(40, 40, 13824, (81, 720, 1280)),
    "wan2.2-a14b": _wan(40, 40, 13824, (81, 720, 1280), transformers=2),
    "wan2.2-ti2v-5b": _wan(24, 30, 14336, (121, 704, 1280), spatial=16),
    "hunyuan-video": _model(
        "HunyuanVideoTransformer3DModel",
        (129, 720, 1280),
        _heads(24, 128, 20, num_single_layers=40, patch_size=2, patch_size_t=1, mlp_ratio=4, guidance_embeds=True),
    ),
    "hunyuan-video-1.5": _model(
        "HunyuanVideo15Transformer3DModel",
        (121, 720, 1280),
        _heads(16, 128, 54, patch_size=1, patch_size_t=1, mlp_ratio=4),
    ),
    "cogvideox-2b": _cogvideox(30, 30, (49, 480, 720)),
    "cogvideox-5b": _cogvideox(48, 42, (49, 480, 720)),
    "cogvideox1.5-5b": _cogvideox(48, 42, (81, 768, 1360), patch_size_t=2, max_text_seq_length=224),
    "flux.1-dev": _model(
        "FluxTransformer2DModel", (1, 1024, 1024), _heads(24, 128, 19, num_single_layers=38, guidance_embeds=True)
    ),
    "flux.2-dev": _model(
        "Flux2Transformer2DModel",
        (1, 1024, 1024),
        _heads(48, 128, 8, num_single_layers=48, mlp_ratio=3.0, guidance_embeds=True),
    ),
    "sd3-medium": _sd3(24),
    "sd3.5-medium": _sd3(24, dual_attention_layers=tuple(range(13))),
    "sd3.5-large": _sd3(38),
    "qwen-image": _model("QwenImageTransformer2DModel", (1, 1328, 1328), _heads(24, 128, 60)),
    "z-image": _model("ZImageTransformer2DModel", (1, 1024, 1024), dict(dim=3840, n_heads=30, n_layers=30)),
    "pixart-sigma": _model("PixArtTransformer2DModel", (1, 1024, 1024), _heads(16, 72, 28, patch_size=2)),
    "hunyuan-dit": _model("HunyuanDiT2DModel", (1, 1024, 1024), _heads(16, 88, 40, patch_size=2, mlp_ratio=4.3637)),
    "ltx-video-2b": _model("LTXVideoTransformer3DModel", (161, 512, 704), _heads(32, 64, 28)),
    "ltx-video-13b": _model("LTXVideoTransformer3DModel", (121, 704, 1216), _heads(32, 128, 48)),
    "ltx-2": _model("LTX2VideoTransformer3DModel", (121, 512, 768), _heads(32, 128, 48)),
    "mochi": _model("MochiTransformer3DModel", (85, 480, 848), _heads(24, 128, 48, patch_size=2)),
    "cosmos1-7b": _model(
        "CosmosTransformer3DModel",
        (121, 704, 1280),
        _heads(32, 128, 28, patch_size=[1, 2, 2]),
        temporal_compression_ratio=8,
    ),
    "cosmos2-2b": _model("CosmosTransformer3DModel", (93, 704, 1280), _heads(16, 128, 28, patch_size=[1, 2, 2])),
    "kandinsky5-lite": _model(
        "Kandinsky5Transformer3DModel",
        (121, 512, 768),
        dict(model_dim=1792, ff_dim=7168, num_visual_blocks=32, axes_dims=[16, 24, 24], patch_size=[1, 2, 2]),
    ),
}


def published(name: str) -> PublishedModel:
    """The published model of that name; raises ValueError with the names there are."""
    if name.lower() not in PUBLISHED:
        near = get_close_matches(name.lower(), PUBLISHED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(PUBLISHED)}."
        raise ValueError(f"Unknown family {name!r}: {hint}")
    return PUBLISHED[name.lower()]


def demo_directory() -> Path:
    """Where the demo model lies: samples/demo in a checkout, dit_sparse/demo in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "samples" / "demo"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "demo"


def find(model_id: str | None) -> ModelFiles:
    """The model that `model_id` names, or the demo model; raises ValueError unless all of its parts are there.

    A directory is checked in full. Of a Hugging Face id only the configuration is fetched.
    """
    if model_id is None:
        if not (demo_directory() / "model_index.json").is_file():
            raise ValueError(
                f"The demo model is not at {demo_directory()}: give --model_id a directory saved by diffusers or a "
                "Hugging Face id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
            )
        model_id = str(demo_directory())
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return _read(folder, str(folder), weights=True)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model_id):
        raise ValueError(
            f"model_id {model_id!r} is no directory here: give a directory saved by diffusers or a Hugging Face id "
            "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return _read(_fetch(model_id), model_id, weights=False)


def _fetch(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns="*.json"))
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"model_id {model_id!r} is neither a directory nor to be had from Hugging Face: {first}."
        ) from None


def _read(folder: Path, source: str, weights: bool) -> ModelFiles:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{source} has no model_index.json, so it is no diffusers pipeline: give one that has.")
    index = _json(folder / "model_index.json")
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{source} brings its own pipeline code, and only the pipelines of diffusers are run.")
    for name, value in _components(index):
        library, class_name = value
        if library not in _LIBRARIES:
            raise ValueError(
                f"{source} wants {class_name} from {library} as its {name}, and only classes of diffusers and "
                "transformers are loaded."
            )
        if not any((folder / name / file).is_file() for file in _COMPONENT_CONFIGS):
            raise ValueError(f"{source} lacks {name}: model_index.json names it, but {name}/ holds no configuration.")
        if weights and (folder / name / "config.json").is_file():
            _check_weights(source, folder / name)
    transformers = {
        name: (value[1], _json(folder / name / "config.json"))
        for name, value in _components(index)
        if name.startswith("transformer")
    }
    vae = folder / "vae" / "config.json"
    return ModelFiles(source, index, transformers, _json(vae) if vae.is_file() else {})


def _components(index: dict[str, Any]) -> Iterable[tuple[str, tuple[str, str]]]:
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[0] is not None:
            yield name, (value[0], value[1])


def _check_weights(source: str, component: Path) -> None:
    name = component.name
    for index in component.glob("*.safetensors.index.json"):
        shards = set(_json(index).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (component / shard).is_file())
        if missing:
            raise ValueError(f"{source} lacks {name}/{missing[0]}, one of the {len(shards)} files its weights are in.")
    if not any(component.glob("*.safetensors")):
        pickled = next((file.name for kind in _PICKLES for file in component.glob(kind)), None)
        if pickled:
            raise ValueError(f"{source} has {name}/{pickled}, a pickle, and only safetensors are loaded.")
        raise ValueError(f"{source} lacks the weights of {name}: there is no .safetensors file in {name}/.")


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold a JSON object, but it holds a {type(values).__name__}.")
    return values


def check_known(files: ModelFiles, known: Iterable[str]) -> None:
    """Raise ValueError unless each transformer's class is among `known`."""
    if not files.transformers:
        raise ValueError(f"{files.source} is a {files.index['_class_name']} without a transformer to make sparse.")
    for name, (class_name, _) in files.transformers.items():
        if class_name not in set(known):
            raise ValueError(
                f"{files.source} has a {class_name} as its {name}; known transformers are {', '.join(sorted(known))}."
            )


def check_size(size: Size, height: int, width: int, num_frames: int) -> None:
    """Raise ValueError, with the nearest legal values, unless a model of that `size` makes such a video or image."""
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % size.pixels:
            raise ValueError(
                f"{name} is a multiple of {size.pixels} for this model, not {value}: {_near(value, size.pixels, 0)}."
            )
    if size.frames is None:
        if num_frames != 1:
            raise ValueError(f"num_frames is 1 for this model, which makes images, not {num_frames}.")
    elif num_frames < 1 or (num_frames - 1) % size.frames:
        raise ValueError(
            f"num_frames is 1 more than a multiple of {size.frames} for this model, not {num_frames}: "
            f"{_near(num_frames, size.frames, 1)}."
        )


def _near(value: int, multiple: int, offset: int) -> str:
    below = (value - offset) // multiple * multiple + offset
    legal = [n for n in (below, below + multiple) if n >= max(1, offset)] or [offset or multiple]
    return f"nearest {'is' if len(legal) == 1 else 'are'} {' and '.join(map(str, legal))}"
