"""The command line: `bestiary COMMAND ...` or `python -m bestiary COMMAND ...`.

Every command is an options dataclass and a function of it, imported only when it is called. Bad
input ends in one line on stderr and exit status 2.
"""

import contextlib
import glob
import importlib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Command(NamedTuple):
    module: str
    options: str
    run: str
    help: str


COMMANDS = {
    "list": Command("eval.show", "List", "run_list", "models, experiments and layers by name"),
    "show": Command("eval.show", "Show", "run_show", "what a model or experiment holds and costs"),
    "train": Command("train.run", "", "train", "run an experiment, or continue it"),
    "eval": Command("eval.evaluate", "Evaluate", "run", "loss, perplexity and sparsity of a run"),
    "generate": Command("eval.generate", "Generate", "run", "text from a run"),
    "plan": Command("eval.plan", "Options", "run", "compile for a TPU that is not there"),
    "compare": Command("eval.compare", "Compare", "run", "architectures under one budget"),
    "import": Command("train.weights", "Import", "run_import", "a run from a Hugging Face folder"),
    "export": Command("train.weights", "Export", "run_export", "a Hugging Face folder from a run"),
    "fit": Command("eval.fit", "Fit", "run", "a KAN, and its formula, for a table of numbers"),
    "merge": Command("train.merge", "Merge", "run", "one run from checkpoints or from runs"),
    "convert": Command("train.convert", "Convert", "run", "latent experts from a mixture's run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    started = time.monotonic()
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        from bestiary import __version__

        print(__version__)
        return 0
    _quiet_libtpu()
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
        if name == "train":
            return _train(rest, started)
        if name == "show":
            return _show(rest)
        return _run(name, rest)
    except (ValueError, NotImplementedError) as error:
        if os.environ.get("BESTIARY_TRACEBACK"):
            raise
        line = " ".join(str(error).split())
        print(f"bestiary {name}: error: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _quiet_libtpu() -> None:
    """libtpu without a TPU (the extra [plan]) complains at every start of JAX."""
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        from bestiary.eval import libtpu

        libtpu.quiet()


def usage() -> str:
    lines = [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    head = "usage: bestiary COMMAND [OPTIONS]      (bestiary COMMAND --help says more)"
    return "\n".join((head, "", *lines))


def parse(name: str, cls: type[T], argv: Sequence[str], default: T | None = None) -> T:
    """`cls` from typed flags, on top of `default`. Raises ValueError with tyro's finding."""
    import tyro

    heard = io.StringIO()
    # an experiment's parts are given: their fields are flags, and no part becomes a subcommand
    given = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(  # type: ignore[return-value]
                cls,
                prog=f"bestiary {name}",
                args=list(argv),
                default=tyro.MISSING_NONPROP if default is None else default,
                config=None if default is None else given,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_plain(heard.getvalue())) from None


def _plain(boxed: str) -> str:
    """tyro's framed message as one line: what is wrong, and the nearest flags if it names some."""
    parts: list[list[str]] = [[]]  # between rules, which are of ASCII where stdout is
    for line in boxed.splitlines()[1:]:  # after the title
        line = line.strip(" │")
        if set(line) <= set("─-╰╯"):
            parts.append([])
        else:
            parts[-1].append(line)
    what, *rest = [" ".join(part) for part in parts if part]
    for part in rest:
        if part.startswith("Available subcommands: "):
            word = what.partition("options: ")[2].split(" ")[0].rstrip(",")
            return f"{word!r} is no subcommand; need one of {part.partition(': ')[2]}, first"
    # a refusal names its field itself; of tyro's preface only the path of a part says more
    finding = re.sub(r"^Error parsing ([A-Z]\w*: )?", "", what)
    nearest = re.findall(r"--[\w.-]+", " ".join(rest))
    flags = list(dict.fromkeys(f for f in nearest if f != "--help" and f not in finding))
    return finding + (f"; perhaps {' or '.join(flags[:3])}" if flags else "")


def _run(name: str, argv: Sequence[str]) -> int:
    command = COMMANDS[name]
    module = importlib.import_module(f"bestiary.{command.module}")
    options = parse(name, getattr(module, command.options), argv)
    return getattr(module, command.run)(options) or 0


def _train(argv: Sequence[str], started: float) -> int:
    name, argv = _experiment_name("train", argv)
    experiment = _experiment("train", name, argv)
    run = importlib.import_module("bestiary.train.run")
    return run.run(experiment, name, started=started)


def _show(argv: Sequence[str]) -> int:
    """Options of `show`, and for an experiment any of its fields."""
    show = importlib.import_module("bestiary.eval.show")
    experiment = importlib.import_module("bestiary.train.experiment")
    if not argv or argv[0] not in experiment.experiments():
        return _run("show", argv)
    own = {"--length", "--json", "--sharding", "--no-json", "--no-sharding", "--help", "-h"}
    mine, fields, args = [argv[0]], [], list(argv[1:])
    while args:
        flag = args.pop(0)
        cache = flag.startswith("--cache")
        target = mine if cache or flag.split("=")[0] in own else fields
        target.append(flag)
        while args and not args[0].startswith("--"):
            target.append(args.pop(0))
    options = parse("show", show.Show, mine)
    show.run_show(options, _experiment("show", argv[0], fields))
    return 0


def _experiment_name(command: str, argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    from bestiary.train.experiment import experiments

    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    known = "\n".join(f"  {name:20} {text}" for name, text in experiments().items())
    text = f"usage: bestiary {command} EXPERIMENT [--help] [--FIELD VALUE ...]\n\n{known}"
    if argv and argv[0] in ("-h", "--help"):
        print(text)
        raise SystemExit(0)
    raise ValueError(f"the first argument is an experiment: {', '.join(experiments())}")


def _experiment(command: str, name: str, argv: Sequence[str]) -> Any:
    """The experiment called `name` with the fields that `argv` overrides."""
    from dataclasses import replace

    from bestiary.train.experiment import Experiment, load_experiment

    default = load_experiment(name)
    flags = {arg.split("=")[0] for arg in argv if arg.startswith("--")}
    # the two lengths of a run exclude each other: naming one takes the other's default away
    if "--steps" in flags and "--minutes" not in flags:
        default = replace(default, steps=1, minutes=None)
    if "--minutes" in flags and "--steps" not in flags:
        default = replace(default, minutes=1.0, steps=None)
    return parse(f"{command} {name}", Experiment, argv, default)


if __name__ == "__main__":
    sys.exit(main())
