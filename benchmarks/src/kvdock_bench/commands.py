"""The commands `kvdock bench` and `kvdock report`; heavy imports wait until one of them runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from kvdock.hookspecs import hookimpl
from kvdock_bench.arguments import Arguments
from kvdock_bench.errors import BenchError

_SEVERAL = ("--acceleration", "--budget", "--device", "--server", "--set")


class _SeveralValues(TyperCommand):
    """Let one flag take several values: `--acceleration SnapKV H2O`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag before each further value, then parse as usual."""
        return super().parse_args(ctx, repeat_flags(args))


def repeat_flags(args: list[str]) -> list[str]:
    """Write `--flag a b` as `--flag a --flag b`, for the flags that take several values."""
    result: list[str] = []
    flag, taken = "", 0
    for word in args:
        if word.startswith("--"):
            flag, taken = (word, 0) if word in _SEVERAL else ("", 0)
        elif flag:
            if taken:
                result.append(flag)
            taken += 1
        result.append(word)
    return result


Names = list[str] | None


def bench(
    model_path: Annotated[
        str, typer.Option("--model_path", help="smollm2-135m, a local folder, or a hub id.")
    ] = "smollm2-135m",
    cfg_path: Annotated[
        str, typer.Option("--cfg_path", help="A packaged config (RULER, demo) or a YAML file.")
    ] = "RULER",
    acceleration: Annotated[
        Names, typer.Option("--acceleration", help="Methods beside the full cache; several.")
    ] = None,
    budget: Annotated[
        Names,
        typer.Option("--budget", help="2048 slots, 25% of the prompt, or 1GiB; one column each."),
    ] = None,
    settings: Annotated[
        Names, typer.Option("--set", help="method.option=value; see `kvdock show METHOD`.")
    ] = None,
    device: Annotated[
        Names, typer.Option("--device", help="cpu, or the indices of GPUs; several.")
    ] = None,
    gp_num: Annotated[
        str | None, typer.Option("--gp_num", help="GPUs per model (2), or models per GPU (1/2).")
    ] = None,
    parallel: Annotated[
        str,
        typer.Option("--parallel", help="How GPUs share a model: map (by layers) or tp (tensor)."),
    ] = "map",
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Models at once, on CPU or in a cluster."),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", "--ray_address", help="A Ray cluster: host:port, or auto."),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option("--launcher", help="ray or processes; ray where it is installed."),
    ] = None,
    torch_dtype: Annotated[
        str | None, typer.Option("--torch_dtype", help="float32, float16 or bfloat16.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option("--batch_size", help="Prompts at once, or auto.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many samples a task.")
    ] = None,
    max_length: Annotated[
        str | None,
        typer.Option("--max_length", help="Cut the middle out of longer prompts: 4096 or 4k."),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="auto, none, or the path of a .jinja file.")
    ] = None,
    save_tag: Annotated[
        str | None, typer.Option("--save_tag", help="Name of the run's folder.")
    ] = None,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Where run folders are made.")
    ] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Set an earlier run aside and start anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print the plan and the memory it needs; run nothing.")
    ] = False,
    server: Annotated[
        Names, typer.Option("--server", help="transformers, vllm, or both: one column each.")
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option("--vllm_python", help="The interpreter of vLLM's environment."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option("--max_model_len", min=1, help="vLLM's limit; default: the model's."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option("--gpu_memory_utilization", min=0.01, max=1, help="vLLM's share of memory."),
    ] = None,
    adapter_path: Annotated[
        str | None, typer.Option("--adapter_path", help="The folder of a PEFT adapter.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time_limit", help="Seconds that one answer may take.")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust_remote_code", help="Run Python code that the model brings with it."),
    ] = False,
) -> None:
    """Measure accuracy, time and memory of methods against the full cache."""
    from kvdock_bench.session import bench as run_bench

    arguments = Arguments(
        model_path=model_path,
        cfg_path=cfg_path,
        device=tuple(device or ()),
        gp_num=gp_num,
        parallel=parallel,
        workers=workers,
        ray_address=ray_address,
        launcher=launcher,
        adapter_path=adapter_path,
        time_limit=time_limit,
        trust_remote_code=trust_remote_code,
        torch_dtype=torch_dtype,
        acceleration=tuple(acceleration or ()),
        batch_size=batch_size,
        budget=tuple(budget or ()),
        settings=tuple(settings or ()),
        limit=limit,
        max_length=max_length,
        template=template,
        save_tag=save_tag,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        server=tuple(server or ("transformers",)),
        vllm_python=vllm_python,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        output_dir=output_dir,
        command=("kvdock", *sys.argv[1:]),
    )
    raise typer.Exit(run_bench(arguments))


def report(
    runs: Annotated[
        Names, typer.Argument(metavar="RUN…", help="Run folders, or their --save_tag.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where run folders lie.")] = Path(
        "runs"
    ),
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Where to write; default: the run's folder, a new one for several runs."
        ),
    ] = None,
    allow_mixed: Annotated[
        bool,
        typer.Option("--allow-mixed", help="Put answers to different protocols in one table."),
    ] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--diff",
            metavar="A B",
            help="Tell what got worse from run A to run B; exit code 1 if anything did.",
        ),
    ] = None,
) -> None:
    """Make tables, plots and report.html of one or several runs again from their records.

    Exit codes: 0, or 1 when --diff finds a significant regression; 2 when something is wrong.
    """
    from kvdock_bench import report_command

    if diff is not None:
        if runs:
            raise BenchError(f"--diff takes two runs; {', '.join(runs)} is one too many.")
        code = report_command.diff(*diff, output_dir, to=to, allow_mixed=allow_mixed)
    elif runs:
        code = report_command.report(runs, output_dir, to=to, allow_mixed=allow_mixed)
    else:
        raise BenchError("Name a run: kvdock report RUN, or kvdock report --diff A B.")
    raise typer.Exit(code)


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with the model `kvdock` among its models; all arguments are lm-eval's."""
    from kvdock_bench.harness.command import main

    main(context.args)


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@hookimpl
def kvdock_commands(app: Any) -> None:
    """Add `bench`, `report` and `lm-eval` to the command line."""
    app.command("bench", cls=_SeveralValues)(bench)
    app.command("report")(report)
    app.command("lm-eval", context_settings=_PASSED_ON)(lm_eval)
