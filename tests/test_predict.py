import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_sparse import models, predict
from dit_sparse.attention import sparse_attention
from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenGrid
from dit_sparse.pipelines.session import FAMILIES, sparsify
from dit_sparse.predict import ModelShape
from dit_sparse.state import Generation, Layer
from tests.tiny import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelShape(TokenGrid(4, 16, 16), heads=3, head_dim=32, layers=4, ffn_dim=200, text_tokens=7)


def published(name: str, height: int, width: int) -> ModelShape:
    model = models.published(name)
    return FAMILIES[model.class_name].shape(model.transformer, height, width, model.num_frames, model.vae)


def test_attention_share_counts_every_matrix_product():
    """Against torch's own count of a real transformer's forward, embeddings and the output projection left out."""
    pipe = tiny_wan(text=False, heads=2, layers=2)
    counter = FlopCounterMode(display=False)
    # Fused kernels for CPUs are not in its tables; as plain products they are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        pipe.transformer(
            hidden_states=torch.zeros(1, 16, 5, 16, 16),
            timestep=torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, 512, 32),
        )
    counts = counter.get_flop_counts()
    blocks = {name: ops for name, ops in counts.items() if re.search(r"\.blocks\.\d+$", name)}
    assert len(blocks) == 2
    whole = sum(sum(ops.values()) for ops in blocks.values())
    self_attention = sum(
        count
        for name, ops in counts.items()
        if name.endswith(".attn1")
        for op, count in ops.items()
        if "bmm" in str(op)
    )
    shape = FAMILIES["WanTransformer3DModel"].shape(pipe.transformer.config, 16, 16, 5, pipe.vae.config)
    assert shape.grid == TokenGrid(5, 8, 8)
    assert predict.attention_share(shape) == pytest.approx(self_attention / whole, rel=1e-6)


def test_attention_share_has_the_order_that_was_measured():
    """Of one forward on an H200, self-attention took 66 % for 14B at 720p, 51 % for 1.3B and 46 % for 14B at 480p."""
    large = predict.attention_share(published("wan2.1-14b", 720, 1280))
    narrow = predict.attention_share(published("wan2.1-1.3b", 480, 832))
    small = predict.attention_share(published("wan2.1-14b", 480, 832))
    assert 0.6 < large < 0.75 and 0.4 < small < 0.55
    assert large > narrow > small


def test_dense_everything_gains_nothing():
    for config in (SparseConfig(method="dense"), SparseConfig(dense_steps=1.0), SparseConfig(dense_layers=4)):
        said = predict.predict(SMALL, config, 10)
        assert said.work == pytest.approx(1) and said.best == pytest.approx(1) == said.expected
        assert not said.pays
    assert predict.predict(SMALL, SparseConfig(method="dense"), 10).state == {}


def test_no_attention_is_the_ceiling():
    said = predict.predict(SMALL, SparseConfig(method="none", density=1e-6, dense_steps=0), 10)
    assert said.work == pytest.approx(1 / said.blocks)
    assert said.best < said.ceiling == pytest.approx(1 / (1 - said.attention_share))


@pytest.mark.parametrize(
    ("options", "work"),
    [
        (dict(method="none", dense_steps=0), 0.125),
        (dict(method="none", dense_steps=4), 0.2 + 0.8 * 0.125),
        (dict(method="none", dense_steps=0, dense_layers=1), 0.25 + 0.75 * 0.125),
        (dict(method="tail", dense_steps=0), 0.125 + 1 / 16),
        # Steps 0 to 3 dense; 4, 8, 12 and 16 anchors, which compute both; 12 sparse.
        (dict(method="anchor", dense_steps=4), (4 + 4 + 16 * (0.125 + 1 / 16)) / 20),
        (dict(method="anchor", dense_steps=4, refresh_every=8), (4 + 2 + 16 * (0.125 + 1 / 16)) / 20),
        (
            dict(method="anchor", dense_steps=4, anchor_density=0.5),
            (4 + 1 + 3 * (0.5 + 1 / 16) + 16 * (0.125 + 1 / 16)) / 20,
        ),
        # Step 10 in the middle is dense, and an anchor for that.
        (
            dict(method="anchor", dense_steps="0-3,10", anchor_density=0.5),
            (4 + 1 + 1 + 3 * (0.5 + 1 / 16) + 16 * (0.125 + 1 / 16)) / 20,
        ),
        (dict(method="reshape", dense_steps=0), (4 + 20 * 0.125) / 20),
        (dict(method="rectify", dense_steps=0, refresh_every=5), (4 + 16 * 0.125) / 20),
    ],
)
def test_work_by_hand(options, work):
    said = predict.predict(SMALL, SparseConfig(density=0.125, block=16, **options), 20)
    assert said.blocks == 64
    assert said.work == pytest.approx(work)


