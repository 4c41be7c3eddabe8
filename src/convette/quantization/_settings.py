"""The choices of post-training quantisation, as a recipe holds them."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from convette.errors import UsageError, did_you_mean
from convette.runtime import EngineSpec

Mode = Literal["auto", "off", "on"]
ObserverName = Literal["default", "min_max", "percentile", "mse", "entropy"]
MethodName = Literal["auto", "int8", "low_bit"]
_QUANTISING = ("openvino", "onnxruntime")


@dataclass(frozen=True)
class QuantizeSettings:
    """Whether and how to quantise.

    - `mode`: ``"auto"`` keeps int8 only if it is measured faster than every float candidate and accurate enough;
      ``"on"`` keeps it if it is accurate enough, faster or not (for its size); ``"off"`` makes none.
    - `max_accuracy_drop`: what int8 (or bfloat16) may lose on the validation split against float32, as a share:
      0.01 is one point.
    - `calibration_images`: training images on which the ranges of the activations are taken.
    - `observer`: how the ranges of activations follow from them: ``"min_max"``, ``"percentile"``, and for ONNX Runtime
      and few bits ``"mse"``, ``"entropy"`` too; ``"default"``: as each engine does by itself.
    - `engines`: where candidates are made and measured (OpenVINO, ONNX Runtime).
    - `batch_size`: images in a measured call. `time_limit`: seconds of measuring for each candidate.
    - `seed`: of the choice of calibration images.
    - `method`: ``"int8"`` as above; ``"low_bit"``: the network itself is written in few bits, packed, for its size
      (`convette.quantization.low_bit`), whatever is faster: with weights of `bits` bits (2 to 8; None: 4), inputs of
      `activation_bits`, `scale_groups` scales a layer, distilled on `calibration_images` images for `block_steps` steps
      a block and `joint_steps` together. ``"auto"``: ``"low_bit"`` for a budget that limits the size and no latency,
      else ``"int8"``.
    - `tried`: with few bits and a limit on size: the bits a weight (on average) for which the network is pruned; of
      those, what is best on the validation split is kept (`bits`, if given, is the only one). The bits of each layer
      then meet the limit itself (exact allocation).

    Raises `UsageError` for a value out of range or an unknown engine.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    mode: Mode = "auto"
    max_accuracy_drop: float = 0.01
    calibration_images: int = 256
    observer: ObserverName = "default"
    engines: tuple[str, ...] = ("openvino:cpu", "onnxruntime:cpu")
    batch_size: int = 1
    time_limit: float = 5.0
    seed: int = 0
    method: MethodName = "auto"
    bits: int | None = None
    tried: tuple[int, ...] = (8, 4)
    activation_bits: int = 8
    scale_groups: int = 8
    block_steps: int = 300
    joint_steps: int = 300

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"quantize.mode = {self.mode!r} is not known.{did_you_mean(self.mode, get_args(Mode))}")
        for name, least in (("calibration_images", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"quantize.{name} = {getattr(self, name)}: at least {least} is needed.")
        if not 0 <= self.max_accuracy_drop <= 1:
            raise UsageError(f"quantize.max_accuracy_drop = {self.max_accuracy_drop}: a share in 0..1 is needed.")
        if not self.time_limit > 0:
            raise UsageError(f"quantize.time_limit = {self.time_limit}: seconds above 0 are needed.")
        if self.observer not in get_args(ObserverName):
            raise UsageError(
                f"quantize.observer = {self.observer!r} is not known."
                f"{did_you_mean(self.observer, get_args(ObserverName))}"
            )
        if self.method not in get_args(MethodName):
            raise UsageError(
                f"quantize.method = {self.method!r} is not known.{did_you_mean(self.method, get_args(MethodName))}"
            )
        for name, least, most in (("bits", 2, 8), ("activation_bits", 0, 8), ("scale_groups", 1, 65_535)):
            value = getattr(self, name)
            if value is not None and (not least <= value <= most or (name == "activation_bits" and value == 1)):
                raise UsageError(f"quantize.{name} = {value}: {least} to {most} can be.")
        if not self.tried or not all(2 <= bits <= 8 for bits in self.tried):
            raise UsageError(f"quantize.tried = {list(self.tried)}: one or more of 2 to 8 can be.")
        if not self.engines:
            raise UsageError("quantize.engines is empty; name openvino:cpu, onnxruntime:cpu or both.")
        for text in self.engines:
            spec = EngineSpec.parse(text)
            if spec.engine not in _QUANTISING or spec.precision is not None:
                raise UsageError(
                    f"quantize.engines: {text!r} cannot be used; name openvino:cpu, onnxruntime:cpu or both."
                )
            if spec.engine == "openvino" and self.observer in ("mse", "entropy") and self.method != "low_bit":
                raise UsageError(
                    f"quantize.observer = {self.observer!r}: OpenVINO's quantiser has no such observer; use min_max or "
                    "percentile, or quantize.engines = ['onnxruntime:cpu'], or quantize.method = 'low_bit'."
                )
