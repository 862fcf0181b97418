"""The command ``veloxlab``: alone it opens JupyterLab on the tour; ``veloxlab doctor`` checks the installation."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxlab.errors import InputError
from veloxlab.files import write_atomically
from veloxlab.shipped import is_installed, shipped_folder

if TYPE_CHECKING:
    import polars as pl

TOUR = "00_tour.ipynb"
COPY_FOLDER = Path("veloxlab-notebooks")
MLX_LM = {"serve": "server", "generate": "generate", "cache-prompt": "cache_prompt"}
"""Commands of mlx-lm's that work on a compressed cache: our name and theirs."""
NUMBERS = {
    "bits": "code bits a value (default: 4)",
    "key_bits": "of keys, if other",
    "value_bits": "of values, if other",
    "sinks": "first tokens kept exact (default: 4)",
    "window": "newest tokens kept exact (default: 64)",
    "max_kv_size": "tokens held at most, older ones are forgotten (default: all)",
}
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status: 0 is success, 1 a failed check, 2 bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options, unknown = parser.parse_known_args(words[:end])
    options.passed_on = [*unknown, *words[end + 1 :]] if options.run is run_mlx_lm else words[end + 1 :]
    if unknown and options.run is not run_mlx_lm:
        parser.error(f"unknown: {' '.join(unknown)}")
    if options.passed_on and options.run not in (open_lab, run_mlx_lm):
        parser.error(f"{options.command} passes nothing on, so leave out {' '.join(words[end:])}")
    try:
        status: int = options.run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="veloxlab",
        description="Without a command: open JupyterLab on the tour. What follows -- is passed on to JupyterLab.",
    )
    parser.add_argument("--version", action="version", version=f"veloxlab {version('veloxlab')}")
    parser.set_defaults(run=open_lab)
    commands = parser.add_subparsers(title="commands", dest="command")
    doctor = commands.add_parser("doctor", help="check the device, the packages and the model's weights")
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(run=show_checks)
    compare = commands.add_parser("compare", help="measure caches side by side on WikiText-2, and write the results")
    compare.add_argument("--model", default="smollm2-135m", help="what to load (default: %(default)s)")
    compare.add_argument("--tokens", type=int, default=512, help="length of a stretch of text (default: %(default)s)")
    compare.add_argument("--windows", type=int, default=3, help="number of stretches (default: %(default)s)")
    compare.add_argument("--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)")
    compare.set_defaults(run=compare_caches)
    sweep = commands.add_parser("sweep", help="uniform bits against RateQuant's, in equal bytes, and write the results")
    sweep.add_argument("--model", default="smollm2-135m", help="what to load (default: %(default)s)")
    sweep.add_argument("--bits", type=float, nargs="+", help="code bits on average (default: 2 2.5 3 3.5 4)")
    sweep.add_argument("--by", nargs="+", help="sensitivities (default: gradient key_norm)")
    sweep.add_argument("--tokens", type=int, default=512, help="length of a stretch of text (default: %(default)s)")
    sweep.add_argument("--windows", type=int, default=8, help="number of stretches (default: %(default)s)")
    sweep.add_argument("--sequences", type=int, default=8, help="for the sensitivities (default: %(default)s)")
    sweep.add_argument("--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)")
    sweep.set_defaults(run=sweep_bits)
    search = commands.add_parser("search", help="measure the Pareto front of bytes and divergence, and write it")
    search.add_argument("--model", default="smollm2-135m", help="what to load (default: %(default)s)")
    search.add_argument("--methods", nargs="+", help="ids (default: those that need no calibration)")
    search.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="of keys and of values (default: 2 3 4)")
    search.add_argument("--sinks", type=int, nargs="+", default=[0, 4], help="exact first tokens (default: 0 4)")
    search.add_argument("--window", type=int, nargs="+", default=[0], help="exact newest tokens (default: 0)")
    search.add_argument(
        "--protected", nargs="+", default=["none", "0"], help="layers left exact, as 0,-1 (default: none 0)"
    )
    search.add_argument("--most-bytes", type=float, help="a token at most (default: any)")
    search.add_argument("--most-kl", type=float, help="nats at most (default: any)")
    search.add_argument("--tokens", type=int, default=192, help="length of a stretch of text (default: %(default)s)")
    search.add_argument("--windows", type=int, default=8, help="number of stretches (default: %(default)s)")
    search.add_argument("--workers", type=int, default=1, help="processes that measure (default: %(default)s)")
    search.add_argument("--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)")
    search.set_defaults(run=search_front)
    bench = commands.add_parser("bench", help="time attention, encoding and decoding here, against exact and mlx-lm's")
    bench.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    bench.add_argument("--tokens", type=int, nargs="+", help="lengths of the context (default: 4096 32768 131072)")
    bench.add_argument(
        "--only",
        nargs="+",
        choices=("attention", "methods", "encode", "decode", "read"),
        help="measure these alone, and leave the rest of FILE as it is",
    )
    bench.set_defaults(run=time_kernels)
    memory = commands.add_parser("memory", help="measure memory at its peak and a token's time, by length of text")
    memory.add_argument("--model", default="smollm2-135m", help="what to load (default: %(default)s)")
    memory.add_argument("--random", action="store_true", help="random weights of its shape, where it is not installed")
    memory.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="lengths")
    memory.add_argument("--layer-tokens", type=int, nargs="*", default=[], help="lengths for one layer of a 7B model")
    memory.add_argument("--quantized", type=int, nargs="*", default=[4, 8], help="widths of mlx-lm's cache beside ours")
    memory.add_argument("--quantized-upto", type=int, default=16384, metavar="TOKENS", help="which a CPU reads slowly")
    memory.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    memory.set_defaults(run=measure_lengths)
    for name, theirs in MLX_LM.items():
        run = commands.add_parser(name, help=f"mlx_lm.{theirs} on a compressed cache, with its options behind ours")
        run.add_argument("model", help="smollm2-135m, a .gguf file, a folder, or a Hugging Face repo id")
        run.add_argument("--method", help="how to compress (default: turboquant)")
        run.add_argument(
            "--plan", type=Path, metavar="FILE", help="a plan that plan.save wrote, in the place of --method"
        )
        for number in NUMBERS:
            run.add_argument(f"--{number.replace('_', '-')}", type=int, metavar="N", help=NUMBERS[number])
        run.set_defaults(run=run_mlx_lm)
    return parser


