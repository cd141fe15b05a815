"""dense_attention against kernels/reference.py in float64, for every backend that runs here."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.kernels import block_attention, reference
from dit_sparse.kernels import dense_attention as module
from dit_sparse.kernels.dense_attention import dense_attention, dense_backend
from dit_sparse.plan import BlockPlan
from tests.close import assert_no_worse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["auto", "block", "cudnn", "flash"] if GPU else ["auto", "block", "cpu"]


def inputs(batch=2, heads=3, queries=70, keys=150, dim=64, strided=False):
    q, k, v = (torch.randn(batch, n, heads, dim, dtype=torch.float64).transpose(1, 2) for n in (queries, keys, keys))
    return [x.to(DEVICE) if strided else x.contiguous().to(DEVICE) for x in (q, k, v)]


def exact(q, k, v, scale, key_mask=None):
    plan = BlockPlan.full(*q.shape[:2], 1, 1, q.device)
    block = max(q.shape[2], k.shape[2])
    return reference.block_attention(q, k, v, plan, None, block=block, scale=scale, key_mask=key_mask)


@pytest.mark.skipif(GPU, reason="the GPU kernels have no float64")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_reference_in_float64(backend, strided, masked):
    q, k, v = inputs(strided=strided)
    mask = torch.rand(2, k.shape[2], device=DEVICE) < 0.6 if masked else None
    actual = dense_attention(q, k, v, scale=0.3, key_mask=mask, backend=backend)
    for a, e in zip(actual, exact(q, k, v, 0.3, mask), strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True, "the last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_pytorchs(backend, masked, dtype):
    if backend in ("cudnn", "flash") and (masked or dtype == torch.float32):
        pytest.skip("torch's GPU kernels take 16-bit floats and no key mask")
    q, k, v = (x.to(dtype) for x in inputs(strided=True))
    mask = torch.rand(2, 33 if masked == "the last" else k.shape[2], device=DEVICE) < 0.6 if masked else None
    out, lse = dense_attention(q, k, v, key_mask=mask, backend=backend)
    if masked == "the last":
        mask = torch.cat([mask.new_ones(2, k.shape[2] - 33), mask], 1)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    eager = exact(q, k, v, 64**-0.5, mask)
    true = exact(q.double(), k.double(), v.double(), 64**-0.5, mask)
    assert_no_worse(out, eager[0], true[0])
    assert_no_worse(lse, eager[1], true[1])


@pytest.mark.parametrize("last", [0, 1, 33, 69, 70, 149])
@pytest.mark.parametrize("backend", ["auto", "block"])
def test_a_mask_of_the_last_keys_is_one_that_shows_all_others(backend, last):
    q, k, v = (x.float() for x in inputs(strided=True))
    mask = torch.rand(2, last, device=DEVICE) < 0.6
    whole = torch.cat([mask.new_ones(2, k.shape[2] - last), mask], 1)
    got = dense_attention(q, k, v, key_mask=mask, backend=backend)
    wanted = dense_attention(q, k, v, key_mask=whole, backend=backend)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "block"])
def test_a_row_that_sees_no_key_is_zero(backend):
    q, k, v = (x.float() for x in inputs())
    mask = torch.ones(2, k.shape[2], dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out, lse = dense_attention(q, k, v, key_mask=mask, backend=backend)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()
    assert out[0].isfinite().all() and lse[0].isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "block"])
def test_a_masked_key_has_no_influence(backend):
    q, k, v = (x.float() for x in inputs())
    mask = torch.rand(2, k.shape[2], device=DEVICE) < 0.6
    before = dense_attention(q, k, v, key_mask=mask, backend=backend)
    hidden = ~mask[:, None, :, None].expand_as(k)
    after = dense_attention(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), key_mask=mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "dim", "masked", "expected"),
    [
        ((9, 0), True, torch.bfloat16, 128, False, "fa4"),
        ((10, 0), True, torch.float16, 64, False, "fa4"),
        ((9, 0), False, torch.bfloat16, 128, False, "block"),
        ((9, 0), False, torch.float16, 128, False, "cudnn"),
        ((9, 0), False, torch.bfloat16, 64, False, "block"),
        ((9, 0), False, torch.bfloat16, 96, False, "cudnn"),
        ((10, 0), False, torch.bfloat16, 128, False, "cudnn"),
        ((9, 0), True, torch.bfloat16, 80, False, "cudnn"),
        ((12, 0), True, torch.bfloat16, 128, False, "cudnn"),
        ((9, 0), True, torch.bfloat16, 256, False, "flash"),
        ((8, 0), True, torch.bfloat16, 128, False, "flash"),
        ((7, 5), False, torch.float16, 128, False, "block"),
        ((9, 0), True, torch.float32, 128, False, "block"),
        ((9, 0), True, torch.bfloat16, 128, True, "block"),
    ],
)
def test_the_fastest_kernel_that_takes_the_inputs(monkeypatch, capability, installed, dtype, dim, masked, expected):
    def version(distribution):
        if distribution != "flash-attn-4" or not installed:
            raise module.PackageNotFoundError(distribution)
        return "4.0.0"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(module, "version", version)
    monkeypatch.setattr(module, "lists_turn", lambda device, tiles, keys, head_dim: False)
    dense_backend.cache_clear()
    try:
        assert dense_backend(torch.device("cuda"), dtype, dim, module.LONG, 24, masked) == expected
    finally:
        dense_backend.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "dtype", "expected"),
    [
        (75_600, 40, 128, torch.bfloat16, "block"), (32_760, 40, 128, torch.bfloat16, "fa4"),
        (75_600, 40, 64, torch.bfloat16, "fa4"), (151_200, 40, 64, torch.bfloat16, "block"),
        (75_600, 40, 128, torch.float16, "fa4"), (200_000, 40, 96, torch.bfloat16, "fa4"),
        (75_600, 7, 128, torch.bfloat16, "fa4"), (75_600, 8, 128, torch.bfloat16, "block"),
    ],
)  # fmt: skip
def test_beside_flash_attention_4_the_block_kernel_is_for_many_heads_that_outgrow_the_cache(
    tokens, heads, dim, dtype, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = SimpleNamespace(L2_cache_size=50 * 2**20, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(module, "version", lambda distribution: "4.0.0")
    dense_backend.cache_clear()
    try:
        assert dense_backend(torch.device("cuda"), dtype, dim, tokens, heads) == expected
    finally:
        dense_backend.cache_clear()


@pytest.mark.parametrize(
    ("changed", "once"),
    [({}, True), ({"capability": (10, 0)}, False), ({"dtype": torch.float32}, False), ({"dim": 96}, False),
     ({"block": 64}, False), ({"tokens": module.LONG - 1}, False), ({"device": "cpu"}, False)],
    ids=str,
)  # fmt: skip
def test_where_anchors_visit_each_pair_once(changed, once, monkeypatch):
    x = dict(capability=(9, 0), device="cuda", dtype=torch.float16, dim=64, block=128, tokens=module.LONG) | changed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: x["capability"])
    assert module.visits_once(torch.device(x["device"]), x["dtype"], x["dim"], x["block"], x["tokens"]) is once


@pytest.mark.parametrize("without", ["Hopper's kernel", "its Triton", "many tokens"])
def test_without_the_hopper_kernel_or_its_lead_dense_is_cudnn(without, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    if without == "Hopper's kernel":
        monkeypatch.setattr(block_attention, "hopper_tiles", None)
    elif without == "its Triton":
        monkeypatch.setattr(block_attention.hopper_tiles, "TRITON", (3, 5))
    tokens = module.LONG - (without == "many tokens")
    dense_backend.cache_clear()
    try:
        assert dense_backend(torch.device("cuda"), torch.bfloat16, 128, tokens, 24) == "cudnn"
    finally:
        dense_backend.cache_clear()


def test_no_flash_attention_installed_is_no_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr("sys.path", [])
    dense_backend.cache_clear()
    try:
        assert dense_backend(torch.device("cuda"), torch.bfloat16, 128, module.LONG, 24) == "cudnn"
    finally:
        dense_backend.cache_clear()


def test_the_cpu_kernel_is_the_cpus():
    assert dense_backend(torch.device("cpu"), torch.bfloat16, 128, module.LONG, 24, True) == "cpu"


@pytest.mark.parametrize("backend", ["fa4", "cudnn", "flash"])
def test_a_named_backend_never_falls_back(backend):
    q, k, v = (x.float().cpu() for x in inputs())
    with pytest.raises(ValueError, match=f"{backend}' does not run on cpu"):
        dense_attention(q, k, v, backend=backend)


def test_an_unknown_backend_is_an_error():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="Unknown dense kernel 'fa3': choose from auto, fa4"):
        dense_attention(q, k, v, backend="fa3")


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 151, dtype=torch.bool), torch.ones(1, 150, dtype=torch.bool), torch.ones(2, 150)]
)
def test_a_mask_that_does_not_fit_is_an_error(mask):
    q, k, v = inputs()
    with pytest.raises(ValueError, match="key_mask must be bool"):
        dense_attention(q, k, v, key_mask=mask.to(DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash", "fa4"])
def test_a_backend_without_masks_says_so(backend):
    q, k, v = (x.bfloat16() for x in inputs())
    with pytest.raises(ValueError, match="takes no key mask"):
        dense_attention(q, k, v, key_mask=torch.ones(2, 150, dtype=torch.bool, device=DEVICE), backend=backend)
