"""What people combine with sparse attention: it works, or it is refused, or it is dense and counted, never silently
something else. Each on real diffusers classes."""

import logging
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    SmoothedEnergyGuidance,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import LayerSkipConfig, _apply_layer_skip_hook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse import SparseConfig, sparsify
from dit_sparse.pipelines.registry import family_of
from tests.families import FAMILIES as TINY
from tests.families import generate as generate_family
from tests.tiny import generate as generate_wan
from tests.tiny import tiny_wan

ANCHOR = SparseConfig("anchor", density=0.15, dense_steps=1, refresh_every=3)


def some(cases, default):
    """All of them, those outside of the default marked slow."""
    assert all(case in cases for case in default)

    def mark(case):
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=[] if case in default else pytest.mark.slow, id="-".join(values))

    return [mark(case) for case in cases]


def make(name):
    if name == "wan":
        return tiny_wan(text=False, layers=3)
    torch.manual_seed(0)
    pipe = TINY[name].make()
    pipe.transformer.eval()
    for weight in pipe.transformer.parameters():
        # Gates that are closed at first would hide whatever attention does.
        if not weight.any():
            weight.data.normal_(std=0.1)
    return pipe


def generate(name, pipe, **options):
    return generate_wan(pipe, **options) if name == "wan" else generate_family(name, pipe, **options)


def attentions(pipe):
    return {
        name: module
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "processor") and family_of(pipe.transformer).is_self_attention(name)
    }


def is_sparse(pipe):
    ours = tuple(family_of(pipe.transformer).processors.values())
    return all(isinstance(module.processor, ours) for module in attentions(pipe).values())


def phases(session):
    return [(r.step, r.phase) for r in session.report().steps]


@dataclass
class Seen:
    """What a generation was told and did: (step, branch) of forwards; (layer, memory) -> [(step, phase)] of calls."""

    moments: list = field(default_factory=list)
    calls: dict = field(default_factory=dict)

    def assert_anchors_are_due(self, first, every):
        """By the calls that were made, whichever those are."""
        for calls in self.calls.values():
            last = None
            for step, phase in calls:
                due = last is None or step - last >= every or (step - first) % every == 0
                expected = "dense" if step < first else "anchor" if due and step != last else "sparse"
                assert phase == expected, calls
                last = step if phase == "anchor" else last


@contextmanager
def watched(session):
    seen, generation = Seen(), session.generation
    leave, parts = generation.leave, generation.parts

    def left():
        seen.moments.append((generation.moment.step, generation.moment.branch))
        leave()

    def parted(layer):
        told = parts(layer)
        seen.calls.setdefault((layer.name, generation._memory), []).append((generation.moment.step, told[0].phase))
        return told

    generation.leave, generation.parts = left, parted
    yield seen
    del generation.leave, generation.parts


# ---- fused projections ----

# Those that diffusers can fuse: it fails on stock LTX-2 and SD3.5 medium, and the others have no such method.
FUSING = ["wan", "cogvideox-2b", "cogvideox-1.5", "pixart-sigma", "hunyuan-dit", "sd3"]
FUSING += ["hunyuan-video", "hunyuan-video-1.5", "flux", "flux2", "qwen-image", "ltx"]


def outputs(name, config):
    """Of a fresh pipeline, plain and with fused projections: diffusers' fused SD3 leaves the norms of q and k out."""
    pipe = make(name)
    with sparsify(pipe, config) if config else nullcontext():
        plain = generate(name, pipe)
    pipe.transformer.fuse_qkv_projections()
    with sparsify(pipe, config) if config else nullcontext():
        return plain, generate(name, pipe)


def assert_like(out, expected, session=None):
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
    if session is not None:
        assert session.report().density < 0.35 and not session.report().fallbacks


