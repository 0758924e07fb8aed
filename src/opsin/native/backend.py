"""Opening a pair: model, vision encoder and context, and the proof of where they compute."""

from opsin.core.errors import BadParameter, ModelNotFound
from opsin.core.image_options import ANY_SIZES, ImageSizes
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.constraint import Constraints
from opsin.native.context import Context
from opsin.native.model import Loading, Model
from opsin.native.probe import probe_placement
from opsin.native.vision import Encoder


class NativeBackend(Context):
    """A loaded pair."""

    def __init__(self, model: Model, settings: EngineSettings, encoder: Encoder | None) -> None:
        super().__init__(model, settings, encoder)
        self._constraints = Constraints(model)  # reads the model in a thread of its own until `close`
        self.settings = settings
        self.eog_texts = frozenset(map(model.text_of, model.eog_tokens))
        self.info = ModelInfo(
            name=model.metadata("general.name") or model.path.stem,
            architecture=model.metadata("general.architecture") or "unknown",
            projector=(encoder.kind or "unknown") if encoder is not None else None,
            llm_file=model.path.name,
            mmproj_file=encoder.path.name if encoder is not None else None,
            quantisation=model.quantisation,
        )

    def placement(self) -> Placement:
        """Run one encode and one prefill of their own with the probe on, and say where they ran."""
        return probe_placement(self.model, self._encoder, self.settings)


def open_backend(
    settings: EngineSettings, progress: Loading = lambda _: None, sizes: ImageSizes = ANY_SIZES
) -> NativeBackend:
    """Load a pair, or free what was loaded of it and raise NativeMismatch, ModelError (of any kind) or BadParameter.

    `progress` hears how much of the language model is loaded, from 0 to 1; `sizes` is what its projector's header says.
    """
    if settings.model is None:
        raise ModelNotFound("No model was given: name one with --model.")
    if settings.mmproj is None and (settings.image_max_tokens or settings.image_min_tokens):
        raise BadParameter("Limits on image tokens need a vision encoder: give its projector with --mmproj.")
    if 0 < (settings.image_max_tokens or 0) < (settings.image_min_tokens or 0):
        raise BadParameter("--image-min-tokens is larger than --image-max-tokens: give a smaller one.")
    logs.show(settings.verbose)
    model = Model(settings.model, settings, progress)
    try:
        encoder = Encoder(model, settings.mmproj, settings, sizes) if settings.mmproj is not None else None
        return NativeBackend(model, settings, encoder)
    except BaseException:
        model.close()
        raise
