"""`sparse_attention` as an op that a compiler takes as it is."""

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.kernels.dense_attention import dense_attention
from dit_sparse.state import Generation

# A custom op takes tensors, so it finds its generation by number. Weak: a generation ends with its session.
_generations: WeakValueDictionary[int, Generation] = WeakValueDictionary()


def address(generation: Generation, layer: int) -> Tensor:
    """[2] int64 on the CPU: where `attend` finds the generation and one of its layers.

    A tensor and not numbers, so that torch.compile makes one graph for all layers.
    """
    _generations[id(generation)] = generation
    return torch.tensor([id(generation), layer], device="cpu")


@torch.library.custom_op("dit_sparse::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, where: Tensor) -> Tensor:
    """`sparse_attention` of the layer at `where` (see `address`); q, k, v [B, H, L, D] -> [B, H, L, D].

    key_mask [B, L] bool is False for padding, which only text has. Outside of its transformer a layer is dense,
    and counted. Under autocast it runs in autocast's dtype, like torch's own attention, and returns q's.
    """
    number, index = where.tolist()
    generation, device, like = _generations[number], q.device.type, q
    if torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    # Pooling and routing are in float32 whatever the model runs in.
    with torch.autocast(device, enabled=False):
        layer = generation.layers[index]
        if generation.moment is None:
            generation.fall_back("attention ran outside of its transformer's forward")
        if key_mask is not None and generation.moment is None:
            out = dense_attention(q, k, v, key_mask=key_mask)[0]
        else:
            text_mask = None if key_mask is None else generation.text_of(layer, key_mask)
            out = sparse_attention(q, k, v, layer, generation, text_mask=text_mask)
    # The layout and dtype that were promised to the compiler.
    return out if (out.stride(), out.dtype) == (like.stride(), like.dtype) else torch.empty_like(like).copy_(out)


@attend.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)
