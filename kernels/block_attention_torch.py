"""block_attention for any device in PyTorch: listed blocks are gathered and given to its own attention kernel."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dit_sparse.kernels.tail_weights import tail_weights
from dit_sparse.plan import BlockPlan, Correction, Residual, Tail
from dit_sparse.residual import unpack

# Bytes of keys and values gathered at a time: for each thread, about a core's share of the last cache, unless that is
# too little to give every thread something to do; and for all threads, but never less than one query block's.
GATHER_BYTES, MOST_BYTES = 4 << 20, 128 << 20
# Rows that torch's CPU kernel gives to a thread at a time, where it is given few.
ROWS_A_TASK = 32
# Numbers of one head that are corrected at a time: more leave the cache, fewer make small products.
SLAB = 1 << 19


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    key_block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Head by head: the listed blocks, a few query blocks at a time, and then what the correction adds."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    rows = q.shape[2] - text
    if key_mask is not None and key_mask.shape[1] < k.shape[2]:
        key_mask = torch.cat([key_mask.new_ones(len(k), k.shape[2] - text), key_mask], dim=1)
    routed = plan.mask() if correction.tail else None
    counts = plan.counts.tolist()
    room = _Room(k)
    for b in range(q.shape[0]):
        mask = None if key_mask is None else key_mask[b]
        for h in range(q.shape[1]):
            keys = _Keys(k[b, h], v[b, h], mask, key_block, text, room)
            listed = plan.indices[b, h], counts[b][h]
            _exact(q[b, h, :rows], keys, block, *listed, scale, out[b, h, :rows], lse[b, h, :rows])
            correct_head(q[b, h, :rows], out[b, h, :rows], lse[b, h, :rows], correction, (b, h), block, routed, scale)
            if text:
                o, l = keys.attended(q[b, h, rows:], scale)
                out[b, h, rows:], lse[b, h, rows:] = o, l
    if scatter is not None:
        ordered, out = out, torch.empty_like(out)
        n = scatter.numel()
        out[:, :, n:] = ordered[:, :, n:]
        out.index_copy_(2, scatter.long(), ordered[:, :, :n])
    return out, lse


def _exact(
    q: Tensor,
    keys: "_Keys",
    block: int,
    indices: Tensor,
    counts: Sequence[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of one head's vision rows q [L, D], in blocks of `block`, to the blocks that are listed for them and
    to text, into out [L, D] and lse [L]."""
    whole, short = divmod(len(q), block)
    order = sorted(range(whole), key=counts.__getitem__)
    blocks = [x[: whole * block].unflatten(0, (whole, block)) for x in (q, out, lse)]
    query, o, l = blocks
    listed, places = indices, None
    if order != list(range(whole)):
        # Query blocks of as many keys side by side, in one copy: an index for each chunk would take longer.
        places = torch.as_tensor(order, device=q.device)
        query, listed = query[places], indices[places]
        o, l = torch.empty_like(query), l.new_empty(l.shape)
    ascending = [counts[i] for i in order]
    token_bytes = 2 * q.shape[-1] * q.element_size()
    # What lists every block needs nothing gathered, and is one call.
    first_full = bisect_left(ascending, keys.blocks)
    if first_full < whole:
        some, those = keys.attended(query[first_full:].flatten(0, 1), scale)
        o[first_full:], l[first_full:] = (x.unflatten(0, (-1, block)) for x in (some, those))
    for first, last in _chunks(ascending[:first_full], block, keys.block, keys.text, token_bytes):
        chunk, width = slice(first, last), ascending[last - 1]
        uneven = None
        if ascending[first] < width:
            uneven = torch.as_tensor(ascending[chunk], device=q.device)
        some, those = _partial(query[chunk].unsqueeze(1), *keys.gather(listed[chunk, :width], uneven), scale)
        o[chunk], l[chunk] = some[:, 0], those[:, 0]
    if places is not None:
        for there, ordered in zip(blocks[1:], (o, l), strict=True):
            there[places] = ordered
    if short:
        some, those = _partial(
            q[whole * block :][None, None], *keys.gather(indices[whole:, : counts[whole]], None), scale
        )
        out[whole * block :], lse[whole * block :] = some[0, 0], those[0, 0]


