"""PuLID's objective (equation 7): the flow loss, the alignment and the ID loss on one batch, term by term.

Each term is a graph of its own, so that its backward pass can be run, and its memory given back, before the next one
is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import SettingsInvalid
from pipeline.identity import id_cond
from pipeline.models.face_features import normalise
from pipeline.models.flux import IdentityRows
from pipeline.models.sampling import image_ids, pack, unpack
from pipeline.training import losses
from pipeline.training.attention import AttentionFeatures, attention_features
from pipeline.training.config import TrainingConfig
from pipeline.training.crop import face_crops
from pipeline.training.draws import Draws
from pipeline.training.examples import Batch, Prompts
from pipeline.training.networks import Networks
from pipeline.training.sampling import (
    Conditioning,
    Velocity,
    fast_schedule,
    noisy,
    one_step_estimate,
    predict,
    sample,
    sample_times,
)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One summand of the objective on this worker's samples.

    loss: its weighted sum over `count` samples, with a graph; the objective has the mean over all workers' samples.
    figures: sums over the samples, by name, for the log.
    """

    loss: Tensor
    count: int
    figures: dict[str, Tensor]


class Objective:
    """Losses of batches. Rows of a batch are this worker's places of the global batch, as `draws` names them."""

    def __init__(
        self, networks: Networks, config: TrainingConfig, id_prompts: Prompts | None, contrast: Prompts | None
    ) -> None:
        """Prompts: those of the ID loss and of the contrastive pair, as they are in `config`, read by T5 and CLIP.

        Raises SettingsInvalid where the stage needs a network or prompts that are not there.
        """
        if config.stage >= 2 and (networks.vae is None or networks.recogniser is None or networks.locate is None):
            raise SettingsInvalid("The ID loss needs the VAE, a recogniser and a way to locate faces.")
        if config.stage >= 2 and config.id_form == "sampled" and not id_prompts:
            raise SettingsInvalid("The ID loss through sampled pictures needs its prompts.")
        if config.stage >= 3 and config.align_form == "trajectory" and not contrast:
            raise SettingsInvalid("The alignment along trajectories needs its prompts.")
        self._networks, self._config = networks, config
        self._id_prompts, self._contrast = id_prompts, contrast

    def identity_tokens(self, batch: Batch) -> Tensor:
        """Identity tokens of everybody in the batch and, in the last row, of nobody: (B + 1, T, kv_dim)."""
        pooled, hidden = self._eva_clip(batch)
        cond, states = id_cond(batch.embedding, pooled), list(hidden)
        with_nobody = [torch.cat((rows.float(), torch.zeros_like(rows[:1]).float())) for rows in (cond, *states)]
        with self._autocast():
            tokens: Tensor = self._networks.idformer(with_nobody[0], with_nobody[1:])
        return tokens.float()

    def terms(self, batch: Batch, tokens: Tensor, draws: Draws, workers: int) -> Iterator[Term]:
        """The terms of this step, in the same order on every worker; `tokens` as from `identity_tokens`."""
        config, people = self._config, tokens[:-1]
        yield self._flow(batch, people, tokens[-1:], draws)
        if config.has_identity(draws.step):
            part = config.id_batch_size // workers
            yield self._identity(batch.take(slice(part)), people[:part], draws.first(part))
        if config.has_alignment(draws.step):
            part = config.align_batch_size // workers
            yield self._alignment(batch.take(slice(part)), people[:part], draws.first(part))

    def _flow(self, batch: Batch, people: Tensor, nobody: Tensor, draws: Draws) -> Term:
        dropped = (draws.uniform("dropout") < self._config.id_dropout).to(people.device)
        people = torch.where(dropped[:, None, None], nobody, people)
        latents, noise, times = self._noisy(batch, draws, "flow")
        conditioning = self._conditioning(batch.text, batch.pooled, batch.latents, self._config.flow_guidance)
        velocity = self._velocity(conditioning, people)(noisy(latents, noise, times), times)
        values = losses.flow_loss(velocity, noise, latents, batch.token_weights)
        return Term(values.sum(), len(batch), {"flow": values.detach().sum()})

    def _identity(self, batch: Batch, people: Tensor, draws: Draws) -> Term:
        assert self._networks.recogniser is not None  # the constructor has seen to it
        assert self._networks.locate is not None
        if batch.reference is None:
            raise SettingsInvalid("The ID loss needs examples with the reference's embedding by its recogniser.")
        latents = (
            self._sampled(batch, people, draws)
            if self._config.id_form == "sampled"
            else self._estimated(batch, people, draws)
        )
        pixels = self._decode(latents, batch.latents)
        found = [
            (row, points) for row, points in enumerate(self._networks.locate(pixels.detach())) if points is not None
        ]
        if not found:  # nothing to learn from, but the other workers count on the term
            return Term(people.sum() * 0, 0, {"id": people.new_zeros(())})
        rows = [row for row, _ in found]
        crops = face_crops(pixels[rows].float(), [points for _, points in found])
        values = losses.id_loss(self._networks.recogniser(crops), batch.reference[rows])
        return Term(self._config.lambda_id * values.sum(), len(rows), {"id": values.detach().sum()})

    def _alignment(self, batch: Batch, people: Tensor, draws: Draws) -> Term:
        """The contrastive pair: one noise and one prompt, with and without the identity, at one random time."""
        latents_id, latents, times, conditioning = self._pair(batch, people, draws)
        transformer, text_tokens = self._networks.flux.transformer, conditioning.text.shape[1]
        with torch.no_grad(), attention_features(transformer, text_tokens) as without:
            self._velocity(conditioning, None)(latents, times)
        with attention_features(transformer, text_tokens) as with_id:
            self._velocity(conditioning, people)(latents_id, times)
        semantic, layout = _alignment_losses(with_id, without)
        loss = self._config.semantic * semantic + self._config.layout * layout
        figures = {"semantic": semantic.detach().sum(), "layout": layout.detach().sum()}
        return Term(loss.sum(), len(batch), figures)

    def _pair(self, batch: Batch, people: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """Latents with and without identity, the time they have reached, and what both paths are conditioned by."""
        config = self._config
        if config.align_form == "noisy":
            latents, noise, times = self._noisy(batch, draws, "alignment")
            conditioning = self._conditioning(batch.text, batch.pooled, batch.latents, config.sample_guidance)
            reached = noisy(latents, noise, times)
            return reached, reached, times, conditioning
        assert self._contrast is not None  # the constructor has seen to it
        conditioning = self._prompted(self._contrast, batch, draws, "alignment prompt")
        noise = self._noise(batch, draws, "alignment noise")
        times = fast_schedule(config.align_steps, noise.shape[1], config.shift, noise.device)
        step = draws.one("alignment step", config.align_steps)
        with torch.no_grad():
            latents_id, latents = (
                sample(self._velocity(conditioning, path), noise, times[: step + 1], 0) for path in (people, None)
            )
        return latents_id, latents, times[step].expand(len(batch)), conditioning

    def _sampled(self, batch: Batch, people: Tensor, draws: Draws) -> Tensor:
        config = self._config
        assert self._id_prompts is not None  # the constructor has seen to it
        conditioning = self._prompted(self._id_prompts, batch, draws, "id prompt")
        noise = self._noise(batch, draws, "id noise")
        times = fast_schedule(config.id_steps, noise.shape[1], config.shift, noise.device)
        return sample(self._velocity(conditioning, people), noise, times, config.id_gradient_steps)

    def _estimated(self, batch: Batch, people: Tensor, draws: Draws) -> Tensor:
        latents, noise, times = self._noisy(batch, draws, "id")
        conditioning = self._conditioning(batch.text, batch.pooled, batch.latents, self._config.sample_guidance)
        start = noisy(latents, noise, times)
        return one_step_estimate(start, self._velocity(conditioning, people)(start, times), times)

    def _velocity(self, conditioning: Conditioning, people: Tensor | None) -> Velocity:
        """FLUX's prediction with identity tokens (B, T, kv_dim), or without any."""
        rows = [] if people is None else [IdentityRows(people, torch.ones(len(people), 1, 1, device=people.device))]

        def velocity(latents: Tensor, times: Tensor) -> Tensor:
            with self._autocast():
                return predict(self._networks.flux, latents, times, conditioning, rows)

        return velocity

    def _autocast(self) -> torch.autocast:
        enabled = self._config.autocast
        if enabled is None:
            enabled = self._networks.flux.transformer.x_embedder.weight.dtype != torch.float32
        # Without its cache: a weight that was cast where no gradient was wanted would stay without one.
        return torch.autocast(self._networks.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _noisy(self, batch: Batch, draws: Draws, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's latents as tokens (B, N, C), noise of their shape, and times (B,)."""
        latents, noise = pack(batch.latents.float()), self._noise(batch, draws, f"{purpose} noise")
        chance, normal = draws.uniform(f"{purpose} mixture", 2), draws.normal(f"{purpose} time")
        times = sample_times(chance, normal, self._config.times, latents.shape[1])
        return latents, noise, times.to(latents.device)

    def _noise(self, batch: Batch, draws: Draws, purpose: str) -> Tensor:
        return pack(draws.normal(purpose, *batch.latents.shape[1:])).to(batch.latents.device)

    def _prompted(self, prompts: Prompts, batch: Batch, draws: Draws, purpose: str) -> Conditioning:
        chosen = draws.choice(purpose, len(prompts))
        text, pooled = (tensor[chosen.to(tensor.device)] for tensor in (prompts.text, prompts.pooled))
        return self._conditioning(text, pooled, batch.latents, self._config.sample_guidance)

    def _conditioning(self, text: Tensor, pooled: Tensor, latents: Tensor, guidance: float) -> Conditioning:
        device, (rows, columns) = latents.device, (size // 2 for size in latents.shape[-2:])
        guides = bool(self._networks.flux.transformer.config.guidance_embeds)
        given = torch.full((len(latents),), guidance, device=device) if guides else None
        return Conditioning(text.to(device), pooled.to(device), image_ids(rows, columns).to(device), given)

    def _decode(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of latents as tokens, for latents of the shape of `like`."""
        vae = self._networks.vae
        assert vae is not None  # the constructor has seen to it
        rows, columns = (size // 2 for size in like.shape[-2:])
        latents = unpack(tokens, rows, columns) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].clamp(-1, 1)  # type: ignore[no-any-return]

    def _eva_clip(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        if batch.eva_pooled is not None:
            return batch.eva_pooled, batch.hidden
        tower = self._networks.eva_clip
        if tower is None or batch.features is None:
            raise SettingsInvalid("Examples have to hold EVA-CLIP's outputs, or its inputs where the tower is there.")
        weight = next(tower.parameters())
        with torch.no_grad():
            pooled, hidden = tower(normalise(batch.features.to(weight.device)).to(weight.dtype))
        return pooled, tuple(hidden)


def _alignment_losses(with_id: AttentionFeatures, without: AttentionFeatures) -> tuple[Tensor, Tensor]:
    """Semantic and layout loss (B,), each the mean over all layers.

    The words' keys are those of the path without identity: FLUX's text tokens read the image, so the other path's
    differ, and the question of both has to be the same.
    """
    pairs = list(zip(with_id.queries, without.queries, without.keys, strict=True))
    semantic = [losses.semantic_alignment(query_id, query, key) for query_id, query, key in pairs]
    layout = [losses.layout_alignment(query_id, query) for query_id, query, _ in pairs]
    return losses.mean_over_layers(semantic), losses.mean_over_layers(layout)
