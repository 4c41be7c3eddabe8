"""How one optimiser step is made. A method whose step is another (unrolled, adversarial) replaces it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from convette.training.distributed import average_gradients
from convette.training.events import Event

if TYPE_CHECKING:
    from convette.training.trainer import Trainer


@runtime_checkable
class StepStrategy(Protocol):
    """Makes one optimiser step from as many batches as it wants."""

    def run(self, trainer: "Trainer", batches: Iterator[Any]) -> None:
        """Pull batches, compute gradients, step every optimiser."""
        ...


class PlainStep:
    """Batch, transform, forward, named losses, sum, backward; after `accumulate` of these: clip and step."""

    def run(self, trainer: "Trainer", batches: Iterator[Any]) -> None:
        """Make one step from ``settings.accumulate`` batches, as if they were one large batch."""
        state, settings, fabric = trainer.state, trainer.stage.settings, trainer.fabric
        parts = settings.accumulate
        for part in range(parts):
            state.batch = next(batches)
            state.images, state.targets = trainer.transform(state.batch)
            trainer.emit(Event.AFTER_TRANSFORM)
            with fabric.without_sync(state.wrapper, part + 1 < parts):
                trainer.forward()
                trainer.compute_losses()
                loss = state.loss if parts == 1 else state.loss / parts  # type: ignore[operator]
                trainer.emit(Event.BEFORE_BACKWARD)
                fabric.backward(loss)  # type: ignore[arg-type]
                trainer.emit(Event.AFTER_BACKWARD)
        self.update(trainer)

    @staticmethod
    def update(trainer: "Trainer") -> None:
        """Turn the gradients that lie in ``.grad`` into a step of the main optimiser."""
        state, settings = trainer.state, trainer.stage.settings
        if len(state.auxiliary):
            average_gradients([p for p in state.auxiliary.parameters() if p.requires_grad])
        trainer.emit(Event.GRADIENTS_READY)
        if settings.gradient_clip is not None:
            state.gradient_norm = trainer.fabric.clip_gradients(
                state.wrapper, state.steppers["main"], float(settings.gradient_clip)
            )
        trainer.emit(Event.BEFORE_OPTIMIZER_STEP)
        for stepper in state.steppers.values():
            stepper.step()
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update()
        trainer.emit(Event.AFTER_OPTIMIZER_STEP)
