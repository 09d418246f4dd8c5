"""The miniature's text encoders: what a prompt of the drawn world says can be read off their outputs linearly.

T5 and CLIP's text tower learn to name a prompt's attributes; then CLIP's picture tower learns, with the usual
contrastive loss, to put a drawing where its prompt is. Padding is not masked, as FLUX does not mask it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from pipeline.miniature import configs, tokenizers
from pipeline.miniature.files import place, save_transformer
from pipeline.miniature.people import FIRST_HELD_OUT, person
from pipeline.miniature.scenes import (
    BACKGROUNDS,
    CLOTHES,
    EXPRESSIONS,
    HATS,
    LIGHTS,
    STYLES,
    WORDS,
    held_out_scene,
    prompt,
    read,
    scene,
)
from pipeline.miniature.world import draw
from pipeline.text import CLIP_LENGTH, pieces
from pipeline.training.miniature.loop import Loop, LoopPlan, generator

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer, T5Tokenizer

ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "background": tuple(BACKGROUNDS),
    "hat": tuple(HATS),
    "expression": tuple(EXPRESSIONS),
    "clothes": tuple(CLOTHES),
    "light": tuple(LIGHTS),
    "style": tuple(STYLES),
}
CHOICES = 10  # prompts of which CLIP is to find the right one
# OpenAI CLIP's, by which its pictures are normalised
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class TextPlan:
    """How the text encoders and CLIP's picture tower are trained."""

    words: LoopPlan = field(default_factory=lambda: LoopPlan(steps=300, batch=64, lr=2e-3, ema=0.98))
    pictures: LoopPlan = field(default_factory=lambda: LoopPlan(steps=500, batch=64, lr=1.5e-3, ema=0.98))
    measured: int = 200


def train(work: Path, weights: Path, plan: TextPlan) -> dict[str, float]:
    """Train all three and write `t5/` and `clip/`.

    Returns the share of attributes that are read right off held-out prompts (t5_reads, clip_reads), and how often CLIP
    finds a held-out drawing's prompt among ten (clip_matches).
    """
    torch.manual_seed(plan.words.seed)
    readers = Readers(weights)
    readers = Loop(readers, plan.words).run(lambda step: readers(_prompts(plan.words, step)))
    save_transformer(tokenizers.with_capitals(readers.t5, WORDS).half(), place(weights, "t5"))
    matcher = Matcher(readers.clip, readers.clip_tokens)
    matcher = Loop(matcher, plan.pictures, work / "clip" / "checkpoint.pt").run(
        lambda step: matcher(_numbers(plan.pictures, step))
    )
    save_transformer(copy.deepcopy(matcher.clip).half(), place(weights, "clip"))
    held_out = range(FIRST_HELD_OUT, FIRST_HELD_OUT + plan.measured)
    figures = readers.measure([prompt(held_out_scene(number), number) for number in held_out])
    return {**figures, "clip_matches": matcher.measure(held_out)}


class Readers(nn.Module):
    """Both text encoders, and the linear heads that read a prompt's attributes off each."""

    def __init__(self, weights: Path) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

        super().__init__()
        folders = place(weights, "t5"), place(weights, "clip")
        tokenizers.save_t5(folders[0], WORDS)
        t5_size, clip_size = len(tokenizers.t5_vocabulary(WORDS)), tokenizers.save_clip(folders[1], WORDS)
        self.t5 = T5EncoderModel(T5Config(**configs.t5(t5_size)))
        self.clip = CLIPModel(CLIPConfig(**configs.clip(clip_size)))
        self.t5_tokens = Pieces(T5Tokenizer.from_pretrained(folders[0]), configs.TEXT_LENGTH)
        self.clip_tokens = Pieces(CLIPTokenizer.from_pretrained(folders[1]), CLIP_LENGTH)
        # "not named" is an answer too
        width = configs.T5["d_model"], configs.CLIP_TEXT["hidden_size"]
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Linear(size, len(names) + 1) for size in width)
                for name, names in ATTRIBUTES.items()
            }
        )

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """The mean cross-entropy of all attributes, read off both encoders."""
        wanted = {name: torch.tensor([_answer(text, name) for text in prompts]) for name in ATTRIBUTES}
        losses = [cross_entropy(scores, wanted[name]) for name, both in self.scores(prompts).items() for scores in both]
        return torch.stack(losses).mean()

    def scores(self, prompts: Sequence[str]) -> dict[str, list[Tensor]]:
        """By attribute, the scores of its names (B, names + 1) read off T5's mean token and CLIP's output."""
        tokens = self.t5(self.t5_tokens(prompts)).last_hidden_state.mean(dim=1)  # (B, 96)
        pooled = self.clip.text_model(self.clip_tokens(prompts)).pooler_output  # (B, 64)
        return {name: [self.heads[name][0](tokens), self.heads[name][1](pooled)] for name in ATTRIBUTES}  # type: ignore[index]

    @torch.no_grad()
    def measure(self, prompts: Sequence[str]) -> dict[str, float]:
        """The share of attributes that each encoder's head names right."""
        right = {"t5_reads": 0.0, "clip_reads": 0.0}
        for name, both in self.scores(prompts).items():
            wanted = torch.tensor([_answer(text, name) for text in prompts])
            for key, scores in zip(right, both, strict=True):
                right[key] += (scores.argmax(dim=1) == wanted).float().mean().item() / len(ATTRIBUTES)
        return right


