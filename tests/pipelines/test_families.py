"""What holds for every family, on real diffusers classes: attention alone is other, and dense where it is to be."""

import inspect
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_sparse import SparseAttnProcessor, SparseConfig, models, sparsify
from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines import session as session_module
from dit_sparse.pipelines.session import FAMILIES
from dit_sparse.predict import attention_share
from tests.families import FAMILIES as TINY
from tests.families import generate, make

# Tail and none are parts of anchor and reshape, and the others choose blocks for these.
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("tail", "none", "topp", "sta", "radial", "ditfastattn")]
METHODS = ["anchor", "reshape", "rectify", "svg", *SLOW]


@pytest.fixture(params=TINY)
def name(request):
    return request.param


def family_of(pipe):
    return FAMILIES[type(pipe.transformer).__name__]


def attentions(pipe):
    return {
        name: module
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "processor") and family_of(pipe).is_self_attention(name)
    }


@lru_cache(maxsize=1)
def forwards(name):
    """The arguments of a stock run's forwards with two rows of one kind, or the two branches of guidance."""
    pipe, seen = make(name), []
    names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(dict(zip(names, args, strict=False)) | kwargs), with_kwargs=True
    )
    guided = not TINY[name].passes
    if hasattr(pipe, "guider"):
        pipe.guider.disable()
    generate(name, pipe, prompts=1 if guided else 2, guided=guided)
    hook.remove()
    return seen


def run(transformer, calls):
    def tensor(out):
        while not isinstance(out, torch.Tensor):
            out = torch.stack(list(out[0])) if isinstance(out[0], list) else out[0]
        return out

    with torch.no_grad():
        return [tensor(transformer(**call)) for call in calls]


def errors_by_module(pipe, go):
    """Of each attention module, how far its output in `go()` is from the stock processor's on the same input."""
    errors, hooks = {}, []

    def compare(name):
        def hook(module, args, kwargs, output):
            ours = module.processor
            module.processor = family_of(pipe).stock(name, pipe.transformer)
            with torch.no_grad():
                stock = type(module).forward(module, *args, **kwargs)
            module.processor = ours
            masks = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
            for a, b in zip(tensors(output), tensors(stock), strict=True):
                for mask in masks:
                    # HunyuanVideo 1.5's padding attends to nothing, ours to all, and nobody reads it.
                    if mask.shape == b.shape[:2]:
                        a, b = a[mask], b[mask]
                errors[name] = max(errors.get(name, 0.0), ((a - b).abs().max() / b.abs().max()).item())

        return hook

    for name, module in attentions(pipe).items():
        hooks.append(module.register_forward_hook(compare(name), with_kwargs=True))
    try:
        go()
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def tensors(output):
    return [x for x in (output if isinstance(output, tuple) else (output,)) if x is not None]


# ---- stock and dense ----


def test_dense_is_stock_in_every_module_of_a_whole_run(name):
    pipe = make(name)
    stock = generate(name, pipe)
    with sparsify(pipe, "dense") as session:
        errors = errors_by_module(pipe, lambda: torch.testing.assert_close(generate(name, pipe), stock))
        assert not session.report().fallbacks
    assert len(errors) == TINY[name].modules == len(session.generation.layers)
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("method", METHODS)
def test_every_block_kept_is_dense(name, method):
    pipe, calls = make(name), forwards(name)
    with sparsify(pipe.transformer, method, density=1.0, dense_steps=0) as session:
        errors = errors_by_module(pipe, lambda: run(pipe.transformer, calls))
        assert session.report().density == 1
        assert (
            {r.phase for r in session.report().steps} == {"anchor", "sparse"} if session.config.learns else {"sparse"}
        )
    assert len(errors) == TINY[name].modules
    assert max(errors.values()) <= 3e-5, errors


