"""Weights that diffusers quantises while it loads them: sparse attention calls the layers, and never reads a weight."""

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, GGUFQuantizationConfig, QuantoConfig

from dit_sparse import SparseConfig, sparsify
from dit_sparse.choices import DENSE
from dit_sparse.profile import fingerprint
from tests import profiles
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


def loaded_with(package, config):
    def how(transformer, folder):
        pytest.importorskip(package)
        transformer.save_pretrained(folder)
        return type(transformer).from_pretrained(folder, quantization_config=config(), dtype=torch.float32)

    return how


HOW = {
    "gguf": (gguf, "GGUFLinear"),
    "quanto int8": (loaded_with("optimum.quanto", lambda: QuantoConfig("int8")), "QLinear"),
    "quanto float8": (loaded_with("optimum.quanto", lambda: QuantoConfig("float8")), "QLinear"),
    "bitsandbytes int8": (loaded_with("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)), "Linear8bitLt"),
    "bitsandbytes nf4": (
        loaded_with(
            "bitsandbytes",
            lambda: BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
        ),
        "Linear4bit",
    ),
}


def make(name):
    pipe = tiny_wan(text=False, layers=3) if name == "wan" else TINY[name].make()
    for weight in pipe.transformer.eval().parameters():
        # Gates that are closed at first would hide whatever attention does.
        if not weight.any():
            weight.data.normal_(std=0.1)
    return pipe


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_quantised_weights(name, how, tmp_path):
    pipe = make(name)
    generate = generate_wan if name == "wan" else lambda pipe: generate_family(name, pipe)
    plain = generate(pipe)
    load, kind = HOW[how]
    pipe.transformer = load(pipe.transformer, tmp_path).eval()
    projections = [m for n, m in pipe.transformer.named_modules() if n.endswith(("attn1.to_q", "attn.to_q"))]
    assert projections and {type(m).__name__ for m in projections} == {kind}
    expected = generate(pipe)
    assert expected.isfinite().all() and not torch.equal(expected, plain)
    with sparsify(pipe, "anchor", density=1.0, dense_steps=0) as session:
        torch.testing.assert_close(generate(pipe), expected, atol=2e-3, rtol=2e-3)
        pipe.set_attn_processor(ANCHOR)
        sparse = generate(pipe)
        assert torch.equal(generate(pipe), sparse) and sparse.isfinite().all()
        assert not torch.allclose(sparse, expected, atol=1e-3)
        assert session.report().density < 0.35 and not session.report().fallbacks
    assert torch.equal(generate(pipe), expected)
