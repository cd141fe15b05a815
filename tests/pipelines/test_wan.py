from collections import Counter

import pytest
import torch
from diffusers import ChronoEditTransformer3DModel, FlowMatchHeunDiscreteScheduler, WanVideoToVideoPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse import SparseConfig, sparsify
from dit_sparse.pipelines import wan
from tests.tiny import generate, tiny_image_to_video, tiny_vace, tiny_video_to_video, tiny_wan

(SparseWanAttnProcessor,) = wan.FAMILY.processors.values()

METHODS = ["anchor", "tail", "reshape", "rectify", "none"]
MAKERS = {
    "text-2.1": lambda: tiny_wan(text=False),
    "text-2.2": lambda: tiny_wan(text=False, wan22=True),
    "image-2.1": lambda: tiny_image_to_video("2.1"),
    "image-2.2": lambda: tiny_image_to_video("2.2"),
    "image-5B": lambda: tiny_image_to_video("5B"),
    "video": tiny_video_to_video,
    "vace": tiny_vace,
}
# Every method on every kind takes minutes; by default all methods on text to video, and anchors on the others.
PAIRS = [
    pytest.param(kind, method, marks=[] if kind.startswith("text") or method == "anchor" else pytest.mark.slow)
    for kind in MAKERS
    for method in METHODS
]
BOTH = ("cond", "uncond")
UNNAMED = ("branch 0", "branch 1")


def transformers(pipe):
    return [t for t in (pipe.transformer, getattr(pipe, "transformer_2", None)) if t is not None]


def watch(session):
    """The (step, branch) of each forward, filled while the session's pipeline runs."""
    moments, leave = [], session.generation.leave

    def noted():
        moments.append((session.generation.moment.step, session.generation.moment.branch))
        leave()

    session.generation.leave = noted
    return moments