def test_few_blocks_kept_is_sparse_and_restore_is_exact(name):
    pipe = make(name)
    before = {name: module.processor for name, module in attentions(pipe).items()}
    stock = generate(name, pipe)
    with sparsify(pipe, "anchor", density=0.15, dense_steps=1) as session:
        sparse, report = generate(name, pipe), session.report()
        assert [r.phase for r in report.steps] == ["dense", "anchor", "sparse"]
        assert not report.fallbacks
        assert report.density < 0.35
    assert sparse.isfinite().all() and not torch.equal(sparse, stock)
    assert {name: module.processor for name, module in attentions(pipe).items()} == before
    assert torch.equal(generate(name, pipe), stock)


# ---- where vision and text lie ----


def test_the_grid_and_the_text_are_what_the_call_says(name):
    pipe, tiny = make(name), TINY[name]
    with sparsify(pipe, "none", dense_steps=0) as session:
        for size in (0, 1):
            generate(name, pipe, size=size, steps=2)
            assert session.generation.grid == TokenGrid(*tiny.sizes[size][1])
            before, after = session.generation.text
            assert (before, after) == tiny.text


def test_a_wrong_grid_is_an_error(name, monkeypatch):
    pipe = make(name)
    family, kind = family_of(pipe), type(pipe.transformer).__name__

    def wrong(transformer, call):
        told = family.forward(transformer, call)
        return replace(told, grid=replace(told.grid, height=told.grid.height + 1))

    monkeypatch.setitem(session_module.FAMILIES, kind, replace(family, forward=wrong))
    with sparsify(pipe, "none", dense_steps=0), pytest.raises(ValueError, match=r"was given \d+ tokens, but its grid"):
        generate(name, pipe, steps=2)


@contextmanager
def watched(pipe, look):
    """Calls look(attend, q, k, v, key_mask) in place of every sparse attention call."""
    for module in attentions(pipe).values():
        inner = module.processor.attend

        def spy(q, k, v, key_mask=None, inner=inner):
            return look(inner, q, k, v, key_mask)

        spy.joint, spy.fall_back = inner.joint, inner.fall_back
        module.processor.attend = spy
    yield


def test_text_is_dense_and_its_padding_without_influence(name):
    pipe, tiny, calls = make(name), TINY[name], forwards(name)
    seen = []

    def look(inner, q, k, v, key_mask):
        out = inner(q, k, v, key_mask)
        layer = session.generation.layers[inner.layer]
        before, after = session.generation.around(layer, q.shape[2])
        mask = None if key_mask is None else key_mask[:, None, None]
        dense = F.scaled_dot_product_attention(q, k, v, mask)
        vision = slice(before, q.shape[2] - after)
        text = [*range(before), *range(q.shape[2] - after, q.shape[2])]
        assert (out - dense)[:, :, vision].abs().max() > 1e-4
        if text:
            torch.testing.assert_close(out[:, :, text], dense[:, :, text], atol=1e-5, rtol=1e-5)
        if mask is not None and not mask.all():
            assert key_mask[:, vision].all()
            loud = [torch.where(mask.mT, x, 100.0) for x in (k, v)]
            assert torch.equal(inner(q, *loud, key_mask), out)
        seen.append((bool(text), mask is not None and not mask.all()))
        return out

    with sparsify(pipe.transformer, "tail", density=0.15, dense_steps=0) as session, watched(pipe, look):
        run(pipe.transformer, calls[:1])
    assert len(seen) == tiny.modules
    assert any(joint for joint, _ in seen) == any(tiny.text)
    assert any(masked for _, masked in seen) == tiny.masked


# ---- batches and sizes ----


@pytest.mark.parametrize("method", ["anchor", "rectify"])
def test_a_batch_is_what_its_rows_are_alone(name, method):
    pipe, calls = make(name), forwards(name)
    config = SparseConfig(method, density=0.2, dense_steps=0)
    with sparsify(pipe.transformer, config) as session:
        both = run(pipe.transformer, calls)
        assert session.report().density < 0.4
    rows = len(both[0])
    assert rows == 2
    for row in range(rows):
        with sparsify(pipe.transformer, config):
            alone = run(pipe.transformer, [row_of(call, row, rows) for call in calls])
        for one, whole in zip(alone, both, strict=True):
            # An anchor's residual is rounded to bfloat16, which makes more of what rounding there is before.
            torch.testing.assert_close(one, whole[row : row + 1], atol=5e-4, rtol=5e-4)


