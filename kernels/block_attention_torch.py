"""block_attention for any device in PyTorch: listed blocks are gathered and given to its own attention kernel."""

import torch
from torch import Tensor

from dit_sparse.plan import BlockPlan, Correction, Residual, Tail
from dit_sparse.residual import unpack

# Bytes of keys and values gathered at a time: about a core's share of the last cache.
GATHER_BYTES = 2 << 20


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    correction: Correction,
    block: int,
    scale: float,
    key_mask: Tensor | None,
    text: int,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A few query blocks at a time: gather the blocks they list, run dense attention on those."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    rows = q.shape[2] - text
    routed = plan.mask() if correction.tail else None
    counts = plan.counts.tolist()
    for b in range(q.shape[0]):
        mask = None if key_mask is None else key_mask[b]
        for h in range(q.shape[1]):
            keys = _Keys(k[b, h], v[b, h], mask, block, text)
            for chosen, width in _chunks(counts[b][h], rows, block, text, q.shape[-1] * q.element_size() * 2):
                at = slice(chosen[0] * block, min(chosen[-1] * block + block, rows))
                consecutive = chosen[-1] - chosen[0] + 1 == len(chosen)
                pick = (lambda x, at=at: x[at]) if consecutive else _picker(chosen, block)
                query = pick(q[b, h]).unflatten(0, (len(chosen), -1)).unsqueeze(1)
                # Views where they will do: on small chunks an index costs as much as the arithmetic.
                listed = slice(chosen[0], chosen[-1] + 1) if consecutive else torch.as_tensor(chosen, device=q.device)
                uneven = None if all(counts[b][h][i] == width for i in chosen) else plan.counts[b, h, listed]
                key, value, bias = keys.gather(plan.indices[b, h, listed, :width], uneven)
                o, l = _partial(query, key, value, bias, scale)
                if correction.tail is not None:
                    o = _merge_tail(
                        query[:, 0], o[:, 0], l[:, 0], correction.tail, (b, h), routed[b, h, listed], scale
                    )
                o, l = o.flatten(0, -2), l.flatten()
                o = _correct_rows(o, correction, (b, h), pick, listed, rows)
                if consecutive:
                    out[b, h, at], lse[b, h, at] = o, l
                else:
                    places = _rows_of(chosen, block, q.device)
                    out[b, h].index_copy_(0, places, o.to(out.dtype))
                    lse[b, h].index_copy_(0, places, l)
            if text:
                bias = None if mask is None else _bias(mask, q.dtype)[None, None, None]
                o, l = _partial(q[b, h, rows:][None, None], k[b, h][None, None], v[b, h][None, None], bias, scale)
                out[b, h, rows:], lse[b, h, rows:] = o[0, 0], l[0, 0]
    if scatter is not None:
        ordered, out = out, torch.empty_like(out)
        n = scatter.numel()
        out[:, :, n:] = ordered[:, :, n:]
        out.index_copy_(2, scatter.long(), ordered[:, :, :n])
    return out, lse


def _chunks(counts: list[int], rows: int, block: int, text: int, token_bytes: int):
    """Query blocks to compute together, and how many key blocks to gather for each of them.

    Blocks of like counts go together, so that little is padded; a short last block goes alone.
    """
    n = len(counts)
    last = n - 1 if rows % block else n
    order = (
        list(range(last))
        if max(counts) - min(counts) <= max(counts) // 8
        else sorted(range(last), key=counts.__getitem__)
    )
    start = 0
    while start < last:
        size = 1
        while start + size < last:
            width = max(counts[i] for i in order[start : start + size + 1])
            if (size + 1) * (width * block + text) * token_bytes > GATHER_BYTES:
                break
            size += 1
        chosen = sorted(order[start : start + size])
        yield chosen, max(counts[i] for i in chosen)
        start += size
    if last < n:
        yield [last], counts[last]


def _rows_of(blocks: list[int], block: int, device: torch.device) -> Tensor:
    return (torch.as_tensor(blocks, device=device)[:, None] * block + torch.arange(block, device=device)).flatten()


def _picker(blocks: list[int], block: int):
    def pick(x: Tensor) -> Tensor:
        return x.index_select(0, _rows_of(blocks, block, x.device))

    return pick


