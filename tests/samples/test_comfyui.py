"""The node against the interface that ComfyUI documents, with models that call attention the way its models do."""

import copy
import gc
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

PATH = Path(__file__).resolve().parents[2] / "samples" / "comfyui" / "dit_sparse_attention.py"
spec = importlib.util.spec_from_file_location("dit_sparse_attention", PATH)
node = importlib.util.module_from_spec(spec)
spec.loader.exec_module(node)


def optimized_attention(*args, **kwargs):
    """A function of ComfyUI as its wrapper makes it: an override gets the function, and all that it was given."""
    override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
    return plain(*args, **kwargs) if override is None else override(plain, *args, **kwargs)


def plain(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.text, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width), heads


class WanModel(nn.Module):
    """Self-attention [B, L, C], then attention to as many tokens of text."""

    def __init__(self):
        super().__init__()
        self.dim, self.num_heads, self.patch_size = 32, 2, (1, 2, 2)
        self.embed, self.out = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 16)
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(3))

    def forward(self, x, timestep, context, transformer_options, mask=None, more=0):
        _, _, t, h, w = x.shape
        x = F.pad(x, (0, w % 2, 0, h % 2))
        h, w = -(-h // 2), -(-w // 2)
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :more], x], dim=1)
        transformer_options["block_type"] = "double"
        for i, block in enumerate(self.blocks):
            transformer_options["block_index"] = i
            q, k, v = (block.qkv(x) * (1 + timestep.view(-1, 1, 1))).chunk(3, dim=-1)
            x = x + optimized_attention(q, k, v, heads=2, mask=mask, transformer_options=transformer_options)
            _, k, v = block.text(context).chunk(3, dim=-1)
            x = x + optimized_attention(q, k, v, heads=2, transformer_options=transformer_options)
        return (
            self.out(x[:, more:]).view(len(x), t, h, w, 4, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
        )


class Flux(nn.Module):
    """Text, then the image, [B, H, L, D], in two kinds of blocks."""

    def __init__(self):
        super().__init__()
        self.hidden_size, self.num_heads, self.patch_size = 32, 2, 2
        self.embed, self.out = nn.Conv2d(4, 32, 2, 2), nn.Linear(32, 16)
        self.double_blocks = nn.ModuleList(Block(32, 2) for _ in range(1))
        self.single_blocks = nn.ModuleList(Block(32, 2) for _ in range(2))

    def forward(self, x, timestep, context, transformer_options, ref_latents=None):
        _, _, h, w = x.shape
        x = torch.cat([context, self.embed(x).flatten(2).transpose(1, 2)], dim=1)
        for ref in ref_latents or ():
            x = torch.cat([x, self.embed(ref).flatten(2).transpose(1, 2)], dim=1)
        for kind, blocks in (("double", self.double_blocks), ("single", self.single_blocks)):
            transformer_options["block_type"] = kind
            for i, block in enumerate(blocks):
                transformer_options["block_index"] = i
                q, k, v = (y.unflatten(2, (2, 16)).transpose(1, 2) for y in block.qkv(x).chunk(3, dim=-1))
                x = x + optimized_attention(
                    q * (1 + timestep.view(-1, 1, 1, 1)),
                    k,
                    v,
                    2,
                    skip_reshape=True,
                    transformer_options=transformer_options,
                )
        x = self.out(x[:, context.shape[1] :][:, : h * w // 4])
        return x.view(len(x), h // 2, w // 2, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class ModelPatcher:
    """As much of ComfyUI's as nodes see."""

    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def get_model_object(self, name):
        assert name == "diffusion_model"
        return self.model

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper


TOKENS = 3 * 8 * 9


def made(kind):
    torch.manual_seed(0)
    return ModelPatcher(kind().requires_grad_(False))


def sample(patcher, *, steps=5, batched=True, seed=0, looks=1, width=18, **c):
    """Euler's method, or Heun's with two looks, as ComfyUI runs a model: both prompts in one batch, if they fit."""
    random = torch.Generator().manual_seed(seed)
    video = isinstance(patcher.model, WanModel)
    x = torch.randn(1, 4, 3, 16, width, generator=random) if video else torch.randn(1, 4, 28, 30, generator=random)
    text = torch.randn(2, TOKENS if video else 9, 32, generator=random)
    sigmas = torch.linspace(1, 0, steps + 1)
    own = {**patcher.model_options["transformer_options"], "sample_sigmas": sigmas}

    def apply_model(x, timestep, **c):
        return patcher.model(x, timestep, **c)

    def guess(x, sigma):
        outs = []
        for rows in ([0, 1],) if batched else ([0], [1]):
            options = {**own, "cond_or_uncond": rows, "sigmas": sigma}
            call = dict(context=text[rows], transformer_options=options, **c)
            given = x.expand(len(rows), *x.shape[1:]), sigma.expand(len(rows))
            wrapper = patcher.model_options.get("model_function_wrapper")
            if wrapper is None:
                outs.append(apply_model(*given, **call))
            else:
                said = {"input": given[0], "timestep": given[1], "c": call, "cond_or_uncond": rows}
                outs.append(wrapper(apply_model, said))
        cond, uncond = torch.cat(outs)[..., : x.shape[-1]].chunk(2)
        return uncond + 2 * (cond - uncond)

    for now, after in zip(sigmas, sigmas[1:], strict=False):
        slope = guess(x, now)
        if looks == 2 and after > 0:
            slope = (slope + guess(x + (after - now) * slope, after)) / 2
        x = x + (after - now) * slope
    return x


def patched(patcher, method="tail", density=0.15, dense_steps=0.0):
    (out,) = node.SparseAttention().patch(patcher, method, density, dense_steps)
    return out, out.model_options["model_function_wrapper"].__self__


def report(run):
    g = run.generation
    return SimpleNamespace(
        phases=[record.phase for record in g.tally.steps()], work=g.tally.work(), fallbacks=dict(g.tally.fallbacks)
    )


@pytest.mark.parametrize("kind", [WanModel, Flux])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("method", ["tail", "anchor", "rectify", "svg"])
def test_every_block_kept_is_what_comfyui_computes(kind, batched, method):
    patcher = made(kind)
    stock = sample(patcher, batched=batched)
    sparse, run = patched(patcher, method, density=1.0)
    torch.testing.assert_close(sample(sparse, batched=batched), stock, atol=1e-4, rtol=1e-4)
    assert not report(run).fallbacks
    assert torch.equal(sample(patcher, batched=batched), stock), "the model before the node is as it was"


@pytest.mark.parametrize("kind", [WanModel, Flux])
def test_few_blocks_kept_is_sparse(kind):
    patcher = made(kind)
    stock = sample(patcher)
    sparse, run = patched(patcher, "anchor", dense_steps=0.2)
    out = sample(sparse)
    assert report(run).phases == ["dense", "anchor", "sparse", "sparse", "sparse"]
    assert report(run).work < 0.8 and not report(run).fallbacks
    assert out.isfinite().all() and not torch.allclose(out, stock, atol=1e-3)
    assert torch.equal(sample(sparse), out)
    # Text that has as many tokens as the video is no self-attention: three layers of two heads, two rows of a batch.
    tokens = 3 * 8 * 9 if kind is WanModel else 14 * 15 + 9
    every = [list(phases.values()) for phases in run.generation.tally.phases.values()]
    assert every == [[3 * 2 * 2 * tokens**2]] * 5


def test_two_prompts_apart_are_those_of_one_batch():
    patcher = made(WanModel)
    outs = [sample(patched(patcher, "anchor")[0], batched=batched) for batched in (True, False)]
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-3)


def test_a_sampler_that_looks_twice():
    sparse, run = patched(made(WanModel), "anchor")
    sample(sparse, steps=6, looks=2)
    assert report(run).phases == ["anchor", "sparse", "sparse", "sparse", "anchor", "sparse"]
    first, *others = [sum(phases.values()) for phases in run.generation.tally.phases.values()]
    assert others == [2 * first] * 5


def test_what_was_learned_goes_when_sampling_ends():
    sparse, run = patched(made(WanModel), "anchor")
    sample(sparse)
    gc.collect()
    assert not run.generation.learned
    assert report(run).phases[0] == "anchor"


@pytest.mark.parametrize(
    ("kind", "given", "reason"),
    [
        (WanModel, dict(mask=torch.zeros(TOKENS, TOKENS)), "a mask was given"),
        (WanModel, dict(more=5), "the sequence is not the latents' grid"),
        (Flux, dict(ref_latents=[torch.zeros(2, 4, 8, 8)]), "reference images lie behind the image"),
    ],
    ids=["mask", "tokens", "references"],
)
def test_what_cannot_be_sparse_is_comfyuis_own_and_counted(kind, given, reason):
    patcher = made(kind)
    stock = sample(patcher, **given)
    sparse, run = patched(patcher)
    assert torch.equal(sample(sparse, **given), stock)
    ((said, count),) = report(run).fallbacks.items()
    assert said.startswith(reason) and count == 15 and report(run).work == 1


def test_a_block_that_does_not_say_its_name_is_counted():
    patcher = made(WanModel)
    sparse, run = patched(patcher)
    run.layers.clear()
    assert torch.equal(sample(sparse), sample(patcher))
    assert list(report(run).fallbacks) == ["the model does not say which of its blocks calls"]


def test_latents_that_are_no_whole_patches():
    patcher = made(WanModel)
    stock = sample(patcher, width=17)
    sparse, run = patched(patcher, density=1.0)
    torch.testing.assert_close(sample(sparse, width=17), stock, atol=1e-4, rtol=1e-4)
    assert not report(run).fallbacks


def test_other_nodes_keep_their_places():
    patcher, calls = made(WanModel), []

    def override(func, *args, **kwargs):
        calls.append("attention")
        return func(*args, **kwargs)

    def wrapper(apply_model, call):
        calls.append("forward")
        return apply_model(call["input"], call["timestep"], **call["c"])

    patcher.model_options["transformer_options"]["optimized_attention_override"] = override
    patcher.set_model_unet_function_wrapper(wrapper)
    sparse, _ = patched(patcher, dense_steps=0.4)
    sample(sparse)
    # Of five steps two are dense; text is attended to in all.
    assert calls.count("forward") == 5 and calls.count("attention") == 3 * (2 + 5)


def test_a_model_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="Linear is no model this node knows: it knows WanModel and Flux"):
        patched(ModelPatcher(nn.Linear(1, 1)))


def test_the_node_is_announced():
    assert set(node.NODE_CLASS_MAPPINGS) == set(node.NODE_DISPLAY_NAME_MAPPINGS)
    cls = node.NODE_CLASS_MAPPINGS["DitSparseAttention"]
    required = cls.INPUT_TYPES()["required"]
    assert required["model"] == ("MODEL",) and cls.RETURN_TYPES == ("MODEL",)
    patcher = made(WanModel)
    for method in required["method"][0]:
        out, _ = patched(patcher, method, density=0.3)
        assert sample(out, steps=3).isfinite().all()
