"""lorakit's methods under any `transformers.Trainer`: a mixin that goes in front of the class.

    class MyTrainer(AdapterTrainerMixin, SFTTrainer): ...          or  MyTrainer = adapter_trainer(SFTTrainer)
    MyTrainer(adapted=attach(model, method), args=SFTConfig(...), train_dataset=...).train()

Whatever the method does in training happens in the Trainer's own loop (train/outside_run.py), the optimizer is the method's, and what is
saved is the adapter. Where the Trainer wants a reference model (DPO, KTO), it is the same model with the adapter off.

What is relied on, public where there was a choice, is in NEEDS and checked when a trainer is made; a Trainer that replaces the loop itself
is refused. Methods that replace the step or make the loss themselves are refused too: `lorakit train` runs them.
"""

import functools
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.core.attach import Adapted
from lorakit.core.errors import BadParameter, CheckpointError, Incompatible, NotExportable
from lorakit.core.events import Descent
from lorakit.core.layer import Slot
from lorakit.core.method import Method
from lorakit.parts.controllers.restart import Restart
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.train.outside_run import OutsideRun
from lorakit.train.state import read_state, write_state

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments
else:
    Trainer = object

T = TypeVar("T", bound=type)

NEEDS = {
    "Trainer": (
        "training_step", "compute_loss", "create_optimizer", "get_train_dataloader", "get_batch_samples", "add_callback", "save_model",
        "_prepare_inputs", "_save", "_save_optimizer_and_scheduler", "_load_from_checkpoint", "_load_best_model", "_push_from_checkpoint",
    ),
    "TrainerCallback": ("on_train_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_train_end"),
    "Accelerator": ("sync_gradients", "prepare_model", "num_processes", "process_index"),
}  # fmt: skip
"""What of Transformers and Accelerate this file stands on."""
LOOP = ("train", "_inner_training_loop", "_run_epoch")
"""What a Trainer must have left as it is."""
ADAMS = ("adamw_torch", "adamw_torch_fused")
"""Names of what AdamW() is anyway."""


