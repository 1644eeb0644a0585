"""A causal language model learns to tell the next token of a text.

Owns the task of Hugging Face models: the way from bytes to a tokenizer's tokens and back, over a model that
``training.huggingface`` builds. What is held out is decided by bytes, as in every task of text, before any of it is cut
into tokens; losses are per token. Holds no training state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from training.data import Corpus
from training.huggingface import Pretrained
from training.run_spec import RunSpec
from training.spec_sections import HuggingFaceSpec, NpzDataSpec
from training.windows import Batch, TextWindows, drawn_symbol

PIECE_BYTES = 32 << 10
"""Text that is cut into tokens at once: tokenizers hold all that they are given several times over."""

PIECES_AT_ONCE = 256

EVALUATION_LOGITS = 1 << 25
"""Numbers in the logits of one forward pass of an evaluation: 128 MiB."""

Tokens = NDArray[np.int32]


class TokenTask:
    """A Hugging Face model, and a text as its tokens."""

    def __init__(
        self,
        spec: RunSpec,
        model: HuggingFaceSpec,
        pretrained: Pretrained,
        corpus: Corpus,
        part: tuple[int, int] | None,
        seed: bytes,
        device: torch.device,
    ) -> None:
        """Raises PretrainedError for a model that cannot be used, and DataError where there is too little text."""
        assert not isinstance(spec.data, NpzDataSpec)
        corpus = corpus.evaluated_on(spec.data.held_out_bytes)
        pretrained.check(parameters=model.parameters, context=model.context)
        self.model = pretrained.build_model().to(device)
        self.pretrained = pretrained
        self.unit = "token"
        self.batch_tokens = spec.train.batch * model.context
        self.held_out_bytes = len(corpus.held_out)
        self.held_out_digest = corpus.held_out_digest
        self._context = model.context
        self._seed = spec.seed
        self._device = device
        self._tokenizer = pretrained.open_tokenizer()
        held_out = tokens_of(self._tokenizer, corpus.held_out.tobytes())
        self._held_out_tokens = len(held_out)
        self._windows = TextWindows(
            tokens_of(self._tokenizer, corpus.part(part).tobytes()),
            held_out,
            unit=self.unit,
            context=model.context,
            batch=spec.train.batch,
            seed=seed,
            evaluation_rows=max(1, EVALUATION_LOGITS // (model.context * self._tokenizer.get_vocab_size())),
            device=device,
        )

    def batch(self, number: int) -> Batch:
        """Windows of the training text, and the same one token further on."""
        return self._windows.batch(number)

    def held_out(self, bytes_max: int | None) -> Iterator[Batch]:
        """The held-out text as windows that follow each other."""
        if bytes_max is None:
            return self._windows.held_out(None)
        return self._windows.held_out(bytes_max * self._held_out_tokens // self.held_out_bytes)

    @torch.inference_mode()
    def sample(self, weights: dict[str, Tensor], prompt: bytes, count: int, temperature: float) -> bytes:
        """``count`` bytes that the model writes, or fewer of a model whose tokens mean nothing; the same call gives the
        same bytes. ``temperature`` 0 takes the likeliest token."""
        generator = torch.Generator().manual_seed(self._seed)
        # A tokenizer may drop a lone line break; something has to come first.
        tokens = tokens_of(self._tokenizer, prompt or b"\n").tolist() or [0]
        begun = len(self._text(tokens))
        for _ in range(count):
            window_BT = torch.tensor([tokens[-self._context :]], device=self._device)
            logits_V = functional_call(self.model, weights, (window_BT,))[0, -1].float().cpu()
            tokens.append(drawn_symbol(logits_V, temperature, generator))
            if len(self._text(tokens)) >= begun + count:
                break
        return self._text(tokens)[begun:][:count]

    def _text(self, tokens: list[int]) -> bytes:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text.encode()


def tokens_of(tokenizer: Any, text: bytes) -> Tokens:
    """``text`` as tokens, none added at its ends; bytes that are not UTF-8 are read as the replacement character."""
    pieces = [piece.decode(errors="replace") for piece in _pieces(text)]
    found = [np.empty(0, np.int32)]
    for start in range(0, len(pieces), PIECES_AT_ONCE):
        encoded = tokenizer.encode_batch(pieces[start : start + PIECES_AT_ONCE], add_special_tokens=False)
        found += [np.array(piece.ids, np.int32) for piece in encoded]
    return np.concatenate(found)


def _pieces(text: bytes) -> Iterator[bytes]:
    """``text`` cut behind line breaks, where tokens seldom run across, unless a line is too long."""
    start = 0
    while start < len(text):
        end = start + PIECE_BYTES
        if end < len(text):
            end = text.rfind(b"\n", start, end) + 1 or end
        yield text[start:end]
        start = end