class _Keys:
    """The keys and values of one head, to be gathered block by block."""

    def __init__(self, k: Tensor, v: Tensor, mask: Tensor | None, block: int, text: int):
        self.k, self.v, self.mask, self.block, self.text = k, v, mask, block, text
        self.columns = k.shape[0] - text
        self.full, self.rest = divmod(self.columns, block)

    def gather(self, indices: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """indices [n, W], counts [n] or None if all are W -> keys and values [n, 1, W * block + text, D], and a bias
        where something must be masked."""
        listed = None
        if counts is not None:
            listed = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
            # Places past the count are gathered too, from block 0, and masked.
            indices = torch.where(listed, indices, 0)
        short = (indices == self.full) if self.rest else None
        if short is not None and not bool(short.any()):
            short = None
        key, value = (self._gather(x, indices, short) for x in (self.k, self.v))
        if listed is None and self.mask is None and short is None:
            return key, value, None
        tokens = indices[..., None].long() * self.block + torch.arange(self.block, device=indices.device)
        keep = tokens < self.columns
        if listed is not None:
            keep &= listed[..., None]
        if self.mask is not None:
            keep = keep & self.mask[tokens.clamp(max=self.columns - 1)]
        keep = keep.flatten(1)
        if self.text:
            text = torch.ones_like(keep[:, :1]) if self.mask is None else self.mask[self.columns :]
            keep = torch.cat([keep, text.expand(len(keep), self.text)], dim=1)
        return key, value, _bias(keep, self.k.dtype)[:, None, None]

    def _gather(self, x: Tensor, indices: Tensor, short: Tensor | None) -> Tensor:
        n, width = indices.shape
        got = x.new_empty(n, width * self.block + self.text, x.shape[-1])
        blocks = got[:, : width * self.block].unflatten(1, (width, self.block))
        if self.full:
            whole = x[: self.full * self.block].unflatten(0, (self.full, self.block))
            at = indices if short is None else indices.clamp(max=self.full - 1)
            if self.text:
                blocks.copy_(whole[at.long()])
            else:
                torch.index_select(whole, 0, at.flatten(), out=got.view(n * width, self.block, -1))
        if short is not None:
            padded = x.new_zeros(self.block, x.shape[-1])
            padded[: self.rest] = x[self.full * self.block : self.columns]
            blocks[short] = padded
        if self.text:
            got[:, width * self.block :] = x[self.columns :]
        return got.unsqueeze(1)


def _bias(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, float("-inf"))


def _partial(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention with its log-sum-exp; out in the accumulation dtype, zero where a row sees nothing."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        out = out.to(lse.dtype)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.mT).to(wide) * scale
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = ((scores - lse[..., None]).exp().to(q.dtype) @ v).to(wide)
    if bias is not None:
        blind = (bias == float("-inf")).all(-1).expand(lse.shape)
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, float("-inf"))
    return out, lse


def _merge_tail(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tail, at: tuple[int, int], routed: Tensor, scale: float
) -> Tensor:
    """q, out [n, block, D], lse [n, block], routed [n, N] -> out with the unrouted blocks' pooled keys merged in."""
    b, h = at
    wide = lse.dtype
    logits = (q @ tail.keys[b, h].to(q.dtype).mT).to(wide).mul_(scale)
    if tail.variances is not None:
        spread = ((q * scale).square() @ tail.variances[b, h].to(q.dtype).mT).to(wide).mul_(0.5)
        logits += spread.clamp_(max=tail.limit)
    weights = tail.log_weights if tail.log_weights.dim() == 1 else tail.log_weights[b]
    logits += weights.to(wide)
    logits.masked_fill_(routed[:, None], float("-inf"))
    whole = torch.logaddexp(lse, logits.logsumexp(-1))
    whole = whole.masked_fill(whole == float("-inf"), 0)[..., None]
    pooled = logits.sub_(whole).exp_().to(q.dtype) @ tail.values[b, h].to(q.dtype)
    return out.mul((lse[..., None] - whole).exp()).add_(pooled)


def _correct_rows(
    out: Tensor, correction: Correction, at: tuple[int, int], pick, listed: slice | Tensor, rows: int
) -> Tensor:
    b, h = at

    def here(x: Tensor) -> Tensor:  # the values of these rows, of a tensor with one a row or one a query block
        if x.shape[2] == rows:
            return pick(x[b, h])
        per_block = x[b, h, listed]
        return per_block.repeat_interleave(len(out) // len(per_block), 0)

    if correction.scale is not None:
        out = out * here(correction.scale)[:, None]
    if (residual := correction.residual) is not None:
        scales = None if residual.scales is None else here(residual.scales)
        out = out + unpack(Residual(here(residual.codes), scales, residual.kind)).to(out.dtype)
    return out
