"""The floor of B10: deployments of Ray Serve that hand on as many bytes over as many hops, and do nothing else."""

from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from ray import serve

from bench.noop import PICTURE_BYTES

FACES, IDENTITY, TEXT = 336 * 336 + 512, 32 * 2048, 128 * 4096 + 768  # float32 numbers of the records
OPTIONS: dict[str, Any] = {"max_ongoing_requests": 16, "ray_actor_options": {"num_cpus": 0.1}}
ROUTE = "/bare"


class Hop:
    """Answers with so many numbers, whatever it is given."""

    def __init__(self, numbers: int) -> None:
        self._numbers = numbers

    async def __call__(self, *_: Any) -> Any:
        """Zeros; the last hop, which has no numbers, gives the bytes of a picture."""
        return np.zeros(self._numbers, np.float32) if self._numbers else bytes(PICTURE_BYTES)


app = FastAPI()


@serve.ingress(app)
class Front:
    """Takes a body in, runs the hops in the order of the chain, and gives the picture out."""

    def __init__(self, faces: Any, identity: Any, text: Any, denoise: Any) -> None:
        self._faces, self._identity, self._text, self._denoise = faces, identity, text, denoise

    @app.post("/")
    async def make(self, request: Request) -> Response:
        """One round trip."""
        text = self._text.remote(1)
        identity = self._identity.remote(self._faces.remote(await request.body()))
        return Response(await self._denoise.remote(text, identity))


def deploy() -> None:
    """Start it beside the application, in the cluster that is running."""

    def hop(name: str, numbers: int) -> Any:
        return serve.deployment(name=name, **OPTIONS)(Hop).bind(numbers)

    hops = [hop("faces", FACES), hop("identity", IDENTITY), hop("text", TEXT), hop("denoise", 0)]
    serve.run(serve.deployment(name="front", **OPTIONS)(Front).bind(*hops), name="bare", route_prefix=ROUTE)
