"""add, ls, show, rm, inspect, check: models and their files."""

import json
from typing import Any

import click

from modelhost.cli.follow import ended, follow
from modelhost.cli.output import counted, error_note, to_dict
from modelhost.cli.session import Command, Session, complete_models, model_argument, pass_session

INCOMPATIBLE = 5

name_option = click.option(
    "--name", metavar="ID", help="The model's id. Default: the source's last segment, lower-cased."
)
task_option = click.option(
    "--task", default="", metavar="TASK", help="What it does (feature-extraction, ...)."
)
include_option = click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Take only paths like this (*.safetensors).",
)
exclude_option = click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave paths like this out."
)


revision_option = click.option(
    "--revision", default="", metavar="REVISION", help="A branch, tag or commit."
)
url_option = click.option(
    "--url",
    "more_uris",
    multiple=True,
    metavar="URL",
    help="A further file of the same model, beside SOURCE, the URL of one; repeatable.",
)


@click.command(cls=Command)
@click.argument("source")
@name_option
@task_option
@revision_option
@url_option
@include_option
@exclude_option
@click.option("--description", default="", metavar="TEXT", help="What the model is for.")
@click.option("--licence", default="", metavar="SPDX", help="Its licence.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable.")
@click.option(
    "--config",
    multiple=True,
    metavar="KEY=VALUE",
    help="A field of the model's config (keep_alive=300s, max_batch_size=8); repeatable.",
)
@pass_session
def add(
    session: Session,
    source: str,
    name: str | None,
    task: str,
    revision: str,
    more_uris: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    description: str,
    licence: str,
    labels: tuple[str, ...],
    config: tuple[str, ...],
) -> None:
    """Register a model and fetch nothing."""
    from modelhost._names import short

    with session.client() as client:
        model = client.add(
            source,
            name,
            task=task,
            revision=revision,
            more_uris=more_uris,
            allow_patterns=include,
            ignore_patterns=exclude,
            description=description,
            licence=licence,
            labels=to_pairs(labels, "--label"),
            config=_config(config) if config else None,
        )
    if session.output.json:
        session.output.document(to_dict(model))
    else:
        session.output.line([short(model.name)])


@click.command(cls=Command)
@click.option("--task", default="", metavar="TASK", help="Only models of this task.")
@click.option(
    "--state", "states", multiple=True, metavar="STATE", help="Only models in this state."
)
@click.option(
    "--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Only models with it."
)
@click.option("--loaded", is_flag=True, help="Only models that are loaded.")
@pass_session
def ls(
    session: Session, task: str, states: tuple[str, ...], labels: tuple[str, ...], loaded: bool
) -> None:
    """List the models."""
    from modelhost.cli import views

    with session.client() as client:
        models = client.models(
            task=task,
            states=states,
            labels=dict(label.partition("=")[::2] for label in labels),
            loaded_only=loaded,
        )
        if session.output.json:
            session.output.document([to_dict(model) for model in models])
            return
        instances = {instance.model: instance for instance in client.instances()}
    session.output.rows(models, views.model_columns(instances))
    if not models and session.output.table:
        error_note(["no models; `modelhost pull hf://org/name` adds one"])


@click.command(cls=Command)
@model_argument
@click.option(
    "--usage", is_flag=True, help="Load it where need be, and say what it takes and gives."
)
@pass_session
def show(session: Session, model: str, usage: bool) -> None:
    """Show one model: its files, its config; if it is loaded its instance, what it takes and gives."""
    from modelhost.cli import views, views_memory
    from modelhost.cli.usage import find_usage, show_usage

    output = session.output
    with session.client() as client:
        found = client.get(model)
        instances = client.instances(found.name)
        description = find_usage(client, model, instances, wanted=usage)
    if output.json:
        told = {"model": to_dict(found), "instances": [to_dict(instance) for instance in instances]}
        if description is not None:
            told["usage"] = to_dict(description)
        output.document(told)
        return
    output.pairs(views.model_pairs(found))
    for instance in instances:
        output.blank()
        output.pairs(views_memory.instance_pairs(instance))
    if found.artifacts:
        output.blank()
        output.rows(found.artifacts, views.ARTIFACT_COLUMNS)
    if description is not None:
        show_usage(output, description, wanted=usage)


