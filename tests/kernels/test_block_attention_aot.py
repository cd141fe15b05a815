"""Every tile of the tuning table, compiled for three GPU generations: nothing spills, and matrix units do the work."""

import pytest

from dit_sparse.kernels.block_attention_triton import block_attention_fwd_kernel
from dit_sparse.kernels.tuning import ATTENTION, attention_tile
from tests.kernels.aot import Build, compile_kernels

CAPABILITIES = (80, 90, 100)
# Pointers that only some corrections need, and the flag that says so.
OPTIONAL = {
    "p_every": "TEXT",
    "p_key_mask": "MASKED",
    "p_tail_k": "TAIL",
    "p_tail_v": "TAIL",
    "p_weights": "TAIL",
    "p_scatter": "SCATTER",
    "p_scale": "SCALE",
    "p_res": "RESIDUAL",
    "p_res_scale": "RESIDUAL",
}
BARE = dict(
    TEXT=False,
    MASKED=0,
    TAIL=False,
    SCATTER=False,
    SCALE=False,
    RESIDUAL=0,
    PER_ROW=False,
    SCALE_PER_ROW=False,
)
VARIANTS = {
    "bare": BARE,
    "anchor": BARE | dict(TAIL=True, SCATTER=True, RESIDUAL=2, PER_ROW=True),
    "everything": dict(
        TEXT=True,
        MASKED=2,
        TAIL=True,
        SCATTER=True,
        SCALE=True,
        RESIDUAL=3,
        PER_ROW=True,
        SCALE_PER_ROW=True,
    ),
}


VARIANTS["text masked"] = VARIANTS["everything"] | dict(MASKED=1)


def build(kind: str, dim: int, block: int, flags: dict, capability: int, key_block: int | None = None) -> Build:
    itemsize = 4 if kind == "fp32" else 2
    tile = attention_tile(capability, itemsize, dim, block)
    types = {
        "p_lse": "*fp32", "p_counts": "*i32", "p_indices": "*i32", "p_every": "*i32", "p_key_mask": "*u8",
        "p_scatter": "*i64", "p_weights": "*fp16", "p_scale": "*fp32",
        "p_res": "*u8" if flags["RESIDUAL"] in (2, 3) else f"*{kind}",
        "p_res_scale": "*fp32", "scale": "fp32",
    }  # fmt: skip
    constexprs = dict(
        D=dim,
        BD=dim,
        BLOCK=block,
        KEY_BLOCK=key_block or block,
        BM=tile.rows,
        BN=min(tile.columns, key_block or block),
        BT=min(tile.columns, key_block or block, 32),
        PRECISION="ieee" if itemsize == 4 else "tf32",
    )
    constexprs |= flags
    signature = {}
    for name in block_attention_fwd_kernel.arg_names:
        if name in constexprs:
            continue
        if not flags.get(OPTIONAL.get(name, ""), True):
            constexprs[name] = None
        elif name.startswith("p_"):
            signature[name] = types.get(name, f"*{kind}") + ":16"
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32:16" if name[1:3] == "_s" else "i32"
    return Build(block_attention_fwd_kernel, signature, constexprs, capability, tile.warps, tile.stages)


# Hopper is where figures are measured; the others take as long again, each.
@pytest.mark.parametrize(
    "capability", [c if c == 90 else pytest.param(c, marks=pytest.mark.slow) for c in CAPABILITIES]
)
def test_no_tile_spills(capability):
    kinds = {2: "bf16", 4: "fp32"}
    # Blocks of 64 cut the rows in half, which asks for fewer registers; "everything" holds all that the others hold.
    cases = [(kinds[itemsize], dim, 128, "everything") for itemsize, dim in ATTENTION[80]]
    more = ((128, "anchor"), (64, "everything"), (128, "text masked"))
    cases += [("bf16", dim, block, name) for dim in (64, 128) for block, name in more]
    built = compile_kernels([build(k, d, b, VARIANTS[n], capability) for k, d, b, n in cases])
    spilled = {case: used.spill_bytes for case, used in zip(cases, built, strict=True) if used.spill_bytes}
    # Addresses, that are put down before the loop over whole blocks and taken up behind it.
    assert spilled.pop(("bf16", 128, 128, "text masked"), 0) <= 32
    assert not spilled
    limit = {80: 163, 90: 227, 100: 227}[capability] * 1024
    assert all(used.shared_bytes <= limit for used in built)


def test_hopper_uses_its_matrix_units():
    sizes = [(dim, key_block) for dim in (64, 128) for key_block in (None, 64)]
    used = compile_kernels([build("bf16", d, 128, VARIANTS["anchor"], 90, key_block) for d, key_block in sizes])
    assert all("HGMMA" in one.sass and one.spill_bytes == 0 for one in used)
