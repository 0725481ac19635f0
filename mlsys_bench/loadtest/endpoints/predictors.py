"""Servers of models that are no language models: TorchServe and TensorFlow Serving.

Sources: pytorch/serve docs/inference_api.md and docs/large_model_inference.md; tensorflow/serving g3doc/api_rest.md.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mlsys_bench.loadtest import answers
from mlsys_bench.loadtest.answers import Answer, Usage
from mlsys_bench.loadtest.endpoints import Ask, Spec, kserve, texts
from mlsys_bench.loadtest.endpoints.reading import decoded, refuse_errors
from mlsys_bench.loadtest.endpoints.template import Http
from mlsys_bench.loadtest.wire import Response, WireError

_encode = msgspec.json.Encoder().encode


class TorchServe:
    """POST /predictions/NAME.  The body is what the model's handler reads: the text as it is, unless a template says otherwise.

    A handler that streams (`send_intermediate_predict_response`) sends chunks without any mark between them: each read from the
    connection counts as one event, unless a JSONPath or a tokenizer tells more.
    """

    def __init__(self, spec: Spec) -> None:
        self._http = Http(spec)

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return self._http.body(ask)

    def read(self, response: Response) -> Answer:
        """Return the prediction's moment, or those of its chunks."""
        return self._http.read(response)


class TFServing:
    """POST /v1/models/NAME:predict with rows of tensors."""

    def __init__(self, spec: Spec) -> None:
        self._infer = kserve.tensors(spec) if spec.form.inputs or spec.settings.get("inputs") else []
        self._batch = spec.form.batch

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request: in columns, for tensors may differ in length; without tensors, rows of text."""
        if not self._infer:
            return _encode({"instances": texts(ask, self._batch)})
        return _encode({"inputs": {tensor.name: kserve.nested(tensor, ask) for tensor in self._infer}})

    def read(self, response: Response) -> Answer:
        """Return the moment of the predictions."""
        said: dict[str, Any] = decoded(response.body(), dict, "prediction")
        refuse_errors(said)
        if "predictions" not in said and "outputs" not in said:
            raise WireError(f"an answer without predictions or outputs: {response.body()[:60]!r}")
        return answers.whole(response.pieces, usage=Usage())
