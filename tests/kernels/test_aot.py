"""Every kernel compiles for Ampere, Hopper and Blackwell without spilling, on a machine with no GPU."""

import re
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from dit_sparse.kernels import (
    block_mass,
    block_scores,
    block_select,
    block_stats,
    merge,
    permute,
    quantise,
    tail_weights,
)
from dit_sparse.kernels.tuning import attention_tile, mass_tile
from tests.kernels.aot import Build, Resources, compile_kernels

CAPABILITIES = (80, 90, 100)


def stats(capability: int, dtype: str = "bf16", dim: int = 128, rows: int = 128, channels: int = 64) -> Build:
    out = dict.fromkeys(("mean", "var", "mad"), "*fp32:16")
    strides = dict.fromkeys(("stride_xb", "stride_xh", "stride_xl"), "i32:16")
    sizes = dict.fromkeys(("stride_lb", "L", "H", "N"), "i32")
    return Build(
        block_stats.block_stats_fwd_kernel,
        {"x": f"*{dtype}:16", "lengths": "*i64:16", **out, **strides, **sizes},
        {"stride_ln": 1, "D": dim, "BLOCK": rows, "BT": rows, "BD": channels, "FIELDS": 3},
        capability,
        block_stats.WARPS,
    )


def scores(capability: int, dim: int = 128, by_error: bool = True, text: bool = True) -> Build:
    signature = {
        **dict.fromkeys(("q", "k", "scores"), "*fp32:16"),
        "lengths": "*i64:16",
        "scale": "fp32",
        **dict.fromkeys(("Q", "N", "COLUMNS", "stride_s"), "i32"),
    }
    tile = block_scores.TILE
    constexprs = {"D": dim, "BQ": tile, "BK": tile, "BD": block_scores.CHANNELS}
    for names, there in ((("variances", "deviations"), by_error), (("text",), text)):
        for name in names:
            (signature if there else constexprs)[name] = "*fp32:16" if there else None
    return Build(block_scores.block_scores_fwd_kernel, signature, constexprs, capability, block_scores.WARPS)


def mass(capability: int, dtype: str = "bf16", dim: int = 128, block: int = 128) -> Build:
    signature = {
        **dict.fromkeys(("p_q", "p_k"), f"*{dtype}:16"),
        "p_w": "*fp32:16",
        **dict.fromkeys(("q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st"), "i32:16"),
        **dict.fromkeys(("H", "R", "L", "N"), "i32"),
        "scale": "fp32",
    }
    tile = mass_tile(capability, {"fp32": 4}.get(dtype, 2), dim, block)
    constexprs = {
        "D": dim, "BD": dim, "BR": tile.rows, "BK": tile.columns, "BLOCK": block, "RUN": block_mass.RUN,
        "STAGES": tile.stages,
    }  # fmt: skip
    return Build(block_mass.block_weights_fwd_kernel, signature, constexprs, capability, tile.warps)


def shares(capability: int, parts: int = 4) -> Build:
    signature = {
        **dict.fromkeys(("p_w", "p_o"), "*fp32:16"),
        **dict.fromkeys(("o_sb", "o_sh"), "i64"),
        **dict.fromkeys(("H", "R", "N", "NQ"), "i32"),
    }
    rows = block_mass.SHARED_ROWS // parts
    constexprs = {"PARTS": parts, "BQ": rows, "BN": block_mass.SHARED_BLOCKS}
    return Build(block_mass.block_shares_fwd_kernel, signature, constexprs, capability, 4)


