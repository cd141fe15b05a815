import copy
import threading
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse import SparseAttnProcessor, SparseConfig, attention, sparsify
from dit_sparse.pipelines import wan
from dit_sparse.pipelines.session import Session
from dit_sparse.state import StateTooLarge
from tests.tiny import generate, tiny_image_to_video, tiny_video_to_video, tiny_wan

(SparseWanAttnProcessor,) = wan.FAMILY.processors.values()

ANCHOR = SparseConfig("anchor", density=0.15, dense_steps=1)


@pytest.fixture
def pipe():
    return tiny_wan(text=False)


def processors(pipe):
    return {
        f"{part}.{name}": processor
        for part, transformer in pipe.components.items()
        if hasattr(transformer, "attn_processors")
        for name, processor in transformer.attn_processors.items()
    }


def assert_stock(pipe, before):
    now = processors(pipe)
    assert now.keys() == before.keys()
    assert all(now[name] is before[name] for name in before)
    assert "set_attn_processor" not in vars(pipe)
    for part in ("transformer", "transformer_2"):
        transformer = getattr(pipe, part, None)
        if transformer is not None:
            assert not transformer._diffusers_hook.hooks
            assert transformer.forward.__func__ is type(transformer).forward
            assert transformer.forward.__self__ is transformer


def is_sparse(pipe):
    return all(isinstance(block.attn1.processor, SparseWanAttnProcessor) for block in pipe.transformer.blocks)


