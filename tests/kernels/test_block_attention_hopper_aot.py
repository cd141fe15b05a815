"""The Hopper kernel compiled for sm_90: copy engine and warpgroup products, and the softmax beside one of them."""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.experimental.gluon import language as gl  # noqa: E402

from dit_sparse.kernels.block_attention_hopper import BLOCK, ROWS, SLOTS, block_attention_hopper_kernel  # noqa: E402
from tests.kernels.aot import Build, Resources, compile_kernels  # noqa: E402

BARE = dict(
    TEXT=False, TAIL=False, SECOND=False, ORDERED=True, SCALE=False, SCALE_PER_ROW=False, RESIDUAL=0, PER_ROW=False
)
EVERYTHING = dict(
    TEXT=True, TAIL=True, SECOND=True, ORDERED=True, SCALE=True, SCALE_PER_ROW=True, RESIDUAL=3, PER_ROW=True
)
# Arguments that only some corrections need, and the flag that says so.
OPTIONAL = {
    "d_tail_k": "TAIL", "d_tail_v": "TAIL", "d_tail_var": "SECOND", "d_routed": "TAIL", "d_weights": "TAIL",
    "p_every": "TEXT", "p_order": "ORDERED", "p_scale": "SCALE", "p_res": "RESIDUAL", "p_res_scale": "RESIDUAL",
}  # fmt: skip


def build(kind: str, dim: int, flags: dict) -> Build:
    def tile(rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], gl.bfloat16)
        return f"tensordesc<{kind}[1,1,{rows},{dim}],{layout!r}>"

    def line(kind: str, bits: int) -> str:
        return f"tensordesc<{kind}[{BLOCK}],{gl.NVMMASharedLayout(0, bits, rank=1)!r}>"

    types = {
        "d_q": tile(ROWS), "d_routed": line("u8", 8), "d_weights": line("fp32", 32),
        "p_out": f"*{kind}", "p_lse": "*fp32", "p_scale": "*fp32", "p_res_scale": "*fp32",
        "p_res": "*u8" if flags["RESIDUAL"] > 1 else f"*{kind}", "scale": "fp32", "limit": "fp32",
    }  # fmt: skip
    constexprs = flags | dict(D=dim, SLOTS=SLOTS, BLOCK=BLOCK, ROWS=ROWS)
    signature = {}
    for name in block_attention_hopper_kernel.arg_names:
        if name in constexprs:
            continue
        if not flags.get(OPTIONAL.get(name, ""), True):
            constexprs[name] = None
        elif name.startswith("d_"):
            signature[name] = types.get(name, tile(BLOCK))
        elif name.startswith("p_"):
            signature[name] = types.get(name, "*i32") + ":16"
        else:
            signature[name] = types.get(name, "i32:16" if name[1:3] == "_s" else "i32")
    return Build(block_attention_hopper_kernel, signature, constexprs, 90, num_warps=4)


@pytest.fixture(scope="module")
def built() -> dict[str, Resources]:
    builds = {
        "bare": build("bf16", 128, BARE),
        "bare, 64 channels": build("fp16", 64, BARE),
        "everything": build("bf16", 128, EVERYTHING),
    }
    return dict(zip(builds, compile_kernels(list(builds.values())), strict=True))


def test_it_uses_what_hopper_has(built):
    for name, used in built.items():
        assert "HGMMA" in used.sass and "UTMALDG" in used.sass, name
        # Twelve warps share 65,536 registers, and the groups that compute take from the one that copies.
        assert used.registers == 168 and "USETMAXREG" in used.sass, name
        assert used.shared_bytes <= 227 * 1024, name


def test_the_main_loop_spills_nothing(built):
    assert not built["bare"].spill_bytes and not built["bare, 64 channels"].spill_bytes
    # The tail holds the queries twice; what it spills is addresses, outside of the loops over blocks.
    assert built["everything"].spill_bytes <= 256


def test_the_exponentials_run_beside_the_product_of_the_values(built):
    """After the logits are waited for (one group of products left), before the values are (none left)."""
    for name, used in built.items():
        marks = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])|(MUFU\.EX2)", used.sass)
        beside, steps = None, []
        for left, _ in marks:
            if left == "0x1":
                beside = 0
            elif not left and beside is not None:
                beside += 1
            elif left == "0x0" and beside is not None:
                steps.append(beside)
                beside = None
        # Two loops in each of two groups; 64 exponentials a thread and step. The tail's wait comes first.
        full = [count for count in steps if count >= 64]
        assert len(full) == 4, f"{name}: {steps}"
