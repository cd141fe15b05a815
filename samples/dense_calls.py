"""The self-attention calls of a held-out clip of the demo model, made dense, for samples that look at tensors."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import check_prompts
import demo_world as world
import torch
from diffusers import WanPipeline
from torch import Tensor

from dit_sparse import sparsify
from dit_sparse.layout import TokenGrid


class _Reached(Exception):
    """The last step to look at is done; the rest of the clip is not needed."""


def look_at(
    model_id: str,
    steps: Sequence[int],
    num_inference_steps: int,
    look: Callable[[Tensor, Tensor, Tensor, TokenGrid], None],
) -> None:
    """Calls look(q, k, v, grid) for every layer at these steps, in the branch of the prompt; tensors [B, H, L, D] in
    raster order."""
    pipe = WanPipeline.from_pretrained(model_id)
    pipe.set_progress_bar_config(disable=True)
    with sparsify(pipe, "dense") as session, torch.no_grad():
        generation = session.generation

        def see(layer, q, k, v, key_mask) -> None:
            if generation.moment.step in steps and generation.moment.branch == "cond":
                look(q, k, v, generation.grid)

        def stop(pipe, step, timestep, inputs):
            if step == max(steps):
                raise _Reached
            return inputs

        generation.dense = see
        scene = check_prompts.held_out(1).scenes[0]
        with suppress(_Reached):
            pipe(world.caption(scene), height=128, width=144, num_frames=14, output_type="latent",
                 num_inference_steps=num_inference_steps, guidance_scale=4.0, callback_on_step_end=stop,
                 generator=torch.Generator().manual_seed(check_prompts.HELD_OUT_SEED))  # fmt: skip
