"""How much softmax mass block routing finds, by the order in which tokens are cut into blocks and by what blocks are
ranked by, on the demo model.

python samples/routing_recall.py --density 0.1 --step 3
"""

import argparse
from dataclasses import replace
from functools import partial

import check_prompts
import torch
from dense_calls import look_at

from dit_sparse import SparseConfig
from dit_sparse.kernels.permute import permute
from dit_sparse.layout import TokenGrid
from dit_sparse.order import token_order
from dit_sparse.routing import fine_scores, pool, route

ORDERS = {
    "hilbert": SparseConfig("none", order="hilbert"),
    "hilbert, error": SparseConfig("none", routing="error"),
    "hilbert, fine": SparseConfig("none", routing="fine"),
    "tile 2x4x4": SparseConfig("none", order="tile", tile=(2, 4, 4)),
    "raster": SparseConfig("none", order="raster"),
    "pixel": SparseConfig("none", order="pixel"),
}


def recall(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid, config: SparseConfig) -> float:
    """Mean share of each row's softmax that lies in its routed blocks; q, k, v [B, H, L, D] in raster order."""
    layout = config.layout(grid)
    q, k, v = permute((q, k, v), token_order(config.order, grid, config.tile, q.device).take)
    scale = q.shape[-1] ** -0.5
    pooled, fine = pool(q, k, v, layout, config), partial(fine_scores, q, k, layout, scale=scale)
    mask = route(pooled, layout, config, density=config.density, scale=scale, fine=fine).plan.mask()
    mass = torch.nn.functional.pad((q @ k.mT * scale).softmax(-1), (0, layout.blocks * layout.block - grid.tokens))
    by_block = mass.unflatten(-1, (layout.blocks, layout.block)).sum(-1)
    return (by_block * mask.repeat_interleave(layout.block, -2)[:, :, : grid.tokens]).sum(-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=str(check_prompts.DEMO))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--step", type=int, default=3)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in ORDERS}

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: TokenGrid) -> None:
        for name, config in ORDERS.items():
            found[name].append(recall(q, k, v, grid, replace(config, density=args.density)))

    look_at(args.model_id, [args.step], args.num_inference_steps, look)
    print(f"share of softmax mass in routed blocks at density {args.density}, step {args.step}; mean, then by layer")
    for name, shares in found.items():
        print(f"{name:16}{sum(shares) / len(shares):.3f}   " + " ".join(f"{x:.3f}" for x in shares))


if __name__ == "__main__":
    main()