def row_of(call, row, rows):
    def part(x):
        batched = isinstance(x, list) or (isinstance(x, torch.Tensor) and x.dim() > 0)
        return x[row : row + 1] if batched and len(x) == rows else x

    return {name: part(x) for name, x in call.items()}


def test_another_size_in_the_same_session_is_that_of_a_fresh_one(name):
    config = SparseConfig("anchor", density=0.15, dense_steps=0)
    fresh = make(name)
    with sparsify(fresh, config):
        expected = generate(name, fresh, size=1)
    pipe = make(name)
    with sparsify(pipe, config) as session:
        generate(name, pipe)
        assert torch.equal(generate(name, pipe, size=1), expected)
        assert [r.phase for r in session.report().steps] == ["anchor", "sparse", "sparse"]


def test_in_plain_diffusers_style(name):
    pipe = make(name)
    config = SparseConfig("anchor", density=0.15, dense_steps=1)
    with sparsify(pipe, config):
        expected = generate(name, pipe)
    modules = [module for module in pipe.transformer.modules() if hasattr(module, "processor")]
    before = [type(module.processor) for module in modules]
    ours = SparseAttnProcessor(config)
    if hasattr(pipe.transformer, "set_attn_processor"):
        pipe.transformer.set_attn_processor(ours)
    else:
        for module in modules:
            module.processor = ours
    assert torch.equal(generate(name, pipe), expected)
    ours.session.restore()
    assert [type(module.processor) for module in modules] == before


def test_branches_of_guidance_in_one_batch_are_one_branch(name):
    """The estimate of memory goes by rows of the batch times forwards a step."""
    pipe, rows = make(name), []
    with sparsify(pipe, "tail", dense_steps=0) as session:
        pipe.transformer.register_forward_hook(lambda *_: rows.append(session.generation._batch))
        generate(name, pipe, steps=2)
        assert family_of(pipe).one_forward == (not TINY[name].passes)
        assert rows == ([1] * 4 if TINY[name].passes else [2] * 2)
        if not TINY[name].passes:
            assert session.generation.branches == 1


def test_guidance_beside_a_batch_of_both_branches_has_its_own_memory():
    """LTX-2 guides in two further ways, one forward of the prompt alone each."""
    pipe, moments = make("ltx2.3"), []
    config = SparseConfig("anchor", density=0.15, dense_steps=0)
    with sparsify(pipe, config) as session:
        pipe.transformer.register_forward_hook(
            lambda *_: moments.append((session.generation.moment.step, session.generation.moment.branch))
        )
        generate("ltx2.3", pipe, stg_scale=1.0, modality_scale=3.0, spatio_temporal_guidance_blocks=[1])
        report = session.report()
    assert moments == [(step, name) for step in range(3) for name in ("cond_uncond", "uncond_stg", "uncond_modality")]
    assert [r.phase for r in report.steps] == ["anchor", "sparse", "sparse"]
    assert not report.fallbacks


# ---- what is refused ----


def test_another_processor_is_not_replaced(name):
    class Other:
        def __call__(self, attn, hidden_states):
            raise AssertionError

    pipe = make(name)
    where, module = next(iter(attentions(pipe).items()))
    module.processor = Other()
    with pytest.raises(ValueError, match=f"transformer.{where} has Other, which would be lost"):
        sparsify(pipe)
    assert isinstance(module.processor, Other)


def told(pipe, **call):
    return family_of(pipe).forward(pipe.transformer, call)


