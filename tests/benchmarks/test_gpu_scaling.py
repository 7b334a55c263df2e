"""``benchmarks/gpu_scaling.py``: what it would run, what it leaves out, and what it makes of figures."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Any:
    """The program, its report and what it shares with ``gpu_train.py``."""
    kept = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("gpu_scaling", "gpu_scaling_report", "gpu_train", "gpu_runs")
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = kept


def scaling_of(modules: Any, folder: Path, memory: int, *arguments: str) -> Any:
    options = modules.gpu_scaling.parse(list(arguments))
    gpus = modules.gpu_scaling.Gpus(count=max(options.counts), memory_bytes=memory)
    return modules.gpu_scaling.Scaling(options, gpus, folder)


def figure(modules: Any, rng: np.random.Generator, section: str, batch: int, count: int, **details: Any) -> Any:
    stages = {
        stage: float(rng.uniform(0.1, 2)) for members in modules.gpu_scaling_report.GROUPS.values() for stage in members
    }
    details = {"stages_ms": stages, "plan": {"label": "26 row_wise", "predicted_ms": 0.75}, **details}
    return asdict(
        modules.gpu_train.Figure(
            section=section, form=f"{section} form", batch=batch, exponent=1.1, gpus=count, details=details,
            samples_per_s=float(rng.uniform(1e6, 1e8)),
        )
    )  # fmt: skip


def test_counts_are_powers_of_two_and_all(modules: Any, rng: np.random.Generator) -> None:
    assert modules.gpu_scaling.default_counts(0) == []
    assert modules.gpu_scaling.default_counts(6) == [1, 2, 4, 6]
    most = int(rng.integers(1, 1000))
    counts = modules.gpu_scaling.default_counts(most)
    assert counts[0] == 1
    assert counts[-1] == most
    assert all(left < right <= 2 * left for left, right in itertools.pairwise(counts))


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_every_section_is_measured_on_every_count_it_is_for(modules: Any, tmp_path: Path, most: int) -> None:
    counts = modules.gpu_scaling.default_counts(most)
    scaling = scaling_of(modules, tmp_path, 0, "--device", "cpu", "--counts", *map(str, counts))
    jobs = list(modules.gpu_scaling.jobs_of(scaling))
    found = [(job.section, job.gpus, job.cases[0][0], job.form) for job in jobs]
    assert len(set(found)) == len(found)
    batches = scaling.options.batches
    weak = {(gpus, batch) for section, gpus, batch, _ in found if section == "weak"}
    assert weak == {(count, batch) for count in counts for batch in batches}
    assert {gpus for section, gpus, *_ in found if section == "auc"} == set(counts)
    assert [gpus for section, gpus, *_ in found if section == "mlperf"] == [most]
    assert [form for section, *_, form in found if section == "eval"] == ["overlapped", "sequential"]
    by_node = [form for section, *_, form in found if section == "plans" and "hierarchical" in form]
    assert [form[-5:] for form in by_node] == {1: [], 2: [], 4: ["2 x 2"], 8: ["2 x 4", "4 x 2"]}[most]


def test_configs_are_the_products_own(modules: Any, tmp_path: Path) -> None:
    from dlrm.config import parse_run_config

    config_of = modules.gpu_scaling.Scaling.config
    for device in ("cuda", "cpu"):
        scaling = scaling_of(modules, tmp_path / device, 0, "--device", device, "--counts", "1", "8")
        batch = 8 * scaling.options.batches[0]
        config = parse_run_config(config_of(scaling, scaling.data(cap=1000), batch, 8))
        assert config.data.batch_size == batch
        assert config.precision == ("fp16" if device == "cuda" else "fp32")
        # The traced steps lie in windows that are not counted.
        first = modules.gpu_runs.LEFT_OUT_WINDOWS * config.train.progress_every
        assert max(config.trace.steps) < first
        for name, embedding in modules.gpu_scaling.plan_forms(8).items():
            values = config_of(scaling, scaling.data(), batch, 8)
            values["embedding"] |= embedding
            assert parse_run_config(values).embedding.nodes == embedding.get("nodes"), name


def test_tables_are_as_wide_as_they_fit(modules: Any, tmp_path: Path) -> None:
    """187.8 M rows x 128 are 96 GB in float32."""
    gib = 1 << 30
    found = {}
    for count in (1, 2, 8):
        scaling = scaling_of(modules, tmp_path, 80 * gib, "--counts", "8")
        found[count] = scaling.table_precision(count)
    assert found == {1: "fp16", 2: "fp32", 8: "fp32"}
    with pytest.raises(RuntimeError, match=r"48 GB of float16 tables do not fit 1 GPU"):
        scaling_of(modules, tmp_path, 40 * gib, "--counts", "8").table_precision(1)


def test_what_the_budget_leaves_out_is_named(modules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = scaling_of(modules, tmp_path, 0, "--device", "cpu", "--counts", "1", "4", "--estimate", "100")
    jobs = list(modules.gpu_scaling.jobs_of(scaling))
    values = [asdict(figure) for figure in modules.gpu_train.run_jobs(jobs, 99.0, lambda _: None)]
    assert len(values) == len(jobs)
    lines = list(modules.gpu_scaling_report.left_out(values))
    assert len(lines) == len(jobs)
    assert all("left out: 9" in line for line in lines)
    about = {"gpus": ["none"], "cores": 2, "date": "today", "command": "c", "rows": 1, "windows": 3, "device": "cpu"}
    modules.gpu_scaling_report.print_report(about, values)
    printed = capsys.readouterr().out
    for line in lines:
        assert line in printed


def test_the_report_computes_shares_sums_and_predictions(modules: Any, rng: np.random.Generator) -> None:
    report = modules.gpu_scaling_report
    one, eight = figure(modules, rng, "weak", 65_536, 1), figure(modules, rng, "weak", 65_536, 8)
    alone = figure(modules, rng, "weak", 6_912, 8)
    share = eight["samples_per_s"] / 8 / one["samples_per_s"]
    figures = [eight, one, alone, figure(modules, rng, "plans", 65_536, 8), figure(modules, rng, "mlperf", 6_912, 8)]
    assert report.share_of_one(figures, eight) == pytest.approx(share)
    assert report.share_of_one(figures, alone) is None
    stages = one["details"]["stages_ms"]
    dense = sum(stages[stage] for stage in report.GROUPS["dense"])
    assert report.groups_ms(one)["dense"] == pytest.approx(dense)
    assert sum(report.groups_ms(one).values()) == pytest.approx(sum(stages.values()))
    assert report.predicted_ms(figures, figures[3]) == (0.75, pytest.approx(0.75 + dense))
    about = {"gpus": ["A GPU"], "cores": 2, "date": "today", "command": "c", "rows": 1, "windows": 3, "device": "cuda"}
    text = report.markdown(about, figures)
    assert (
        f"| 8 | 65,536 | {eight['samples_per_s'] / 1e6:,.2f} | {eight['samples_per_s'] / 8e6:,.2f} | {share:.1%}"
        in text
    )
    assert f"8 GPUs at 65,536 a GPU: {share:.1%} of one GPU's rate, aim 90%" in text
    assert f"global batch 55,296: {figures[4]['samples_per_s'] / 1e6:.1f} M samples/s, aim 70" in text
    assert "64.40" in text
    on_cpu = report.markdown({**about, "device": "cpu"}, figures)
    assert "HugeCTR" not in on_cpu
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.count(" | ") >= 2


def test_the_picture_is_an_svg_with_every_rate(modules: Any, rng: np.random.Generator) -> None:
    about = {"device": "cuda"}
    figures = [figure(modules, rng, "weak", batch, count) for batch in (65_536, 6_912) for count in (1, 2, 4, 8)]
    svg = ET.fromstring(modules.gpu_scaling_report.picture(about, figures))  # noqa: S314  made here
    assert svg.tag.endswith("}svg")
    hints = [element.text for element in svg.iter() if element.tag.endswith("}title")]
    for each in figures:
        assert f"{each['gpus']}: {each['samples_per_s'] / 1e6:.1f} M samples/s" in hints
    assert modules.gpu_scaling_report.picture(about, [figures[0], figures[4]]) == ""


def test_stage_times_are_medians_of_the_windows_that_count(modules: Any, rng: np.random.Generator) -> None:
    times = rng.uniform(1, 2, 7)
    records = [{"type": "step", "stages_ms": {"lookup": float(ms)}} for ms in times]
    left_out = modules.gpu_runs.LEFT_OUT_WINDOWS
    assert modules.gpu_runs.stages_of(records) == {"lookup": pytest.approx(np.median(times[left_out:]))}
    # A GPU times the steps of a trace alone.
    traced = [records[0], *({"type": "step", "stages_ms": {}} for _ in range(6))]
    assert modules.gpu_runs.stages_of(traced) == {"lookup": pytest.approx(times[0])}
    assert modules.gpu_runs.stages_of([{"type": "start"}]) == {}


def test_a_failure_is_told_by_the_engines_own_line(modules: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\nerror: device: no GPU\nMPI_ABORT was invoked\n  Errorcode: 4\n")
    assert modules.gpu_runs.last_line(log) == "error: device: no GPU"
    log.write_text("one\nRuntimeError: CUDA out of memory\nbye\n")
    assert modules.gpu_runs.last_line(log) == "RuntimeError: CUDA out of memory"
    log.write_text("\n")
    assert modules.gpu_runs.last_line(log) == "it said nothing"
