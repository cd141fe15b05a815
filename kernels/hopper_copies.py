"""The warp that copies, in block_attention_hopper.py: a tile's queries, its listed blocks, its tail, its residual."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_sparse.kernels.hopper_tiles import begin_tile, copy_codes, find_tile, load_tile, next_slot, tell_end

_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _fill(desc, b, h, row, to, bars, slot, phase, more: gl.constexpr):
    """Copy a block to the slot's memory once it is empty; `more` bytes are to follow."""
    full, empty = bars
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes + more)
    load_tile(desc, [b, h, row, 0], full.index(slot), to)


@gluon.jit
def _fill_both(desc, b, h, row, other, ring, bars, slot, phase):
    """Copy two blocks of half as many keys to the slot's memory once it is empty.

    A tile lies there 64 channels at a time, in rows of 128 bytes: first those of the one, then those of the other."""
    full, empty = bars
    HALF: gl.constexpr = desc.block_type.shape[2]
    PARTS: gl.constexpr = ring.shape[2] // 64
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, 64], desc.dtype)
    if _REINTERPRETS:
        pieces = ring.reinterpret(desc.dtype, [ring.shape[0] * PARTS * 2, HALF, 64], layout)
    else:
        pieces = ring._reinterpret(desc.dtype, [ring.shape[0] * PARTS * 2, HALF, 64], layout)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes * PARTS * 2)
    for i in gl.static_range(PARTS):
        piece = (slot * PARTS + i) * 2
        load_tile(desc, [b, h, row, i * 64], full.index(slot), pieces.index(piece))
        load_tile(desc, [b, h, other, i * 64], full.index(slot), pieces.index(piece + 1))


@gluon.jit
def _fill_listed(desc, b, h, row, other, ring, bars, slot, phase, HALVES: gl.constexpr):
    """Copy the keys or values of a step, of HALVES that begin at `row` and `other`, or all from `row` on."""
    if HALVES:
        _fill_both(desc, b, h, row, other, ring, bars, slot, phase)
    else:
        _fill(desc, b, h, row, ring.index(slot), bars, slot, phase, 0)


@gluon.jit
def _halved(p_list, blocks, steps, COLUMNS, BLOCK: gl.constexpr):
    """Of two listed blocks a step: steps that these take, all steps, and keys that count in the last of the former."""
    HALF: gl.constexpr = BLOCK // 2
    n = gl.cdiv(blocks, 2)
    short = (blocks - 1) % 2 * HALF + gl.minimum(COLUMNS - gl.load(p_list + (blocks - 1)) * HALF, HALF)
    return n, steps + n - blocks, short


@gluon.jit
def _first_step(i_bh, i, is_text, n, pointers, sizes, TURNED: gl.constexpr):
    """Which of its n steps the tile at place i of its head begins with.

    Programs go through a head's keys at the same time, and what one has copied the cache holds for the others if they
    are at the same place. They start one after another, over the time that the shortest tiles of the head before took:
    by so much the later ones must begin further on, to be where the earlier ones are by then.
    """
    first = 0
    if TURNED:
        p_counts, NQ = pointers[0], sizes[5]
        longest, shortest = gl.load(p_counts + i_bh * NQ), gl.load(p_counts + (i_bh * NQ + NQ - 1))
        programs = gl.num_programs(0)
        share = (i % programs * shortest).to(gl.float32) / (programs * longest).to(gl.float32)
        first = gl.where(is_text, 0, (share * (n - 1).to(gl.float32)).to(gl.int32))
    return first


@gluon.jit
def _turned(i, first, n, TURNED: gl.constexpr):
    """What step i takes of a list that is gone through from `first` on, and then from its start. Its last block, the
    only one that can be short, stays the last."""
    if not TURNED:
        return i
    j = i + first
    j = gl.where(j < n - 1, j, j - (n - 1))
    return gl.where(i < n - 1, j, i)


@gluon.jit
def _clock():
    # Unsigned, so that a clock that was set back, or ran over, ends a wait.
    return gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r", [], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def _start_apart(pointers, sizes, HALVES: gl.constexpr, D: gl.constexpr):
    """Wait for this program's part of the time that the first head's shortest tile takes; see `_first_step`."""
    # A block's products take 16 D clocks, and all of it, at 128 channels, about an eighth more.
    CLOCKS: gl.constexpr = 9 * D if HALVES else 18 * D
    begin = _clock()
    steps = gl.load(pointers[0] + sizes[5] - 1)
    until = (gl.program_id(0) * steps).to(gl.float32) * CLOCKS / gl.num_programs(0).to(gl.float32)
    waited = _clock() - begin
    while waited < until.to(gl.uint32):
        waited = _clock() - begin


