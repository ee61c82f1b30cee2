"""``vllm-dspark simulate`` as a user meets it."""

import json

import pytest
from typer.testing import CliRunner

from vllm_dspark.cli import app
from vllm_dspark.verification import library, traces


@pytest.fixture(name="invoke")
def _invoke():
    return lambda *arguments: CliRunner().invoke(app, ["simulate", *arguments])


SMALL = ("--concurrency", "1,4", "--requests", "8", "--tokens", "60", "--drafts", "1,7")


def test_figures_and_plot(invoke, tmp_path):
    figures, plot = tmp_path / "out.json", tmp_path / "out.png"
    pytest.importorskip("matplotlib")
    done = invoke(*SMALL, "--json", str(figures), "--plot", str(plot))
    assert done.exit_code == 0, done.output
    points = json.loads(figures.read_text())["points"]
    assert [(p["concurrency"], p["arm"]) for p in points] == [
        (users, arm) for users in (1, 4) for arm in ("off", "fixed 1", "fixed 7", "adaptive")
    ]
    by_arm = {p["arm"]: p for p in points if p["concurrency"] == 1}
    assert by_arm["adaptive"]["throughput"] > 1.2 * by_arm["off"]["throughput"]
    assert by_arm["off"]["drafted"] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_running_ahead_of_the_device(invoke, tmp_path):
    for name, arguments in (("ahead", ["--ahead"]), ("not", [])):
        done = invoke(*SMALL, *arguments, "--json", str(tmp_path / name))
        assert done.exit_code == 0, done.output
    ahead, usual = (json.loads((tmp_path / name).read_text()) for name in ("ahead", "not"))
    assert ahead["ahead"]
    assert ahead["points"] != usual["points"]
    for one, other in zip(ahead["points"], usual["points"], strict=True):
        if one["arm"] != "adaptive":
            assert one["throughput"] == pytest.approx(other["throughput"], rel=0.02), one["arm"]


def test_recorded_trace(invoke, tmp_path):
    path = tmp_path / "trace.json"
    traces.synthetic(4, ["records"], tokens=40, seed=1).save(path)
    done = invoke("--concurrency", "2", "--drafts", "7", "--trace", str(path))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--table", "nowhere"),
        ("--domains", "poetry"),
        ("--concurrency", "0"),
        ("--concurrency", "many"),
        ("--context", "9,3"),
        ("--trace", "nowhere.json"),
    ],
)
def test_bad_values_are_named(invoke, arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert arguments[1] in done.output.replace("\n", " ") or arguments[0] in done.output


def test_every_shipped_table_loads_and_says_what_it_is():
    assert library.names()
    for name in library.names():
        assert name.endswith("synthetic") == library.table(name).label.startswith("synthetic")
