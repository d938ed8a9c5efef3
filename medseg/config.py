"""The schema (dataclasses beside the parts) ↔ the YAML files of `configs/`. The only importer of Hydra and OmegaConf.

Each part's defaults are stored in Hydra under its group and `_name`, and a YAML of `configs/` starts from them
(`defaults: [_adamw]`). So every key can be overridden, completed and shown, and stands in one place: the dataclass.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from medseg.bundle import BUNDLE_FILE
from medseg.documents import YAML_ERRORS, check_yaml
from medseg.errors import Code, MedsegError, nearest, of_machine
from medseg.registry import make_config
from medseg.tasks import LEFT_AS_THEY_ARE, SEGMENTATION, TASKS, configs_folder, task_named, task_of
from medseg.training.distributed import is_requeued
from medseg.training.experiment import CONFIG_FILE, PLACES_FILE, is_place
from medseg.training.overrides import options_first, refuse_nesting
from medseg.training.run_folder import (
    REFUSED_FILE,
    has_begun,
    refusals_in,
    remove_unstarted,
    used_folder,
    write_refusal,
)


def run_hydra(config_name: str, arguments: Sequence[str], task: Callable[[Any, Path], Any]) -> None:
    """Compose a configuration from a command line as Hydra does (sweeps, --cfg, completion included) and run a task.

    Args:
        config_name: a YAML of `configs/`, without suffix.
        arguments: what stands after the verb.
        task: called with the experiment and the run's folder; once for each job of a sweep.
    Raises:
        MedsegError: E_CONFIG for keys, values or options that do not exist, with the nearest ones.
    """
    if "--experimental-rerun" in arguments:
        raise MedsegError(
            Code.CONFIG,
            "--experimental-rerun is off: it would open a pickle, which can run code",
            remedy="go on with a run by: medseg train resume=RUN",
        )
    register_schema()
    refused: list[MedsegError] = []
    SweepEnd.refused = []

    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        others = sorted(path.name for path in folder.iterdir() if path.name != f"{config_name}.log")
        try:
            if others and not is_requeued():
                raise used_folder(folder, others)
            task(resumed(folder, []) if others and has_begun(folder) else experiment_from(config), folder)
        except (MedsegError, OSError, MemoryError, RuntimeError) as error:
            refusal = error if isinstance(error, MedsegError) else of_machine(error)
            if refusal is None:
                raise
            # Kept and raised at the end: Hydra would print it in its own way, and end a sweep at its first bad job.
            refused.append(refusal)
            if not others:
                remove_unstarted(folder)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sys.stderr.write(f"{refusal}\n")
                write_refusal(folder, refusal)  # also for whoever waits for this job on another machine

    with _hydra_process(["medseg", *options_first(arguments)]):  # the name that shell completion is installed for
        try:
            hydra.main(config_path=str(configs_folder()), config_name=config_name, version_base="1.3")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, config_name, arguments) from error
    if refused or (refused := SweepEnd.refused):
        raise refused[0]


class SweepEnd(Callback):
    """Compares the runs of a sweep when the last is done, wherever a launcher of Hydra had them run."""

    refused: ClassVar[list[MedsegError]] = []

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, write it and the picture into the sweep's folder."""
        folder = Path(config.hydra.sweep.dir)
        if any(folder.glob(f"*/{CONFIG_FILE}")) or any(folder.glob(f"*/{REFUSED_FILE}")):
            from medseg.reports.sweep import conclude_sweep  # draws: matplotlib is half a second of imports

            SweepEnd.refused = refusals_in(folder)
            conclude_sweep(folder, Console())