@pytest.mark.parametrize("name", some(FUSING, ["cogvideox-1.5", "pixart-sigma", "hunyuan-dit", "sd3"]))
def test_projections_fused_while_sparse(name):
    """CogVideoX, PixArt, HunyuanDiT and SD3 replace processors then, which must not turn sparse attention off."""
    plain, fused = outputs(name, ANCHOR)
    stock_plain, stock_fused = outputs(name, None)
    pipe = make(name)
    session = sparsify(pipe, ANCHOR)
    assert_like(generate(name, pipe), plain, session)
    pipe.transformer.fuse_qkv_projections()
    assert_like(generate(name, pipe), fused, session)
    pipe.set_attn_processor(ANCHOR)
    assert_like(generate(name, pipe), fused, session)
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.fuse_qkv_projections()
    assert_like(generate(name, pipe), fused, session)
    assert is_sparse(pipe)
    pipe.transformer.unfuse_qkv_projections()
    # Twice fused, what was there before is fused, too.
    twice = fused if name == "sd3" else plain
    assert_like(generate(name, pipe), twice, session)
    pipe.transformer.fuse_qkv_projections()
    session.restore()
    assert_like(generate(name, pipe), stock_fused)
    pipe.transformer.unfuse_qkv_projections()
    assert not any(type(m.processor).__name__.startswith("Sparse") for m in attentions(pipe).values())
    assert_like(generate(name, pipe), stock_fused if name == "sd3" else stock_plain)


@pytest.mark.parametrize("name", some(["cogvideox-1.5", "pixart-sigma", "hunyuan-dit", "sd3", "wan"], ["sd3"]))
def test_projections_fused_before_and_unfused_while_sparse(name):
    plain, fused = outputs(name, ANCHOR)
    pipe = make(name)
    pipe.transformer.fuse_qkv_projections()
    before = {n: type(m.processor) for n, m in attentions(pipe).items()}
    with sparsify(pipe, ANCHOR) as session:
        assert_like(generate(name, pipe), fused, session)
        pipe.transformer.unfuse_qkv_projections()
        assert_like(generate(name, pipe), plain, session)
        assert is_sparse(pipe)
        pipe.transformer.fuse_qkv_projections()
        assert_like(generate(name, pipe), fused, session)
    assert {n: type(m.processor) for n, m in attentions(pipe).items()} == before


def test_what_the_user_sets_after_fusing_is_his():
    """It is told apart from what fuse_qkv_projections sets."""
    pipe = make("cogvideox-1.5")
    stock = generate("cogvideox-1.5", pipe)
    with sparsify(pipe, ANCHOR) as session:
        pipe.transformer.fuse_qkv_projections()
        sparse = generate("cogvideox-1.5", pipe)
        kind = type(next(iter(pipe.transformer.original_attn_processors.values())).stock)
        pipe.set_attn_processor(kind())
        torch.testing.assert_close(generate("cogvideox-1.5", pipe), stock)
        assert not session.report().fallbacks
        pipe.set_attn_processor(ANCHOR)
        torch.testing.assert_close(generate("cogvideox-1.5", pipe), sparse, atol=1e-3, rtol=1e-3)


# ---- processors of somebody else's, set while sparse ----


def test_a_processor_that_took_our_place_is_counted(caplog):
    pipe = make("wan")
    stock = generate("wan", pipe)
    with sparsify(pipe, ANCHOR) as session, caplog.at_level(logging.WARNING, "dit_sparse"):
        generate("wan", pipe)
        pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
        generate("wan", pipe)
        report = session.report()
        assert report.fallbacks == {"WanAttnProcessor took sparse attention's place": 8}
        partly = report.work
        pipe.transformer.set_attn_processor(WanAttnProcessor())
        assert torch.equal(generate("wan", pipe), stock)
        report = session.report()
        assert report.fallbacks == {"WanAttnProcessor took sparse attention's place": 24}
        assert partly < report.work == 1
    assert len([r for r in caplog.records if "took" in r.getMessage()]) == 2  # once a run
    with sparsify(pipe, "tail", dense_steps=0, strict=True):
        pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
        with pytest.raises(ValueError, match="WanAttnProcessor took sparse attention's place, and strict=True"):
            generate("wan", pipe)


def test_attention_outside_of_its_transformer_is_counted():
    pipe = make("wan")
    with sparsify(pipe, ANCHOR) as session:
        generate("wan", pipe)
        x = torch.randn(1, 20, 64)
        with torch.no_grad():
            ours = pipe.transformer.blocks[0].attn1(x)
            torch.testing.assert_close(ours, WanAttnProcessor()(pipe.transformer.blocks[0].attn1, x))
        assert session.report().fallbacks == {"attention ran outside of its transformer's forward": 1}