def _chunks(
    counts: Sequence[int], block: int, key_block: int, text: int, token_bytes: int
) -> Iterator[tuple[int, int]]:
    """Where the query blocks that are computed together begin and end; counts, of key blocks, ascend.

    Those of one count go together, and padding is for where that leaves threads without work.
    """
    threads = torch.get_num_threads()
    fewest = -(-threads // -(-block // ROWS_A_TASK))
    start = 0
    while start < len(counts):
        size = (counts[start] * key_block + text) * token_bytes
        fit = max(threads * GATHER_BYTES // size, fewest)
        # A last round in which some threads have nothing to do takes as long as a full one.
        most = min(start + fit // fewest * fewest, len(counts))
        stop = max(bisect_right(counts, counts[start], start, most), min(start + fewest, most))
        while stop - start > 1 and (stop - start) * (counts[stop - 1] * key_block + text) * token_bytes > MOST_BYTES:
            stop -= 1
        yield start, stop
        start = stop


class _Room:
    """Memory for gathered keys and values, the same for each chunk: pages that are new to a process are slow."""

    def __init__(self, like: Tensor):
        self.like, self.held = like, like.new_empty(0)

    def take(self, numbers: int) -> tuple[Tensor, Tensor]:
        if 2 * numbers > self.held.numel():
            self.held = self.like.new_empty(2 * numbers)
        return self.held[:numbers], self.held[numbers : 2 * numbers]


class _Keys:
    """The keys and values of one head, to be gathered block by block."""

    def __init__(self, k: Tensor, v: Tensor, mask: Tensor | None, block: int, text: int, room: _Room):
        self.k, self.v, self.mask, self.block, self.text, self.room = k, v, mask, block, text, room
        self.columns = k.shape[0] - text
        self.blocks, self.rest = -(-self.columns // block), self.columns % block

    def attended(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of q [rows, D] to all keys: out and lse."""
        bias = None if self.mask is None else _bias(self.mask, q.dtype)[None, None, None]
        out, lse = _partial(*(x[None, None] for x in (q, self.k, self.v)), bias, scale)
        return out[0, 0], lse[0, 0]

    def gather(self, indices: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """indices [n, W], counts [n] or None if all are W -> keys and values [n, 1, W * block + text, D], good until
        the next are gathered, and a bias where something must be masked."""
        device, keep = indices.device, None
        tokens = indices[..., None].long() * self.block + torch.arange(self.block, device=device)
        if counts is not None:
            listed = torch.arange(indices.shape[1], device=device) < counts[:, None]
            # Places past the count are gathered too, from block 0, and masked.
            tokens.masked_fill_(~listed[..., None], 0)
            keep = listed[..., None].expand_as(tokens)
        if self.rest and bool((past := tokens >= self.columns).any()):
            tokens.clamp_(max=self.columns - 1)
            keep = ~past if keep is None else keep & ~past
        if self.mask is not None:
            keep = self.mask[tokens] if keep is None else keep & self.mask[tokens]
        tokens = tokens.flatten(1)
        if self.text:
            text = torch.arange(self.columns, self.columns + self.text, device=device).expand(len(indices), -1)
            tokens = torch.cat([tokens, text], dim=1)
            if keep is not None:
                seen = torch.ones_like(text, dtype=torch.bool) if self.mask is None else self.mask[text]
                keep = torch.cat([keep.flatten(1), seen], dim=1)
        shape = (*tokens.shape, self.k.shape[-1])
        gathered = self.room.take(math.prod(shape))
        for x, into in zip((self.k, self.v), gathered, strict=True):
            torch.index_select(x, 0, tokens.flatten(), out=into.view(-1, shape[-1]))
        key, value = (x.view(shape).unsqueeze(1) for x in gathered)
        return key, value, None if keep is None else _bias(keep.flatten(1), self.k.dtype)[:, None, None]


def _bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))


def _partial(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention with its log-sum-exp; zero and -inf where a row sees nothing."""
    out, lse = _softmax(q, k, v, bias, scale)
    if bias is not None:
        blind = (bias == float("-inf")).all(-1).expand(lse.shape)
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, float("-inf"))
    return out, lse


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention with its log-sum-exp; anything where a row sees nothing. bias of any rows, or of one for all."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        return out, lse
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.mT).to(wide) * scale
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp().to(q.dtype) @ v).to(wide), lse


def correct_head(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    correction: Correction,
    at: tuple[int, int],
    block: int,
    routed: Tensor | None,
    scale: float,
) -> None:
    """What the correction makes of the vision rows of the head `at`, out [L, D] with lse [L], in place."""
    if correction.tail is None and correction.scale is None and correction.residual is None:
        return
    rows = len(q)
    width = q.shape[-1] if routed is None else max(q.shape[-1], routed.shape[-1])
    step = max(1, SLAB // (width * block)) * block
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        blocks = slice(first // block, -(-some.stop // block))

        def here(x: Tensor, some: slice = some, blocks: slice = blocks) -> Tensor:
            """The values of these rows, of a tensor with one a row or one a query block."""
            if x.shape[2] == rows:
                return x[(*at, some)]
            return x[(*at, blocks)].repeat_interleave(block, 0)[: some.stop - some.start]

        o = out[some].to(lse.dtype)
        if correction.tail is not None:
            assert routed is not None
            weights = tail_weights(correction.tail, (*at, blocks), scale=scale).to(lse.dtype)
            _merge_tail(q[some], o, lse[some], correction.tail, at, weights, routed[(*at, blocks)], block, scale)
        if correction.scale is not None:
            o *= here(correction.scale)[:, None]
        if (residual := correction.residual) is not None:
            scales = None if residual.scales is None else here(residual.scales)
            o += unpack(Residual(here(residual.codes), scales, residual.kind))
        out[some] = o


def _merge_tail(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    tail: Tail,
    at: tuple[int, int],
    weights: Tensor,
    routed: Tensor,
    block: int,
    scale: float,
) -> None:
    """q, out [rows, D], lse [rows], weights [1, N] or [blocks, N], routed [blocks, N] -> out with the unrouted blocks'
    pooled keys merged in."""
    rows = len(q)
    keys, values = (x[at].to(q.dtype) for x in (tail.keys, tail.values))
    hidden = routed | weights.isneginf()
    bias = weights.masked_fill(hidden, float("-inf")).repeat_interleave(block, 0)[:rows]
    pooled, pooled_lse = (x[0, 0] for x in _softmax(q[None, None], keys[None, None], values[None, None], bias, scale))
    nothing = hidden.all(-1).repeat_interleave(block)[:rows]
    pooled_lse = pooled_lse.masked_fill(nothing, float("-inf"))
    both = torch.logaddexp(lse, pooled_lse)
    both.masked_fill_(both.isneginf(), 0)
    out.mul_((lse - both).exp_()[:, None])
    out.add_(pooled.masked_fill_(nothing[:, None], 0).mul_((pooled_lse - both).exp_()[:, None]))
