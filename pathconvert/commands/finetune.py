"""The command finetune: continue training in path space."""

from __future__ import annotations

import inspect
import time
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic.fields import FieldInfo

from pathconvert.choices import TrainingDevice
from pathconvert.commands.console import Steps, emit, facts, note
from pathconvert.commands.loading import Loader
from pathconvert.commands.options import Arch, InputSize, Json, Key, Prefix, TrustPickle
from pathconvert.errors import PathconvertError
from pathconvert.training.settings import Settings, flag

if TYPE_CHECKING:
    from pathconvert.training.run.loop import Run
    from pathconvert.training.run.position import Result


def _finetune(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint in any form, or a torchvision name. Omit it with --resume."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the run (default: runs/NAME-TIME).")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the run in this folder.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with settings. Command-line options take precedence; --no-NAME turns"
            " off a switch that the file turns on."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the training plan and exit.")
    ] = False,
    device: Annotated[
        TrainingDevice, typer.Option(help="Device to train on. auto uses a GPU if there is one.")
    ] = "auto",
    arch: Arch = None,
    input_size: InputSize = None,
    key: Key = None,
    prefix: Prefix = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that is not empty.")
    ] = False,
    as_json: Json = False,
    trust_pickle: TrustPickle = False,
    **settings: Any,
) -> None:
    """Continue training in path space, on labelled images. A plain network is converted first."""
    given = _given(settings)
    steps = Steps(1)
    with steps.shown(), steps.step("load and prepare"):
        if resume is not None:
            others = {
                "output_dir": output_dir,
                "arch": arch,
                "input_size": input_size,
                "key": key,
                "prefix": prefix,
                "force": force,
            }
            given |= {name: value for name, value in others.items() if value}
            run, folder = _resumed(resume, source, given, config, device), resume
        else:
            if source is None:
                raise PathconvertError("nothing to train", "Give a SOURCE, or --resume RUN.")
            from pathconvert.training.run.folder import default_folder

            folder = output_dir or default_folder(source)
            resolved = Settings.from_file(config, given) if config else Settings(**given)
            if not resolved.data:
                raise PathconvertError(
                    "no images to train on", "Give --data FOLDER, or --data NAME:ROOT."
                )
            loader = Loader(arch, input_size, None, key, trust_pickle, prefix)
            run = _begun(source, loader, resolved, folder, device, force=force, dry_run=dry_run)
    if run.fabric.is_global_zero:
        for remark in run.prepared.notes:
            note(f"note: {remark}")
    if dry_run:
        _show_plan(run, str(source or resume), as_json)
        return
    result = _trained(run)
    if run.fabric.is_global_zero:
        _show_result(result, folder, str(source or resume), as_json, steps.seconds)


def _show_result(
    result: Result, folder: Path, source: str, as_json: bool, seconds: Mapping[str, float]
) -> None:
    """Print what a finished run measured, and where its best network is."""
    from pathconvert.networks.loading import trained_file

    best, last, network = result.best, result.history[-1], str(trained_file(folder))
    done = [f"{last[what]} {what}{'s' * (last[what] != 1)}" for what in ("epoch", "step")]
    rows = {
        "trained": ", ".join(done),
        "best": (
            f"top-1 {best['val_top1']:.2%}, top-5 {best['val_top5']:.2%}, "
            f"loss {best['val_loss']:.4f} (epoch {best['epoch']})"
        ),
        "network": network,
    }
    if result.shortened:
        rows["shortened"] = (
            f"{result.shortened} steps of chains were shortened: the learning rate may be too large"
        )
    summary = {
        "folder": str(folder),
        "network": network,
        "best": best,
        "history": result.history,
        "shortened": result.shortened,
        "seconds": seconds,
    }
    emit(summary, facts(f"{source} → {folder}", rows), as_json)


def _resumed(
    path: Path,
    source: str | None,
    given: Mapping[str, Any],
    config: Path | None,
    device: TrainingDevice,
) -> Run:
    """The run in folder ``path``, ready to go on.

    Raises:
        PathconvertError: a source, or an option other than --data and --device, was given as well.
    """
    options = [flag(name) for name in given if name != "data"]
    extra = source or next(iter(options), None) or (config and "--config")
    if extra:
        raise PathconvertError(
            f"{extra} cannot be given with --resume: "
            "a resumed run keeps the settings in its config.yaml",
            "Start a new run to change it. Only --data may be given, if the images have moved.",
        )
    from pathconvert.training.run.begin import resume

    return resume(path, device=device, data=given.get("data"))