@contextmanager
def _hydra_process(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and prints and swallows errors unless an environment variable is set."""
    program, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = arguments, "1"
    try:
        yield
    finally:
        sys.argv = program
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def search_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...] | tuple[float, float, bool]]]:
    """A command line with Hydra's sweeps in it: what is fixed, and what is searched.

    Returns:
        The overrides without sweeps; and by key the values to choose from, as text, or (lowest, highest, whether
        logarithmic) of an interval, which are ints where it is one of ints.
    Raises:
        MedsegError: E_CONFIG for what Hydra cannot read.
    """
    refuse_nesting(overrides)
    searched: dict[str, tuple[str, ...] | tuple[float, float, bool]] = {}
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        for override in (o for o in parsed if o.is_sweep_override()):
            value: Any = override.value()
            is_interval = isinstance(value, IntervalSweep)
            log = "log" in getattr(value, "tags", ())
            key = override.get_key_element()
            if is_interval:
                searched[key] = (value.start, value.end, log)
            else:
                searched[key] = tuple(map(str, override.sweep_string_iterator()))
    except (HydraException, ValueError, TypeError) as error:
        raise _explain(error, "train", overrides) from error
    return [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line], searched


def compose(config_name: str, overrides: Sequence[str]) -> Any:
    """The experiment of a list of overrides, without running anything (for the demo, notebooks and tests).

    Raises:
        MedsegError: E_CONFIG as `run_hydra`.
    """
    register_schema()
    refuse_nesting(overrides)
    try:
        return experiment_from(_compose(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, config_name, overrides) from error


def experiment_from(config: DictConfig) -> Any:
    """Check a composed configuration and turn it into the dataclasses of its task.

    Raises:
        MedsegError: E_CONFIG or E_NAME for keys, types or names that do not exist.
    """
    values = OmegaConf.to_container(config, resolve=True)
    if not isinstance(values, dict):
        raise MedsegError(Code.CONFIG, "the configuration is not a table", got=type(values).__name__)
    task = task_named(str(values.get("task", SEGMENTATION)))
    for *groups, last in task.experiment.places:  # absolute: a run may go on, and be looked at, from another folder
        table: Any = values
        for name in groups:
            table = table.get(name) if isinstance(table, dict) else None
        if isinstance(table, dict) and is_place(table.get(last)) and (*groups, last) not in LEFT_AS_THEY_ARE:
            table[last] = str(Path(table[last]).expanduser().absolute())
    experiment = make_config(task.experiment, {str(k): v for k, v in values.items()}, where="")
    for group, registry in task.parts.items():
        # Checked here, before any data are read; parts are built where they are used.
        settings = dict(getattr(experiment, group))
        part = registry.part(str(settings.pop("name", "")))
        make_config(part.config, settings, where=group)
    return experiment


def register_schema() -> None:
    """Store the defaults of all parts where the YAML files expect them."""
    store = ConfigStore.instance()
    for task in TASKS.values():
        for group, registry in task.parts.items():
            for name in registry.names():
                store.store(group=group, name=f"_{name}", node=_defaults(registry.part(name).config))
        for group, (name, cls) in task.plain.items():
            store.store(group=group, name=name, node=_defaults(cls))
        top = {key: value for key, value in _defaults(task.experiment).items() if key not in task.groups}
        store.store(name=f"_{task.config}", node=top)


def resumed(run: Path, overrides: Sequence[str]) -> Any:
    """The experiment of a run that goes on: its own configuration, with other values of `trainer` where given.

    Args:
        run: the folder of the run.
        overrides: `trainer.key=value`; and `data.root=FOLDER` where the run came without its `PLACES_FILE`.
    Raises:
        MedsegError: E_RUN if the folder is no run, E_CONFIG for other keys: a run keeps its data and model.
    """
    stored = run / CONFIG_FILE
    if not has_begun(run):
        raise MedsegError(
            Code.RUN,
            "this folder is not a run that can go on",
            where=run,
            expected=f"a folder that medseg train made, with {CONFIG_FILE} and {BUNDLE_FILE}",
        )
    places = _read_yaml(run / PLACES_FILE) if (run / PLACES_FILE).is_file() else OmegaConf.create()
    for override in overrides:
        moved = override.startswith("data.root=") and "data.root" not in places
        if not (override.startswith("trainer.") or moved) or "=" not in override:
            raise MedsegError(
                Code.CONFIG,
                "a run that goes on keeps its configuration but for the trainer's",
                where=override,
                expected="trainer.KEY=VALUE, such as trainer.max_minutes=60",
                remedy="begin a new run for other settings",
            )
    try:
        config = _read_yaml(stored)
        task = task_named(str(config.get("task", SEGMENTATION)))
        for key in (".".join(names) for names in task.experiment.places):
            if key in places:
                OmegaConf.update(config, key, places[key])
        OmegaConf.update(config, "resume", str(run))
        for parsed in OverridesParser.create().parse_overrides(list(overrides)):  # YAML would read "off" as false
            OmegaConf.update(config, parsed.key_or_group, parsed.value())
        return experiment_from(config)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise MedsegError(Code.CONFIG, "the configuration cannot be read", where=stored, got=error) from error


def _read_yaml(path: Path) -> DictConfig:
    """A table that `write_config` wrote.

    Raises:
        MedsegError: E_CONFIG if it is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        config = OmegaConf.load(io.StringIO(text))
    except (OmegaConfBaseException, OSError, AssertionError, *YAML_ERRORS) as error:  # OmegaConf asserts
        raise MedsegError(Code.CONFIG, "the configuration cannot be read", where=path, got=error) from error
    if not isinstance(config, DictConfig):
        raise MedsegError(Code.CONFIG, "the configuration is not a table", where=path)
    return config


def _defaults(cls: type) -> dict[str, Any]:
    """Defaults of a dataclass as plain values; fields without one are left to the YAML (`???`)."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            nested = dataclasses.is_dataclass(default) and not isinstance(default, type)
            values[field.name] = _defaults(type(default)) if nested else _plain(default)
        else:
            values[field.name] = "???"
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(configs_folder()), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def composed(config_name: str, overrides: Sequence[str]) -> tuple[dict[str, Any], str, str]:
    """A configuration with these overrides, and what its help says before and after its keys.

    Raises:
        MedsegError: E_CONFIG as `run_hydra`.
    """
    register_schema()
    try:
        with hydra.initialize_config_dir(str(configs_folder()), version_base="1.3"):
            config = hydra.compose(config_name, list(overrides), return_hydra_config=True)
        said = config.hydra.help
        plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        values = OmegaConf.to_container(plain, throw_on_missing=False)
        return {str(k): v for k, v in values.items()} if isinstance(values, dict) else {}, said.header, said.footer
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, config_name, overrides) from error


def _explain(error: Exception, config_name: str, arguments: Sequence[str]) -> MedsegError:
    """A composition error in our words, with the nearest key or option."""
    text = f"{error}\n{error.__cause__ or ''}"
    key = re.search(r"Could not override '([^']+)'", text)
    if key and isinstance(error, ConfigCompositionException):
        return _unknown_key(key.group(1), config_name, arguments)
    option = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if option and isinstance(error, MissingConfigException):
        group, name = option.groups()
        options = re.findall(r"^\t+(\S+)$", text, flags=re.MULTILINE)
        served = task_of(arguments).options(group)
        of_others = {path.stem for path in (configs_folder() / group).glob("*.yaml")}.difference(served)
        known = [o for o in options if not o.startswith("_") and o not in of_others] or served
        return MedsegError(
            Code.CONFIG,
            f"there is no option {name!r} of {group}",
            where=f"{group}={name}",
            remedy=nearest(name, known),
        )
    return MedsegError(
        Code.CONFIG,
        "the configuration cannot be composed",
        got=" ".join(str(error).split()),
        remedy="write overrides as key=value; quote values with special characters: 'data.root=\"a, b\"'",
    )


def _unknown_key(key: str, config_name: str, arguments: Sequence[str]) -> MedsegError:
    """Name the keys that stand where the user looked."""
    name = key.lstrip("+~")
    parent, _, last = name.rpartition(".")
    groups = [a for a in arguments if "=" in a and "." not in a.split("=")[0] and not a.startswith(("-", "hydra"))]
    try:
        known_groups = task_of(arguments).groups - {name}
        config = _compose(config_name, [g for g in groups if g.split("=")[0] in known_groups])
        node = OmegaConf.select(config, parent) if parent else config
        known = [str(k) for k in node] if isinstance(node, DictConfig) else []
        while parent and not known:
            parent, _, last = parent.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            known = [str(k) for k in node] if isinstance(node, DictConfig) else []
    except (HydraException, OmegaConfBaseException):
        known = []
    if not parent and last in known and (configs_folder() / last).is_dir():
        return MedsegError(
            Code.CONFIG,
            f"{name} takes the name of an option",
            where=name,
            expected=" | ".join(task_of(arguments).options(last)),
            remedy=f"set single values by {name}.KEY=VALUE",
        )
    remedy = nearest(last, known) if known else "medseg train --help lists all keys"
    if known:
        remedy = re.sub(r"'([^']+)'", lambda m: f"'{parent}.{m.group(1)}'" if parent else m.group(0), remedy)
    return MedsegError(Code.CONFIG, f"unknown key {name}", where=name, remedy=remedy)
