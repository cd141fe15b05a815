"""The Hopper kernel compiled for sm_90: copy engine and warpgroup products, and the softmax beside one of them."""

import re
from itertools import pairwise

import pytest

triton = pytest.importorskip("triton")

from triton.experimental.gluon import language as gl  # noqa: E402

from dit_sparse.kernels import block_attention_hopper8 as hopper8  # noqa: E402
from dit_sparse.kernels.block_attention_hopper import BLOCK, ROWS, SHAPES, block_attention_hopper_kernel  # noqa: E402
from tests.kernels.aot import Build, Resources, compile_kernels  # noqa: E402

BARE = dict.fromkeys(
    ("TEXT", "MASKED", "TAIL", "SCATTER", "SCALE", "SCALE_PER_ROW", "RESIDUAL", "PER_ROW", "COPIED", "TURNED"), False
)
ANCHOR = BARE | dict(TAIL=True, SCATTER=True, RESIDUAL=2, PER_ROW=True, COPIED=True, TURNED=True)
EVERYTHING = ANCHOR | dict(TEXT=True, MASKED=True, SCALE=True, SCALE_PER_ROW=True, RESIDUAL=3)
# Arguments that only some corrections need, and the flag that says so.
OPTIONAL = {
    "d_tail_k": "TAIL", "d_tail_v": "TAIL", "d_weights": "TAIL", "d_codes": "COPIED", "p_every": "TEXT",
    "p_text_mask": "MASKED", "p_scatter": "SCATTER", "p_scale": "SCALE", "p_res": "RESIDUAL",
    "p_res_scale": "RESIDUAL",
}  # fmt: skip


def build(kind: str, dim: int, flags: dict, key_block: int = BLOCK) -> Build:
    def tile(rows: int, columns: int = dim) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.bfloat16)
        return f"tensordesc<{kind}[1,1,{rows},{columns}],{layout!r}>"

    def bytes_(kind: str, rows: int, width: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], gl.uint8)
        return f"tensordesc<{kind}[1,1,{rows},{width}],{layout!r}>"

    def line(kind: str, bits: int) -> str:
        return f"tensordesc<{kind}[{BLOCK}],{gl.NVMMASharedLayout(0, bits, rank=1)!r}>"

    types = {
        "d_q": tile(ROWS), "d_codes": bytes_("u8", ROWS, dim if flags["RESIDUAL"] == 2 else dim // 2),
        "d_weights": line("fp16", 16),
        "p_out": f"*{kind}", "p_lse": "*fp32", "p_text_mask": "*u8", "p_scatter": "*i64", "p_scale": "*fp32",
        "p_res_scale": "*fp32", "p_res": "*u8" if flags["RESIDUAL"] in (2, 3) else f"*{kind}", "scale": "fp32",
    }  # fmt: skip
    halves = key_block < BLOCK
    types |= dict.fromkeys(("d_k", "d_v"), tile(key_block, 64 if halves else dim))
    constexprs = flags | dict(D=dim, HALVES=halves, **SHAPES[dim], FIXED=kind == "bf16", BLOCK=BLOCK, ROWS=ROWS)
    signature = {}
    for name in block_attention_hopper_kernel.arg_names:
        if name in constexprs:
            continue
        if not flags.get(OPTIONAL.get(name, ""), True) or (name == "p_res" and flags["COPIED"]):
            constexprs[name] = None
        elif name.startswith("d_"):
            signature[name] = types.get(name, tile(BLOCK))
        elif name.startswith("p_"):
            signature[name] = types.get(name, "*i32") + ":16"
        else:
            signature[name] = types.get(name, "i32:16" if name[1:3] == "_s" else "i32")
    return Build(block_attention_hopper_kernel, signature, constexprs, 90, num_warps=4)


def build_8bit(flags: dict) -> Build:
    def tile(kind: str, rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], gl.uint8)
        return f"tensordesc<{kind}[1,1,{rows},{columns}],{layout!r}>"

    def line(kind: str, bits: int, length: int) -> str:
        return f"tensordesc<{kind}[{length}],{gl.NVMMASharedLayout(0, bits, rank=1)!r}>"

    keys, values, unit = tile("i8", BLOCK, 128), tile("fp8e4nv", BLOCK, 128), line("fp32", 32, 32)
    types = {
        "d_q": tile("i8", ROWS, 128), "d_k": keys, "d_tail_k": keys, "d_v": values, "d_tail_v": values,
        "d_unit": unit, "d_tail_unit": unit, "d_weights": line("fp16", 16, BLOCK),
        "d_codes": tile("u8", ROWS, 128 if flags["RESIDUAL"] == 2 else 64),
        "p_out": "*bf16", "p_text_mask": "*u8", "p_res": "*u8" if flags["RESIDUAL"] in (2, 3) else "*bf16",
        "p_scatter": "*i64", "scale": "fp32",
    }  # fmt: skip
    floats = ("p_lse", "p_q_unit", "p_q_shift", "p_v_unit", "p_scale", "p_res_scale")
    types |= dict.fromkeys(floats, "*fp32")
    optional = OPTIONAL | {"d_tail_unit": "TAIL"}
    constexprs = flags | dict(D=128, SLOTS=hopper8.SLOTS, BLOCK=BLOCK, ROWS=ROWS)
    del constexprs["TURNED"]
    signature = {}
    for name in hopper8.block_attention_hopper8_kernel.arg_names:
        if name in constexprs:
            continue
        if not flags.get(optional.get(name, ""), True) or (name == "p_res" and flags["COPIED"]):
            constexprs[name] = None
        elif name.startswith("p_"):
            signature[name] = types.get(name, "*i32") + ":16"
        else:
            signature[name] = types.get(name, "i32:16" if name[1:3] == "_s" else "i32")
    return Build(hopper8.block_attention_hopper8_kernel, signature, constexprs, 90, num_warps=4)


