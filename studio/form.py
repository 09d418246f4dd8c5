"""Form: the parameters of a picture as controls, with the ranges and defaults of pipeline.request."""

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import gradio as gr
from annotated_types import Ge, Le, MultipleOf
from pydantic import BaseModel

from cluster.client import Client
from pipeline.errors import InvalidRequest, PipelineError
from pipeline.request import NEGATIVE_PROMPT, Person, Request

MINIATURE = {"width": 256, "height": 256}  # what the miniature has learnt to draw
ANY_SEED = ("", "-1")  # -1 is the official app's word for it
Updates = dict[Any, Any]
Values = Mapping[Any, Any]  # the value of each component


class Form:
    """The controls. Made where they are to stand in the page."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.prompt = gr.Textbox(label="Prompt", value="portrait, color, cinematic", lines=3, max_length=8192)
        self._person = {
            "id_weight": _slider(
                Person, "id_weight", "How strongly the identity acts; above 1 it drags background and framing in.", 0.05
            ),
            "start_step": _slider(
                Person, "start_step", "First step at which it acts: 4 for photographs, 0 or 1 for stylised pictures."
            ),
        }
        with gr.Row():
            self.seed = gr.Textbox(label="seed", info="Empty or -1: drawn at random, and told with the picture.")
            self._output_format = gr.Radio(["png", "jpg", "webp"], value="png", label="output_format")
        self._sizes = {name: _slider(Request, name, "Pixels.") for name in ("width", "height")}
        self._more = {
            "num_steps": _slider(Request, "num_steps", "Denoising steps."),
            "guidance_scale": _slider(
                Request, "guidance_scale", "FLUX's distilled guidance; lower is looser and often more natural.", 0.1
            ),
            "num_outputs": _slider(Request, "num_outputs", "Pictures; picture n is drawn with seed + n."),
        }
        with gr.Accordion("True CFG, and the length of the prompt", open=False):
            self._negative_prompt = gr.Textbox(
                label="negative_prompt", value=NEGATIVE_PROMPT, info="Counts where true_cfg is above 1.", lines=2
            )
            self._more |= {
                "true_cfg": _slider(
                    Request,
                    "true_cfg",
                    "Classifier-free guidance by a second pass, at twice the time; 1: off.",
                    0.1,
                ),
                "timestep_to_start_cfg": _slider(Request, "timestep_to_start_cfg", "First step of the second pass."),
                "max_sequence_length": _slider(
                    Request, "max_sequence_length", "Tokens read of the prompt; changing it changes the picture."
                ),
            }

    @property
    def inputs(self) -> set[Any]:
        """Every control."""
        return {
            *(self.prompt, self.seed, self._output_format, self._negative_prompt),
            *(*self._person.values(), *self._sizes.values(), *self._more.values()),
        }

    @property
    def sizes(self) -> list[Any]:
        """What `suited` fills."""
        return list(self._sizes.values())

    async def suited(self) -> Updates:
        """The sizes that suit the service's preset, when the page is opened."""
        with suppress(PipelineError):  # the page says so where it lists the stored identities
            if (await asyncio.to_thread(self._client.models))["preset"] == "miniature":
                return {self._sizes[name]: gr.Slider(value=size) for name, size in MINIATURE.items()}
        return {size: gr.skip() for size in self.sizes}

    def body(self, values: Values, who: Mapping[str, Any] | None) -> dict[str, Any]:
        """A request as JSON, `who` being its person without weights; raises InvalidRequest."""
        numbers = self._sizes | self._more
        person = {name: values[control] for name, control in self._person.items()}
        return {
            "prompt": values[self.prompt],
            "negative_prompt": values[self._negative_prompt],
            "output_format": values[self._output_format],
            "seed": _seed(values[self.seed]),
            **{name: values[control] for name, control in numbers.items()},
            "people": [] if who is None else [{**who, **person}],
        }


def _slider(model: type[BaseModel], name: str, tip: str, step: float = 1) -> gr.Slider:
    """A number of a request, in its own range."""
    field = model.model_fields[name]
    rules = {type(rule): rule for rule in field.metadata}
    return gr.Slider(
        rules[Ge].ge,
        rules[Le].le,
        value=field.default,
        step=rules[MultipleOf].multiple_of if MultipleOf in rules else step,
        label=name,
        info=tip,
    )


def _seed(text: str) -> int:
    """A seed that was typed, or any; below 2**53 as the service's own are."""
    text = text.strip()
    if text in ANY_SEED:
        return secrets.randbelow(2**53)
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise InvalidRequest("The seed is a whole number from 0; leave it empty for any.")
    return int(text)
