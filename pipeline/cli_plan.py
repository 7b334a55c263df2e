"""``crosslane plan``: where the tables of a config would lie, on this machine or on one that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlrm.errors import ConfigError
from pipeline.cli_data import parse_counts
from pipeline.console import AsJson, print_fields, print_json, text_of
from pipeline.threads import settle_threads

if TYPE_CHECKING:
    from dlrm.config import RunConfig
    from embedding.links import LinkRates
    from embedding.placement import Plan
    from pipeline.manifest import TableInfo
    from pipeline.planning import Calibration

_MOST_RANKS = 1024


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML or JSON file of a run.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the machine to plan for.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that they share out among themselves.")] = 1,
    links: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="Link rates: a JSON file such as a run directory's, or a100 or h100 (of device: cuda).",
        ),
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Predict the step time on 8 to 1,024 ranks.")] = False,
    batch: Annotated[
        bool, typer.Option("--batch", help="Propose batches near the config's that waste least of the last step.")
    ] = False,
    within: Annotated[float, typer.Option(help="Of --batch: how far to look, as a share of the config's batch.")] = 0.1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Of the simulation.")] = 8,
    flops: Annotated[
        float, typer.Option(help="Of the simulation: operations of the dense part a rank does in 1 s.")
    ] = 1e14,
    rows: Annotated[
        str | None, typer.Option(metavar="R1,R2,...", help="Rows of each table, instead of the data set's manifest.")
    ] = None,
    dense: Annotated[int, typer.Option(min=0, help="Dense columns, with --rows.")] = 13,
    exponent: Annotated[
        float | None, typer.Option(help="Suppose look-ups by this power law instead of counting; --rows: 1.1.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set one field; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where tables would lie, the bytes over each link and the predicted time; trains nothing."""
    settle_threads()
    from dlrm.config import load_run_config
    from pipeline.planning import plan_tables
    from pipeline.planning import simulate as predict

    run = load_run_config(config, overrides or ())
    if batch:
        if rows is not None:
            raise ConfigError("--batch: counts the rows of the data set's splits, which --rows stands in for; drop one")
        found = batch_rows(run, ranks, within)
        if as_json:
            print_json(found)
        else:
            _print_table(
                "Waste: empty places of an epoch's steps, percent; * of the proposed batch",
                [_batches_shown(row) for row in found],
            )
        return
    if not 0 < flops < float("inf"):
        raise ConfigError(f"--flops: {flops}; must be a finite number above 0")
    tables, num_dense, calibration = _data(run, rows, dense, exponent)
    if simulate:
        rates = read_links(links or "h100")
        counts = [2**power for power in range(3, _MOST_RANKS.bit_length()) if 2**power <= run.data.batch_size]
        if not counts:
            raise ConfigError(f"data.batch_size: {run.data.batch_size} rows are fewer than 8 ranks; raise it")
        result = predict(
            run, tables, num_dense=num_dense, calibration=calibration, links=rates, ranks_per_node=ranks_per_node,
            flops=flops, ranks=counts,
        )  # fmt: skip
        print_simulation(result, f"batch {run.data.batch_size:,}, links {rates.source}", as_json=as_json)
        return
    rates = read_links(links or ("h100" if run.device == "cuda" else None))
    made = plan_tables(
        run, tables, ranks=ranks, nodes=nodes, calibration=calibration, links=rates, captured=run.device == "cuda"
    )
    print_plan(made, rates, as_json=as_json)


def batch_rows(run: RunConfig, ranks: int, within: float) -> list[dict[str, Any]]:
    """One row for training and one for every split that is evaluated: the config's batch beside the proposed one."""
    from pipeline.batch_choice import choose_batch, weigh_batch
    from pipeline.dataset import load_dataset

    splits = load_dataset(run.data.path).splits
    wanted = {"train": (run.data.batch_size, "data.batch_size", run.data.drop_last)}
    for split in (run.eval.split, run.eval.final_split):
        if split is not None:
            wanted.setdefault(split, (run.eval.batch_size, "eval.batch_size", False))
    shown = []
    for split, (wished, field, drop_last) in wanted.items():
        if split in splits and (count := splits[split].rows):
            now = weigh_batch(count, wished, ranks, drop_last=drop_last)
            best = choose_batch(count, wished, ranks, within=within, drop_last=drop_last)
            shown.append(
                {
                    "split": split, "rows": count, "field": field,
                    "batch": now.batch, "steps": now.steps, "waste_percent": 100 * now.waste,
                    "proposed": best.batch, "proposed_steps": best.steps,
                    "proposed_waste_percent": 100 * best.waste, "last_step_filled_percent": 100 * best.last_share,
                }
            )  # fmt: skip
    return shown


