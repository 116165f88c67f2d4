from __future__ import annotations

import csv
import json
import math
import re

import pytest

from lightning_qlora.cli import main
from lightning_qlora.tools.plot import plot
from lightning_qlora.tools.plotting.curves import draw_panel, smooth, thin_out
from lightning_qlora.tools.plotting.panels import arrange, format_value
from lightning_qlora.tools.plotting.reading import Series, read_run, read_runs
from lightning_qlora.tools.plotting.terminal import sparkline


def write_metrics(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for row in rows for name in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def training(start=0, end=100, every=10, scale=1.0):
    rows = [
        {
            "step": step,
            "epoch": 0,
            "train_loss": scale * math.exp(-step / 50),
            "learning_rate": 1e-3 * (1 - step / 200),
            "gradient_norm": 1.0 + step % 3,
            "tokens_per_second": 1000 + step,
            "peak_memory_gib": 2.5,
        }
        for step in range(start, end, every)
    ]
    return [*rows, {"step": end - 1, "epoch": 0, "val_loss": 0.5 * scale, "val_perplexity": 1.6}]


def write_answers(folder, step, after):
    row = {
        "id": "q1",
        "messages": [{"role": "user", "content": "Where is my <script>bread bin</script>?"}],
        "reference": "Here.",
        "before": {"answer": "No idea."},
        "after": {"answer": after},
    }
    (folder / "answers").mkdir(exist_ok=True)
    (folder / "answers" / f"step_{step}.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    folder = write_metrics(tmp_path / "run" / "logs" / "version_0", training())
    write_answers(folder, 50, "Perhaps.")
    write_answers(folder, 100, "Here.")
    return tmp_path / "run"


def test_a_run_is_found_by_any_folder_above_its_metrics(run):
    files = {read_run(str(run / place)).files for place in ("", "logs", "logs/version_0", "logs/version_0/metrics.csv")}
    assert files == {(run / "logs" / "version_0" / "metrics.csv",)}
    found = read_run(str(run))
    assert found.series["train_loss"].steps == list(range(0, 100, 10))
    assert found.series["val_loss"].values == [0.5]
    assert [answers.step for answers in found.answers] == [50, 100]


def test_answers_may_hold_any_line_separator(run):
    folder, texts = run / "logs" / "version_0", ["one\u2028two", "one\u2029two", "one\x85two"]
    for step, text in enumerate(texts):
        write_answers(folder, step, text)
    assert [answers.rows[0]["after"]["answer"] for answers in read_run(str(run)).answers[: len(texts)]] == texts


def test_a_resumed_run_goes_on_where_it_was_interrupted(run):
    write_metrics(run / "logs" / "version_10", training(60, 140, scale=2.0))
    write_metrics(run / "logs" / "version_9", training(40, 80, scale=3.0))

    found = read_run(str(run))

    loss = found.series["train_loss"]
    assert loss.steps == list(range(0, 140, 10))
    assert found.resumed == (40, 60)
    assert [round(v / math.exp(-s / 50)) for s, v in zip(loss.steps, loss.values, strict=True)] == (
        [1] * 4 + [3] * 2 + [2] * 8
    )


def test_an_evaluation_in_the_same_folder_does_not_replace_the_run(run):
    write_metrics(run / "logs" / "version_1", [{"step": 0, "val_loss": 7.0, "epoch": 0}])
    assert read_run(str(run)).series["val_loss"].values == [0.5]


def test_a_new_run_in_the_same_folder_replaces_the_old_one(run):
    write_metrics(run / "logs" / "version_1", training(scale=4.0))
    found = read_run(str(run))
    assert found.series["train_loss"].values[0] == 4.0
    assert found.resumed == ()


def test_a_file_that_is_still_being_written_is_read(run):
    file = run / "logs" / "version_0" / "metrics.csv"
    file.write_text(file.read_text() + "0,1e")
    assert len(read_run(str(run)).series["train_loss"].steps) == 10


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_that_are_not_finite_are_counted_and_said(tmp_path, value, capsys):
    rows = training()
    rows[4]["train_loss"] = value
    folder = write_metrics(tmp_path / "run", rows)

    plot([str(folder)], html=str(tmp_path / "page.html"))

    assert read_run(str(folder)).series["train_loss"].num_nonfinite == 1
    assert "1 not finite" in capsys.readouterr().out
    assert "train_loss of run: 1 values are NaN or infinite" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", r"holds no metrics\.csv"), ("empty", "no logged values"), ("", "several runs: .*empty.*run")],
)
def test_what_is_no_run_is_refused_by_name(run, place, message):
    write_metrics(run.parent / "empty" / "logs" / "version_0", [{"step": "", "train_loss": ""}])
    with pytest.raises(ValueError, match=message):
        read_run(str(run.parent / place))


def test_runs_are_named_by_what_differs(run, tmp_path):
    write_metrics(tmp_path / "other" / "logs" / "version_0", training())
    assert [r.name for r in read_runs([str(run), str(tmp_path / "other")])] == ["run", "other"]
    assert [r.name for r in read_runs([f"{run}/logs", f"{tmp_path}/other/logs"])] == ["run/logs", "other/logs"]
    assert [r.name for r in read_runs([str(run), str(run)])] == ["run (1)", "run (2)"]
    with pytest.raises(ValueError, match="No run is named"):
        read_runs([])


def test_metrics_of_one_kind_share_a_panel(tmp_path):
    once = {"step": 5, "val_loss": 1, "test_loss": 2, "train_loss": 3, "lr-AdamW": 4, "val_rewards/margin": 5}
    answers = {"answers_exact": 0.5, "answers_exact_base": 0.1, "some_base": 1}
    panels = {p.name: p for p in arrange([read_run(str(write_metrics(tmp_path, [once | answers])))])}

    assert {line.metric: line.style for line in panels["loss"].lines} == {
        "train_loss": "plain",
        "val_loss": "dashed",
        "test_loss": "dotted",
    }
    assert [line.metric for line in panels["learning_rate"].lines] == ["lr-AdamW"]
    assert {line.metric for line in panels["answers_exact"].lines} == {"answers_exact", "answers_exact_base"}
    assert [*panels][:2] == ["loss", "learning_rate"]
    assert {"rewards/margin", "some_base"} <= panels.keys()
    assert (panels["loss"].best, panels["answers_exact"].best, panels["learning_rate"].best) == (
        "lowest",
        "highest",
        None,
    )


def test_only_some_metrics(run, capsys):
    plot([str(run)], metrics=["loss", "norm"])
    shown = capsys.readouterr().out
    assert "train_loss" in shown
    assert "gradient_norm" in shown
    assert "learning_rate" not in shown
    with pytest.raises(ValueError, match=r"No metric contains nothing\. There are: gradient_norm, learning_rate"):
        plot([str(run)], metrics=["nothing"])


def test_a_sparkline_has_the_shape_of_the_curve():
    assert sparkline(Series([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0])) == "▁▃▆█"
    assert sparkline(Series([0, 1, 9], [1.0, 1.0, 1.0]), 3) == "▅ ▅"
    assert sparkline(Series([5], [1.0])) == sparkline(Series()) == ""
    assert len(sparkline(Series(list(range(1000)), [float(i % 7) for i in range(1000)]))) == 32


def test_thinning_keeps_every_spike():
    values = [1.0] * 5000
    values[1234], values[4321] = 99.0, -5.0
    points = thin_out(Series(list(range(5000)), values), 400)
    assert len(points) <= 400
    assert {(1234, 99.0), (4321, -5.0)} <= set(points)
    assert [step for step, _ in points] == sorted(step for step, _ in points)


def test_smoothing_keeps_a_constant_and_begins_at_the_first_value():
    assert smooth(Series(list(range(100)), [3.0] * 100)).values == pytest.approx([3.0] * 100)
    assert smooth(Series(list(range(100)), [float(i) for i in range(100)])).values[0] == 0.0


@pytest.mark.parametrize(
    "values", [[0.0] * 5, [1e-5, 1.0, 1e5], [-3.0, 4.0], [7.0, 7.0], [1e-300, 1e300], [0.0, 1e-9], [5e5, 5e5 + 1]]
)
def test_any_values_can_be_drawn_inside_the_picture(values, tmp_path):
    rows = [{"step": i * 3, "train_loss": value} for i, value in enumerate(values)]
    (panel,) = arrange([read_run(str(write_metrics(tmp_path, rows)))])

    svg = str(draw_panel(panel, ["a <b> run"]))

    assert "<b>" not in svg
    places = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg)]
    assert len(places) == len(values)
    assert all(62 <= x <= 526 and 12 <= y <= 212.1 for x, y in places)
    marks = [float(y) for y in re.findall(r'<line class="grid"[^>]*y1="([\d.-]+)"', svg)]
    assert 1 <= len(marks) <= 9
    assert all(11.9 <= y <= 212.1 for y in marks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.23456, "1.235"), (12345.6, "12,346"), (2e-4, "2.00e-4"), (3e7, "3.00e+7"), (-0.5, "-0.5")],
)
def test_values_are_short(value, text):
    assert format_value(value) == text


def test_the_page_holds_curves_and_answers_and_no_foreign_markup(run, tmp_path):
    plot([str(run)], html=str(tmp_path / "pages" / "page.html"))

    page = (tmp_path / "pages" / "page.html").read_text()

    assert page.count("<svg") == 5
    assert "Logged once" in page
    assert "val_perplexity" in page
    assert "<script>bread" not in page
    assert "&lt;script&gt;bread bin" in page
    assert page.index("No idea.") < page.index("Perhaps.") < page.rindex("Here.")
    assert not re.search(r'(src|href)="(?!#)', page)


def test_the_command_takes_runs_as_words(run, tmp_path, capsys):
    write_metrics(tmp_path / "other" / "logs" / "version_0", training(scale=3.0))

    code = main(["plot", str(run), str(tmp_path / "other"), f"--html={tmp_path}/p.html", "--json"])

    assert code == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], second["name"]) == ("run", "other")
    assert second["series"]["train_loss"]["values"][0] == 3.0
    assert "train_loss of other" in (tmp_path / "p.html").read_text()


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 1
    assert "holds no metrics.csv" in capsys.readouterr().err