@pytest.mark.parametrize(
    ("options", "work"),
    [
        # An anchor is dense, and pooled keys besides.
        (dict(method="anchor", dense_steps=4), (4 + 4 * (1 + 1 / 16) + 12 * (0.125 + 1 / 16)) / 20),
        (
            dict(method="anchor", dense_steps=4, anchor_density=0.5),
            (4 + (1 + 1 / 16) + 3 * (0.5 + 2 / 16) + 12 * (0.125 + 1 / 16)) / 20,
        ),
        (dict(method="reshape", dense_steps=0), (4 + 16 * 0.125) / 20),
        (dict(method="tail", dense_steps=0), 0.125 + 1 / 16),
    ],
)
def test_work_where_anchors_visit_each_pair_once(options, work):
    config = SparseConfig(density=0.125, block=16, **options)
    assert sum(predict.attention_work(SMALL, config, 20, visits_once=True)) == pytest.approx(work)


def test_padding_is_work():
    ragged = replace(SMALL, grid=TokenGrid(1, 5, 5))
    said = predict.predict(ragged, SparseConfig(method="none", density=1.0, block=16, dense_steps=0), 4)
    assert said.work == pytest.approx((32 / 25) ** 2)


@pytest.mark.parametrize(
    ("method", "block", "key_block"),
    [
        *((method, 16, 16) for method in ("none", "tail", "anchor", "reshape", "rectify")),
        *((method, 32, 16) for method in ("none", "tail", "anchor", "reshape")),
    ],
)
def test_prediction_is_what_a_run_reports(method, block, key_block):
    """Top-k leaves the query block's own out at times, and it is forced in; hence the margin of one block a row."""
    sizes = {"key_block": key_block} if key_block < block else {}
    config = SparseConfig(method=method, density=0.2, block=block, **sizes, dense_layers=1, dense_steps=2)
    pipe = tiny_wan(text=False, layers=3)
    pipe.set_progress_bar_config(disable=True)
    with sparsify(pipe, config) as session:
        pipe(
            prompt_embeds=torch.zeros(1, 512, 32),
            negative_prompt_embeds=torch.ones(1, 512, 32),
            height=16,
            width=32,
            num_frames=4,
            num_inference_steps=8,
            output_type="latent",
        )
        report = session.report()
    shape = FAMILIES["WanTransformer3DModel"].shape(pipe.transformer.config, 16, 32, 5, pipe.vae.config)
    said = predict.predict(shape, config, 8)
    assert said.phases == tuple(step.phase for step in report.steps)
    assert said.work <= report.work <= said.work + block // key_block / said.blocks
    if config.learns:
        # float32 residuals would be twice that; the run stores what it says it does.
        assert said.state[report.residual] == report.state_bytes
    else:
        assert said.state == {} and report.state_bytes == 0


def test_state_of_the_published_models():
    """Wan 14B at 720p, 40 layers, both branches: 62 GB in bf16, 31 GB in fp8, 15.5 GB in int4, plans not counted."""
    shape = published("wan2.1-14b", 720, 1280)
    plan = 40 * 2 * 40 * 591 * (59 + 2) * 4
    state = predict.state_bytes(shape, SparseConfig())
    rows = 40 * 2 * 40 * 75600
    assert state == {"bf16": rows * 256 + plan, "fp8": rows * 132 + plan, "int4": rows * 68 + plan}
    assert state["bf16"] - plan == pytest.approx(62e9, rel=0.01)
    halves = predict.state_bytes(replace(shape, branches=1), SparseConfig())
    assert halves["fp8"] * 2 == state["fp8"]
    assert predict.state_bytes(shape, SparseConfig(dense_layers=10))["fp8"] * 4 == state["fp8"] * 3


@pytest.mark.parametrize("options", [{"density": 1.0}, {"top_p": 0.5}, {"neighbours": True}, {"first_frame": True}])
def test_state_is_what_is_remembered_whatever_a_plan_has_room_for(options):
    config = SparseConfig("anchor", dense_steps=0, residual="fp8", **options)
    shape = replace(SMALL, grid=TokenGrid(3, 5, 7), heads=2, head_dim=16, layers=1, branches=1)
    g = Generation(config, [Layer("blocks.0.attn1", 0, 1, 2, 16)])
    g.enter(shape.grid, batch=1, device=torch.device("cpu"), timestep=0.0, step=0, branch="cond")
    sparse_attention(*torch.randn(3, 1, 2, 105, 16), g.layers[0], g)
    assert predict.state_bytes(shape, config)["fp8"] == g.peak_state_bytes


def test_whether_it_pays_follows_the_expected_speed_up():
    assert predict.predict(published("wan2.1-14b", 720, 1280), SparseConfig(), 50).pays
    assert not predict.predict(published("wan2.1-14b", 128, 128), SparseConfig(), 50).pays
    said = predict.predict(published("wan2.1-14b", 720, 1280), SparseConfig(), 50)
    assert 1 < said.expected < said.best < said.ceiling


def test_steps_and_layers_beyond_the_run_are_refused():
    with pytest.raises(ValueError, match="dense_steps: '9' in '0,9' lies outside 0..7"):
        predict.predict(SMALL, SparseConfig(dense_steps="0,9"), 8)
    with pytest.raises(ValueError, match="dense_layers: '5-6' in '5-6,1' lies outside 0..3"):
        predict.predict(SMALL, SparseConfig(dense_layers="5-6,1"), 8)