def run_mlx_lm(options: argparse.Namespace) -> int:
    """Run one of mlx-lm's commands on a compressed cache."""
    from veloxlab.commands import Wanted, run

    settings = {name: getattr(options, name) for name in NUMBERS if getattr(options, name) is not None}
    run(
        options.command,
        MLX_LM[options.command],
        options.model,
        Wanted(options.plan, options.method, settings),
        options.passed_on,
    )
    return 0


def open_lab(options: argparse.Namespace) -> int:
    """Open JupyterLab on the tour notebook; this process becomes the server's."""
    if find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed; run `uv pip install jupyterlab`.")
    # an address and not the file's path: JupyterLab prints it too, for a browser on another machine
    start = f"--LabApp.default_url=/lab/tree/{TOUR}"
    arguments = [sys.executable, "-m", "jupyterlab", str(_notebooks()), start, *options.passed_on]
    if os.geteuid() == 0 and "--allow-root" not in arguments:
        print("Running as root, so JupyterLab is started with --allow-root.", file=sys.stderr)
        arguments.append("--allow-root")
    os.execv(sys.executable, arguments)


def _notebooks() -> Path:
    """Give the folder of notebooks to work in: a clone's own, or a copy of an installed package's."""
    folder = shipped_folder("notebooks")
    if not is_installed(folder):
        return folder
    COPY_FOLDER.mkdir(exist_ok=True)
    for notebook in sorted(folder.glob("*.ipynb")):
        copy = COPY_FOLDER / notebook.name
        if not copy.exists():  # a user's changes are never overwritten
            shutil.copyfile(notebook, copy)
    print(f"The notebooks are in {COPY_FOLDER.resolve()}.", file=sys.stderr)
    return COPY_FOLDER.resolve()


def compare_caches(options: argparse.Namespace) -> int:
    """Measure, print the tables, and write them as Parquet and Markdown beside a chart as PNG."""
    import veloxlab as vl
    from veloxlab.measure.compare import byte_ratios, compare
    from veloxlab.views import frontier, picture

    model, tokenizer = vl.load(options.model)
    frame = compare(
        model,
        tokenizer,
        tokens=options.tokens,
        windows=options.windows,
        progress=lambda done, total, label: print(f"{done} of {total}: {label}", file=sys.stderr),
    )
    ratios = byte_ratios()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"compare_{Path(options.model).stem}"
    frame.write_parquet(options.out / f"{stem}.parquet")
    ratios.write_parquet(options.out / "byte_ratios.parquet")
    chart = frontier(frame, x="bits")
    (options.out / f"{stem}.png").write_bytes(picture.png(chart.to_dict(), width=2 * picture.WIDTH))
    tables = f"{compared_table(frame)}\n\n{ratio_table(ratios)}\n"
    write_atomically(options.out / f"{stem}.md", tables.encode())
    print(tables, end="")
    return 0