def test_images_to_go_by_are_dense_and_always_attended_to():
    """Flux with a reference image: text, then the image, then tokens of another grid."""
    pipe, call = make("flux"), dict(forwards("flux")[0])
    rows = len(call["hidden_states"])
    grid = torch.cartesian_prod(torch.ones(1), torch.arange(5.0), torch.arange(7.0))
    call["img_ids"] = torch.cat([call["img_ids"], grid])
    call["hidden_states"] = torch.cat([call["hidden_states"], torch.randn(rows, 35, 16)], dim=1)
    now = told(pipe, **call)
    assert (now.grid, now.before, now.after) == (TokenGrid(1, 14, 15), 9, 35)
    dense = []

    def look(inner, q, k, v, key_mask):
        out = inner(q, k, v, key_mask)
        exact = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out[:, :, :9], exact[:, :, :9], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out[:, :, 9 + 210 :], exact[:, :, 9 + 210 :], atol=1e-5, rtol=1e-5)
        dense.append((out - exact)[:, :, 9 : 9 + 210].abs().max() < 1e-4)
        return out

    with sparsify(pipe.transformer, "none", density=0.15, dense_steps=0), watched(pipe, look):
        run(pipe.transformer, [call])
    assert dense == [False, False]
    with sparsify(pipe.transformer, "none", density=1.0, dense_steps=0):
        errors = errors_by_module(pipe, lambda: run(pipe.transformer, [call]))
    assert len(errors) == 2 and max(errors.values()) < 3e-5


def test_images_of_one_shape_are_frames_of_one_grid():
    pipe = make("qwen-image")
    call = dict(hidden_states=torch.zeros(1, 1, 1), encoder_hidden_states=torch.zeros(1, 4, 1), timestep=None)
    now = told(pipe, img_shapes=[[(1, 14, 15), (1, 14, 15), (1, 5, 7), (1, 14, 15)]], **call)
    assert (now.grid, now.before, now.after) == (TokenGrid(2, 14, 15), 4, 35 + 210)


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        ("ltx", dict(hidden_states=torch.zeros(1, 9, 4), video_coords=1), "given coordinates in place of num_frames"),
        ("kandinsky5", dict(sparse_params={"P": 0.9}), "sparse already, by NABLA"),
        ("z-image", dict(x=[torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 6)], cap_feats=[]), "do not share a grid"),
        ("z-image", dict(x=[[torch.zeros(4, 1, 8, 8)]], cap_feats=[]), "do not share a grid"),
    ],
    ids=["coordinates", "nabla", "sizes", "omni"],
)
def test_what_lies_on_no_grid_is_refused(name, call, reason):
    with pytest.raises(ValueError, match=reason):
        told(make(name), **call)


def test_linear_attention_is_refused_with_the_reason():
    sana = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    with pytest.raises(ValueError, match="SanaTransformer2DModel cannot be: its self-attention is linear"):
        sparsify(sana)


def test_a_mask_that_is_more_than_padding_runs_dense_and_is_counted():
    pipe, calls = make("flux"), forwards("flux")
    module = pipe.transformer.transformer_blocks[0].attn
    with sparsify(pipe.transformer, "none", density=0.15, dense_steps=0) as session:
        inputs = {}
        module.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
        run(pipe.transformer, calls[:1])
        mask = torch.rand(219, 219) > 0.3
        with torch.no_grad():
            inputs["attention_mask"] = mask
            ours = module(**inputs)
            stock = family_of(pipe).stock("", pipe.transformer)(module, **inputs)
        for a, b in zip(ours, stock, strict=True):
            torch.testing.assert_close(a, b)
        assert session.report().fallbacks == {"a mask was given that may hide more than padding of the text": 1}
    with (
        sparsify(pipe.transformer, "none", dense_steps=0, strict=True),
        torch.no_grad(),
        pytest.raises(ValueError, match="more than padding of the text, and strict=True"),
    ):
        module(**inputs)


class Parallel:
    """diffusers' configuration of context parallelism, as far as anybody asks for it."""

    tensor_parallel_config = None

    def __init__(self, **options):
        self.context_parallel_config = SimpleNamespace(
            **(dict(ring_degree=1, ulysses_degree=1, ulysses_anything=False, ring_anything=False) | options)
        )