# ---- perturbed attention, skipped layers ----


@pytest.mark.parametrize("how", ["scores", "attention", "block"])
def test_guidance_that_leaves_attention_out(how):
    """Perturbed attention (scores) and skip-layer guidance do the same to a sparse model as to a stock one."""
    pipe = make("pixart-sigma")
    stages = dict(scores=(False, True, False), attention=(True, False, False), block=(True, False, True))[how]
    config = LayerSkipConfig([0], "transformer_blocks", *stages)

    def skipping(run):
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        _apply_layer_skip_hook(pipe.transformer, config, "skip")
        try:
            return run()
        finally:
            registry.remove_hook("skip", recurse=True)

    def run():
        return generate("pixart-sigma", pipe)

    stock, plain = skipping(run), run()
    assert not torch.allclose(stock, plain, atol=1e-4)
    # Latents of these random weights are hundreds, and where they cross zero a CPU's float32 differs by as many ulps.
    near = dict(atol=1e-6 * stock.abs().max().item(), rtol=1e-4)
    with sparsify(pipe, "tail", density=1.0, dense_steps=0) as session:
        torch.testing.assert_close(skipping(run), stock, **near)
        expected = {"perturbed attention guidance replaces attention": 3} if how == "scores" else {}
        assert session.report().fallbacks == expected
        torch.testing.assert_close(run(), plain, **near)
        assert not session.report().fallbacks


# ---- what is read of the device ----


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_ids_are_read_once_a_run(name, monkeypatch):
    pipe, read, cpu = make(name), [], torch.Tensor.cpu

    def counted(x, *args, **kwargs):
        read.append(tuple(x.shape))
        # As it is where there is another device.
        return cpu(x, *args, **kwargs).clone()

    with sparsify(pipe, "tail", dense_steps=0) as session:
        monkeypatch.setattr(torch.Tensor, "cpu", counted)
        for _ in range(2):
            generate(name, pipe, steps=4)
            assert len([shape for shape in read if shape[-1] in (3, 4)]) == 1, read
            read.clear()
        # In a loop of one's own, nobody tells of runs.
        family, ids = family_of(pipe.transformer), torch.zeros(6, 3)
        for _ in range(2):
            session._on_host(family, {"img_ids": ids}, None)
        assert len(read) == 1
        ids += 1
        (now,) = session._on_host(family, {"img_ids": ids}, None).values()
        assert torch.equal(now, ids)
        (now,) = session._on_host(family, {"img_ids": ids + 1}, None).values()
        assert torch.equal(now, ids + 1)


# ---- samplers of one's own ----


def test_heuns_method_in_a_loop_of_ones_own():
    """Its two looks at a noise level are one step; what is learned at it serves both."""
    pipe = make("wan")
    random = torch.Generator().manual_seed(5)
    noise, prompts = torch.randn(1, 16, 5, 16, 16, generator=random), torch.randn(2, 1, 8, 32, generator=random)
    levels = torch.linspace(1.0, 0.0, 7)

    @torch.no_grad()
    def run():
        def velocity(x, level):
            both = [
                pipe.transformer(x, timestep=1000 * level.expand(1), encoder_hidden_states=prompt).sample
                for prompt in prompts
            ]
            return both[1] + 3 * (both[0] - both[1])

        x = noise
        for now, after in zip(levels, levels[1:], strict=False):
            first = velocity(x, now)
            second = velocity(x + (after - now) * first, after)
            x = x + (after - now) * (first + second) / 2
        return x

    # In as many steps as there are levels, two looks at each but the first and the last.
    with sparsify(pipe.transformer, ANCHOR) as session:
        out = run()
        with watched(session) as seen:
            assert torch.equal(run(), out)
    steps = [step for step, branch in seen.moments if branch == "branch 0"]
    assert steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert len(seen.calls) == 2 * 3  # branches, layers
    seen.assert_anchors_are_due(1, 3)
    assert {step for calls in seen.calls.values() for step, phase in calls if phase == "anchor"} == {1, 4}
    stock = run()
    with sparsify(pipe.transformer, "anchor", density=1.0, dense_steps=0):
        torch.testing.assert_close(run(), stock, atol=1e-4, rtol=1e-4)


