"""Products of codes as integer sums, in block_attention_hopper8.py: how they start, which of them count, their maxima,
and the probabilities and outputs made of them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

# An int32 sum of products on top of these bits is, read as float32, that sum plus MAGIC: no conversion is needed.
MAGIC_BITS = gl.constexpr(0x4B400000)
MAGIC = gl.constexpr(12582912.0)
# Probabilities are kept 2^UP times as large, so that e4m3 tells small ones from zero.
UP = gl.constexpr(8.0)


@gluon.jit
def products(q, ring, slot, start: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr):
    """Start codes of queries times codes of KEYS keys, which as float32 read MAGIC too much."""
    s = gl.full([ROWS, KEYS], MAGIC_BITS, gl.int32, s_layout)
    return warpgroup_mma(q, ring.index(slot).slice(start, KEYS).permute((1, 0)), s, is_async=True)


@gluon.jit
def values(p, part, ring, slot, start: gl.constexpr, KEYS: gl.constexpr, use_acc: gl.constexpr):
    """Start the output of KEYS keys' values alone, or adding it to that of the keys before."""
    v = ring.index(slot).slice(start, KEYS, dim=1).permute((1, 0))
    return warpgroup_mma(p, v, part, use_acc=use_acc, is_async=True)


@gluon.jit
def unit_of(unit_ring, slot):
    """What the products of this block's codes and one more code stand for."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    return gl.max(unit_ring.index(slot).slice(0, 4).load(layout), 0)


@gluon.jit
def probabilities(e, ROWS: gl.constexpr, KEYS: gl.constexpr, o_layout: gl.constexpr):
    """Exponentials by row of the keys' tile -> e4m3 by key, where each thread holds them already."""
    e = e.reshape([ROWS, KEYS // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5)).reshape([ROWS, KEYS])
    return gl.convert_layout(e, gl.DotOperandLayout(0, o_layout, 4)).to(gl.float8e4nv)


@gluon.jit
def _counted(s, start: gl.constexpr, left, KEYS: gl.constexpr, s_layout: gl.constexpr):
    """The first `left` keys of the block count; these begin at `start`."""
    row = start + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    key = (row & ~14) | ((row & 8) >> 2) | ((row & 6) << 1)
    return gl.where((key < left)[None, :], s, float("-inf"))


@gluon.jit
def _seen(s, p_seen, masked, KEYS: gl.constexpr, s_layout: gl.constexpr):
    """If they are `masked`, the keys that are seen count."""
    seen = gl.load(p_seen + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout)), mask=masked, other=1)
    return gl.where((seen != 0)[None, :], s, float("-inf"))


@gluon.jit
def hidden(
    s, start: gl.constexpr, left, p_seen, masked, MASKED: gl.constexpr, KEYS: gl.constexpr, s_layout: gl.constexpr
):  # fmt: skip
    """Sums of keys that begin at `start`: of those that do not count, less than any."""
    t = _counted(s.to(gl.float32, bitcast=True), start, left, KEYS, s_layout)
    if MASKED:
        t = _seen(t, p_seen + start, masked, KEYS, s_layout)
    return t.to(gl.int32, bitcast=True)


@gluon.jit
def thread_maxima(s):
    """[ROWS, N] sums as integers, which order as the numbers do -> [ROWS, 4], the largest of each thread: three are
    compared at once, odd and even columns apart, so that fewer wait for one another."""
    return gl.max(gl.max(s.reshape([s.shape[0], s.shape[1] // 8, 4, 2]), 1), 2)


@gluon.jit
def top_of(m, most, unit):
    """The maximum of a row so far, from the largest sum of each thread."""
    most = gl.convert_layout(gl.max(most, 1), m.type.layout).to(gl.float32, bitcast=True)
    return gl.maximum(m, (most - MAGIC) * unit)
