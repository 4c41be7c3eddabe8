"""Training with the rounding a network will run with: straight-through estimators, learned steps (arXiv 1902.08153)."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from convette.errors import UsageError
from convette.layers.quantization.deployed import quantized_layers
from convette.layers.quantization.edits import quantize_layers
from convette.layers.quantization.fake_quantize import ACTIVATION_BITS, WEIGHT_BITS
from convette.training.events import Event, Method
from convette.training.methods._groups import split_group

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


class QuantizationAware(Method):
    """Train with the rounding of `bits`-bit weights and `activation_bits`-bit inputs, from a trained network.

    At the start of the training the network is edited as `convette.layers.quantization.quantize_layers` says (live:
    optimiser and averaged copy follow), ranges coming from its first batch. Use a tenth of the usual learning rate.
    Gradients go straight through the rounding (LSQ, arXiv 1902.08153). Costs a rounding of every weight and input a
    step: about a quarter more time. Raises `UsageError` for bits that cannot be.
    """

    changes_structure = True

    def __init__(
        self,
        bits: int = 8,
        activation_bits: int = 8,
        scale_groups: int | None = None,
        ends_8_bits: bool = True,
        *,
        observer: str = "mse",
        name: str = "quantization_aware",
    ) -> None:
        if bits not in WEIGHT_BITS or activation_bits not in ACTIVATION_BITS:
            raise UsageError(f"{name}: {bits} weight and {activation_bits} activation bits: 2 to 8 (or 0 activations).")
        self.name, self.bits, self.activation_bits = name, bits, activation_bits
        self.scale_groups, self.ends_8_bits, self.observer = scale_groups, ends_8_bits, observer
        self.events = frozenset({Event.STAGE_START})

    def apply(self, event: Event, trainer: "Trainer") -> None:
        """Edit the network once, before the first step."""
        state = trainer.state
        if quantized_layers(state.model):
            return
        quantize_layers(
            state.model,
            state.example[0],
            self._first_images(trainer),
            bits=self.bits,
            activation_bits=self.activation_bits,
            scale_groups=self.scale_groups,
            ends_8_bits=self.ends_8_bits,
            observer=self.observer,
            edit=trainer.edit_structure,
        )
        # Weight decay would pull the logarithms of the steps, that is the steps, towards one.
        steps = [parameter for name, parameter in state.model.named_parameters() if name.endswith("log_scale")]
        split_group(state.optimizers["main"], steps, self.name)
        state.model.train()
        if state.ema is not None:
            state.ema.module.load_state_dict(state.model.state_dict())

    def _first_images(self, trainer: "Trainer") -> Tensor:
        batch: Any = next(iter(trainer.stage.batches(0, 0)))
        images, _ = trainer.transform(batch)
        return images.to(next(trainer.state.model.parameters()))
