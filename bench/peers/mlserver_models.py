"""The models that MLServer serves, by custom runtimes; it imports this in the peer's environment."""

from pathlib import Path
from typing import Any

from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceResponse, ResponseOutput  # type: ignore[import-not-found]

from bench.peers.minilm import MiniLM


class Identity(MLModel):  # type: ignore[misc]
    """Outputs are the inputs."""

    async def predict(self, payload: Any) -> Any:
        """Answer a request."""
        one = payload.inputs[0]
        # As it came: turning it into an array and back would cost more.
        output = ResponseOutput(
            name="OUTPUT0", datatype=one.datatype, shape=one.shape, data=one.data
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


class Sentences(MLModel):  # type: ignore[misc]
    """Texts to embeddings."""

    async def load(self) -> bool:
        """Load the model from the folder that its settings name."""
        self._minilm = MiniLM(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: Any) -> Any:
        """Answer a request."""
        vectors = self._minilm.embed(StringCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("embedding", vectors)
        return InferenceResponse(model_name=self.name, outputs=[output])