# ---- diffusers' caches ----

STEPS, ORDERS = 9, ("cache first", "sparse first")
ATTENTION = [r".*\.attn1?"]


def timestep_of(pipe):
    """What PAB and FasterCache want to be told; pipelines whose timesteps go to 1 included."""
    return lambda: float(pipe._current_timestep.max()) if pipe._current_timestep is not None else 999.0


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=ATTENTION
    ),
    "mag": lambda pipe: MagCacheConfig(
        threshold=0.2, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "pab": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=timestep_of(pipe),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=timestep_of(pipe),
        tensor_format="BFCHW",
        is_guidance_distilled=pipe.__class__.__name__ != "CogVideoXPipeline",
    ),
    "sea": lambda pipe: SeaCacheConfig(threshold=0.8),
}


@contextmanager
def cached(pipe, cache):
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


# Of these, only Wan's pipeline tells SeaCache the noise level that it asks for.
CACHED = [
    (name, cache, order)
    for name in ("wan", "cogvideox-1.5", "flux")
    for cache in CACHES
    for order in ORDERS
    if name == "wan" or cache != "sea"
]
DEFAULT = [case for case in CACHED if case[0] == "cogvideox-1.5" and case[2] == "cache first"]


@pytest.mark.parametrize(("name", "cache", "order"), some(CACHED, [*DEFAULT, ("wan", "sea", "sparse first")]))
def test_a_cache_skips_and_anchors_come_when_due(name, cache, order):
    pipe = make(name)
    with cached(pipe, cache):
        stock = generate(name, pipe, steps=STEPS)
    with ExitStack() as stack:
        if order == "cache first":
            stack.enter_context(cached(pipe, cache))
        session = stack.enter_context(sparsify(pipe, ANCHOR))
        if order == "sparse first":
            stack.enter_context(cached(pipe, cache))
        with watched(session) as seen:
            out = generate(name, pipe, steps=STEPS)
        report = session.report()
        assert torch.equal(generate(name, pipe, steps=STEPS), out)
        # Each step of the run was told of once a branch, in order.
        branches = sorted({branch for _, branch in seen.moments})
        assert [step for step, branch in seen.moments if branch == branches[0]] == list(range(STEPS))
        assert [r.step for r in report.steps][0] == 0 and not report.fallbacks
        assert len(session.generation.tally.marks) == len(seen.moments)
        made = sum(map(len, seen.calls.values()))
        assert 0 < made < len(seen.moments) * len(session.generation.layers), "some calls are skipped, and not all"
        seen.assert_anchors_are_due(1, 3)
        assert report.density < 0.35 and out.isfinite().all() and not torch.equal(out, stock)
        # With every block kept, it is what the cache makes of stock attention.
        pipe.set_attn_processor(SparseConfig("anchor", density=1.0, dense_steps=0))
        torch.testing.assert_close(generate(name, pipe, steps=STEPS), stock, atol=2e-3, rtol=2e-3)
    with cached(pipe, cache):
        assert torch.equal(generate(name, pipe, steps=STEPS), stock)


@pytest.mark.parametrize("cache", [SeaCacheConfig(threshold=0.8), TextKVCacheConfig()], ids=["sea", "text"])
def test_a_cache_that_does_nothing_here(cache):
    """SeaCache is told no noise level by CogVideoX, and TextKVCache looks for blocks of NucleusMoE alone."""
    name = "cogvideox-1.5"
    pipe = make(name)
    stock = generate(name, pipe)
    with sparsify(pipe, ANCHOR) as session:
        sparse, steps = generate(name, pipe), phases(session)
        pipe.transformer.enable_cache(cache)
        assert torch.equal(generate(name, pipe), sparse)
        assert phases(session) == steps
        pipe.transformer.disable_cache()
        assert torch.equal(generate(name, pipe), sparse)
    assert torch.equal(generate(name, pipe), stock)


# ---- weights that are elsewhere, in other dtypes, or adapted ----


