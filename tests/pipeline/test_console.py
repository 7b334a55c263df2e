"""What commands print: text comes out as it went in, whatever brackets it holds."""

import io

from rich.console import Console

from pipeline.console import RunProgress, print_fields, print_rows

NAME = "[bold]weights [out, in][/wrong]"


def test_brackets_in_names_and_errors_are_printed_as_they_are(capsys):
    print_fields(NAME, {"error": f"{NAME} differ"}, as_json=False)
    print_rows(NAME, [{"name": NAME}], as_json=False)
    printed = capsys.readouterr().out
    assert printed.count(NAME) == 4, printed


def test_a_runs_name_with_brackets_is_shown_on_a_terminal_and_elsewhere():
    for terminal in (True, False):
        shown = io.StringIO()
        with RunProgress(Console(file=shown, width=200, force_terminal=terminal, color_system=None)) as view:
            view.feed({"type": "start", "run": NAME, "steps": 10, "step": 0, "ranks": 1, "threads": 1})
            view.feed({"type": "step", "step": 3, "samples_per_s": 1.0, "loss": 0.5})
            view.feed({"type": "eval", "step": 3, "split": NAME, "metrics": {"auc": 0.5, "log_loss": 0.7}})
            view.feed({"type": "end", "step": 3, "reason": "stopped"})
        text = shown.getvalue()
        assert f"{NAME}: 10 steps" in text
        assert f"on {NAME}: AUC 0.5" in text
        assert f"{NAME}: stopped at step 3" in text


def test_an_empty_list_still_says_so(capsys):
    print_rows("0 of 0 jobs", [], as_json=False)
    assert capsys.readouterr().out == "0 of 0 jobs\n"


def test_numbers_of_a_wide_table_stay_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{f"column {n}": f"{10**n:,}" for n in range(12)}]
    print_rows("wide", rows, as_json=False, folds=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if "100,000,000,000" in line)
    assert all(value in line for value in rows[0].values())