@click.command(cls=Command)
@click.argument(
    "models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_models
)
@click.option("-f", "--force", is_flag=True, help="Unload it first, and cancel its download.")
@click.option("--files", is_flag=True, help="Delete the files only; the entry stays.")
@pass_session
def rm(session: Session, models: tuple[str, ...], force: bool, files: bool) -> None:
    """Delete models and their files. Files that other models share stay."""
    with session.client() as client:
        for model in models:
            delete = client.delete_files if files else client.delete
            ended(session, follow(session, delete(model, force=force, wait=False), quiet=True))


@click.command(cls=Command)
@click.argument("source")
@revision_option
@url_option
@include_option
@exclude_option
@click.option("--allow-unsafe", is_flag=True, help="Show what a pull with this option would fetch.")
@pass_session
def inspect(
    session: Session,
    source: str,
    revision: str,
    more_uris: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    allow_unsafe: bool,
) -> None:
    """Ask a source what a pull would fetch, and fetch nothing."""
    from modelhost._text import show_bytes
    from modelhost.cli import views

    output = session.output
    with session.client() as client:
        found = client.inspect(
            source,
            revision=revision,
            more_uris=more_uris,
            allow_patterns=include,
            ignore_patterns=exclude,
            allow_unsafe=allow_unsafe,
        )
    if output.json:
        output.document(to_dict(found))
        return
    memory = found.predicted_bytes
    output.pairs(
        [
            ("source", found.source.uri),
            ("revision", found.revision),
            ("id", found.model_id),
            ("task", found.task + (f" ({found.source_task})" if found.source_task else "")),
            ("licence", found.licence),
            ("tags", " ".join(found.tags)),
            ("gated", "yes" if found.gated else ""),
            ("private", "yes" if found.private else ""),
            ("download", f"{counted(found.file_count, 'file')}, {show_bytes(found.size_bytes)}"),
            ("device memory", show_bytes(memory) if memory else ""),
        ]
    )
    output.blank()
    output.rows(found.files, views.FILE_COLUMNS)
    for skipped in found.skipped_files:
        output.say(f"left out: {skipped.path} ({skipped.message})")


@click.command(cls=Command)
@model_argument
@click.option(
    "--device", metavar="DEVICE", help="The device. Default: the model's own, or the best."
)
@click.pass_context
def check(context: click.Context, model: str, device: str | None) -> None:
    """Tell whether a model can work here, check by check; exit code 5 where it cannot."""
    from modelhost.cli import views

    session = context.ensure_object(Session)
    output = session.output
    with session.client() as client:
        found = client.check_compatibility(model, device)
    if output.json:
        output.document(to_dict(found))
    else:
        output.rows(found.checks, views.CHECK_COLUMNS)
    if not found.compatible:
        context.exit(INCOMPATIBLE)


def to_bytes(text: str, option: str) -> int:
    """Return the bytes of ``5MB``; a wrong one is an error of the command line."""
    from modelhost._text import read_bytes

    try:
        return read_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def to_pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """Return ``KEY=VALUE`` texts as a dictionary; a wrong one is an error of the command line."""
    for text in texts:
        if "=" not in text[1:]:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
    pairs = dict(text.partition("=")[::2] for text in texts)
    if len(pairs) < len(texts):
        raise click.BadParameter("a key is given twice", param_hint=option)
    return pairs


def _config(texts: tuple[str, ...]) -> Any:
    """Return the ModelConfig of ``KEY=VALUE`` texts; values are JSON, or a word or span (a number = seconds) as it stands."""
    from google.protobuf.json_format import ParseDict, ParseError

    from modelhost.v1.models_pb2 import ModelConfig

    try:
        values = {k: _json_or_text(v) for k, v in to_pairs(texts, "--config").items()}
        for name, field in ModelConfig.DESCRIPTOR.fields_by_name.items():
            spans = field.message_type is not None and field.message_type.name == "Duration"
            given = values.get(name) if spans else None
            if isinstance(given, int | float):
                # protobuf reads no exponent, which Python writes below 0.0001.
                values[name] = f"{given:.9f}s" if isinstance(given, float) else f"{given}s"
        return ParseDict(values, ModelConfig())
    except ParseError as error:
        raise click.BadParameter(str(error), param_hint="--config") from None


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