def lora(pipe, scale=1.0):
    """Random weights of a LoRA on the projections of self-attention, with diffusers' names."""
    random, weights = torch.Generator().manual_seed(3), {}
    for name, module in attentions(pipe).items():
        for layer in ("to_q", "to_k", "to_v"):
            linear = getattr(module, layer)
            prefix = f"transformer.{name}.{layer}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=random)
            weights[f"{prefix}.lora_B.weight"] = scale * torch.randn(linear.out_features, 4, generator=random)
    return weights


@pytest.mark.parametrize("name", some(["wan", "cogvideox-1.5", "flux"], ["wan"]))
def test_a_lora_loaded_fused_and_unloaded_in_a_session(name):
    pytest.importorskip("peft")
    with_lora = make(name)
    with_lora.load_lora_weights(lora(with_lora))
    with sparsify(with_lora, ANCHOR):
        expected = generate(name, with_lora)
    pipe = make(name)
    with sparsify(pipe, ANCHOR) as session:
        plain = generate(name, pipe)
        pipe.load_lora_weights(lora(pipe))
        assert torch.equal(generate(name, pipe), expected)
        assert not torch.allclose(expected, plain, atol=1e-2)
        pipe.fuse_lora()
        assert_like(generate(name, pipe), expected, session)
        pipe.unfuse_lora()
        assert_like(generate(name, pipe), expected, session)
        pipe.unload_lora_weights()
        assert_like(generate(name, pipe), plain, session)
        assert is_sparse(pipe)


def test_a_lora_loaded_in_the_middle_of_a_run():
    pytest.importorskip("peft")
    pipe = make("wan")

    def load(pipe, step, timestep, tensors):
        if step == 1:
            pipe.load_lora_weights(lora(pipe, 0.1))
        return {}

    outs = []
    for config in (SparseConfig("anchor", density=1.0, dense_steps=0), None):
        with sparsify(pipe, config) if config else nullcontext():
            outs.append(generate("wan", pipe, callback_on_step_end=load))
        pipe.unload_lora_weights()
    torch.testing.assert_close(outs[0], outs[1], atol=1e-3, rtol=1e-3)


def group_offload(level, disk):
    def how(pipe, folder):
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
            offload_to_disk_path=str(folder) if disk else None,
        )

    return how


def layerwise_casting(pipe, folder):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantised(pipe, folder):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig(version=2))


ELSEWHERE = {
    "blocks": group_offload("block_level", False),
    "blocks on disk": group_offload("block_level", True),
    "leaves": group_offload("leaf_level", False),
    "leaves on disk": group_offload("leaf_level", True),
    "fp8 storage": layerwise_casting,
    "torchao int8": quantised,
}


PLACED = [
    (name, how, order)
    for name in ("wan", "cogvideox-1.5", "flux", "mochi")
    for how in ELSEWHERE
    for order in ("sparse first", "sparse last")
]
DEFAULT = [("wan", how, "sparse first") for how in ("leaves on disk", "torchao int8")]


@pytest.mark.parametrize(
    ("name", "how", "order"), some(PLACED, [*DEFAULT, ("cogvideox-1.5", "fp8 storage", "sparse last")])
)
def test_weights_that_are_not_where_they_seem(name, how, order, tmp_path):
    """A processor that read `.weight` would find garbage there: it calls the layers."""
    stock = make(name)
    ELSEWHERE[how](stock, tmp_path / "stock")
    expected = generate(name, stock)
    pipe = make(name)
    if order == "sparse last":
        ELSEWHERE[how](pipe, tmp_path / "ours")
    with sparsify(pipe, "anchor", density=1.0, dense_steps=0) as session:
        if order == "sparse first":
            ELSEWHERE[how](pipe, tmp_path / "ours")
        torch.testing.assert_close(generate(name, pipe), expected, atol=2e-3, rtol=2e-3)
        pipe.set_attn_processor(ANCHOR)
        sparse = generate(name, pipe)
        assert torch.equal(generate(name, pipe), sparse) and sparse.isfinite().all()
        assert session.report().density < 0.35 and not session.report().fallbacks
    torch.testing.assert_close(generate(name, pipe), expected)


