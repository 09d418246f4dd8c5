"""TrainingConfig: everything that decides how a training goes, in one frozen record that reads and writes JSON."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import SettingsInvalid
from pipeline.settings import PresetName
from pipeline.training.losses import ID_WEIGHT, LAYOUT_WEIGHT, SEMANTIC_WEIGHT

ID_PROMPTS = ("portrait, color, cinematic",)  # the paper's section 3.5
# The paper's Table 8: prompts whose style an identity easily spoils.
CONTRAST_PROMPTS = (
    "portrait, color, cinematic",
    "portrait, anime artwork",
    "portrait, comic art, graphic novel art",
    "portrait, digital artwork, illustrative, painterly, matte painting",
    "portrait, magnificent, celestial, ethereal, painterly, epic, majestic, magical, fantasy art, cover art, dreamy",
    "portrait, vibrant, professional, sleek, modern, minimalist, graphic, line art, vector graphics",
    "portrait, cyberpunk, vaporwave, neon, vibes, vibrant, stunningly beautiful, crisp, detailed, sleek, ultramodern, "
    "magenta highlights, dark purple shadows, high contrast, cinematic, ultra detailed, intricate, professional",
    "portrait, energetic brushwork, bold colors, abstract forms, expressive, emotional",
    "portrait, film noir style, monochrome, high contrast, dramatic shadows, 1940s style, mysterious, cinematic",
    "portrait, papercut, mixed media, textured paper, overlapping, asymmetrical, abstract, vibrant",
    "portrait, paper mache representation, 3D, sculptural, textured, handmade, vibrant, fun",
    "portrait, vaporwave style, retro aesthetic, cyberpunk, vibrant, neon colors, vintage 80s and 90s style, highly "
    "detailed",
    "portrait, watercolor painting, vibrant, beautiful, painterly, detailed, textural, artistic",
    "portrait, impressionist painting, loose brushwork, vibrant color, light and shadow play",
    "portrait, expressionist, raw, emotional, dynamic, distortion for emotional effect, vibrant, use of unusual "
    "colors, detailed",
)


class Frozen(BaseModel):
    """A record that does not change and takes no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Times(Frozen):
    """Which times the flow loss is trained at.

    A share of them is uniform in [low, 1], the others are sigmoid(mean + spread n). Without a mean it is FLUX's time
    shift at the picture's size.
    """

    mean: float | None = None
    spread: float = Field(default=1.0, gt=0)
    uniform_share: float = Field(default=0.0, ge=0, le=1)
    low: float = Field(default=0.7, ge=0, le=1)


# Who somebody is, is decided at high noise: half of the times there, and the others leaning that way.
HIGH_NOISE = Times(mean=1.0, spread=1.2, uniform_share=0.5, low=0.7)


# What may differ between a training and one that goes on from its checkpoint: nothing that is learnt depends on it.
FREE = {"log_dir", "checkpoint_every", "gradient_checkpointing"}


class TrainingConfig(Frozen):
    """How PuLID is trained.

    The weights of the losses, the prompts, the three stages and the four steps of the fast sampler are the paper's. It
    says nothing of learning rates, batch sizes and step counts: those defaults are ours.

    stage: 1 is the flow loss only, 2 adds the ID loss, 3 the alignment. batch_size, id_batch_size and
    align_batch_size are over all workers; the ID loss and the alignment take the first samples of the batch, at every
    `id_every`-th and `align_every`-th step.

    id_form: "sampled", a whole picture in `id_steps` steps with gradient through the last `id_gradient_steps`, or
    "one_step", the estimate that one prediction on a noisy picture leads to. align_form: "trajectory", both paths walk
    from one noise on one of the contrastive prompts to one random step of `align_steps`, as the paper has it without a
    fast model; or "noisy", both read the same noisy picture under its own prompt.

    autocast: bfloat16 in FLUX and IDFormer; null: where FLUX itself is not in float32.

    warmup: steps until the full learning rate; decay_from: the share of all steps after which it falls in a line to
    zero. optimiser: "adamw", or "muon" for matrices with AdamW for the rest.
    """

    preset: PresetName = "flux-dev"
    stage: Literal[1, 2, 3] = 1
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    id_batch_size: int = Field(default=8, ge=1)
    align_batch_size: int = Field(default=8, ge=1)

    optimiser: Literal["adamw", "muon"] = "adamw"
    lr_cross_attention: float = Field(default=1e-4, ge=0)
    lr_idformer: float = Field(default=5e-5, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=500, ge=0)
    decay_from: float = Field(default=1.0, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.999, ge=0, lt=1)

    times: Times = Times()
    id_dropout: float = Field(default=0.1, ge=0, le=1)
    # flux-dev is distilled to a guidance: 1 is the one that leaves its pictures' distribution as the data's
    flow_guidance: float = 1.0
    sample_guidance: float = 4.0
    shift: bool = True

    lambda_id: float = Field(default=ID_WEIGHT, ge=0)
    id_every: int = Field(default=1, ge=1)
    id_form: Literal["sampled", "one_step"] = "sampled"
    id_steps: int = Field(default=4, ge=1)
    id_gradient_steps: int = Field(default=4, ge=1)
    id_prompts: tuple[str, ...] = Field(default=ID_PROMPTS, min_length=1)

    semantic: float = Field(default=SEMANTIC_WEIGHT, ge=0)
    layout: float = Field(default=LAYOUT_WEIGHT, ge=0)
    align_every: int = Field(default=1, ge=1)
    align_form: Literal["trajectory", "noisy"] = "trajectory"
    align_steps: int = Field(default=4, ge=1)
    contrast_prompts: tuple[str, ...] = Field(default=CONTRAST_PROMPTS, min_length=1)

    autocast: bool | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(default=500, ge=1)
    log_dir: str | None = None

    @model_validator(mode="after")
    def _parts_of_the_batch(self) -> Self:
        if max(self.id_batch_size, self.align_batch_size) > self.batch_size:
            raise ValueError("id_batch_size and align_batch_size are parts of batch_size, and cannot be larger")
        return self

    def check_workers(self, count: int) -> None:
        """Raises SettingsInvalid where the batches cannot be shared out evenly among so many workers."""
        sizes = (self.batch_size, self.id_batch_size, self.align_batch_size)
        if count < 1 or any(size % count for size in sizes):
            raise SettingsInvalid(f"Batch sizes {sizes} have to be multiples of the workers, not {count}, 1 at least.")

    def has_identity(self, step: int) -> bool:
        """Whether the ID loss counts at a step."""
        return self.stage >= 2 and self.lambda_id > 0 and step % self.id_every == 0

    def has_alignment(self, step: int) -> bool:
        """Whether the alignment counts at a step."""
        return self.stage >= 3 and self.semantic + self.layout > 0 and step % self.align_every == 0

    def learning_rate(self, step: int) -> float:
        """What the learning rates are multiplied by at a step."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        flat = self.decay_from * self.steps
        falling = 1.0 if step < flat else max(0.0, (self.steps - step) / (self.steps - flat))
        return rising * falling