def errors_by_module(pipe, **options):
    """Of each attention call, how far its output is from the stock processor's on the same input, relative."""
    errors, hooks = {}, []

    def compare(name):
        def hook(module, args, output):
            with torch.no_grad():
                stock = WanAttnProcessor()(module, *args)
            error = (output - stock).abs().max() / stock.abs().max()
            errors[name] = max(errors.get(name, 0.0), error.item())

        return hook

    for part, transformer in zip(("high", "low"), transformers(pipe), strict=False):
        for name, module in transformer.named_modules():
            if hasattr(module, "processor"):
                hooks.append(module.register_forward_hook(compare(f"{part}.{name}")))
    try:
        generate(pipe, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


class WithoutRope(SparseWanAttnProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, None)


class TooLoud(SparseWanAttnProcessor):
    def __call__(self, *args, **kwargs):
        return 1.5 * super().__call__(*args, **kwargs)


class HeadsSwapped(SparseWanAttnProcessor):
    def __init__(self, attend):
        def flipped(q, k, v, key_mask=None):
            return attend(q, k, v, key_mask).flip(1)

        flipped.joint = attend.joint
        super().__init__(flipped)


# ---- dense is stock, module by module ----


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_dense_equals_the_stock_processor_in_every_module(kind, fused):
    pipe = MAKERS[kind]()
    if fused:
        for transformer in transformers(pipe):
            transformer.fuse_qkv_projections()
    with sparsify(pipe, "dense"):
        errors = errors_by_module(pipe)
    assert len(errors) == (10 if kind == "vace" else 4 * len(transformers(pipe)))
    assert max(errors.values()) <= 1e-6, errors


def test_dense_equals_the_stock_processor_in_bfloat16():
    pipe = tiny_wan(text=False)
    pipe.transformer.to(torch.bfloat16)
    with sparsify(pipe, "dense"):
        errors = errors_by_module(pipe)
    assert len(errors) == 4
    assert max(errors.values()) <= 2**-8, errors


@pytest.mark.parametrize("broken", [WithoutRope, TooLoud, HeadsSwapped])
def test_a_wrong_processor_does_not_pass_for_stock(broken):
    pipe = tiny_wan(text=False)
    with sparsify(pipe, "dense"):
        for block in pipe.transformer.blocks:
            block.attn1.set_processor(broken(block.attn1.processor.attend))
        errors = errors_by_module(pipe)
    for name, error in errors.items():
        assert error > 1e-2 if name.endswith("attn1") else error == 0, (name, error)


@pytest.mark.parametrize("kind", MAKERS)
def test_cross_attention_keeps_its_processor(kind):
    pipe = MAKERS[kind]()
    before = [t.attn_processors for t in transformers(pipe)]
    with sparsify(pipe, "tail", dense_steps=0):
        for stock, transformer in zip(before, transformers(pipe), strict=True):
            now = transformer.attn_processors
            assert stock.keys() == now.keys()
            for name in stock:
                if ".attn2." in name:
                    assert now[name] is stock[name]
                else:
                    assert isinstance(now[name], SparseWanAttnProcessor)


# ---- sparse, against stock ----


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_every_block_kept_is_stock(kind, method):
    pipe = MAKERS[kind]()
    stock = generate(pipe)
    with sparsify(pipe, method, density=1.0, dense_steps=0, dense_layers=0):
        ours = generate(pipe)
    torch.testing.assert_close(ours, stock, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_few_blocks_kept_is_finite_and_not_stock(kind, method):
    pipe = MAKERS[kind]()
    stock = generate(pipe)
    with sparsify(pipe, method, density=0.1, dense_steps=0) as session:
        ours = generate(pipe)
        report = session.report()
    assert ours.isfinite().all()
    assert (ours - stock).abs().max() > 1e-4
    assert report.density < 0.25
    assert report.work < 1
    assert not report.fallbacks


def test_two_videos_of_one_batch_are_those_made_alone():
    pipe = tiny_wan(text=False)
    latents = torch.randn(2, 16, 5, 16, 16, generator=torch.Generator().manual_seed(3))
    embeds = torch.randn(2, 2, 8, 32, generator=torch.Generator().manual_seed(4))

    def run(rows):
        return pipe(
            prompt_embeds=embeds[0, rows],
            negative_prompt_embeds=embeds[1, rows],
            latents=latents[rows],
            height=16,
            width=16,
            num_frames=4,
            num_inference_steps=4,
            output_type="latent",
        ).frames

    pipe.set_progress_bar_config(disable=True)
    with sparsify(pipe, "anchor", density=0.15, dense_steps=1):
        together = run([0, 1])
        torch.testing.assert_close(together[:1], run([0]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1:], run([1]), atol=1e-4, rtol=1e-4)


# ---- step and branch ----


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["cfg", ""])
def test_steps_and_branches(kind, guidance):
    pipe = MAKERS[kind]()
    steps = range(3 if kind == "video" else 4)  # strength 0.8 leaves 3 of 4
    names = UNNAMED if kind == "video" else BOTH
    with sparsify(pipe, "tail", dense_steps=1) as session:
        moments = watch(session)
        generate(pipe, guidance=guidance)
        assert session.total_steps == len(steps)
        assert moments == [(step, name) for step in steps for name in names[: 2 if guidance > 1 else 1]]
        assert [record.phase for record in session.report().steps] == ["dense"] + ["sparse"] * (len(steps) - 1)


def test_two_transformers_share_the_steps():
    pipe = tiny_wan(text=False, wan22=True)
    called = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with sparsify(pipe, "anchor", dense_steps=0, refresh_every=3) as session:
        generate(pipe, steps=6)
        report = session.report()
        # Each remembers under names of its own, so the second learns when it begins, between two anchors.
        assert [layer.name for layer in session.generation.layers] == [
            f"{part}.blocks.{i}.attn1" for part in ("transformer", "transformer_2") for i in range(2)
        ]
    begins = called.index("transformer_2") // 2
    assert called == ["transformer"] * 2 * begins + ["transformer_2"] * 2 * (6 - begins)
    assert 0 < begins < 3
    phases = [record.phase for record in report.steps]
    assert phases[0] == phases[begins] == phases[3] == "anchor"
    assert Counter(phases)["sparse"] == 3


@pytest.mark.parametrize("kind", ["image-5B", "video"])
def test_a_scheduler_that_repeats_a_timestep_is_followed_step_by_step(kind):
    pipe = MAKERS[kind]()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with sparsify(pipe, "anchor", dense_steps=0, refresh_every=100) as session:
        moments = watch(session)
        if kind == "video":
            # Its own start, between two evaluations of one step, is not Heun's.
            generate(pipe, steps=3, strength=1.0)
        else:
            generate(pipe, steps=3)
        steps = len(moments) // 2
        names = UNNAMED if kind == "video" else BOTH
        assert steps == len(pipe.scheduler.timesteps) > 3
        assert moments == [(step, name) for step in range(steps) for name in names]
        assert [r.phase for r in session.report().steps] == ["anchor"] + ["sparse"] * (steps - 1)


def abort(at):
    def callback(pipe, step, timestep, tensors):
        if step == at:
            raise KeyboardInterrupt
        return {}

    return {"callback_on_step_end": callback}


def abort_inside(pipe, call):
    """Let the pipeline's `call`-th forward fail half way through the transformer."""
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("aborted")

    return pipe.transformer.blocks[1].register_forward_pre_hook(hook)


CHANGES = {
    "nothing": {},
    "seed": {"seed": 7},
    "size": {"size": 32},
    "steps": {"steps": 6},
    "fewer steps": {"steps": 2},
    "no guidance": {"guidance": 1.0},
    "two prompts": {"prompts": 2},
}


@pytest.mark.parametrize("method", ["anchor", pytest.param("reshape", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["text-2.1", "text-2.2", pytest.param("image-2.2", marks=pytest.mark.slow), "video"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_later_generation_is_that_of_a_fresh_process(kind, method, change):
    config = SparseConfig(method, density=0.15, dense_steps=1, refresh_every=3)
    fresh = MAKERS[kind]()
    with sparsify(fresh, config) as session:
        expected = generate(fresh, **CHANGES[change])
        phases = [(r.step, r.phase) for r in session.report().steps]
    pipe = MAKERS[kind]()
    with sparsify(pipe, config) as session:
        generate(pipe)
        assert torch.equal(generate(pipe, **CHANGES[change]), expected)
        assert [(r.step, r.phase) for r in session.report().steps] == phases


@pytest.mark.parametrize(
    "kind",
    ["text-2.1", "image-2.2", "video", *(pytest.param(k, marks=pytest.mark.slow) for k in ("text-2.2", "image-2.1"))],
)
@pytest.mark.parametrize(
    "when", ["after step 0", "after step 2", "in cond 0", "in uncond 0", "in cond 1", "in uncond 1"]
)
@pytest.mark.parametrize("same", [True, False], ids=["same prompt", "other prompt"])
def test_an_aborted_generation_leaves_nothing_behind(kind, when, same):
    config = SparseConfig("anchor", density=0.15, dense_steps=0)
    later = {} if same else {"seed": 2}
    fresh = MAKERS[kind]()
    with sparsify(fresh, config) as session:
        expected = generate(fresh, **later)
        told = [(r.step, r.phase) for r in session.report().steps], session.report().work
        forwards = len(session.generation.tally.marks)
    pipe = MAKERS[kind]()
    with sparsify(pipe, config) as session:
        word, place, step = when.split()
        if word == "after":
            with pytest.raises(KeyboardInterrupt):
                generate(pipe, **abort(int(step)))
        else:
            hook = abort_inside(pipe, 2 * int(step) + 1 + (place == "uncond"))
            if kind.endswith("2.2") and step == "1":
                generate(pipe)  # the other transformer's step
            else:
                with pytest.raises(RuntimeError, match="aborted"):
                    generate(pipe)
            hook.remove()
        assert torch.equal(generate(pipe, **later), expected)
        assert not session.generation.learned
        assert ([(r.step, r.phase) for r in session.report().steps], session.report().work) == told
        assert len(session.generation.tally.marks) == forwards


def test_a_loop_of_ones_own_that_begins_again_after_one_forward():
    transformer = tiny_wan(text=False).transformer
    x, prompt = torch.randn(1, 16, 4, 16, 16), torch.randn(1, 8, 32)

    @torch.no_grad()
    def forward(t):
        return transformer(x, timestep=torch.tensor([t]), encoder_hidden_states=prompt).sample

    with sparsify(transformer, "anchor", density=0.15, dense_steps=0) as session:
        first, second = forward(900.0), forward(800.0)
        assert [r.phase for r in session.report().steps] == ["anchor", "sparse"]
        assert torch.equal(forward(900.0), first)
        assert torch.equal(forward(900.0), first)
        assert torch.equal(forward(800.0), second)
        assert [r.phase for r in session.report().steps] == ["anchor", "sparse"]


def test_another_pipeline_with_the_same_transformer():
    pipe = tiny_wan(text=False)
    other = WanVideoToVideoPipeline(**{name: pipe.components[name] for name in tiny_video_to_video().components})
    with sparsify(other, "anchor", dense_steps=1):
        expected = generate(other)
    with sparsify(pipe, "anchor", dense_steps=1) as session:
        generate(pipe, steps=10)
        assert torch.equal(generate(other), expected)
        # Not the 10 of this pipeline's own run; the scheduler knows of 4, strength takes one of them.
        assert session.total_steps == 4
        assert [r.phase for r in session.report().steps] == ["dense", "anchor", "sparse"]


@pytest.mark.parametrize(
    "options", [{"num_videos_per_prompt": 2}, {"prompts": 2, "num_videos_per_prompt": 2}], ids=str
)
def test_several_videos_a_prompt(options):
    def make():
        return tiny_wan(text=True)

    def run(pipe):
        pipe.set_progress_bar_config(disable=True)
        prompts = ["red ball moves left", "blue square moves up"][: options.get("prompts", 1)]
        return pipe(
            prompts,
            height=16,
            width=16,
            num_frames=4,
            num_inference_steps=3,
            num_videos_per_prompt=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    fresh = make()
    with sparsify(fresh, "anchor", density=0.15, dense_steps=1):
        expected = run(fresh)
    assert len(expected) == 2 * options.get("prompts", 1)
    pipe = make()
    with sparsify(pipe, "anchor", density=0.15, dense_steps=1) as session:
        generate(pipe)
        moments = watch(session)
        assert torch.equal(run(pipe), expected)
        assert moments == [(step, name) for step in range(3) for name in BOTH]


def test_other_wan_transformers_are_named_in_the_error():
    transformer = ChronoEditTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        rope_max_seq_len=8,
    )
    with pytest.raises(ValueError, match="ChronoEditTransformer3DModel.*known are.*WanTransformer3DModel"):
        sparsify(transformer)