def select(
    capability: int, row: int = 1024, top_p: bool = True, forced: bool = True, logarithms: bool = True
) -> Build:
    signature = {"scores": "*fp32:16", "counts": "*i32:16", "indices": "*i32:16", "top_p": "fp32"}
    constexprs = {"stride_sk": 1, "BN": row, "HAS_TOP_P": top_p, "HAS_FORCED": forced, "LOGARITHMS": logarithms}
    # The rows of block_scores lie so.
    signature |= dict.fromkeys(("stride_sb", "stride_sh", "stride_sq"), "i32:16" if logarithms else "i32")
    strides = []
    if forced:
        signature["forced"] = "*i1"
        strides = ["stride_fb", "stride_fh", "stride_fq"]
    else:
        constexprs |= dict.fromkeys(("forced", "stride_fb", "stride_fh", "stride_fq"))
    signature |= dict.fromkeys([*strides, "least", "most", "H", "Q", "N", "W"], "i32")
    warps = max(row // block_select.SCORES_PER_WARP, 1)
    return Build(block_select.block_select_fwd_kernel, signature, constexprs, capability, warps)


def weights(capability: int, dtype: str = "fp16", dim: int = 128, second: bool = True, by_row: bool = True) -> Build:
    signature = {
        "log_weights": "*fp32:16",
        "out": f"*{dtype}:16",
        **dict.fromkeys(("factor", "limit"), "fp32"),
        **dict.fromkeys(("w_sb", "H", "Q", "N"), "i32"),
        "WIDTH": "i32:16",
    }
    tile, size = tail_weights.TILE, 2 if dtype == "fp16" else 4
    constexprs = {"D": dim, "SECOND": second, "BY_ROW": by_row, "BQ": tile, "BK": tile}
    constexprs["BD"] = tail_weights.CHANNELS[size]
    constexprs["PRECISION"] = "tf32" if dtype == "fp16" else "ieee"
    for name in ("q_mean", "q_var", "variances"):
        (signature if second else constexprs)[name] = "*fp32:16" if second else None
    warps, stages = tail_weights.WARPS[size], tail_weights.STAGES[size]
    return Build(tail_weights.tail_weights_fwd_kernel, signature, constexprs, capability, warps, stages)


def listed(capability: int, by_row: bool = True) -> Build:
    signature = {"out": "*fp16:16", **dict.fromkeys(("counts", "indices"), "*i32:16")}
    signature |= {"STEP": "i32", "WIDTH": "i32:16"}
    constexprs = {"BY_ROW": by_row, "BW": tail_weights.PLACES}
    return Build(tail_weights.listed_fwd_kernel, signature, constexprs, capability, 1)


def gather(capability: int, dtype: str = "bf16", dim: int = 128, padded: int = 128) -> Build:
    signature = {
        **dict.fromkeys(("xs", "ys"), (f"*{dtype}:16",) * 3),
        **dict.fromkeys(("x_strides", "y_strides"), (("i32:16",) * 3,) * 3),
        "index": "*i64:16",
        **dict.fromkeys(("n", "L", "H"), "i32"),
    }
    constexprs = {"D": dim, "BT": permute.TILE // padded, "BD": padded}
    return Build(permute.permute_fwd_kernel, signature, constexprs, capability, permute.WARPS)


def pooled(capability: int, dtype: str = "bf16", dim: int = 128, block: int = 128) -> Build:
    signature = {
        **dict.fromkeys(("xs", "ys"), (f"*{dtype}:16",) * 3),
        "stats": (("*fp32:16",) * 3,) * 3,
        **dict.fromkeys(("x_strides", "y_strides"), (("i32:16",) * 3,) * 3),
        **dict.fromkeys(("index", "lengths"), "*i64:16"),
        **dict.fromkeys(("n", "L", "H", "N"), "i32"),
    }
    constexprs = {"D": dim, "BT": block, "BD": min(dim, permute.TILE // block), "FIELDS": (3, 3, 2)}
    return Build(permute.permute_pooled_fwd_kernel, signature, constexprs, capability, permute.WARPS)


def merged(capability: int, dtype: str = "bf16", dim: int = 128) -> Build:
    signature = {
        **dict.fromkeys(("p_o", "p_other"), f"*{dtype}:16"),
        **dict.fromkeys(("p_l", "p_other_l"), "*fp32:16"),
        **{f"{x}_s{axis}": "i32:16" for x in "ox" for axis in "bht"},
        **{f"{x}_s{axis}": "i32" for x in "ly" for axis in "bh"},
        **dict.fromkeys(("H", "L"), "i32"),
    }
    constexprs = {"D": dim, "BD": dim, "BM": merge.TILE // dim}
    return Build(merge.merge_fwd_kernel, signature, constexprs, capability, merge.WARPS)


def tailed(capability: int, dtype: str = "bf16", dim: int = 128) -> Build:
    size = 4 if dtype == "fp32" else 2
    tile = attention_tile(capability, size, dim, 128)
    signature = {
        **dict.fromkeys(("p_q", "p_o", "p_tail_k", "p_tail_v", "p_found"), f"*{dtype}:16"),
        "p_l": "*fp32:16",
        "p_weights": f"*{'fp32' if size == 4 else 'fp16'}:16",
        **{f"{x}_s{axis}": "i32:16" for x in "qof" for axis in "bht"},
        **{f"l_s{axis}": "i32" for axis in "bh"},
        **dict.fromkeys(("H", "L", "NQ", "NK"), "i32"),
        "scale": "fp32",
    }
    constexprs = {"D": dim, "BD": dim, "BLOCK": 128, "BM": tile.rows, "BN": tile.columns}
    constexprs["PRECISION"] = "ieee" if size == 4 else "tf32"
    return Build(merge.with_tail_fwd_kernel, signature, constexprs, capability, tile.warps, tile.stages)


def in_8bit(kernel: Any, x: str, codes: str, *sizes: str, masked: bool = False) -> Build:
    names = kernel.arg_names
    constexprs = {"D": 128, "BLOCK": quantise.BLOCK}
    if "MASKED" in names:
        constexprs |= {"MASKED": masked} | ({} if masked else {"p_mask": None})
    signature = {
        **{x: "*bf16:16", "p_codes": codes},
        **{name: "*fp32:16" for name in ("p_mean", "p_unit", "p_shift") if name in names},
        **dict.fromkeys(("s_b", "s_h", "s_t"), "i32:16"),
        **dict.fromkeys(("H", "L", *sizes), "i32"),
        **({"scale": "fp32"} if "scale" in names else {}),
        **({"p_mask": "*u8:16"} if masked else {}),
    }
    return Build(kernel, signature, constexprs, 90, quantise.WARPS)


# They serve a kernel for Hopper.
IN_8BIT = [
    in_8bit(quantise._queries_kernel, "p_q", "*i8:16"),
    *(in_8bit(quantise._keys_kernel, "p_k", "*i8:16", "VISION", "blocks", masked=m) for m in (False, True)),
    *(in_8bit(quantise._values_kernel, "p_v", "*fp8e4nv:16", "VISION", "blocks", masked=m) for m in (False, True)),
]
MADE = (stats, scores, mass, select, weights, listed, gather, pooled, merged, tailed)
USUAL = [make(capability) for capability in CAPABILITIES for make in MADE]
USUAL += IN_8BIT
USUAL += [weights(80, "fp32", by_row=False), tailed(80, "fp32"), tailed(80, "fp32", 64)]
USUAL += [tailed(capability, dim=64) for capability in CAPABILITIES]
# A tile of 8192 numbers in one warp is 256 a thread, and a thread has 255 registers.
SPILLING = replace(stats(90, "fp32"), num_warps=1)


@pytest.fixture(scope="module")
def usual() -> list[Resources]:
    return compile_kernels([*USUAL, SPILLING])


def assert_fits(build: Build, used: Resources) -> None:
    assert used.spill_bytes == 0, (build, used.registers)
    # A multiprocessor has 65536 registers: two programs of four warps must fit, or one of eight.
    assert used.registers * build.num_warps * 32 <= 32768 * (1 + build.num_warps // 8), (build, used.registers)
    # 8.6, 8.9 and 12.0 run what is for 8.0, with less shared memory.
    assert used.shared_bytes <= {80: 99}.get(build.capability, 227) * 1024, (build, used.shared_bytes)


def test_usual_shapes_fit(usual: list[Resources]) -> None:
    for build, used in zip(USUAL, usual, strict=False):
        assert_fits(build, used)


def test_memory_is_read_16_bytes_at_a_time(usual: list[Resources]) -> None:
    for build, used in zip(USUAL, usual, strict=False):
        if build.fn in (
            block_scores.block_scores_fwd_kernel,
            block_stats.block_stats_fwd_kernel,
            permute.permute_fwd_kernel,
            permute.permute_pooled_fwd_kernel,
        ):
            assert re.search(r"LDG\.E\.128|LDGSTS\.E\.BYPASS\.[A-Z.]*128", used.sass), build


def test_scores_are_products_of_whole_float32(usual: list[Resources]) -> None:
    for build, used in zip(USUAL, usual, strict=False):
        if build.fn is block_scores.block_scores_fwd_kernel:
            products, loads = (len(re.findall(rf"\b{name}", used.sass)) for name in ("FFMA", "LDS"))
            # Tensor cores would round what they multiply. A thread multiplies what it reads several times.
            assert not re.search(r"\b(HMMA|HGMMA|UTCHMMA)", used.sass), build
            assert products >= 8 * loads, (build, products, loads)


def test_8_bit_codes_are_16_bytes_a_store_and_no_conversions(usual: list[Resources]) -> None:
    for build, used in zip(USUAL, usual, strict=False):
        if build in IN_8BIT:
            assert "STG.E.128" in used.sass and used.sass.count("F2I") < 4, build
            # Three programs of eight warps fit a multiprocessor.
            assert used.registers <= 80, (build, used.registers)


def test_the_helper_sees_spills(usual: list[Resources]) -> None:
    assert usual[-1].spill_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_extreme_shapes_fit(capability: int) -> None:
    builds = [
        stats(capability, "fp32"),
        stats(capability, "fp32", 256, 64, 64),
        stats(capability, "fp32", 8, 1024, 8),
        stats(capability, "fp16", 40, 16, 64),
        scores(capability, 40, by_error=False),
        scores(capability, 256, text=False),
        mass(capability, "fp32", 128),
        mass(capability, "fp32", 256, 16),
        mass(capability, dim=64, block=32),
        mass(capability, dim=256, block=64),
        mass(capability, dim=256, block=128),
        mass(capability, block=16),
        shares(capability),
        shares(capability, 1),
        select(capability, 1024, logarithms=False),
        select(capability, 16, top_p=False, forced=False),
        select(capability, 256),
        select(capability, 8192),
        weights(capability, "fp32", by_row=False),
        weights(capability, "fp32", 40, by_row=False),
        weights(capability, dim=256, by_row=False),
        weights(capability, second=False),
        listed(capability, by_row=False),
        gather(capability, "fp32"),
        gather(capability, "fp32", 256, 256),
        gather(capability, "fp16", 72, 128),
        pooled(capability, "fp32"),
        pooled(capability, "fp16", 64, 32),
    ]
    for build, used in zip(builds, compile_kernels(builds), strict=True):
        assert_fits(build, used)
