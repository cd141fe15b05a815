"""One process of several that run a transformer by context parallelism; the first holds it to a run of its own."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from dit_sparse import SparseConfig, sparsify
from dit_sparse.choices import DENSE, Choice
from dit_sparse.pipelines.session import levels_of
from dit_sparse.profile import fingerprint
from tests import profiles
from tests.families import FAMILIES as TINY
from tests.tiny import tiny_wan

STEPS = 4


def make(name):
    torch.manual_seed(0)
    pipe = tiny_wan(text=False, heads=4, layers=3) if name == "wan" else TINY[name].make()
    for weight in pipe.transformer.eval().parameters():
        if not weight.any():
            weight.data.normal_(std=0.1)
    # Who runs the transformer without the pipeline's loop says what steps there are.
    pipe.scheduler.set_timesteps(STEPS)
    return pipe


def profile_of(pipe, method):
    """Each head does something else than the one before it, step by step; lopsided, the first half is dense."""
    with sparsify(pipe, "dense") as session:
        layers = tuple((layer.name, layer.heads, layer.head_dim) for layer in session.generation.layers)
    low, high = profiles.LADDER[0], profiles.LADDER[2]
    choices = [Choice("anchor", low, "bf16"), Choice("tail", high), DENSE]
    choices += [Choice("calibrated", low), Choice("reshape", low, "fp8"), Choice("rectify", high)]
    heads = sum(heads for _, heads, _ in layers)
    index = torch.arange(heads)[:, None, None] % 6 + torch.zeros(heads, 1, STEPS, dtype=torch.long)
    # From the last step but one on.
    index[..., -1] = (index[..., -1] + 1) % 6
    if method == "lopsided":
        first = torch.cat([torch.arange(heads) < heads // 2 for _, heads, _ in layers])
        index = torch.where(first, 2, torch.arange(heads) % 2)[:, None, None].expand_as(index)
    weights = {"transformer": {"class": type(pipe.transformer).__name__} | fingerprint(pipe.transformer)}
    made = profiles.profile(layers, ("branch 0",), STEPS, levels_of(pipe.scheduler), weights, block=16)
    return profiles.chosen(made, choices, index, torch.arange(STEPS) == 0)


def calls(name):
    random = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(*shape, generator=random)

    for step in range(STEPS):
        timestep = torch.tensor([1.0 - step / STEPS])
        if name == "wan":
            call = dict(
                hidden_states=tensor(1, 16, 5, 16, 16),
                timestep=1000 * timestep,
                encoder_hidden_states=torch.ones(1, 8, 32),
            )
        elif name == "cogvideox-1.5":
            call = dict(hidden_states=tensor(1, 6, 4, 14, 18), timestep=1000 * timestep)
            call["encoder_hidden_states"] = torch.ones(1, 10, 16)
        elif name == "ltx":
            call = dict(hidden_states=tensor(1, 192, 4), timestep=1000 * timestep, num_frames=3, height=8, width=8)
            call["encoder_hidden_states"] = torch.ones(1, 10, 16)
            # Of a mask for cross-attention, diffusers' own hooks make one of the wrong length.
            call["encoder_attention_mask"] = None

        elif name == "qwen-image":
            call = dict(hidden_states=tensor(1, 210, 16), timestep=timestep, img_shapes=[[(1, 14, 15)]])
            call["encoder_hidden_states"] = torch.ones(1, 10, 16)
            call["encoder_hidden_states_mask"] = (torch.arange(10) < 7).long()[None]
        else:
            grid = torch.cartesian_prod(torch.zeros(1), torch.arange(14.0), torch.arange(15.0))
            call = dict(hidden_states=tensor(1, 210, 16), timestep=timestep, img_ids=grid, txt_ids=torch.zeros(10, 3))
            call["encoder_hidden_states"] = torch.ones(1, 10, 16)
            if name == "flux":
                call["pooled_projections"] = torch.ones(1, 8)
            else:
                # Flux.2 counts along four axes.
                call |= {which: functional.pad(call[which], (0, 1)) for which in ("img_ids", "txt_ids")}
        yield call


@torch.no_grad()
def run(transformer, name):
    return torch.stack([transformer(**call, return_dict=False)[0] for call in calls(name)])


def main(rank, name, method, order, degree, file):
    order, _, compiled = order.partition(", ")
    # What diffusers asks of the accelerator there is not.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", f"file://{file}", timedelta(seconds=60), rank=rank, world_size=2)
    alone = make(name)
    if method in ("profile", "lopsided"):
        path = f"{file}.{rank}.profile.safetensors"
        profile_of(alone, method).save(path)
        config = SparseConfig(profile=path)
    else:
        options = {"dense_steps": 0} if method == "dense" else {"density": 0.15, "dense_steps": 1}
        config = SparseConfig(method, **options)
    stock = run(alone.transformer, name)
    with sparsify(alone, config) as session:
        expected, work = run(alone.transformer, name), session.report().work
    shared, counter = make(name), CompileCounterWithBackend(compiled)
    if degree == "tp_degree":
        # By its own word diffusers does this on accelerators alone.
        tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
        parallel = TensorParallelConfig(mesh=init_device_mesh("cpu", (2,)))
    else:
        parallel = ContextParallelConfig(**{degree: 2})
    if order == "before":
        shared.transformer.enable_parallelism(config=parallel)
    with sparsify(shared, config) as session:
        if order == "after":
            shared.transformer.enable_parallelism(config=parallel)
        if compiled:
            # Into Wan's first block diffusers puts a hook of its own, which breaks the graph.
            shared.transformer.compile_repeated_blocks(fullgraph=name != "wan", backend=counter)
        if order == "after a run":
            run(shared.transformer, name)
            shared.transformer.enable_parallelism(config=parallel)
        out, report = run(shared.transformer, name), session.report()
    told = [] if work == 1 else [(out - stock).abs().max() > 1e-4]
    worst = (out - expected).abs().max().item()
    print(f"RANK {rank}", worst, report.work, work, counter.frame_count, all(told), report.fallbacks)
    assert torch.equal(run(alone.transformer, name), stock)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, *arguments = sys.argv[1:]
    main(int(rank), *arguments)
