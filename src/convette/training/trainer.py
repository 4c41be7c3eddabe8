"""The trainer: a plain loop that tells methods where it is, and lets them change everything."""

import contextlib
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convette._progress import progress
from convette.errors import InterruptedRun, TrainingError
from convette.training import snapshot
from convette.training._fabric import FabricAdapter
from convette.training.checkpoints import CheckpointFolder
from convette.training.distributed import broadcast_tensors, gather, is_main, world_size
from convette.training.ema import Ema
from convette.training.events import Event, Method, by_event, in_order
from convette.training.guards import ParameterGuard, blame, check_ranks_agree, first_not_finite
from convette.training.logs import TrainLog
from convette.training.optimizers import build_optimizer, exchange_parameters, schedule_for
from convette.training.restructure import edit_structure
from convette.training.state import EpochRecord, LossTerms, Stage, State
from convette.training.step import PlainStep, StepStrategy
from convette.training.taps import FeatureTaps

# Steps between two looks at things that cost a synchronisation: signals among ranks, losses on an accelerator.
_LOOK_EVERY = 8


class Trainer:
    """Trains `model` through the stages of `plan`, telling `methods` about every event.

    - `loss(outputs, targets)` is the task's loss, the term named ``"task"``; `accuracy(outputs, targets)` a figure in
      0..1 for the log. `transform(batch)` gives images and targets on the device.
    - `strategy` makes one optimiser step; methods may replace it (``trainer.strategy = ...``).
    - `checkpoints`: where checkpoints go (rank 0 writes them); `resume`: a checkpoint's tree to go on from; `header`:
      facts kept in every checkpoint.

    ``trainer.state`` is everything that changes. The network's structure is edited by `edit_structure` only.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Sequence[Stage],
        *,
        loss: Callable[[Any, Any], Tensor],
        accuracy: Callable[[Any, Any], Tensor] | None = None,
        transform: Callable[[Any], tuple[Any, Any]],
        fabric: FabricAdapter,
        methods: Sequence[Method] = (),
        strategy: StepStrategy | None = None,
        example: Any = None,
        checkpoints: CheckpointFolder | None = None,
        resume: Mapping[str, Any] | None = None,
        header: Mapping[str, Any] | None = None,
        log: TrainLog | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        title: str = "train",
    ) -> None:
        self.plan = tuple(plan)
        self.fabric = fabric
        self.transform = transform
        self.strategy: StepStrategy = strategy or PlainStep()
        self.methods = in_order(methods)
        self.title = title
        self.memory_format = memory_format
        self.checkpoints = checkpoints
        self.header = dict(header or {})
        self.log = log
        self.state = State(model=model, device=fabric.device, taps=FeatureTaps(model), example=example)
        self.finished = False
        self.resources = contextlib.ExitStack()  # what methods want undone at the end, however it comes
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._loss = loss
        self._accuracy = accuracy
        self._resume = resume
        self._table = by_event(self.methods)
        self._guard = ParameterGuard(model)
        self._stop: str | None = None
        self._in_step = False
        self._last_checkpoint: Any = None

    @property
    def stage(self) -> Stage:
        """The stage the run is in."""
        return self.plan[min(self.state.clock.stage, len(self.plan) - 1)]

    def emit(self, event: Event) -> None:
        """Let every method that wants `event` act, in order."""
        for method in self._table[event]:
            method.apply(event, self)

    def add_auxiliary(self, name: str, module: nn.Module) -> nn.Module:
        """Train `module` (a method's adapter, a learned weight) along with the network; to be called at SETUP.

        Its parameters join the optimiser, the checkpoint and the averaging of gradients over ranks. Rank 0's values
        are taken on all ranks. Called again with the same name (at STRUCTURE_CHANGED), it takes the place of the old.
        """
        module = module.to(self.state.device)
        broadcast_tensors([tensor.detach() for tensor in [*module.parameters(), *module.buffers()]])
        old = dict(self.state.auxiliary.items()).get(name)
        self.state.auxiliary[name] = module
        for optimizer in self.state.optimizers.values():
            exchange_parameters(optimizer, old.parameters() if old is not None else (), module.parameters())
        return module

    def edit_structure(self, edits: Sequence[Any]) -> Any:
        """Apply `edits` (of `convette.surgery`) to the network under the live optimiser; returns the change.

        Among several ranks, rank 0's edits are taken. Optimiser state is sliced like the weights, the EMA copy is
        edited alike, the wrapper is set up again, and STRUCTURE_CHANGED is emitted. Raises `StructureError` inside a
        step, and whatever `surgery.apply` raises, with the network as it was.
        """
        return edit_structure(self, edits, in_step=self._in_step)

    # -- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> list[EpochRecord]:
        """Train to the end of the plan (or go on from `resume`); returns the record of every epoch.

        Raises `InterruptedRun` after SIGINT or SIGTERM, with a checkpoint written where there is a folder;
        `TrainingError` when the loss is not finite or ranks drift apart; `StorageError` when the disk is full.
        """
        try:
            self._set_up()
            if not self.finished:
                self._run()
        finally:
            self._let_go()
        return self.state.history

    def _run(self) -> None:
        clock = self.state.clock
        self._open_log()
        if clock.step == 0 and self.header.get("choice", {}).get("milliseconds"):
            self.save()  # what was measured must not be measured again, or a run killed early would come out otherwise
        total = sum(stage.steps * stage.settings.epochs for stage in self.plan)
        with self._signals(), self._progress(total - clock.step) as advance:
            self.emit(Event.FIT_START)
            while clock.stage < len(self.plan):
                self._run_stage(advance)
            self.emit(Event.FIT_END)
            self.finished = True
            self.save()

    def _let_go(self) -> None:
        self.state.taps.detach()
        self.resources.close()
        if world_size() > 1:
            # DDP leaves its hooks on the parameters until it is collected; the next run sets up its own.
            self.state.wrapper = None
            gc.collect()

    def save(self) -> None:
        """Write a checkpoint of everything, where a folder was given. All ranks must call it together."""
        culprit = first_not_finite(self.state.model)
        if culprit is not None:
            raise TrainingError(f"{self._where()}: {culprit} is not finite{self._remedy()}")
        if self.checkpoints is None:
            return
        self.emit(Event.CHECKPOINT)
        tree = snapshot.take(self)
        if is_main():
            self._last_checkpoint = self.checkpoints.write(self.state.clock.step, tree)

    def _open_log(self) -> None:
        if self.log is None:
            return
        self.log.restore(self.state.history)
        step = self.state.clock.step
        if step > 0:
            self.log.event("resumed", step)
        elif "choice" in self.header:
            self.log.event("choice", step, **self.header["choice"])

    def _set_up(self) -> None:
        state = self.state
        if self._resume is not None:
            self.emit(Event.BEFORE_LOAD)
            snapshot.restore_network(self, self._resume)
        state.model.to(state.device)
        state.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if self.plan[0].settings.ema_decay is not None:
            state.ema = Ema(state.model, float(self.plan[0].settings.ema_decay))
        self.emit(Event.SETUP)
        self.wrap()
        self.start_optimizer()
        if self._resume is not None:
            snapshot.restore_rest(self, self._resume)
            self._resume = None
            self.emit(Event.AFTER_LOAD)

    def wrap(self) -> None:
        """Set the wrapper up for the network as it is now."""
        self.state.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.state.wrapper = self.fabric.wrap(self.state.model)
        self._guard = ParameterGuard(self.state.model)

    def start_optimizer(self) -> None:
        """Make the optimiser and schedule of the current stage."""
        state, settings = self.state, self.stage.settings
        rate = settings.peak_learning_rate(self.stage.images_per_step)
        optimizer = build_optimizer([state.model, state.auxiliary], settings, rate)
        state.optimizers = {"main": optimizer}
        state.steppers = {"main": self.fabric.wrap_optimizer(optimizer)}
        state.schedules = {"main": schedule_for(settings, self.stage.steps)}

    def _run_stage(self, advance: Callable[..., None]) -> None:
        clock = self.state.clock
        if clock.stage_step == 0 and clock.epoch == 0:
            if clock.stage > 0:
                self.start_optimizer()
            self.emit(Event.STAGE_START)
        while clock.epoch < self.stage.settings.epochs:
            self._run_epoch(advance)
        self.emit(Event.STAGE_END)
        clock.stage += 1
        clock.epoch = clock.epoch_step = clock.stage_step = 0

    def _run_epoch(self, advance: Callable[..., None]) -> None:
        state, stage, clock = self.state, self.stage, self.state.clock
        state.wrapper.train()
        if clock.epoch_step == 0:
            self.sums, self.counts = {}, {}
            self.emit(Event.EPOCH_START)
        start, first = time.monotonic(), clock.epoch_step
        detail = f"epoch {clock.epoch + 1}/{stage.settings.epochs}"
        batches = stage.batches(clock.epoch, clock.epoch_step * stage.settings.accumulate)
        before = clock.seconds
        while clock.epoch_step < stage.steps:
            self._run_step(batches)
            clock.seconds = before + time.monotonic() - start
            advance(1, detail=detail)
            if clock.epoch_step < stage.steps:
                self._between_steps()
        images = (clock.epoch_step - first) * stage.images_per_step
        record = self._end_epoch(images / max(time.monotonic() - start, 1e-9))
        clock.seconds = before + time.monotonic() - start
        clock.epoch += 1
        clock.epoch_step = 0
        state.history.append(record)
        if self.log is not None:
            self.log.epoch(record, state.history)
        self.emit(Event.EPOCH_END)
        self.save()
        self._stop_if_asked(saved=True)

    def _run_step(self, batches: Iterator[Any]) -> None:
        state, clock = self.state, self.state.clock
        rate = self.stage.settings.peak_learning_rate(self.stage.images_per_step)
        for name, optimizer in state.optimizers.items():
            state.learning_rate = rate * state.schedules[name](clock.stage_step)
            for group in optimizer.param_groups:
                group["lr"] = state.learning_rate
        self.emit(Event.BATCH_START)
        self._guard.check(state.model)
        self._in_step = True
        self.strategy.run(self, batches)
        self._in_step = False
        state.taps.clear()
        clock.step += 1
        clock.stage_step += 1
        clock.epoch_step += 1
        self.emit(Event.BATCH_END)

    def _between_steps(self) -> None:
        every, step = self.stage.settings.checkpoint_steps, self.state.clock.step
        if step % _LOOK_EVERY == 0 and self.state.device.type != "cpu":
            self._check_sums()
        saved = every is not None and step % every == 0
        if saved:
            self.save()
        if world_size() == 1 or step % _LOOK_EVERY == 0:
            self._stop_if_asked(saved)

    # -- parts of a step, for strategies ---------------------------------------------------------------------------

    def forward(self) -> None:
        """Run the network on ``state.images`` into ``state.outputs``."""
        state = self.state
        self.emit(Event.BEFORE_FORWARD)
        state.outputs = state.wrapper(state.images)
        self.emit(Event.AFTER_FORWARD)

    def compute_losses(self) -> None:
        """Fill ``state.losses`` (the task's and the methods' terms) and their weighted sum ``state.loss``."""
        state = self.state
        state.losses = LossTerms()
        self.emit(Event.BEFORE_LOSS)
        state.losses.add("task", self._loss(state.outputs, state.targets), state.losses.weights.get("task", 1.0))
        self.emit(Event.AFTER_LOSS)
        state.loss = state.losses.total()
        if state.device.type == "cpu" and not math.isfinite(state.loss.item()):
            self._refuse_losses({name: value.item() for name, value in state.losses.values.items()})
        self._count("loss", state.loss)
        if self._accuracy is not None:
            self._count("accuracy", self._accuracy(state.outputs.detach(), state.targets))
        if len(state.losses.values) > 1 or state.losses.weights["task"] != 1.0:
            for name, value in state.losses.values.items():
                self._count(f"term:{name}", value)

    def _count(self, key: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0) + 1

    def _check_sums(self) -> None:
        # A sum stays not finite once one of its parts was: looking now and then misses nothing.
        values = {name: float(total) for name, total in self.sums.items()}
        if not all(math.isfinite(value) for value in values.values()):
            self._refuse_losses(_terms(values) or {"task": values["loss"]})

    def _refuse_losses(self, terms: Mapping[str, float]) -> None:
        bad = next((name for name, value in terms.items() if not math.isfinite(value)), "sum of all terms")
        where = blame(self.state.model, self.state.images)
        raise TrainingError(
            f"{self._where()}: loss term {bad!r} is {terms.get(bad, math.nan)}; "
            f"first not finite: {where}{self._remedy()}"
        )

    def _where(self) -> str:
        clock = self.state.clock
        return f"{self.title}: epoch {clock.epoch + 1}, step {clock.epoch_step + 1}"

    def _remedy(self) -> str:
        kept = f" The last good checkpoint is {self._last_checkpoint}." if self._last_checkpoint else ""
        rate = self.stage.settings.peak_learning_rate(self.stage.images_per_step)
        return f".{kept} Lower learning_rate (now {rate:g}) or set gradient_clip."

    # -- between epochs --------------------------------------------------------------------------------------------

    def _end_epoch(self, images_per_second: float) -> EpochRecord:
        state, stage, clock = self.state, self.stage, self.state.clock
        self._check_sums()
        check_ranks_agree(state.model, self._where())
        broadcast_tensors([*state.model.buffers()])
        if state.ema is not None:
            state.ema.synchronise()
        ranks = gather({name: float(total) / self.counts[name] for name, total in self.sums.items()})
        means = {name: sum(r[name] for r in ranks) / len(ranks) for name in ranks[0]}
        found: Mapping[str, float] = {}
        last = clock.epoch + 1 == stage.settings.epochs
        if stage.validate is not None and (last or (clock.epoch + 1) % stage.settings.validate_every == 0):
            self.emit(Event.EVALUATION_START)
            found = stage.validate(state.evaluated)
            self.emit(Event.EVALUATION_END)
        return EpochRecord(
            stage=stage.name,
            epoch=clock.epoch + 1,
            step=clock.step,
            seconds=round(clock.seconds, 3),
            images_per_second=round(images_per_second, 1),
            learning_rate=state.learning_rate,
            train_loss=means["loss"],
            terms=_terms(means) or {"task": means["loss"]},
            train_accuracy=means.get("accuracy"),
            validation_loss=found.get("loss"),
            validation_accuracy=found.get("accuracy"),
        )

    def _stop_if_asked(self, saved: bool) -> None:
        asked = next((reason for reason in gather(self._stop) if reason), None)
        if asked is None:
            return
        if not saved:
            self.save()
        kept = "a checkpoint was written; the same command goes on from it" if self.checkpoints else "nothing was kept"
        raise InterruptedRun(f"{self.title}: stopped by {asked} after step {self.state.clock.step}; {kept}.")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        # Only the main thread may set handlers; elsewhere signals are somebody else's business.
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._stop is not None:  # the second time, at once
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _progress(self, total: int) -> contextlib.AbstractContextManager[Callable[..., None]]:
        if not is_main():
            return contextlib.nullcontext(lambda count=1, detail="": None)
        return progress(self.title, total, "step")


def _terms(figures: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("term:"): value for name, value in figures.items() if name.startswith("term:")}
