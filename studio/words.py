"""What the page says, as HTML; whatever comes from elsewhere is text in it and nothing more."""

import re
from html import escape

from pipeline.errors import PipelineError


def said(text: str, done: float | None = None) -> str:
    """A line of the page, with a bar where `done` says how much of something is (0..1)."""
    bar = "" if done is None else f'<progress max="1" value="{done:.3f}"></progress>'
    return f'<p role="status">{escape(text)} {bar}</p>'


def refused(error: PipelineError) -> str:
    """An error as the sentence that it is; a photo has the number that it has on the page."""
    words = re.sub(r"^photos\[(\d)\]", lambda found: f"Photo {int(found[1]) + 1}", str(error))
    return f'<p role="alert" class="refused">{escape(words)}</p>'