class Pieces:
    """Turns prompts into token ids of one length, as text.py does for a request."""

    def __init__(self, tokenizer: "T5Tokenizer | CLIPTokenizer", length: int) -> None:
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, length)."""
        return torch.tensor([pieces(self._tokenizer, text, self._length)[0] for text in prompts])


class Matcher(nn.Module):
    """CLIP, whose text tower is done, learning to put drawings where their prompts are."""

    def __init__(self, clip: "CLIPModel", tokens: Pieces) -> None:
        super().__init__()
        self.clip, self._tokens = clip.requires_grad_(True), tokens
        self.clip.text_model.requires_grad_(False)

    def forward(self, numbers: Sequence[int]) -> Tensor:
        """The contrastive loss over the drawings of these numbers, in both directions."""
        said, shown = self.embed(numbers, scene)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        return self._loss(scale * said @ shown.T, torch.arange(len(numbers)))

    @staticmethod
    def _loss(scores: Tensor, right: Tensor) -> Tensor:
        return (cross_entropy(scores, right) + cross_entropy(scores.T, right)) / 2

    def embed(self, numbers: Sequence[int], scene_of: Any) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, 64) of the prompts and of the drawings of these numbers."""
        scenes = [scene_of(number) for number in numbers]
        said = self.clip.text_model(self._tokens([prompt(s, n) for s, n in zip(scenes, numbers, strict=True)]))
        size = configs.CLIP_VISION["image_size"]
        drawings = [draw(person(n), s, size).pixels for s, n in zip(scenes, numbers, strict=True)]
        shown = self.clip.vision_model(clip_pixels(drawings))
        return (
            normalize(self.clip.text_projection(said.pooler_output), dim=-1),
            normalize(self.clip.visual_projection(shown.pooler_output), dim=-1),
        )

    @torch.no_grad()
    def measure(self, numbers: Sequence[int]) -> float:
        """How often a held-out drawing's own prompt is the nearest of ten."""
        said, shown = self.embed(numbers, held_out_scene)
        groups = [slice(start, start + CHOICES) for start in range(0, len(numbers), CHOICES)]
        right = [(shown[g] @ said[g].T).argmax(dim=1) == torch.arange(len(shown[g])) for g in groups]
        return torch.cat(right).float().mean().item()


def clip_pixels(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures of CLIP's own size (S, S, 3) as its input (B, 3, S, S)."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (batch - mean) / std


def _answer(text: str, attribute: str) -> int:
    """The number of the name that a prompt gives an attribute; the last: none."""
    names = ATTRIBUTES[attribute]
    said = read(text).get(attribute)
    return len(names) if said is None else names.index(said)


def _numbers(plan: LoopPlan, step: int) -> list[int]:
    found: list[int] = torch.randint(FIRST_HELD_OUT, (plan.batch,), generator=generator(plan.seed, step)).tolist()
    return found


def _prompts(plan: LoopPlan, step: int) -> list[str]:
    return [prompt(scene(number), number) for number in _numbers(plan, step)]
