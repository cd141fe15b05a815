"""Quantised weights: sparse attention calls the layers, and never reads a weight."""

import pytest
import torch
from diffusers import GGUFQuantizationConfig, QuantoConfig
from torch import nn

from dit_sparse import SparseConfig, sparsify
from dit_sparse.pipelines.registry import family_of
from dit_sparse.profile import fingerprint
from tests.families import FAMILIES as TINY
from tests.families import generate as generate_family
from tests.tiny import generate as generate_wan
from tests.tiny import tiny_wan

ANCHOR = SparseConfig("anchor", density=0.15, dense_steps=1, refresh_every=3)


def gguf(transformer, folder):
    """As llama.cpp and ComfyUI write it: matrices in blocks of 32, the rest in float32."""
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(folder / "model.gguf", "transformer")
    kinds = package.GGMLQuantizationType
    for name, weight in transformer.state_dict().items():
        blocks = "blocks" in name and weight.dim() == 2 and weight.shape[1] % 32 == 0
        kind = kinds.Q8_0 if blocks else kinds.F32
        writer.add_tensor(name, package.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    transformer.save_config(folder)
    return type(transformer).from_single_file(
        folder / "model.gguf",
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )


def quanto(kind):
    def how(transformer, folder):
        pytest.importorskip("optimum.quanto")
        transformer.save_pretrained(folder)
        return type(transformer).from_pretrained(folder, quantization_config=QuantoConfig(kind), dtype=torch.float32)

    return how


def bitsandbytes(kind, **options):
    """The layers that diffusers would put in: without a GPU it refuses to, where bitsandbytes itself does not."""

    def how(transformer, folder):
        layers = pytest.importorskip("bitsandbytes").nn
        for name, linear in list(transformer.named_modules()):
            if isinstance(linear, nn.Linear) and "blocks" in name:
                bias = linear.bias is not None
                layer = getattr(layers, kind)(linear.in_features, linear.out_features, bias=bias, **options)
                layer.load_state_dict(linear.state_dict())
                transformer.set_submodule(name, layer.to("cpu"))
        return transformer

    return how


HOW = {
    "gguf": (gguf, "GGUFLinear"),
    "quanto int8": (quanto("int8"), "QLinear"),
    "quanto float8": (quanto("float8"), "QLinear"),
    "bitsandbytes int8": (bitsandbytes("Linear8bitLt", has_fp16_weights=False), "Linear8bitLt"),
    "bitsandbytes nf4": (bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32), "Linear4bit"),
}


def make(name):
    pipe = tiny_wan(text=False, layers=3) if name == "wan" else TINY[name].make()
    for weight in pipe.transformer.eval().parameters():
        # Gates that are closed at first would hide whatever attention does.
        if not weight.any():
            weight.data.normal_(std=0.1)
    return pipe


def furthest(pipe, generate):
    """In a generation, the most that an attention module's output is from the stock processor's on the same input."""
    errors, stock = [], family_of(pipe.transformer).stock

    def hook(name):
        def compare(module, args, kwargs, output):
            ours, module.processor = module.processor, stock(name, pipe.transformer)
            with torch.no_grad():
                expected = type(module).forward(module, *args, **kwargs)
            module.processor = ours
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (output, expected)), strict=True):
                errors.append(((a - b).abs().max() / b.abs().max()).item())

        return compare

    hooks = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "processor") and family_of(pipe.transformer).is_self_attention(name)
    ]
    generate(pipe)
    for handle in hooks:
        handle.remove()
    return max(errors)


# Without a GPU, nf4 wants multiples of 64 channels.
CASES = [(name, how) for how in HOW for name in ("wan", "flux") if (name, how) != ("flux", "bitsandbytes nf4")]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_quantised_weights(name, how, tmp_path):
    pipe = make(name)
    generate = generate_wan if name == "wan" else lambda pipe: generate_family(name, pipe)
    plain, weights = generate(pipe), fingerprint(pipe.transformer)
    load, kind = HOW[how]
    pipe.transformer = load(pipe.transformer, tmp_path).eval()
    projections = [m for n, m in pipe.transformer.named_modules() if n.endswith(("attn1.to_q", "attn.to_q"))]
    assert projections and {type(m).__name__ for m in projections} == {kind}
    expected = generate(pipe)
    # Calibrated by itself: a profile of the model that was quantised is not taken for its own.
    assert fingerprint(pipe.transformer) == fingerprint(pipe.transformer) != weights
    assert expected.isfinite().all() and not torch.equal(expected, plain)
    with sparsify(pipe, "anchor", density=1.0, dense_steps=0) as session:
        # bitsandbytes rounds activations, too, and there a little more may be a leap.
        assert furthest(pipe, generate) < (0.01 if "bitsandbytes" in how else 1e-5)
        pipe.set_attn_processor(ANCHOR)
        assert furthest(pipe, generate) > 0.1
        sparse = generate(pipe)
        assert torch.equal(generate(pipe), sparse) and sparse.isfinite().all()
        assert session.report().density < 0.35 and not session.report().fallbacks
    assert torch.equal(generate(pipe), expected)
