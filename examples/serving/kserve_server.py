"""An exported program under KServe's own server: the Open Inference Protocol, without torch.

    ebm-guard export guard.safetensors --model ... --format onnx --input pixels --output gate.onnx
    pip install kserve onnxruntime
    python examples/serving/kserve_server.py gate.onnx --model_name gate --http_port 8080

Answers POST /v2/models/gate/infer with the six outputs of the graph. In a cluster this file is the
container of a custom predictor. KServe reads a request's body whole: limit its size in the ingress.
"""

import argparse
from typing import Any

import kserve
import numpy as np
import onnxruntime
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import InferOutput, InferRequest, InferResponse

DATATYPES = {"float32": "FP32", "float64": "FP64", "bool": "BOOL"}


class Gate(kserve.Model):
    """Run one exported program."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        self.path = path

    def load(self) -> bool:
        """Open the graph; it names and describes its tensors itself."""
        self.session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        (self.wanted,) = self.session.get_inputs()
        self.names = [output.name for output in self.session.get_outputs()]
        self.ready = True
        return True

    def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Answer a batch: all outputs of the graph, in its order."""
        outputs = []
        for name, value in zip(self.names, self.run(payload), strict=True):
            output = InferOutput(name, list(value.shape), DATATYPES[value.dtype.name])
            output.set_data_from_numpy(value, binary_data=False)
            outputs.append(output)
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=outputs)

    def run(self, payload: InferRequest) -> list[np.ndarray[Any, Any]]:
        """Check the request against the graph, and run it."""
        name, shape = self.wanted.name, self.wanted.shape[1:]
        given = payload.get_input_by_name(name)
        if given is None or given.datatype != "FP32" or list(given.shape[1:]) != shape:
            raise InvalidInput(f"needed one input {name!r}, FP32, of shape [batch, *{shape}]")
        return self.session.run(self.names, {name: given.as_numpy()})


def main() -> None:
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    parser.add_argument("program", help="file that `ebm-guard export --format onnx` wrote")
    given = parser.parse_args()
    gate = Gate(given.model_name, given.program)
    gate.load()
    kserve.ModelServer(enable_grpc=given.enable_grpc, http_port=given.http_port).start([gate])


if __name__ == "__main__":
    main()