def test_models_that_go_to_the_device_in_turn():
    """enable_model_cpu_offload, with the CPU for a device; after each run it puts modules' own forwards back."""
    pipe = make("wan")
    stock = generate("wan", pipe)
    with sparsify(pipe, ANCHOR):
        expected = generate("wan", pipe)
    for order in ("before", "after"):
        pipe = make("wan")
        if order == "before":
            pipe.enable_model_cpu_offload(device="cpu")
        with sparsify(pipe, ANCHOR) as session:
            if order == "after":
                pipe.enable_model_cpu_offload(device="cpu")
            for _ in range(2):
                assert torch.equal(generate("wan", pipe), expected)
                assert session.report().density < 0.35
        # Its hook is there still, and ours is not.
        assert "add_hook_to_module" in pipe.transformer.forward.func.__qualname__
        assert torch.equal(generate("wan", pipe), stock)


# ---- the rest of a pipeline ----


def test_a_vae_that_works_in_tiles():
    pipe = make("wan")
    pipe.vae.enable_tiling()
    video = generate_wan(pipe, size=32)
    with sparsify(pipe, "anchor", density=1.0, dense_steps=0):
        torch.testing.assert_close(generate_wan(pipe, size=32), video, atol=1e-3, rtol=1e-3)


def no_guidance_from(at):
    """What diffusers' documentation calls dynamic guidance; where both prompts come in one batch, it halves them."""

    def callback(pipe, step, timestep, tensors):
        if step != at:
            return {}
        pipe._guidance_scale = 1.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items() if name != "latents"}

    return callback


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_guidance_that_ends_in_the_middle_of_a_run(name):
    pipe, steps = make(name), 8
    halved = [] if name == "wan" else ["prompt_embeds", "pooled_prompt_embeds"]
    options = dict(callback_on_step_end=no_guidance_from(2), callback_on_step_end_tensor_inputs=halved, steps=steps)
    stock = generate(name, pipe, **options)
    with sparsify(pipe, ANCHOR) as session:
        with watched(session) as seen:
            generate(name, pipe, **options)
        if name == "wan":
            assert [step for step, branch in seen.moments if branch == "cond"] == list(range(steps))
            assert [step for step, branch in seen.moments if branch == "uncond"] == [0, 1, 2]
        else:
            # Another prompt, of half of the rows, remembers for itself.
            assert seen.moments == [(step, "branch 0" if step < 3 else "branch 1") for step in range(steps)]
        seen.assert_anchors_are_due(1, 3)
        assert [r.step for r in session.report().steps] == list(range(steps))
        pipe.set_attn_processor(SparseConfig("anchor", density=1.0, dense_steps=0))
        torch.testing.assert_close(generate(name, pipe, **options), stock, atol=1e-3, rtol=1e-3)


# ---- guiders ----

GUIDERS = {
    "cfg": (lambda: ClassifierFreeGuidance(guidance_scale=3.0), 2),
    "adaptive": (lambda: AdaptiveProjectedGuidance(guidance_scale=3.0), 2),
    "cfg, ended early": (lambda: ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5), 2),
    "smoothed energy": (lambda: SmoothedEnergyGuidance(guidance_scale=3.0, seg_guidance_layers=[1], **SMOOTH), 3),
}
SMOOTH = dict(seg_guidance_start=0.0, seg_guidance_stop=1.0)


@pytest.mark.parametrize("guider", some(GUIDERS, ["cfg, ended early", "smoothed energy"]))
def test_a_guider_runs_its_own_forwards(guider):
    name, steps = "hunyuan-video-1.5", 6
    make_guider, branches = GUIDERS[guider]
    pipe = make(name)
    pipe.guider = make_guider()
    stock = generate(name, pipe, steps=steps)
    with sparsify(pipe, ANCHOR) as session:
        with watched(session) as seen:
            generate(name, pipe, steps=steps)
        assert len({branch for _, branch in seen.moments}) == branches
        per_branch = {}
        for step, branch in seen.moments:
            per_branch.setdefault(branch, []).append(step)
        assert max(per_branch.values(), key=len) == list(range(steps))
        assert all(told == sorted(set(told)) for told in per_branch.values())
        seen.assert_anchors_are_due(1, 3)
        assert not session.report().fallbacks and session.report().density < 0.35
        pipe.set_attn_processor(SparseConfig("anchor", density=1.0, dense_steps=0))
        torch.testing.assert_close(generate(name, pipe, steps=steps), stock, atol=1e-3, rtol=1e-3)
