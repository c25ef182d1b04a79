"""A guard under LitServe (pip install litserve): the same decision, another server.

    python examples/serving/litserve_server.py guard.safetensors my_model.py:make_model

LitServe runs each worker in a process of its own, and so do counters and a drift monitor that live
in a worker: add them up outside (`DriftMonitor.merge`), or use `ebm-guard serve`, where one process
is one replica.
"""

import io
import sys
from typing import Any

import litserve
from PIL import Image

from ebm_guard import Decision, Guard
from ebm_guard.model.loading import load_model


class GuardAPI(litserve.LitAPI):
    """Decide on one image file a request."""

    def __init__(self, guard: str, model: str, checkpoint: str | None = None) -> None:
        super().__init__()
        self.paths = (guard, model, checkpoint)

    def setup(self, device: str) -> None:
        """Load the guard in the worker."""
        guard, model, checkpoint = self.paths
        # Loading checks that the model is the one that the guard was fitted on.
        self.guard = Guard.load(guard, load_model(model, checkpoint=checkpoint).to(device))

    def decode_request(self, request: Any) -> Image.Image:
        """Open the field `file` of the form."""
        return Image.open(io.BytesIO(request["file"].file.read()))

    def predict(self, x: Image.Image) -> Decision:
        """Prepare the image as the artefact says, and decide."""
        return self.guard.predict(x)

    def encode_response(self, output: Decision) -> dict[str, Any]:
        """Answer as `ebm-guard serve` does."""
        return {"decisions": output.rows()}


if __name__ == "__main__":
    litserve.LitServer(GuardAPI(*sys.argv[1:])).run(port=8000)
