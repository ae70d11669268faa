"""Lightning's command line with the monitors of this project, one line for every mistake, and one folder per run."""

import warnings
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentError
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from fairness_dft.cli.commands import resumable, writable
from fairness_dft.cli.configuration import prepared
from fairness_dft.cli.help import answer_help, program
from fairness_dft.cli.messages import innermost, way_out
from fairness_dft.files import one_line
from fairness_dft.prompts.datamodule import PromptModule
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.callbacks import AdapterAverage, AdapterCheckpoint, StepBar, Throughput
from fairness_dft.training.dashboard import Dashboard
from fairness_dft.training.evaluation import Evaluation, settings_for
from fairness_dft.training.image_grid import ImageGrid
from fairness_dft.training.interruption import GracefulStop, SkipNonFiniteSteps
from fairness_dft.training.module import FairFinetuning
from fairness_dft.training.quality_monitor import QualityMonitor

MONITORS = {
    "adapter_average": AdapterAverage,
    "bias_monitor": BiasMonitor,
    "quality_monitor": QualityMonitor,
    "image_grid": ImageGrid,
    "adapter_checkpoint": AdapterCheckpoint,
    "throughput": Throughput,
    "skip_non_finite_steps": SkipNonFiniteSteps,
}


class OneLineCLI(LightningCLI):
    """Lightning's command line, in which every mistake becomes one line before a model is loaded.

    Args:
        command: Name of the module that is run.
        module: The LightningModule that is built.
        data: Base class of the data that is built.
        args: Arguments of the command line; those of the process by default.
        example: Arguments of a call, for messages.
        trainer_defaults: Arguments of the trainer that the user can override.

    Raises:
        ValueError: In one line, for every mistake in the configuration.
    """

    def __init__(
        self,
        command: str,
        module: type[LightningModule],
        data: type[LightningDataModule],
        args: ArgsType = None,
        example: str = "",
        trainer_defaults: dict[str, Any] | None = None,
    ) -> None:
        self.command, self.example = command, example
        super().__init__(
            module,
            data,
            subclass_mode_data=True,
            args=args,
            run=False,
            seed_everything_default=0,
            save_config_kwargs={"config_filename": "config.yaml"},
            parser_kwargs={
                "prog": program(command),
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, **(trainer_defaults or {})},
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if args is None or isinstance(args, list):
            args = prepared(answer_help(self.command, args))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the arguments were prepared
                super().parse_arguments(parser, args)
        except ArgumentError as error:
            out = way_out(str(error), parser.get_defaults().keys(), self.example)
            raise ValueError(innermost(str(error)) + out) from error

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(innermost(str(error), self.config)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            hint = "if the machine is the reason, leave accelerator and devices to auto"
            raise ValueError(f"--trainer: {one_line(error).rstrip('.!')}; {hint}") from error


class FairnessCLI(OneLineCLI):
    """Builds module, prompts, monitors and trainer from YAML files and flags, of which later ones win.

    Args:
        args: Arguments of the command line; those of the process by default.
        command: Name of the module that is run.
        module: What is built; of the settings of a finetuning it takes those that it has, and ignores the others.
        example: Arguments of a call, for messages.

    Raises:
        ValueError: In one line, for every mistake in the configuration, before a model is loaded.
    """

    def __init__(
        self,
        args: ArgsType = None,
        command: str = "fit",
        module: type[Evaluation] = FairFinetuning,
        example: str = "--config experiments/quickstart.yaml",
    ) -> None:
        self.module = module
        callbacks = {"callbacks": [GracefulStop(), Dashboard()]}
        super().__init__(command, FairFinetuning, PromptModule, args, example, callbacks)

    def build_module(self, kind: type[FairFinetuning], *args: Any, **settings: Any) -> Evaluation:
        """Build the command's module from the settings of a finetuning."""
        return self.module(*args, **settings_for(self.module, settings))

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_instantiator(cast(Any, self.build_module), FairFinetuning)  # an audit is not a finetuning
        for name, callback in MONITORS.items():
            parser.add_lightning_class_args(callback, name)
        for seed in ("model.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", seed, compute_fn=int)
        parser.add_argument("--name", type=str, default="run", help="Name of the experiment and of its folder.")
        parser.add_argument("--output", type=str, default="runs", help="Folder for all runs.")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to resume from.")
        parser.add_argument(
            "--plan", action="store_true", help="Estimate time and memory from a few measured steps, then exit."
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        if self.config.plan and self.command != "fit":
            raise ValueError(f"--plan belongs to fairness_dft.fit, not to fairness_dft.{self.command}: remove it")

    @override
    def before_instantiate_classes(self) -> None:
        writable(Path(self.config.output))
        if self.config.ckpt_path is not None:
            resumable(Path(self.config.ckpt_path))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        from lightning.pytorch.loggers import TensorBoardLogger

        tensorboard = TensorBoardLogger(self.config.output, name=self.config.name)
        logger = self._get(self.config_init, "trainer.logger")
        if logger in (None, True):
            kwargs["logger"] = tensorboard
        if logger or logger is None:
            self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        else:
            kwargs["default_root_dir"] = tensorboard.log_dir  # a run without curves also has its own folder
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False and not self.own_progress_bar():
            self.trainer_defaults["callbacks"].append(StepBar())
        return super().instantiate_trainer(**kwargs)

    def own_progress_bar(self) -> bool:
        """Return whether the user's configuration has its own progress bar."""
        callbacks = self._get(self.config_init, "trainer.callbacks")
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        return any(isinstance(callback, ProgressBar) for callback in callbacks)
