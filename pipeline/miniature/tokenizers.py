"""The miniature's two tokenizers, built in code in the formats that T5Tokenizer and CLIPTokenizer load."""

from collections.abc import Iterable
from pathlib import Path

# Whole words for the small T5, so that an ordinary prompt fits into 128 tokens; everything else is spelt out.
WORDS = """
a an and at by for from her his in is of on or the their to with without
man woman person people boy girl child portrait photo picture painting drawing sketch face head hair eyes smile hat
glasses beard dress suit coat shirt armor crown hand sitting standing walking holding sign looking laughing angry happy
red orange yellow green blue purple pink brown black white gray gold silver dark light bright soft warm cold
garden forest beach city street mountain sea sky night day sunset snow rain space room studio window background
color colour cinematic realistic detailed cartoon anime comic ice stone wood paper glass water fire style quality
bad worst text signature watermark extra limbs
"""


def t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces and scores of a unigram model: T5's special tokens first, words, then every printable ASCII character.

    A word costs less than its letters together, whichever way it is cut; a character outside ASCII is `<unk>`.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]  # ids 0, 1, 2 as in T5; word start
    words = [("\u2581" + word, -3.0) for word in WORDS.split()]
    return [*special, *words, *((chr(code), -4.0) for code in range(33, 127))]


def clip_vocabulary() -> dict[str, int]:
    """CLIP's byte alphabet, each byte inside and at the end of a word, then its two special tokens; no merges."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces: Iterable[str] = [*alphabet, *(byte + "</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}


def save_t5(folder: Path) -> None:
    """Write the T5 tokenizer's files into a folder."""
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    """Write the CLIP tokenizer's files into a folder."""
    from transformers import CLIPTokenizer

    CLIPTokenizer(vocab=clip_vocabulary(), merges=[]).save_pretrained(folder)