@gluon.jit
def _rows_of(
    p_list, i, first, n, blocks, COLUMNS,
    TEXT: gl.constexpr, TURNED: gl.constexpr, HALVES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Where the keys of step i begin, and its second half where steps are of HALVES: an odd list ends in one twice."""
    j = _turned(i, first, n, TURNED)
    if HALVES:
        HALF: gl.constexpr = BLOCK // 2
        row = gl.load(p_list + 2 * j, mask=i < n, other=0) * HALF
        other = gl.load(p_list + gl.minimum(2 * j + 1, blocks - 1), mask=i < n, other=0) * HALF
        if TEXT:
            row = gl.where(i < n, row, COLUMNS + (i - n) * BLOCK)
            other = gl.where(i < n, other, row + HALF)
    else:
        row = gl.load(p_list + j, mask=i < n, other=0) * BLOCK
        if TEXT:
            row = gl.where(i < n, row, COLUMNS + (i - n) * BLOCK)
        other = row
    return row, other


@gluon.jit
def produce(
    descs, tail_descs, pointers, rings, bars, q_bars, facts, lost, codes_parts, sizes, tiles, padded,
    TEXT: gl.constexpr, TAIL: gl.constexpr, COPIED: gl.constexpr, FIXED: gl.constexpr,
    TURNED: gl.constexpr, HALVES: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Every tile of this program, then those that a group could not hold, from each group's list."""
    q_full, q_empty = q_bars
    p_work = pointers[4]
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    t = gl.program_id(0)
    if TURNED:
        _start_apart(pointers, sizes, HALVES, descs[0].block_type.shape[3])
    while t < tiles:
        t, slot, phase, q_phase = _copy_tile(
            t, descs, tail_descs, pointers, rings, bars, q_bars, facts, codes_parts, sizes, padded,
            slot, phase, q_phase, TEXT, TAIL, COPIED, False, TURNED, HALVES, SLOTS, BLOCK, ROWS,
        )  # fmt: skip
    tell_end(facts, q_bars, q_phase)
    if FIXED:
        q_phase ^= 1
        for group in gl.static_range(2):
            mbarrier.wait(q_empty.index(group), q_phase ^ 1)
        layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
        t, other = gl.max(lost.index(0).load(layout), 0), gl.max(lost.index(1).load(layout), 0)
        group = gl.where(t < 0, 1, 0)
        t = gl.where(t < 0, other, t)
        while t >= 0:
            following = gl.load(p_work + 1 + 2 * t + group)
            _, slot, phase, q_phase = _copy_tile(
                t, descs, tail_descs, pointers, rings, bars, q_bars, facts, codes_parts, sizes, padded,
                slot, phase, q_phase, TEXT, TAIL, COPIED, True, TURNED, HALVES, SLOTS, BLOCK, ROWS,
            )  # fmt: skip
            ended = (following < 0) & (group == 0)
            t = gl.where(ended, other, following)
            group = gl.where(ended, 1, group)
        tell_end(facts, q_bars, q_phase)


@gluon.jit
def _copy_tile(
    t, descs, tail_descs, pointers, rings, bars, q_bars, facts, codes_parts, sizes, padded,
    slot, phase, q_phase,
    TEXT: gl.constexpr, TAIL: gl.constexpr, COPIED: gl.constexpr, AGAIN: gl.constexpr,
    TURNED: gl.constexpr, HALVES: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Keys of a step, then values of the step before: the order in which they are used. Returns the next tile, too."""
    d_q, d_k, d_v = descs
    q_ring, ring, weight_ring = rings
    full, empty = bars
    H, LQ, LK, VISION, COLUMNS, NQ, NK, STEP, texts = sizes
    i_bh, place, i_list, row, is_text, p_list, n, steps = find_tile(t, pointers, sizes, TEXT, BLOCK)
    b, h = i_bh // H, i_bh % H
    blocks = n
    # Lists ascend, so only the last listed block can be the short one.
    if HALVES:
        n, steps, short = _halved(p_list, blocks, steps, COLUMNS, BLOCK)
    else:
        short = COLUMNS - gl.load(p_list + n - 1) * BLOCK
    first = _first_step(i_bh, place, is_text, n, pointers, sizes, TURNED)
    before, before_too = _rows_of(p_list, 0, first, n, blocks, COLUMNS, False, TURNED, HALVES, BLOCK)
    begin_tile(d_q, q_ring, q_bars, q_phase, facts, H, i_bh, row, n, steps, short, t, ROWS)
    q_phase ^= 1
    _fill_listed(d_k, b, h, before, before_too, ring, bars, slot, phase, HALVES)
    slot, phase = next_slot(slot, phase, SLOTS)
    if not AGAIN:
        t = gl.num_programs(0) + gl.atomic_add(pointers[4], 1)
    for i in range(1, steps):
        row_k, row_k_too = _rows_of(p_list, i, first, n, blocks, COLUMNS, TEXT, TURNED, HALVES, BLOCK)
        _fill_listed(d_k, b, h, row_k, row_k_too, ring, bars, slot, phase, HALVES)
        slot, phase = next_slot(slot, phase, SLOTS)
        _fill_listed(d_v, b, h, before, before_too, ring, bars, slot, phase, HALVES)
        slot, phase = next_slot(slot, phase, SLOTS)
        before, before_too = row_k, row_k_too
    if TAIL:
        d_tail_k, d_tail_v, d_weights = tail_descs
        tail_steps = gl.where(is_text, 0, padded // BLOCK)
        for i in range(0, tail_steps):
            _fill(d_tail_k, b, h, i * BLOCK, ring.index(slot), bars, slot, phase, d_weights.block_type.nbytes)
            weights_at = (i_list * padded).to(gl.int32) + i * BLOCK
            load_tile(d_weights, [weights_at], full.index(slot), weight_ring.index(slot))
            slot, phase = next_slot(slot, phase, SLOTS)
            if i == 0:
                _fill_listed(d_v, b, h, before, before_too, ring, bars, slot, phase, HALVES)
            else:
                _fill(d_tail_v, b, h, (i - 1) * BLOCK, ring.index(slot), bars, slot, phase, 0)
            slot, phase = next_slot(slot, phase, SLOTS)
        if tail_steps == 0:
            _fill_listed(d_v, b, h, before, before_too, ring, bars, slot, phase, HALVES)
        else:
            _fill(d_tail_v, b, h, (tail_steps - 1) * BLOCK, ring.index(slot), bars, slot, phase, 0)
    else:
        _fill_listed(d_v, b, h, before, before_too, ring, bars, slot, phase, HALVES)
    slot, phase = next_slot(slot, phase, SLOTS)
    if COPIED:
        # What ended the first pass came without codes.
        copy_codes(codes_parts, b, h, row, q_phase ^ AGAIN, ROWS)
    return t, slot, phase, q_phase
