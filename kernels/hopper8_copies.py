"""The warp that copies, in block_attention_hopper8.py: a tile's queries, its listed blocks, its tail, its residual."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_sparse.kernels.hopper_tiles import begin_tile, copy_codes, find_tile, load_tile, next_slot, tell_end


@gluon.jit
def _copy(desc, at, ring, bars, slot, phase, more: gl.constexpr):
    """Copy a tile into the slot once it is empty; `more` bytes are to follow."""
    full, empty = bars
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes + more)
    load_tile(desc, at, full.index(slot), ring.index(slot))


@gluon.jit
def produce(
    descs, tail_descs, pointers, rings, k_bars, v_bars, q_bars, facts, codes_parts, sizes, tiles, padded, key_blocks,
    TEXT: gl.constexpr, TAIL: gl.constexpr, COPIED: gl.constexpr,
    SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Keys of a step, then values of the step before: the order in which they are used."""
    d_q, d_k, d_unit, d_v = descs
    q_ring, k_ring, unit_ring, v_ring, weight_ring = rings
    k_full = k_bars[0]
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts = sizes
    k_slot, k_phase = gl.to_tensor(0), gl.to_tensor(0)
    v_slot, v_phase = gl.to_tensor(0), gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    t = gl.program_id(0)
    while t < tiles:
        i_bh, _, i_list, row, is_text, p_list, n, steps = find_tile(t, pointers, sizes, TEXT, BLOCK)
        b, h = i_bh // H, i_bh % H
        before = gl.load(p_list)
        # Lists ascend, so only the last listed block can be the short one.
        short = COLUMNS - gl.load(p_list + n - 1) * BLOCK
        begin_tile(d_q, q_ring, q_bars, q_phase, facts, H, i_bh, row, n, steps, short, t, ROWS)
        q_phase ^= 1
        _copy(d_k, [b, h, before * BLOCK, 0], k_ring, k_bars, k_slot, k_phase, 128)
        load_tile(d_unit, [(i_bh * key_blocks + before) * 32], k_full.index(k_slot), unit_ring.index(k_slot))
        k_slot, k_phase = next_slot(k_slot, k_phase, SLOTS)
        t = gl.num_programs(0) + gl.atomic_add(pointers[4], 1)
        for i in range(1, steps):
            now = gl.load(p_list + i, mask=i < n, other=0)
            if TEXT:
                # Text keys lie behind the last block of vision, which is filled up.
                now = gl.where(i < n, now, NK + i - n)
            _copy(d_k, [b, h, now * BLOCK, 0], k_ring, k_bars, k_slot, k_phase, 128)
            load_tile(d_unit, [(i_bh * key_blocks + now) * 32], k_full.index(k_slot), unit_ring.index(k_slot))
            k_slot, k_phase = next_slot(k_slot, k_phase, SLOTS)
            _copy(d_v, [b, h, 0, before * BLOCK], v_ring, v_bars, v_slot, v_phase, 0)
            v_slot, v_phase = next_slot(v_slot, v_phase, SLOTS)
            before = now
        _copy(d_v, [b, h, 0, before * BLOCK], v_ring, v_bars, v_slot, v_phase, 0)
        v_slot, v_phase = next_slot(v_slot, v_phase, SLOTS)
        if TAIL:
            d_tail_k, d_tail_unit, d_tail_v, d_weights = tail_descs
            for i in range(0, gl.where(is_text, 0, padded // BLOCK)):
                more: gl.constexpr = 128 + d_weights.block_type.nbytes
                _copy(d_tail_k, [b, h, i * BLOCK, 0], k_ring, k_bars, k_slot, k_phase, more)
                at = (i_bh * (padded // BLOCK) + i) * 32
                load_tile(d_tail_unit, [at], k_full.index(k_slot), unit_ring.index(k_slot))
                weights_at = (i_list * padded).to(gl.int32) + i * BLOCK
                load_tile(d_weights, [weights_at], k_full.index(k_slot), weight_ring.index(k_slot))
                k_slot, k_phase = next_slot(k_slot, k_phase, SLOTS)
                _copy(d_tail_v, [b, h, 0, i * BLOCK], v_ring, v_bars, v_slot, v_phase, 0)
                v_slot, v_phase = next_slot(v_slot, v_phase, SLOTS)
        if COPIED:
            copy_codes(codes_parts, b, h, row, q_phase, ROWS)
    tell_end(facts, q_bars, q_phase)
