"""What the tail's second-order term is worth on the demo model, taken for each query row or for a query block at once.

python samples/second_order.py --density 0.1 --steps 3 9 15 --block 32 128
"""

import argparse
from contextlib import suppress

import check_prompts
import demo_world as world
import torch
from diffusers import WanPipeline

from dit_sparse import SparseConfig, sparsify
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.reference import block_attention, correct, tail_weights
from dit_sparse.layout import Layout
from dit_sparse.order import token_order
from dit_sparse.plan import BlockPlan, Correction, Tail
from dit_sparse.routing import pool, route

KINDS = ("no tail", "first order", "of each row", "of the block")


class Reached(Exception):
    """The last step to look at is done; the rest of the clip is not needed."""


def errors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid, config: SparseConfig) -> list[float]:
    """Relative error of the output by kind; q, k, v [B, H, L, D] in raster order."""
    layout, scale = Layout(grid, block=config.block_size(grid.tokens)), q.shape[-1] ** -0.5
    q, k, v = permute((q, k, v), token_order(config.order, grid, config.tile, q.device).take)
    pooled = pool(q, k, v, layout, config)
    plan = route(pooled, layout, config, density=config.density, scale=scale).plan
    dense = (q @ k.mT * scale).softmax(-1) @ v
    lengths, limit = pooled.lengths, config.second_order_limit
    first = lengths.to(q.dtype).log()
    of_block = tail_weights(pooled.q.mean, pooled.q.var, pooled.k.var, lengths, scale=scale, limit=limit)
    of_row = tail_weights(q, torch.zeros_like(q), pooled.k.var, lengths, scale=scale, limit=limit)
    # Each row as a query block of its own.
    rows = BlockPlan.from_mask(plan.mask().repeat_interleave(layout.block, 2)[:, :, : grid.tokens])

    def with_tail(weights: torch.Tensor | None) -> torch.Tensor:
        correction = None if weights is None else Correction(tail=Tail(pooled.k.mean, pooled.v.mean, weights))
        if weights is not of_row:
            return block_attention(q, k, v, plan, correction, block=layout.block, scale=scale)[0]
        out, lse = block_attention(q, k, v, plan, None, block=layout.block, scale=scale)
        return correct(q, out, lse, rows, correction, 1, scale)

    return [float((with_tail(w) - dense).norm() / dense.norm()) for w in (None, first, of_row, of_block)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=str(check_prompts.DEMO))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--block", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 9, 15])
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    pipe = WanPipeline.from_pretrained(args.model_id)
    pipe.set_progress_bar_config(disable=True)
    found: dict[int, list[list[float]]] = {block: [] for block in args.block}
    with sparsify(pipe, "dense") as session, torch.no_grad():
        generation = session.generation

        def look(layer, q, k, v, key_mask):
            if generation.moment.step in args.steps and generation.moment.branch == "cond":
                for block in args.block:
                    config = SparseConfig("tail", density=args.density, block=block)
                    found[block].append(errors(q, k, v, generation.grid, config))

        def stop(pipe, step, timestep, inputs):
            if step == max(args.steps):
                raise Reached
            return inputs

        generation.dense = look
        scene = check_prompts.held_out(1).scenes[0]
        with suppress(Reached):
            pipe(world.caption(scene), height=128, width=144, num_frames=14, output_type="latent",
                 num_inference_steps=args.num_inference_steps, guidance_scale=4.0, callback_on_step_end=stop,
                 generator=torch.Generator().manual_seed(check_prompts.HELD_OUT_SEED))  # fmt: skip
    print(f"relative error of attention at density {args.density}, the mean of {len(found[args.block[0]])} calls")
    print(f"{'block':8}" + "".join(f"{kind:>14}" for kind in KINDS))
    for block, each in found.items():
        means = torch.tensor(each).mean(0)
        print(f"{block:<8}" + "".join(f"{x:14.4f}" for x in means.tolist()))


if __name__ == "__main__":
    main()
