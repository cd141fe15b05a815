"""What the tail and its second-order term, of each query row or of a query block at once, are worth on the demo model,
and what smaller blocks of keys are.

python samples/second_order.py --density 0.1 --steps 3 9 15 --block 32 128 --key_block 32 64
"""

import argparse
from dataclasses import replace

import check_prompts
import torch
from dense_calls import look_at

from dit_sparse import SparseConfig
from dit_sparse.kernels.permute import permute
from dit_sparse.kernels.reference import block_attention, correct
from dit_sparse.layout import TokenGrid
from dit_sparse.order import token_order
from dit_sparse.plan import BlockPlan, Correction, SecondOrder, Tail
from dit_sparse.routing import pool, route

KINDS = ("no tail", "first order", "of each row", "of the block")


def errors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid, config: SparseConfig) -> list[float]:
    """Relative error of the output by kind, and the share of blocks kept; q, k, v [B, H, L, D] in raster order."""
    layout, scale = config.layout(grid), q.shape[-1] ** -0.5
    sizes = {"block": layout.block, "key_block": layout.key_size}
    q, k, v = permute((q, k, v), token_order(config.order, grid, config.tile, q.device).take)
    pooled = pool(q, k, v, layout, config)
    plan = route(pooled, layout, config, density=config.density, scale=scale).plan
    dense = (q @ k.mT * scale).softmax(-1) @ v
    limit = config.second_order_limit
    first = Tail(pooled.k.mean, pooled.v.mean, pooled.lengths.to(q.dtype).log())
    of_block = replace(first, second=SecondOrder(pooled.q.mean, pooled.q.var, pooled.k.var, limit))
    of_row = replace(first, second=SecondOrder(q, torch.zeros_like(q), pooled.k.var, limit))
    # Each row as a query block of its own.
    rows = BlockPlan.from_mask(plan.mask().repeat_interleave(layout.block, 2)[:, :, : grid.tokens])

    def with_tail(tail: Tail | None) -> torch.Tensor:
        correction = Correction(tail=tail)
        if tail is not of_row:
            return block_attention(q, k, v, plan, correction, **sizes, scale=scale)[0]
        out, lse = block_attention(q, k, v, plan, None, **sizes, scale=scale)
        return correct(q, out, lse, rows, correction, 1, scale)

    found = [float((with_tail(tail) - dense).norm() / dense.norm()) for tail in (None, first, of_row, of_block)]
    return [*found, plan.density()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=str(check_prompts.DEMO))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--block", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--key_block", type=int, nargs="*", default=[32, 64], help="those smaller than the block")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 9, 15])
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    sizes = [(block, size) for block in args.block for size in (block, *args.key_block[::-1]) if size <= block]
    found: dict[tuple[int, int], list[list[float]]] = {pair: [] for pair in dict.fromkeys(sizes)}

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: TokenGrid) -> None:
        for block, size in found:
            config = SparseConfig("tail", density=args.density, block=block, key_block=size)
            found[block, size].append(errors(q, k, v, grid, config))

    look_at(args.model_id, args.steps, args.num_inference_steps, look)
    print(f"relative error of attention at density {args.density}, the mean of {len(found[sizes[0]])} calls")
    print(f"{'block':8}{'of keys':8}" + "".join(f"{kind:>14}" for kind in (*KINDS, "kept")))
    for (block, size), each in found.items():
        means = torch.tensor(each).mean(0)
        print(f"{block:<8}{size:<8}" + "".join(f"{x:14.4f}" for x in means.tolist()))


if __name__ == "__main__":
    main()
