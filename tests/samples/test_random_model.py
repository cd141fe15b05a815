import runpy
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

random_model = runpy.run_path(str(Path(__file__).parents[2] / "samples" / "random_model.py"))["random_model"]


@pytest.mark.slow
def test_what_is_saved_loads_and_makes_a_video(tmp_path):
    random_model("wan2.1-1.3b", 1, "cpu").save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert len(pipe.transformer.blocks) == 1 and pipe.transformer.config.num_attention_heads == 12
    out = pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="pt").frames
    assert out.shape == (1, 5, 3, 32, 32) and out.isfinite().all()


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="FluxTransformer2DModel, and this takes a Wan"):
        random_model("flux.1-dev", None, "cpu")