@pytest.mark.parametrize("options", [dict(ring_degree=2), dict(ulysses_degree=2, ulysses_anything=True)], ids=str)
def test_a_ring_runs_stock_and_is_counted(options):
    pipe, calls = make("flux"), forwards("flux")
    with sparsify(pipe.transformer, "none", density=0.15, dense_steps=0) as session:
        for module in attentions(pipe).values():
            module.processor._parallel_config = Parallel(**options)
        # The stock processor hands it to diffusers' dispatcher, which wants a mesh.
        with pytest.raises(AttributeError, match="_mesh"):
            run(pipe.transformer, calls[:1])
        (said,) = session.report().fallbacks
        assert said.startswith("context parallelism passes keys around or cuts the sequence unevenly")
    with sparsify(pipe.transformer, "none", dense_steps=0, strict=True):
        for module in attentions(pipe).values():
            module.processor._parallel_config = Parallel(**options)
        with pytest.raises(ValueError, match="passes keys around .*strict=True"):
            run(pipe.transformer, calls[:1])


@pytest.mark.parametrize("name", ["cogvideox-1.5", "mochi", "sd3", "pixart-sigma", "hunyuan-dit"])
def test_context_parallelism_that_attention_never_hears_of_is_refused(name):
    """diffusers would attend to each part of the sequence alone."""
    pipe = make(name)
    pipe.transformer._parallel_config = Parallel(ulysses_degree=2)
    with sparsify(pipe, "none", dense_steps=0), pytest.raises(ValueError, match="attends to a part of it only: use a"):
        generate(name, pipe)


def test_parts_of_a_sequence_that_are_not_told_apart_run_stock():
    pipe = make("hunyuan-video")
    with sparsify(pipe, "none", dense_steps=0) as session:
        generate("hunyuan-video", pipe, steps=2)
        (one, *_) = attentions(pipe).values()
        session.generation.text = (0, 9)
        assert "text comes last" in one.processor.attend.unshardable(2)
        session.generation.text = (9, 0)
        assert one.processor.attend.unshardable(2) is None


@pytest.mark.slow
def test_blocks_compile_to_one_graph_a_kind(name):
    """For all layers, steps and phases."""
    torch._dynamo.reset()
    pipe, counter = make(name), CompileCounterWithBackend("eager")
    with sparsify(pipe, "anchor", density=0.15, dense_steps=1):
        expected = generate(name, pipe, steps=4)
        for block in blocks(pipe):
            block.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(generate(name, pipe, steps=4), expected, atol=1e-5, rtol=1e-5)
    kinds = len({type(block) for block in blocks(pipe)})
    # Blocks of one kind that are built otherwise, as a last one without a text stream, are a kind of their own.
    assert kinds <= counter.frame_count <= len(blocks(pipe))


def blocks(pipe):
    """The modules that hold the attention modules."""
    return [pipe.transformer.get_submodule(name) for name in sorted({n.rpartition(".")[0] for n in attentions(pipe)})]


# ---- what plan goes by ----


def test_the_shape_of_a_model_counts_every_matrix_product(name):
    """Against torch's own count of the blocks of a real transformer."""
    pipe, tiny, calls = make(name), TINY[name], forwards(name)
    counter = FlopCounterMode(display=False)
    # Fused kernels for CPUs are not in its tables; as plain products they are.
    with sdpa_kernel(SDPBackend.MATH), counter:
        run(pipe.transformer, calls[:1])
    counts = counter.get_flop_counts()
    root = type(pipe.transformer).__name__
    names = attentions(pipe)
    whole = sum(sum(counts[f"{root}.{block}"].values()) for block in {name.rpartition(".")[0] for name in names})
    products = sum(n for name in names for op, n in counts[f"{root}.{name}"].items() if "bmm" in str(op))

    made = {"num_frames": 1} | tiny.sizes[0][0]
    family = family_of(pipe)
    shape = family.shape(pipe.transformer.config, made["height"], made["width"], made["num_frames"], pipe.vae.config)
    assert shape.grid == TokenGrid(*tiny.sizes[0][1])
    assert shape.layers == tiny.modules
    assert (shape.text_tokens == 0) or (shape.joint_text == 0)
    assert (shape.joint_text > 0) == any(tiny.text)
    shape = replace(shape, text_tokens=9 if shape.text_tokens else 0, joint_text=sum(tiny.text))
    assert attention_share(shape) == pytest.approx(products / whole, rel=tiny.beside)
    models.check_size(family.size(pipe.transformer.config, pipe.vae.config), **made)