def sweep_bits(options: argparse.Namespace) -> int:
    """Measure, print the table, and write it as Parquet and Markdown; a run that was stopped goes on."""
    import veloxlab as vl
    from veloxlab.allocate.sweep import BITS, sweep, swept_table, write_sweep

    model, tokenizer = vl.load(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"ratequant_{Path(options.model).stem}"
    unfinished = options.out / f"{stem}.unfinished.json"
    frame = sweep(
        model,
        tokenizer,
        bits=options.bits or BITS,
        by=options.by or ("gradient", "key_norm"),
        tokens=options.tokens,
        windows=options.windows,
        sequences=options.sequences,
        unfinished=unfinished,
        progress=lambda done, total, label: print(f"{done} of {total}: {label}", file=sys.stderr),
    )
    write_sweep(frame, options.out, stem)
    unfinished.unlink(missing_ok=True)
    print(swept_table(frame))
    return 0


def search_front(options: argparse.Namespace) -> int:
    """Search, print the front, and write all candidates as Parquet."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import ExitStack

    import veloxlab as vl

    try:
        protected = [() if word == "none" else tuple(map(int, word.split(","))) for word in options.protected]
    except ValueError:
        words = " ".join(options.protected)
        raise InputError(f"--protected {words} names no layers: give numbers as 0 or 0,-1, or the word none.") from None
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        executor = None
        if options.workers > 1:
            fresh = multiprocessing.get_context("spawn")  # MLX's threads do not survive a fork
            executor = stack.enter_context(ProcessPoolExecutor(options.workers, mp_context=fresh))
        result = vl.search(
            options.model,
            methods=options.methods,
            bits=options.bits,
            sinks=options.sinks,
            window=options.window,
            protected=protected,
            most_bytes_per_token=options.most_bytes,
            most_kl=options.most_kl,
            tokens=options.tokens,
            windows=options.windows,
            executor=executor,
            progress=lambda done, total, label: print(f"{done} of {total}: {label}", file=sys.stderr),
        )
    result.save(options.out / f"search_{Path(options.model).stem}.parquet")
    print(front_table(result.front))
    return 0


def front_table(frame: pl.DataFrame) -> str:
    """Give the front of a search as a Markdown table."""
    lines = ["| cache | K / V bits | sinks | window | exact layers | bytes a token | KL (nats), 95 % | top-1 flips |"]
    lines.append("|---|---|---:|---:|---|---:|---:|---:|")
    for row in frame.iter_rows(named=True):
        kl = f"{row['kl']:.4f}"
        if row["low"] is not None:
            kl += f" ({row['low']:.4f} to {row['high']:.4f})"
        cells = [f"{row['key_bits']} / {row['value_bits']}", str(row["sinks"]), str(row["window"])]
        cells += [", ".join(map(str, row["protected"])), f"{row['bytes_per_token']:,.1f}", kl]
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {100 * row['top1_flips']:.1f} % |")
    return "\n".join(lines)


def compared_table(frame: pl.DataFrame) -> str:
    """Give the comparison as a Markdown table, by true bits; attention's time in brackets, against the exact one."""
    stored, attended = ((frame[f"{name}_us"] / frame[f"{name}_ratio"])[0] for name in ("store", "attend"))
    exact_bytes = frame["fp16_bytes"][0]
    lines = [
        "| cache | true bits a value | KL (nats) | top-1 flips | perplexity | held, KB | tables, KB | store, µs "
        "| attend, µs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| exact, 16 bits | 16 | 0 | 0 % | {frame['perplexity_exact'][0]:.2f} | {exact_bytes / 1000:,.0f} | "
        f"| {stored:.2f} | {attended:,.0f} |",
    ]
    for row in frame.sort("held_bits", "name").iter_rows(named=True):
        numbers = [f"{row['held_bits']:.2f}", f"{row['kl_mean']:.4f}", f"{100 * row['top1_flips']:.1f} %"]
        numbers += [f"{row['perplexity']:.2f}", f"{row['held_bytes'] / 1000:,.0f}", f"{row['table_bytes'] / 1000:,.0f}"]
        numbers += [f"{row['store_us']:.1f}", f"{row['attend_us']:,.0f} ({row['attend_ratio']:.1f}×)"]
        lines.append(f"| {row['name']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def ratio_table(frame: pl.DataFrame) -> str:
    """Give the byte ratios as a Markdown table."""
    lines = ["| cache | keys | values | whole cache |", "|---|---:|---:|---:|"]
    for row in frame.iter_rows(named=True):
        ratios = [f"{row[name]:.2f}×" for name in ("key_ratio", "value_ratio", "ratio")]
        lines.append(f"| {row['name']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def bench_table(results: dict[str, Any], query_heads: int, kv_heads: int, head_dim: int) -> str:
    """Give the times of attention of one shape, as ``veloxlab bench`` wrote them, as a Markdown table."""
    shape = (query_heads, kv_heads, head_dim)
    rows = [r for r in results["attention"]["rows"] if (r["query_heads"], r["kv_heads"], r["head_dim"]) == shape]
    tokens = sorted({row["tokens"] for row in rows})
    lines = [f"| cache | {' | '.join(f'{n:,} tokens' for n in tokens)} |", f"|---|{'---:|' * len(tokens)}"]
    for name in dict.fromkeys(row["cache"] for row in rows):
        cells = [
            f"{row['microseconds']:.0f} µs ({row['ratio']:.2f}×)"
            for n in tokens
            for row in rows
            if (row["cache"], row["tokens"]) == (name, n)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_kernels(options: argparse.Namespace) -> int:
    """Time attention, encoding, decoding and reading, say so as they come, and write them as JSON, with the device."""
    from veloxlab.codecs import METHODS
    from veloxlab.measure import bench
    from veloxlab.measure.bench import attention

    tokens = tuple(options.tokens or attention.TOKENS)
    parts: dict[str, Callable[[], Any]] = {
        "attention": lambda: bench.decode_attention(tokens=tokens),
        "methods": lambda: bench.attention_of_methods([name for name in METHODS if name != "none"]),
        "encode": bench.encode_steps,
        "decode": lambda: bench.decode_steps(tokens=tokens),
        "read": bench.read_prompts,
    }
    written: Path | None = options.json
    kept = json.loads(written.read_text()) if options.only and written and written.exists() else {}
    for name in options.only or parts:
        rows = parts[name]()
        kept[name] = {"facts": bench.facts(), "rows": rows}
        if written:
            write_atomically(written, json.dumps(kept, indent=1).encode())
    if written and "attention" in kept:
        write_atomically(written.with_suffix(".png"), bench_picture(kept))
    return 0


def bench_picture(results: dict[str, Any]) -> bytes:
    """Draw the times of attention of the first shape that ``veloxlab bench`` wrote, as a PNG."""
    import polars as pl

    from veloxlab.views import attention_times, picture

    times = pl.DataFrame(results["attention"]["rows"])
    first = times.row(0, named=True)
    shape = ("query_heads", "kv_heads", "head_dim")
    heading = "Attention of one token: {} query heads, {} KV heads, head dimension {}".format(
        *(first[n] for n in shape)
    )
    chart = attention_times(times.filter(*(pl.col(n) == first[n] for n in shape)), heading=heading)
    return picture.png(chart.to_dict())


def measure_lengths(options: argparse.Namespace) -> int:
    """Measure what each length costs, print the tables, and write them as JSON."""
    import polars as pl

    import veloxlab as vl
    from veloxlab.measure import bench, lengths

    def say(done: int, total: int, label: str) -> None:
        print(f"{done} of {total}: {label}", file=sys.stderr)

    results: dict[str, Any] = {"facts": bench.facts()}
    jobs = {options.model: options.tokens, "one layer of 7B": options.layer_tokens}
    for name, tokens in jobs.items():
        if not tokens:
            continue
        random = options.random or name != options.model
        model = lengths.random_model(name) if random else vl.load(name)[0]
        caches = lengths.makers(model, theirs=options.quantized)
        frame = pl.concat(
            lengths.costs_by_length(
                model,
                {cache: make},
                [n for n in sorted(tokens) if n <= options.quantized_upto or not cache.startswith("mlx-lm")],
                progress=say,
            )
            for cache, make in caches.items()
        )
        results[name] = frame.to_dicts()
        print(f"{name}\n\n{lengths_table(frame)}\n")
    if options.json:
        write_atomically(options.json, json.dumps(results, indent=1).encode())
    return 0


def lengths_table(frame: pl.DataFrame) -> str:
    """Give `measure.lengths.LENGTHS` as a Markdown table."""
    lines = ["| cache | tokens | held, MB | peak in prefill, MB | peak in decoding, MB | a token, ms |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in frame.sort("tokens", maintain_order=True).iter_rows(named=True):
        names = ("held_bytes", "prefill_peak_bytes", "decode_peak_bytes")
        sizes = ["fails" if row[name] is None else f"{row[name] / 1e6:,.1f}" for name in names]
        time = "fails" if row["decode_seconds"] is None else f"{1e3 * row['decode_seconds']:.1f}"
        lines.append(f"| {row['cache']} | {row['tokens']:,} | {' | '.join(sizes)} | {time} |")
    return "\n".join(lines)


def show_checks(options: argparse.Namespace) -> int:
    """Print what the doctor found, as a table or as JSON; status 1 if a check failed."""
    from veloxlab.checkup import doctor

    checks = doctor()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
            if check.hint:
                print(f"      {'':<{width}}  -> {check.hint}")
    return int(any(check.status == "fail" for check in checks))