@pytest.fixture(scope="module")
def built() -> dict[str, Resources]:
    builds = {
        "bare": build("bf16", 128, BARE),
        "bare, 64 channels": build("fp16", 64, BARE),
        "everything": build("bf16", 128, EVERYTHING),
        "fp16": build("fp16", 128, BARE | dict(RESIDUAL=4, PER_ROW=True)),
        "halves": build("bf16", 128, EVERYTHING, 64),
        "halves, 64 channels": build("fp16", 64, BARE | dict(TEXT=True), 64),
    }
    return dict(zip(builds, compile_kernels(list(builds.values())), strict=True))


def test_it_uses_what_hopper_has(built):
    for name, used in built.items():
        assert "HGMMA" in used.sass and "UTMALDG" in used.sass, name
        # Twelve warps share 65,536 registers, and the groups that compute take from the one that copies.
        assert used.registers == 168 and "USETMAXREG" in used.sass, name
        assert used.shared_bytes <= 227 * 1024, name
        # Where it cannot have two products under way, the assembler waits behind each.
        products, waits = (len(re.findall(what, used.sass)) for what in (r"\bHGMMA", r"WARPGROUP\.DEPBAR"))
        assert waits <= products // 4, (name, waits, products)


def test_next_to_nothing_is_spilled(built):
    # Of 240 registers 192 hold logits, output and two blocks' probabilities; what does not fit is addresses and
    # counters. Triton 3.6 spills 32 bytes there, 3.9 200, nearly all before the loop over blocks.
    assert built["bare"].spill_bytes <= 200
    # Two blocks' logits, output and queries take 176 there: 3.6 spills nothing, 3.9 ten registers of addresses.
    assert built["bare, 64 channels"].spill_bytes <= 40
    # The tail holds the queries twice; what it spills lies outside of the loops over blocks.
    assert built["everything"].spill_bytes <= 288
    assert built["halves"].spill_bytes <= 320 and built["halves, 64 channels"].spill_bytes <= 24


def test_the_exponentials_run_beside_the_product_of_the_values(built):
    """After the logits are waited for (one group of products left), before the next wait; with bfloat16 no maximum is
    looked for there but where tiles are done again."""
    for name, used in built.items():
        marks = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])|(MUFU\.EX2)|\b(FMNMX)", used.sass)
        waits = [i for i, (left, _, _) in enumerate(marks) if left]
        steps = [marks[i + 1 : j] for i, j in pairwise(waits) if marks[i][0] == "0x1"]
        # 64 exponentials a thread and block, in each of two groups: of a round and of one block.
        full = [step for step in steps if sum(bool(e) for _, e, _ in step) >= 64]
        plain = [step for step in full if not any(m for _, _, m in step)]
        blocks = 2 * (SHAPES[64 if "64" in name else 128]["ROUND"] + 1)
        # The same of pooled ones. Of a tile that is done again, the last may wait.
        everything = name in ("everything", "halves")
        most = blocks * (2 if everything else 1)
        fixed = everything or name == "bare"
        assert len(plain) == (most if fixed else 0), f"{name}: {len(plain)} of {len(full)} look for no maximum"
        assert blocks <= len(full) - len(plain) <= most, f"{name}: {[len(step) for step in steps]}"


def test_8_bits():
    """Products in both 8-bit types that do not wait for one another, no copy through shared memory between them, and
    few registers too many."""
    bare, anchor, everything = compile_kernels([build_8bit(BARE), build_8bit(ANCHOR), build_8bit(EVERYTHING)])
    for used, spill in ((bare, 160), (anchor, 176), (everything, 480)):
        assert "IGMMA" in used.sass and "QGMMA" in used.sass and "UTMALDG" in used.sass
        assert used.registers == 168 and used.spill_bytes <= spill and used.shared_bytes <= 227 * 1024
        # Where registers do not suffice, the assembler waits behind each product.
        products, waits = (len(re.findall(what, used.sass)) for what in (r"\b[IQ]GMMA", r"WARPGROUP\.DEPBAR"))
        assert waits <= products // 2, (waits, products)
    # What is stored to shared memory is what the tile is, what the compiler tells its warps, and the output of both
    # groups on its way to 16 bytes a thread, eight times 16 bytes of each.
    assert len(re.findall(r"\bSTS", bare.sass)) <= 8 + 2 * 8


def test_the_output_is_stored_16_bytes_a_thread(built):
    """64 rows of a group by 128 threads; with bfloat16 there is a second copy of it, for tiles that are done again."""
    twice = ("bare", "everything", "halves")
    for name, used in built.items():
        stores = (64 if "64" in name else 128) // 16
        assert len(re.findall(r"STG\.E\.128", used.sass)) == 2 * stores * (2 if name in twice else 1), name
