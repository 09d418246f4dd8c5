"""TextEncoder: a prompt -> Text (T5 tokens, CLIP pooled)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.caches import Cache, digest, prompt_cache, read_only, revision
from pipeline.errors import InternalError
from pipeline.settings import Settings
from pipeline.trace import Trace

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

CLIP_LENGTH = 77


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A prompt, for FLUX: tokens (L, 4096) float32 with L in 128, 256, 384, 512; pooled (768,) float32.

    A T5 that reads fewer tokens than asked for (the miniature's reads 32) gives as many as it reads.

    truncated: the prompt had more than L tokens, and its end was not read.
    """

    tokens: NDArray[np.float32]
    pooled: NDArray[np.float32]
    truncated: bool
    trace: Trace


class TextEncoder:
    """Reads prompts with T5 and CLIP; several threads may call it at once. `cache` keeps the texts."""

    def __init__(
        self,
        t5: "tuple[T5Tokenizer, T5EncoderModel]",
        clip: "tuple[CLIPTokenizer, CLIPTextModel]",
        models: Mapping[str, str],
        cache: Cache[Text] | None = None,
    ) -> None:
        """Without a cache nothing is kept."""
        self._t5_tokenizer, self._t5 = t5
        self._clip_tokenizer, self._clip = clip
        self._models = dict(models)
        self._revision = revision(models)
        self.cache = Cache(0, _bytes) if cache is None else cache

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Read the tokenizers and networks from the preset's files; raises WeightsError."""
        from pipeline import checkpoints

        files = checkpoints.files(settings)
        t5, clip = checkpoints.load_t5(files, settings), checkpoints.load_clip(files, settings)
        return cls(t5, clip, files.hashes("t5", "clip"), prompt_cache(settings.cache, _bytes))

    def encode(self, prompt: str, length: int) -> Text:
        """A prompt as FLUX reads it: T5's last hidden state over `length` tokens, CLIP's pooled output over 77.

        Padding is not masked, as in the official code, so `length` is part of what the picture depends on. Raises
        InternalError where the numbers are not finite, before a whole generation is spent on them. Of a prompt that was
        read before, at this length, the networks see nothing.
        """
        started = time.perf_counter()
        length = min(length, self._t5_tokenizer.model_max_length)
        key = ("", digest(self._revision, prompt, str(length)))
        text = self.cache.get_or_compute(key, lambda: self._read(prompt, length))
        return replace(text, trace=Trace({"text": time.perf_counter() - started}, self._models))

    def _read(self, prompt: str, length: int) -> Text:
        import torch

        ids, truncated = pieces(self._t5_tokenizer, prompt, length)
        words, _ = pieces(self._clip_tokenizer, prompt, CLIP_LENGTH)
        with torch.inference_mode():
            tokens = self._t5(torch.tensor([ids], device=self._t5.device)).last_hidden_state[0]  # (L, 4096)
            pooled = self._clip(torch.tensor([words], device=self._clip.device)).pooler_output[0]  # (768,)
        if not (torch.isfinite(tokens).all() and torch.isfinite(pooled).all()):
            raise InternalError("The text encoder gave numbers that are not finite; set PULID_DTYPE to bfloat16.")
        return Text(
            tokens=read_only(tokens.float().cpu().numpy()),
            pooled=read_only(pooled.float().cpu().numpy()),
            truncated=truncated,
            trace=Trace(),
        )


def _bytes(text: Text) -> int:
    return text.tokens.nbytes + text.pooled.nbytes


def pieces(tokenizer: Any, prompt: str, length: int) -> tuple[list[int], bool]:
    """Exactly `length` token ids that end, before any padding, with the end token; and whether some were dropped."""
    # Padded and cut here, not by the tokenizer: it keeps both lengths as a state of its Rust half, where two calls with
    # different lengths overwrite each other's (seen with transformers 5.23: one in eight calls of four threads).
    ids: list[int] = tokenizer(prompt, verbose=False).input_ids
    if len(ids) > length:
        return [*ids[: length - 1], ids[-1]], True
    return ids + [tokenizer.pad_token_id] * (length - len(ids)), False
