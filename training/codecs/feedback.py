"""What a lossy codec left out is not lost: it is added to what is sent next.

Owns error feedback (Seide et al., Interspeech 2014; with decay SparseLoCo, arXiv 2508.15706): without it a codec that
leaves values out never sends small ones, however long they last. What is owed belongs to one sender and one broadcast,
the same bytes to everybody; whether they arrived the caller knows, who then keeps what is owed after or before.
"""

from __future__ import annotations

from torch import Tensor

from training.codecs.codec import Codec


def encode_with(
    codec: Codec, values: Tensor, owed: Tensor, *, decay: float = 1.0, key: int = 0
) -> tuple[bytes, Tensor]:
    """The bytes of ``values`` and of what is ``owed``, and what is owed once these have arrived; all flat fp32.

    ``decay``: what of a debt is left a round later; below 1 none grows for ever. Raises NotFinite where
    the codec does. Changes none of its inputs.
    """
    due = (owed * decay).add_(values)
    data = codec.encode(due, key)
    return data, due.sub_(codec.decode(data, len(due), key))