def _batches_shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that fit a terminal."""
    return {
        "split": row["split"],
        "rows": row["rows"],
        "batch": row["batch"],
        "steps": row["steps"],
        "waste": _short(row["waste_percent"]),
        "proposed": row["proposed"],
        "steps*": row["proposed_steps"],
        "waste*": _short(row["proposed_waste_percent"]),
    }


def print_plan(plan: Plan, links: LinkRates, *, as_json: bool) -> None:
    """Print a plan: its tables, its time, and the plans that it was chosen over."""
    summary: dict[str, Any] = {
        "ranks": plan.ranks,
        "nodes": plan.nodes,
        "all_to_all": plan.all_to_all,
        "links": links.source,
        "step_ms": None if plan.step_seconds is None else 1e3 * plan.step_seconds,
        "step_parts_ms": {name: 1e3 * seconds for name, seconds in plan.seconds},
        "mib_per_rank": float(plan.memory().max()) / 2**20,
        "reduce_start_bytes": round(plan.reduce_start_bytes),
        "alternatives_ms": {name: 1e3 * seconds for name, seconds in plan.alternatives},
    }
    if as_json:
        print_json({**summary, "tables": plan.describe(), "link_rates": links.to_values()})
        return
    _print_table("MiB a rank, MB a step inside nodes and between", [_shown(row) for row in plan.describe()])
    named = {name.replace("mib", "MiB"): value for name, value in summary.items()}
    print_fields("Predicted, without the dense part", named, as_json=False)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that fit a terminal (MiB a rank, MB a step inside nodes and between); ``--json`` has all."""
    return {
        "table": row["table"],
        "rows": row["rows"],
        "placement": row["placement"].replace(" de-duplicated", " dedup"),
        "frequent": row["frequent_rows"],
        "share": _short(row["frequent_share"]),
        "rank": str(row["rank"]),
        "MiB": _short(row["mib_per_rank"]),
        "MB in": _short(row["inside_bytes"] / 1e6),
        "MB out": _short(row["across_bytes"] / 1e6),
    }


def print_simulation(rows: list[dict[str, Any]], what: str, *, as_json: bool) -> None:
    """Print what ``planning.simulate`` found."""
    if as_json:
        print_json(rows)
        return
    title = f"Predicted milliseconds of a step, {what};\nMB between nodes and MiB of tables: a rank"
    _print_table(title, [_step_shown(row) for row in rows])


def _step_shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a simulated step that fit a terminal; ``--json`` has all.

    Lanes: the longer of the two, as if they overlapped fully.
    """
    times = {
        "send": sum(row[f"{part}_ms"] for part in ("keys", "vectors", "gradients", "all_reduce")),
        "work": row["work_ms"],
        "dense": row["dense_ms"] + row["dense_all_reduce_ms"],
        "step": row["step_ms"],
        "lanes": row["overlapped_ms"],
    }
    return {
        "ranks": row["ranks"],
        "nodes": row["nodes"],
        "by": "pair" if row["all_to_all"] == "flat" else "node",
        **{name: _short(value) if value >= 1 else round(value, 3) for name, value in times.items()},
        "M/s": _short(row["samples_per_s"] / 1e6),
        "MB out": _short(row["across_mb_per_rank"]),
        "MiB": _short(row["memory_mib_per_rank"]),
    }


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """A narrow table: numbers to the right, nothing folded inside a word where the terminal is wide enough."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, value in (rows[0] if rows else {}).items():
        text = isinstance(value, str)
        table.add_column(
            name, justify="left" if text else "right", no_wrap=name in ("placement", "rows", "batch", "proposed")
        )
    for row in rows:
        table.add_row(*(text_of(value) for value in row.values()))
    Console().print(table)


def _short(value: float) -> float:
    """Three digits, so that all columns fit 80 characters."""
    return float(f"{value:.3g}")


def read_links(text: str | None) -> LinkRates:
    """Rates by name or from a JSON file; ``None``: what is supposed of any machine.

    Raises:
        ConfigError: it is neither.
    """
    import json

    from embedding.links import DEFAULT, PUBLISHED, rates_from_values

    if text is None:
        return DEFAULT
    if text in PUBLISHED:
        return PUBLISHED[text]
    try:
        values = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(PUBLISHED)
        raise ConfigError(f"--links {text}: {error.strerror or error}; name a JSON file or one of {names}") from None
    except ValueError:
        raise ConfigError(f"--links {text}: not JSON; name a file with link rates") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--links {text}: holds {type(values).__name__}, but must hold an object with link rates")
    return rates_from_values(values)


def _data(
    run: RunConfig, rows: str | None, dense: int, exponent: float | None
) -> tuple[tuple[TableInfo, ...], int, Calibration]:
    """The tables, the dense columns, and what is known of the rows."""
    from pipeline.dataset import load_dataset
    from pipeline.manifest import TableInfo
    from pipeline.planning import calibrate, supposed

    if exponent is not None and not 0 <= exponent <= 10:
        raise ConfigError(f"--exponent: {exponent}; must lie in 0 .. 10")
    if rows is not None:
        counts = parse_counts("--rows", rows)
        if min(counts) < 1:
            raise ConfigError(f"--rows: {min(counts)} rows; every table has at least 1")
        tables = tuple(TableInfo(name=f"C{number}", rows=count) for number, count in enumerate(counts, 1))
        return tables, dense, supposed(tables, 1.1 if exponent is None else exponent)
    dataset = load_dataset(run.data.path)
    if exponent is not None:
        return dataset.tables, dataset.num_dense, supposed(dataset.tables, exponent)
    return dataset.tables, dataset.num_dense, calibrate(run, dataset)