def denoise(transformer, steps, *, branches=2, seed=5):
    """A loop of one's own around a bare transformer."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 5, 16, 16, generator=random)
    prompts = torch.randn(2, 1, 8, 32, generator=random).unbind()
    for t in torch.linspace(999, 100, steps):
        for prompt in prompts[:branches]:
            with torch.no_grad():
                x = x - 0.1 * transformer(x, timestep=t.expand(1), encoder_hidden_states=prompt).sample
    return x


# ---- sparsify and restore ----


@pytest.mark.parametrize("wan22", [False, True])
def test_restore_undoes_everything(wan22):
    pipe = tiny_wan(text=False, wan22=wan22)
    before, stock = processors(pipe), generate(pipe)
    session = sparsify(pipe, ANCHOR)
    assert is_sparse(pipe)
    assert not torch.equal(generate(pipe), stock)
    session.restore()
    assert_stock(pipe, before)
    assert torch.equal(generate(pipe), stock)
    session.restore()
    assert_stock(pipe, before)
    assert session.report().steps  # still told


def test_a_with_block_restores_after_an_exception_too(pipe):
    before = processors(pipe)
    with sparsify(pipe, ANCHOR):
        assert is_sparse(pipe)
    assert_stock(pipe, before)
    with pytest.raises(RuntimeError, match="mine"), sparsify(pipe, ANCHOR):
        raise RuntimeError("mine")
    assert_stock(pipe, before)


def test_sparse_again_after_restore(pipe):
    with sparsify(pipe, ANCHOR):
        first = generate(pipe)
    with sparsify(pipe, "anchor", density=0.15, dense_steps=1):
        assert torch.equal(generate(pipe), first)


@pytest.mark.parametrize("target", ["pipe", "transformer"])
def test_sparse_twice_is_an_error_that_changes_nothing(pipe, target):
    with sparsify(pipe, ANCHOR):
        first, before = generate(pipe), processors(pipe)
        with pytest.raises(ValueError, match=r"transformer is sparse already: call restore\(\)"):
            sparsify(pipe if target == "pipe" else pipe.transformer, "tail")
        assert processors(pipe) == before
        assert torch.equal(generate(pipe), first)


def test_what_has_no_known_transformer_is_named(pipe):
    with pytest.raises(ValueError, match="AutoencoderKLWan has no transformer this library knows: it has Auto"):
        sparsify(pipe.vae)
    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="WanPipeline has no.*AutoencoderKLWan.*known are .*WanTransformer3DModel"):
        sparsify(pipe)


def test_a_config_and_options_do_not_mix(pipe):
    with pytest.raises(ValueError, match="density"):
        sparsify(pipe, ANCHOR, density=0.2)
    with pytest.raises(ValueError, match="did you mean 'density'"):
        sparsify(pipe, densty=0.2)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def test_the_prediction_of_phases_needs_a_run_for_shares(pipe):
    with sparsify(pipe, "anchor", dense_steps=0.25) as session:
        assert session.total_steps is None
        with pytest.raises(ValueError, match="dense_steps=0.25 counts against the number of steps"):
            session.phase(0)
        generate(pipe)
        assert session.total_steps == 4
        assert [session.phase(step) for step in range(4)] == ["dense", "anchor", "sparse", "sparse"]


# ---- pipe.set_attn_processor ----


def test_a_method_can_be_set_by_config_or_name(pipe):
    expected = {}
    for config in (SparseConfig("tail"), SparseConfig("rectify", density=0.3), SparseConfig("dense")):
        with sparsify(pipe, config):
            expected[config] = generate(pipe)
    with sparsify(pipe, ANCHOR) as session:
        generate(pipe)
        pipe.set_attn_processor("tail")
        assert session.config == SparseConfig("tail")
        assert torch.equal(generate(pipe), expected[SparseConfig("tail")])
        pipe.set_attn_processor(SparseConfig("rectify", density=0.3))
        assert torch.equal(generate(pipe), expected[SparseConfig("rectify", density=0.3)])
        pipe.set_attn_processor("dense")
        assert torch.equal(generate(pipe), expected[SparseConfig("dense")])
        assert session.report().work == 1
        pipe.set_attn_processor(SparseAttnProcessor("tail"))
        assert torch.equal(generate(pipe), expected[SparseConfig("tail")])


@pytest.mark.parametrize("wan22", [False, True])
def test_a_diffusers_processor_turns_sparse_off_until_a_method_is_set(wan22):
    pipe = tiny_wan(text=False, wan22=wan22)
    before, stock = processors(pipe), generate(pipe)
    with sparsify(pipe, ANCHOR) as session:
        sparse = generate(pipe)
        pipe.set_attn_processor(WanAttnProcessor())
        assert torch.equal(generate(pipe), stock)
        pipe.set_attn_processor(ANCHOR)
        assert torch.equal(generate(pipe), sparse)
        given = {name: WanAttnProcessor() for name in pipe.transformer.attn_processors}
        kept = dict(given)
        pipe.set_attn_processor(given)
        assert given == kept
        assert pipe.transformer.attn_processors == kept
        assert torch.equal(generate(pipe), stock)
        pipe.set_attn_processor(ANCHOR)
        assert torch.equal(generate(pipe), sparse)
        assert session.report().work < 1
        cross = {name: p for name, p in processors(pipe).items() if ".attn2." in name}
        assert all(before[name] is p for name, p in cross.items())
    assert_stock(pipe, before)


def test_a_method_set_in_a_callback_begins_there(pipe):
    def switch(pipe, step, timestep, tensors):
        if step == 1:
            pipe.set_attn_processor("tail")
        return {}

    with sparsify(pipe, ANCHOR) as session:
        out = generate(pipe, steps=5, callback_on_step_end=switch)
        assert [(r.step, r.phase) for r in session.report().steps] == [(2, "sparse"), (3, "sparse"), (4, "sparse")]
    assert out.isfinite().all()


def test_an_unknown_name_is_one_sentence_and_changes_nothing(pipe):
    with sparsify(pipe, ANCHOR) as session:
        first = generate(pipe)
        with pytest.raises(ValueError, match="^Unknown method 'ankor': choose from anchor, tail, [^.]*\\.$"):
            pipe.set_attn_processor("ankor")
        assert session.config == ANCHOR
        assert torch.equal(generate(pipe), first)


def test_other_pipelines_are_untouched(pipe):
    other = tiny_wan(text=False)
    before, stock = processors(other), generate(other)
    with sparsify(pipe, ANCHOR):
        assert not hasattr(other, "set_attn_processor")
        assert not hasattr(WanPipeline, "set_attn_processor")
        assert not hasattr(DiffusionPipeline, "set_attn_processor")
        assert processors(other) == before
        generate(pipe)
        assert torch.equal(generate(other), stock)


def test_two_sparse_pipelines_do_not_share_state(pipe):
    other = tiny_wan(text=False, seed=1)
    with sparsify(other, ANCHOR):
        expected = generate(other)
    with sparsify(pipe, ANCHOR), sparsify(other, ANCHOR):

        def between(*_):
            generate(pipe, seed=3)
            return {}

        assert torch.equal(generate(other, callback_on_step_end=between), expected)


# ---- the user's own dense backend ----


@pytest.mark.parametrize("when", ["before", "after", "method set later"])
def test_a_backend_the_user_chose_runs_the_dense_steps(pipe, when, monkeypatch):
    from dit_sparse.pipelines import session as module

    used = []
    dispatch = module.dispatch_attention_fn

    def counted(*args, **kwargs):
        used.append(str(kwargs["backend"].value))
        return dispatch(*args, **kwargs)

    ours, dense = [], attention.dense_attention
    monkeypatch.setattr(module, "dispatch_attention_fn", counted)
    monkeypatch.setattr(attention, "dense_attention", lambda *a, **k: ours.append(1) or dense(*a, **k))
    if when == "before":
        pipe.transformer.set_attention_backend("_native_math")
    with sparsify(pipe, "anchor", density=0.15, dense_steps=2) as session:
        if when != "before":
            pipe.transformer.set_attention_backend("_native_math")
        if when == "method set later":
            pipe.set_attn_processor(SparseConfig("tail", dense_steps=2))
        out = generate(pipe)
        report = session.report()
    # Two layers, two branches, two dense steps.
    assert used == ["_native_math"] * 8
    # An anchor needs the log-sum-exp, which no backend of diffusers gives.
    assert len(ours) == (0 if when == "method set later" else 4)
    assert report.dense_backend == "_native_math"
    assert [r.phase for r in report.steps][:2] == ["dense", "dense"]
    assert not report.fallbacks
    assert out.isfinite().all()


# ---- plain diffusers style ----


@pytest.mark.parametrize(
    "config", [ANCHOR, replace(ANCHOR, dense_steps=0), SparseConfig("tail", dense_steps=0)], ids=str
)
@pytest.mark.parametrize("make", [tiny_wan, tiny_video_to_video, tiny_image_to_video])
@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["cfg", ""])
def test_one_object_does_what_sparsify_does(make, config, guidance):
    expected = make()
    with sparsify(expected, config) as session:
        wanted = generate(expected, guidance=guidance)
        phases = [(r.step, r.phase) for r in session.report().steps]
    pipe = make()
    stock = generate(pipe, guidance=guidance)
    ours = SparseAttnProcessor(config)
    for part in ("transformer", "transformer_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).set_attn_processor(ours)
    for _ in range(2):
        assert torch.equal(generate(pipe, guidance=guidance), wanted)
        assert [(r.step, r.phase) for r in ours.session.report().steps] == phases
    assert is_sparse(pipe)
    for block in pipe.transformer.blocks:
        assert type(block.attn2.processor) is WanAttnProcessor
    assert not hasattr(pipe, "set_attn_processor")
    ours.session.restore()
    assert torch.equal(generate(pipe, guidance=guidance), stock)


def test_a_share_of_the_steps_is_known_inside_a_pipeline():
    pipe = tiny_video_to_video()
    ours = SparseAttnProcessor(dense_steps=0.5)
    pipe.transformer.set_attn_processor(ours)
    generate(pipe, steps=5)
    assert [r.phase for r in ours.session.report().steps] == ["dense", "dense", "anchor", "sparse"]


@pytest.mark.parametrize("branches", [1, 2])
def test_one_object_on_a_bare_transformer(pipe, branches):
    transformer = pipe.transformer
    with sparsify(transformer, ANCHOR) as session:
        expected = denoise(transformer, 4, branches=branches)
        assert [r.phase for r in session.report().steps] == ["dense", "anchor", "sparse", "sparse"]
    ours = SparseAttnProcessor("anchor", density=0.15, dense_steps=1)
    transformer.set_attn_processor(ours)
    for _ in range(2):
        assert torch.equal(denoise(transformer, 4, branches=branches), expected)
    # With other prompts of the same shape, and after a run of other length.
    denoise(transformer, 6, seed=6, branches=branches)
    assert torch.equal(denoise(transformer, 4, branches=branches), expected)


def test_a_share_of_unknown_steps_is_an_error(pipe):
    pipe.transformer.set_attn_processor(SparseAttnProcessor("tail"))
    with pytest.raises(ValueError, match="dense_steps=0.15 counts against the number of steps"):
        denoise(pipe.transformer, 2)


def test_another_object_takes_over(pipe):
    with sparsify(pipe, SparseConfig("tail", dense_steps=0)):
        expected = generate(pipe)
    stock = generate(pipe)
    pipe.transformer.set_attn_processor(SparseAttnProcessor(ANCHOR))
    generate(pipe)
    ours = SparseAttnProcessor("tail", dense_steps=0)
    pipe.transformer.set_attn_processor(ours)
    for _ in range(2):
        assert torch.equal(generate(pipe), expected)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(pipe)
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    assert torch.equal(generate(pipe), stock)
    pipe.transformer.set_attn_processor(ours)
    assert torch.equal(generate(pipe), expected)


def test_another_object_on_one_transformer_leaves_the_other_sparse():
    pipe = tiny_wan(text=False, wan22=True)
    first = SparseAttnProcessor("tail", dense_steps=0)
    for transformer in (pipe.transformer, pipe.transformer_2):
        transformer.set_attn_processor(first)
    expected = generate(pipe)
    second = SparseAttnProcessor("tail", dense_steps=0)
    pipe.transformer.set_attn_processor(second)
    assert torch.equal(generate(pipe), expected)
    assert first.session is not second.session
    assert all(isinstance(b.attn1.processor, SparseWanAttnProcessor) for b in pipe.transformer_2.blocks)


def test_an_object_does_not_end_a_session_of_sparsify(pipe):
    with sparsify(pipe, ANCHOR):
        pipe.transformer.set_attn_processor(SparseAttnProcessor("tail", dense_steps=0))
        with pytest.raises(ValueError, match="transformer is sparse already"):
            generate(pipe)


def test_an_object_alone_says_where_it_belongs():
    attention = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="runs inside one of .*WanTransformer3DModel.*, not alone"):
        SparseAttnProcessor()(attention, torch.zeros(1, 1, 1))


def test_an_object_keeps_the_backend_set_on_it(pipe):
    ours = SparseAttnProcessor(ANCHOR)
    pipe.transformer.set_attn_processor(ours)
    pipe.transformer.set_attention_backend("_native_math")
    generate(pipe)
    assert ours.session.report().dense_backend == "_native_math"
    assert pipe.transformer.blocks[0].attn2.processor._attention_backend.value == "_native_math"


# ---- copies and files ----


def test_a_copy_of_a_sparse_pipeline_does_not_run_the_original(pipe):
    stock = generate(pipe)
    session = sparsify(pipe, ANCHOR)
    sparse = generate(pipe)
    # As CUDA's clocks, it cannot be copied.
    session.generation.tally.marks.append(threading.Lock())
    clone = copy.deepcopy(pipe)
    with pytest.raises(ValueError, match="deep copy of a sparse one"):
        generate(clone)
    clone.set_attn_processor.__self__.restore()
    assert torch.equal(generate(clone), stock)
    assert torch.equal(generate(pipe), sparse)


def test_copies_of_processors_share_what_was_learned(pipe):
    with sparsify(pipe, replace(ANCHOR, dense_steps=0)) as session:

        def look(*_):
            assert session.generation.learned
            processor = pipe.transformer.blocks[0].attn1.processor
            assert copy.deepcopy(processor).attend.generation is session.generation
            return {}

        generate(pipe, callback_on_step_end=look)


def test_a_copy_of_an_object_works_alone(pipe):
    other = tiny_wan(text=False)
    ours = SparseAttnProcessor(ANCHOR)
    pipe.transformer.set_attn_processor(ours)
    expected = generate(pipe)
    other.transformer.set_attn_processor(copy.deepcopy(ours))
    assert torch.equal(generate(other), expected)
    assert SparseAttnProcessor().config == SparseConfig()
    fresh = copy.deepcopy(tiny_with(SparseAttnProcessor(ANCHOR)))
    assert torch.equal(generate(fresh), expected)


def tiny_with(processor):
    pipe = tiny_wan(text=False)
    pipe.transformer.set_attn_processor(processor)
    return pipe


def test_a_sparse_pipeline_saves_as_a_stock_one(tmp_path):
    pipe = tiny_wan(text=True)
    stock = generate(pipe)
    with sparsify(pipe, ANCHOR):
        generate(pipe)
        pipe.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    assert all(type(p) is WanAttnProcessor for p in processors(loaded).values())
    assert not hasattr(loaded, "set_attn_processor")
    assert torch.equal(generate(loaded), stock)


# ---- report, fallbacks, memory ----


def test_the_report_of_a_sparse_run_and_of_a_dense_one(pipe):
    with sparsify(pipe, replace(ANCHOR, refresh_every=3)) as session:
        generate(pipe, steps=6)
        report = session.report()
        assert [(r.step, r.phase) for r in report.steps] == list(
            enumerate(["dense", "anchor", "sparse", "sparse", "anchor", "sparse"])
        )
        assert all(r.seconds > 0 for r in report.steps)
        assert 0.1 < report.density < 0.25
        assert 0.5 < report.work < 1  # three of six steps are dense, or more: an anchor's plan comes on top
        assert report.state_bytes > 0
        assert report.residual == "bf16"
        assert report.kernel == "torch"
        assert report.dense_backend == "cpu"
        pipe.set_attn_processor("dense")
        generate(pipe)
        report = session.report()
        assert report.work == 1 and report.density == 1 and report.state_bytes == 0
        assert {r.phase for r in report.steps} == {"dense"}


def test_dense_layers_are_dense(pipe):
    stock = generate(pipe)
    with sparsify(pipe, "tail", density=0.1, dense_steps=0, dense_layers=1.0) as session:
        assert torch.equal(generate(pipe), stock)
        assert session.report().work == 1
        pipe.set_attn_processor(SparseConfig("tail", density=0.1, dense_steps=0, dense_layers=1))
        assert not torch.equal(generate(pipe), stock)
        assert session.report().work > 0.5
    with sparsify(pipe, "tail", dense_layers="0,2"), pytest.raises(ValueError, match="dense_layers: .*0..1"):
        generate(pipe)


def call_attn1(pipe, mask=None, text=None):
    attn = pipe.transformer.blocks[0].attn1
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return attn(x, text, mask, None), WanAttnProcessor()(attn, x, text, mask, None)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (dict(mask=torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.3), "mask"),
        (dict(text=torch.ones(1, 7, 64)), "cross-attention"),
    ],
    ids=["mask", "text"],
)
def test_what_cannot_be_sparse_runs_dense_and_is_counted(pipe, given, reason):
    with sparsify(pipe, "tail", dense_steps=0) as session:
        generate(pipe)
        for _ in range(3):
            torch.testing.assert_close(*call_attn1(pipe, **given), atol=1e-6, rtol=1e-5)
        ((said, count),) = session.report().fallbacks.items()
        assert count == 3 and reason in said
    with sparsify(pipe, "tail", dense_steps=0, strict=True):
        with pytest.raises(ValueError, match=f"{reason}.*strict=True"):
            call_attn1(pipe, **given)
        generate(pipe)


def test_strict_names_the_layer_that_holds_nan(pipe):
    pipe.transformer.blocks[1].attn1.to_v.bias.data[3] = float("nan")
    with (
        sparsify(pipe, "tail", strict=True),
        pytest.raises(ValueError, match=r"v of transformer.blocks.1.attn1 holds"),
    ):
        generate(pipe)


@pytest.mark.parametrize("make", [tiny_wan, tiny_image_to_video])
def test_state_too_large_is_said_before_the_first_step(make):
    pipe = make()
    before, stock, ran = processors(pipe), generate(pipe), []
    pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with sparsify(pipe, replace(ANCHOR, max_state_gib=1e-6)) as session:
        for _ in range(2):
            with pytest.raises(StateTooLarge, match=r"must remember \d.*GiB in int4, but 0.00 GiB may be used"):
                generate(pipe)
        assert not ran
        pipe.set_attn_processor("tail")
        assert generate(pipe).isfinite().all()
        assert session.report().state_bytes == 0
    assert_stock(pipe, before)
    assert torch.equal(generate(pipe), stock)


def test_the_estimate_of_memory_counts_the_branches(pipe):
    config = replace(ANCHOR, residual="bf16", share_plan=False)
    with sparsify(pipe, config) as session:
        generate(pipe)
        gib = session.report().state_bytes / 2**30
    with sparsify(pipe, replace(config, max_state_gib=0.75 * gib)) as session:
        with pytest.raises(StateTooLarge):
            generate(pipe)
        generate(pipe, guidance=1.0)
        assert session.report().state_bytes == pytest.approx(gib * 2**29)


# ---- diffusers' caches ----


@pytest.mark.parametrize("first", ["cache", "sparse"])
def test_anchors_beside_a_cache_that_skips_blocks(first):
    pipe = tiny_wan(text=False, layers=3)
    steps = 12
    cache = FirstBlockCacheConfig(threshold=0.08)
    if first == "cache":
        pipe.transformer.enable_cache(cache)
    with sparsify(pipe, "anchor", density=0.15, dense_steps=1, refresh_every=4) as session:
        if first == "sparse":
            pipe.transformer.enable_cache(cache)
        ran, learned = [], []
        pipe.transformer.blocks[1].attn1.register_forward_hook(
            lambda *_: ran.append((session.generation.moment.step, session.generation.moment.branch))
        )
        record = session.generation.record

        def recorded(layer, what):
            if layer.index == 1:
                learned.append((session.generation.moment.step, session.generation.moment.branch))
            record(layer, what)

        session.generation.record = recorded
        out = generate(pipe, steps=steps)
        report = session.report()
        again = generate(pipe, steps=steps)
    assert out.isfinite().all()
    assert torch.equal(out, again)
    assert [r.step for r in report.steps] == list(range(steps))
    half = len(ran) // 2
    ran, learned = ran[:half], learned[: len(learned) // 2]
    for branch in ("cond", "uncond"):
        at = [step for step, name in ran if name == branch]
        assert 2 < len(at) < steps, "the cache skips some steps, and not all"
        due, last = [], None
        for step in at[1:]:
            if last is None or step - last >= 4 or (step - 1) % 4 == 0:
                due.append(step)
                last = step
        assert [step for step, name in learned if name == branch] == due
    pipe.transformer.disable_cache()


def test_a_session_can_be_made_and_dropped(pipe):
    """The op looks its generation up by number, which must hold as long as the pipeline is sparse."""
    import gc

    expected = generate_with(sparsify, pipe)
    pipe = tiny_wan(text=False)
    sparsify(pipe, ANCHOR)  # nobody keeps the session
    gc.collect()
    assert torch.equal(generate(pipe), expected)
    assert isinstance(pipe.set_attn_processor.__self__, Session)


def generate_with(how, pipe):
    with how(pipe, ANCHOR):
        return generate(pipe)
