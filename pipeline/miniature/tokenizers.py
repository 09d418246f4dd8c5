"""The miniature's two tokenizers, built in code in the formats that T5Tokenizer and CLIPTokenizer load.

Both know the given words whole, one piece each, so that a prompt of the miniature's world fits into its 32 tokens;
everything else is spelt out. CLIP's reads small letters alone; T5's has pieces of their own for capitals.
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.miniature.configs import TEXT_LENGTH

if TYPE_CHECKING:
    from transformers import T5EncoderModel

WORD = -3.0  # the score of a whole word in T5's vocabulary
CLIP_PARTS = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")  # how CLIPTokenizer cuts a text before it spells


def t5_vocabulary(words: Iterable[str]) -> list[tuple[str, float]]:
    """Pieces and scores of a unigram model: T5's special tokens first, words, then every printable ASCII character.

    A word costs less than its letters together, whichever way it is cut; a character outside ASCII is `<unk>`.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]  # ids 0, 1, 2 as in T5; word start
    letters = [(chr(code), -4.0) for code in range(33, 127)]
    return [*special, *(("\u2581" + word, WORD) for word in sorted(set(words))), *letters]


def t5_capitals(words: Iterable[str]) -> dict[str, str]:
    """Portrait and PORTRAIT for each word: a piece of the T5 tokenizer -> the piece that means the same.

    They stand after `t5_vocabulary`, which a T5 is trained with; it learns to read them by `with_capitals`.
    """
    words = sorted(set(words))
    forms = [(form, word) for word in words for form in (word[:1].upper() + word[1:], word.upper())]
    return {f"\u2581{form}": f"\u2581{word}" for form, word in forms if form not in words}


def with_capitals(t5: "T5EncoderModel", words: Iterable[str]) -> "T5EncoderModel":
    """A copy that reads each word in capitals exactly as it reads the word, and everything else as before."""
    import torch

    words = tuple(words)
    ids = {piece: index for index, (piece, _) in enumerate(t5_vocabulary(words))}
    same = [ids[piece] for piece in t5_capitals(words).values()]
    t5 = copy.deepcopy(t5)
    rows = t5.shared.weight.detach()  # (V, d_model)
    wider = torch.nn.Embedding.from_pretrained(torch.cat((rows, rows[same])), freeze=False)  # type: ignore[no-untyped-call]
    t5.set_input_embeddings(wider)
    t5.config.vocab_size = t5.shared.num_embeddings
    return t5


def clip_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte alphabet inside and at the end of a word, the pieces of the words, two special tokens; and merges."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(part for word in sorted(set(words)) for part in CLIP_PARTS.findall(word.lower()))
    merged = dict.fromkeys(left + right for left, right in merges)
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def _merges(parts: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one piece of each part. Later ones never undo what earlier ones did: they have lower rank."""
    ranks: dict[tuple[str, str], int] = {}
    for part in parts:
        pieces = [*part[:-1], part[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(zip(pieces, pieces[1:], strict=False))
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            at = pairs.index(pair)
            pieces[at : at + 2] = [pair[0] + pair[1]]
    return list(ranks)


def save_t5(folder: Path, words: Iterable[str]) -> int:
    """Write the T5 tokenizer's files into a folder; returns how many pieces it has."""
    from transformers import T5Tokenizer

    words = tuple(words)
    vocabulary = [*t5_vocabulary(words), *((piece, WORD) for piece in t5_capitals(words))]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH).save_pretrained(folder)
    return len(vocabulary)


def save_clip(folder: Path, words: Iterable[str]) -> int:
    """Write the CLIP tokenizer's files into a folder; returns how many pieces it has, start and end the last two."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary(words)
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    return len(vocabulary)
