"""A guard under LitServe (pip install litserve): the same decision, another server.

    python examples/serving/litserve_server.py guard.safetensors my_model.py:make_model --port 8000
    curl -F file=@cat.jpg http://127.0.0.1:8000/predict

LitServe runs each worker in a process of its own, and so do counters and a drift monitor that live
in a worker: add them up outside (`DriftMonitor.merge`), or use `ebm-guard serve`, where one process
is one replica. An image that cannot be read is answered with 400.
"""

import argparse
import io
from typing import Any

import litserve
from fastapi import HTTPException, Request
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

    def decode_request(self, request: Request) -> Image.Image:
        """Open the field `file` of the form."""
        try:
            image = Image.open(io.BytesIO(request["file"].file.read()))
            image.load()
        except (KeyError, AttributeError, OSError, Image.DecompressionBombError) as error:
            raise HTTPException(400, f"needed an image file in the field `file`: {error}") from None
        return image

    def predict(self, x: Image.Image) -> Decision:
        """Prepare the image as the artefact says, and decide."""
        return self.guard.predict(x)

    def encode_response(self, output: Decision) -> dict[str, Any]:
        """Answer as `ebm-guard serve` does."""
        return {"decisions": output.rows()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guard")
    parser.add_argument("model", help="module:factory or file.py:factory")
    parser.add_argument("--checkpoint")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes that decide")
    given = parser.parse_args()
    api = GuardAPI(given.guard, given.model, given.checkpoint)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=given.workers, max_payload_size=10 * 2**20
    )
    # Its default writes a client file into the working folder.
    server.run(host=given.host, port=given.port, generate_client_file=False)


if __name__ == "__main__":
    main()