class AdapterTrainerMixin(Trainer):
    """Put it before a Trainer class. `adapted`: the handle of a model with one active adapter, which is what is trained; the other
    arguments are the class's own, `model` left out.

    Raises Incompatible for a method, an argument or a Trainer that cannot be honored, BadParameter for what contradicts `adapted`.
    """

    adapted: Adapted
    _run: OutsideRun | None = None
    _resumed: Path | None = None
    _trained: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        before = [c for c in mro[: mro.index(AdapterTrainerMixin)] if not issubclass(c, AdapterTrainerMixin)]
        if before:
            raise Incompatible(
                f"{before[0].__name__} stands before AdapterTrainerMixin; write "
                f"class {cls.__name__}(AdapterTrainerMixin, {before[0].__name__})"
            )

    def __init__(self, *args: Any, adapted: Adapted, **kwargs: Any) -> None:
        _check_class(type(self))
        given = args[0] if args else kwargs.get("model")
        if given is not None and given is not adapted.model:
            raise BadParameter("model is not the one that is adapted; leave it out, it is adapted.model")
        for name in ("model_init", "peft_config", "optimizer_cls_and_kwargs", "quantization_config"):
            if kwargs.get(name) is not None:
                raise BadParameter(f"{name} cannot be used: the model is adapted, and its method brings the optimizer; leave it out")
        if (kwargs.get("optimizers") or (None,))[0] is not None:
            raise BadParameter("optimizers has one of its own, and the method brings its own; give (None, scheduler)")
        if len(adapted.active) != 1:
            raise Incompatible(f"one adapter is trained at a time, and active are {list(adapted.active)}; switch(name) to one")
        (self._name,) = adapted.active
        self.adapted, method = adapted, adapted.methods[adapted.active[0]]
        _check_method(method, self._name)
        arguments = kwargs.get("args") or next((a for a in args[1:] if hasattr(a, "output_dir")), None)
        if arguments is not None:
            _check_arguments(arguments, method)
        if args:
            args = (adapted.model, *args[1:])
        else:
            kwargs["model"] = adapted.model
        if _wants_reference(type(self)) and kwargs.get("ref_model") is None and (len(args) < 2 or args[1] is arguments):
            kwargs["ref_model"] = _reference(adapted, method, arguments)
        self._construct(args, kwargs)
        _check_arguments(self.args, method)
        self._check_place()
        if self.accelerator.num_processes > 1:  # gradients are averaged by the run
            prepare: Any = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = prepare
        self.callback_handler.callbacks.insert(0, _events(self))

    def _construct(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The class's own constructor, kept from casting the adapter, and from taking a quantized base for one that nothing trains."""
        model, held = self.adapted.model, [(row, row.tensor.data) for row in self.adapted.params()]
        mark, quantized = "_hf_peft_config_loaded", bool(getattr(self.adapted.model, "is_quantized", False))
        before = getattr(model, mark, False)
        if quantized:
            setattr(model, mark, True)
        try:
            super().__init__(*args, **kwargs)
        finally:
            if quantized:
                setattr(model, mark, before)
        for row, data in held:
            if row.tensor.dtype != data.dtype:  # TRL makes what trains on a quantized base bf16
                row.tensor.data = data.to(row.tensor.device)

    def _check_place(self) -> None:
        """What is only known once the Trainer is there."""
        if self.args.n_gpu > 1:
            raise Incompatible("several GPUs in one process would train copies of the model; start with accelerate or torchrun")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise Incompatible("FSDP and DeepSpeed shard the adapter, too; `accelerate launch … lorakit train` shards the base")
        mine = {id(row.tensor) for row in self.adapted.params()}
        foreign = [name for name, p in self.adapted.model.named_parameters() if p.requires_grad and id(p) not in mine]
        if foreign:
            raise Incompatible(f"{foreign[0]} would train and is no adapter's ({len(foreign)} such); name it in the method's unfreeze")
        around = vars(self.adapted.model).get("forward") is not None or self.args.use_liger_kernel
        if around and _head_is_adapted(self.adapted.model):
            raise Incompatible(
                f"{type(self).__name__} multiplies by the head's weight itself and never sees an adapter there; leave the head out of sites"
            )

    # --- the step ---------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The class's own, with the step's events around it."""
        if self._run is None:
            return super().training_step(*args, **kwargs)
        with self._run.micro_batch():
            return super().training_step(*args, **kwargs)

    def plain_step(self, inputs: dict[str, Any], items: Any) -> Tensor:
        """One forward and backward of the class, outside of any step."""
        return super().training_step(self.model_wrapped, inputs, items)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own. A method may leave out the whole backward pass of a step: then there is nothing to go back to."""
        found = super().compute_loss(*args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        if self._run is None or not torch.is_grad_enabled() or loss.requires_grad:
            return found
        loss = loss + torch.zeros_like(loss, requires_grad=True)
        return (loss, *found[1:]) if isinstance(found, tuple) else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The method's, over the adapter's parameters as they are now. Every call of `train` begins with a new one."""
        args_, method = self.args, self.adapted.methods[self._name]
        spec = method.optim or AdamW(betas=(args_.adam_beta1, args_.adam_beta2), eps=args_.adam_epsilon)
        table = self.adapted.params()
        self.optimizer = spec.build(table, lr=args_.learning_rate, weight_decay=args_.weight_decay)
        return self.optimizer

    def _begin(self) -> None:
        """Everything is prepared, and what was saved is back."""
        method, folder, self._resumed = self.adapted.methods[self._name], self._resumed, None
        if self._trained and folder is None and any(getattr(spec, "fresh", False) for spec in method.controllers):
            raise Incompatible(f"{self._name!r} has been trained, and its method only begins afresh; attach it anew")
        state = None
        if folder is not None and (method.controllers or (folder / "state.json").exists()):
            if not (folder / "state.json").exists():
                raise CheckpointError(f"{folder} has no state of the method's controllers, as save_only_model leaves it; begin anew")
            state = read_state(folder)
        self._run = OutsideRun(self, state)

    def _end(self) -> None:
        run, self._run, self._trained = self._run, None, True
        assert run is not None
        run.finish()

    # --- files ------------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter in lorakit's format, and the tokenizer; nothing of the base."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        self.adapted.save(folder, self._name)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter to a folder: `lorakit.load(model, folder)` or any command of lorakit reads it."""
        self.adapted.meta = self._facts() | self.adapted.meta | {"steps": self.state.global_step}
        super().save_model(output_dir, _internal_call)

    def _facts(self) -> dict[str, Any]:
        """What the adapter remembers: enough to load its base again and to talk to it."""
        model = getattr(self.adapted.model.config, "_name_or_path", "")
        template = getattr(self.processing_class, "chat_template", None)
        found = {"model": model, "chat_template": template, "trainer": type(self).__name__}
        return {key: value for key, value in found.items() if value}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._run is not None:
            write_state(Path(output_dir), self._run.state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._take(Path(resume_from_checkpoint))
        self._resumed = Path(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.accelerator.wait_for_everyone()
        self._take(Path(self.state.best_model_checkpoint))  # type: ignore[arg-type]

    def _take(self, folder: Path) -> None:
        """Give the adapter a checkpoint's tensors. Raises CheckpointError for another method's."""
        from lorakit.adapters.io import load_adapter
        from lorakit.adapters.record import to_json

        saved, mine = load_adapter(folder), self.adapted.methods[self._name].recipe
        if mine is None or saved.recipe.name != mine.name or json.loads(to_json(saved.recipe.kwargs)) != json.loads(to_json(mine.kwargs)):
            raise CheckpointError(f"{folder} was made by {saved.recipe}, and attached is {mine}; attach the same, or lorakit.load it")
        if set(self.adapted.tensors(self._name)) != set(saved.tensors):
            raise CheckpointError(f"{folder} adapts other sites; attach the same ones, or lorakit.load the checkpoint")
        self.adapted.fit(self._name, saved.tensors)
        self.adapted.load_tensors(self._name, saved.tensors)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._save(self.args.output_dir)  # the class copies files of a whole model there, and knows none of an adapter
        super()._push_from_checkpoint(checkpoint_folder)


@functools.cache
def adapter_trainer(cls: T) -> T:
    """The class with AdapterTrainerMixin before it."""
    return type(f"Adapter{cls.__name__}", (AdapterTrainerMixin, cls), {"__doc__": cls.__doc__})  # type: ignore[return-value]


def _events(trainer: AdapterTrainerMixin) -> "TrainerCallback":
    """What the mixin hears of the loop."""
    from transformers import TrainerCallback

    class LorakitEvents(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer._begin()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if trainer._run is not None:
                trainer._run.clipped()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if trainer._run is not None:
                trainer._run.stepped()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            trainer._end()

    return LorakitEvents()


# --- what is refused ------------------------------------------------------------------------------------------------------
def _check_class(cls: type) -> None:
    import transformers
    from accelerate import Accelerator

    kinds: dict[str, type] = {"Trainer": transformers.Trainer, "TrainerCallback": transformers.TrainerCallback, "Accelerator": Accelerator}
    if not issubclass(cls, transformers.Trainer):
        raise Incompatible(f"{cls.__name__} is no transformers.Trainer; write class MyTrainer(AdapterTrainerMixin, Trainer)")
    missing = [f"{kind}.{name}" for kind, names in NEEDS.items() for name in names if not hasattr(kinds[kind], name)]
    missing += [f"Trainer.{name}" for name in LOOP if not hasattr(transformers.Trainer, name)]
    if missing:
        raise Incompatible(f"transformers {transformers.__version__} has no {', '.join(missing)}, which lorakit stands on; use 5.23")
    other = next((name for name in LOOP if getattr(cls, name) is not getattr(transformers.Trainer, name)), None)
    if other is not None:
        owner = next(c.__name__ for c in cls.__mro__ if other in vars(c))
        raise Incompatible(f"{owner} has a training loop of its own ({other}), in which lorakit cannot see the steps; use another Trainer")


def _check_method(method: Method, name: str) -> None:
    called = method.recipe.name if method.recipe is not None else name
    if not isinstance(method.loop, Descent):
        raise Incompatible(
            f"{called} makes its own steps ({type(method.loop).__name__}), and so does a Trainer; use `lorakit train --method {called}`"
        )
    if method.objective is not None:
        raise Incompatible(
            f"{called} makes its own loss ({type(method.objective).__name__}), and so does a Trainer; use `lorakit train --method {called}`"
        )


def _check_arguments(args: "TrainingArguments", method: Method) -> None:
    """Arguments that cannot be honored, or that would be passed over in silence."""
    if args.fp16:
        raise Incompatible("fp16=True scales the loss, and penalties and controllers would see scaled gradients; use bf16=True")
    if args.bf16_full_eval or args.fp16_full_eval:
        raise Incompatible("full evaluation in half precision casts the adapter for good; leave bf16_full_eval and fp16_full_eval out")
    if args.auto_find_batch_size and method.controllers:
        raise Incompatible("auto_find_batch_size begins again in the middle of a schedule; set per_device_train_batch_size yourself")
    if getattr(args, "parallelism_config", None) is not None:
        raise Incompatible("parallelism_config splits layers or sequences, which adapters of lorakit do not; leave it out")
    if getattr(args, "sync_ref_model", False):
        raise Incompatible("sync_ref_model=True moves the reference, and that is the base itself; leave it out")
    if method.recipe is None and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        raise NotExportable("this method was changed with .but() and has no recipe, so it cannot be saved; set save_strategy='no'")
    plain = {f: type(args).__dataclass_fields__[f].default for f in ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")}
    optim = str(getattr(args.optim, "value", args.optim))
    own = method.optim is not None
    if args.optim_args or (optim != plain["optim"] and (own or optim not in ADAMS)):
        rule = type(method.optim or AdamW()).__name__
        raise Incompatible(f"optim={optim} would be passed over: the method's optimizer is {rule}; leave optim and optim_args out")
    changed = [name for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(args, name) != plain[name]]
    if own and changed:
        raise Incompatible(f"{changed[0]} would be passed over: the method brings {type(method.optim).__name__} with its own; leave it out")


def _head_is_adapted(model: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    slot = head._modules.get("lora") if isinstance(head, nn.Module) else None
    return isinstance(slot, Slot) and bool(slot.active)


# --- the reference --------------------------------------------------------------------------------------------------------
def _wants_reference(cls: type) -> bool:
    return any("__init__" in vars(c) and "ref_model" in inspect.signature(c.__init__).parameters for c in cls.__mro__[:-1])  # type: ignore[misc]


def _reference(adapted: Adapted, method: Method, args: Any) -> "Reference":
    absorbs = any(isinstance(spec, Restart) and spec.absorb for spec in method.controllers)
    if absorbs and not getattr(args, "precompute_ref_log_probs", False):
        raise Incompatible(
            "the base absorbs this method's legs while it trains, and the reference needs it bare in the same step; set absorb=False "
            "or precompute_ref_log_probs=True"
        )
    return Reference(adapted)


class Reference(nn.Module):
    """The adapter-off model: the very same weights, which it does not own. What is asked of it is answered by the model."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__()
        self.adapted = adapted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.adapted.disabled():  # around whatever a Trainer puts in forward's place
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, adapter off."""
        return self.adapted.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's: what a cache of its outputs is valid for."""
        return self.adapted.model.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["adapted"].model, name)