def _begun(
    source: str,
    loader: Loader,
    settings: Settings,
    folder: Path,
    device: TrainingDevice,
    *,
    force: bool,
    dry_run: bool,
) -> Run:
    """A new run in ``folder`` that trains ``source``."""
    from pathconvert.training.run.begin import begin

    return begin(loader.open(source), settings, folder, device=device, force=force, dry_run=dry_run)


def _show_plan(run: Run, source: str, as_json: bool) -> None:
    """Print what --dry-run shows: the network's form, chains, memory, images and steps."""
    from pathconvert.training.run.plan import plan

    found = plan(run)
    chains, memory = found["chains"], found["memory_bytes"]
    rows = {
        "form": (
            f"{found['form']}, {found['path_bn_layers']} Path-BN layers, {found['pivots']} pivots"
        ),
        "parameters": ", ".join(f"{n} {kind}" for kind, n in found["parameters"].items() if n),
        "chains": (
            f"{chains['chains']} over {chains['units']} channels, start {chains['start']}"
            if chains
            else "none"
        ),
        "images": (
            f"{found['train_images']} to train on, {found['val_images']} held out, "
            f"{found['classes']} classes"
        ),
        "steps": f"{found['steps']} in {found['epochs']} epochs, on {found['device']}",
        "memory": (
            f"{memory['weights'] / 2**20:.0f} MiB weights, "
            f"{memory['activations'] / 2**20:.0f} MiB activations"
        ),
    }
    for name, why in chains.get("left", {}).items():
        rows[f"on no chain: {name}"] = why
    emit(found | {"source": source}, facts(f"{source}: training plan", rows), as_json)


class _Bar:
    """Progress of a run on stderr: a bar on a terminal, and one line per epoch."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("")
        self._since, self._images = time.perf_counter(), 0

    def step(
        self, epoch: int, done: int, total: int, loss: float, accuracy: float, images: int
    ) -> None:
        """Show the progress after a batch."""
        self._images += images
        rate = self._images / (time.perf_counter() - self._since)
        text = f"epoch {epoch + 1}: loss {loss:.4f}, top-1 {accuracy:.1%}, {rate:.0f} images/s"
        self._bar.update(self._task, description=text, completed=done, total=total)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Print a line after an epoch."""
        note(
            f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.1%}; "
            f"held out: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2%}; "
            f"{row['images_per_second']:.0f} images/s"
        )
        self._since, self._images = time.perf_counter(), 0

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _trained(run: Run) -> Result:
    """Train, with progress on stderr in the first of several processes."""
    if not run.fabric.is_global_zero:
        return run.train()
    with _Bar() as bar:
        return run.train(bar)


# ---- options from the settings -------------------------------------------------------------------


#: What begins the names of the hidden options that turn switches off.
OFF = "no_"


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given on the command line; ``--no-NAME`` gives False."""
    given = {name: value for name, value in settings.items() if value is not None}
    off = {name.removeprefix(OFF): False for name in given if name.startswith(OFF)}
    return {name: value for name, value in given.items() if not name.startswith(OFF)} | off


def _options() -> list[inspect.Parameter]:
    """One option for every setting, and one that turns it off if it is a switch.

    The value of an option is None if it is not given.
    """
    options = []
    for name, field in Settings.model_fields.items():
        kind: Any = field.annotation
        options.append(_parameter(name, Annotated[kind | None, _option(name, field)]))
        if isinstance(field.default, bool):
            off = typer.Option(flag(f"{OFF}{name}"), hidden=True)
            options.append(_parameter(f"{OFF}{name}", Annotated[bool | None, off]))
    return options


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _option(name: str, field: FieldInfo) -> Any:
    """The typer option of a setting: its flag, help, choices and default."""
    text, bracket, default = (field.description or "").removesuffix(".").partition(" (default:")
    choices = [word for part in _parts(field.annotation) for word in typing.get_args(part)]
    if choices:
        text += f": {', '.join(choices)}"
    if field.default is not None and field.default != "" and field.default is not False:
        bracket, default = " (default:", f" {field.default})"
    metavar = "WORD" if choices else None
    return typer.Option(
        flag(name), help=f"{text}{bracket}{default}.", show_default=False, metavar=metavar
    )


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def finetune(**options: Any) -> None:
    """Replaced below by the docstring of :func:`_finetune`, which is the command's help."""
    _finetune(**options)


def _as_command() -> None:
    """Give :func:`finetune` the options of :func:`_finetune` and of the settings."""
    own = inspect.signature(_finetune, eval_str=True)
    fixed = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fixed[1:]]
    parameters = [fixed[0], *_options(), *keywords]
    finetune.__doc__ = _finetune.__doc__
    finetune.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    finetune.__annotations__ = {p.name: p.annotation for p in parameters}


_as_command()
