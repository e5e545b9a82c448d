import base64

import numpy as np
import pytest
from PIL import Image

from dafm_ray.config import EvaluateConfig
from dafm_ray.errors import DataError
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.figures import bar_figure, read_figure, recall_figure, write_figures
from tests.samples import labelled_dataset, score_store

HOSTILE = 'a < b & "c" -> <script>'


def test_a_figure_is_an_svg_and_a_png_with_its_caption(tmp_path):
    figure = bar_figure("orders", HOSTILE, {"x": [1.0, 2.0]}, ["a", "b"], "points")
    write_figures([figure], tmp_path)
    again = read_figure(tmp_path / "figures" / "orders.svg")
    assert (again.name, again.caption, again.svg) == ("orders", HOSTILE, figure.svg)
    with Image.open(tmp_path / "figures" / "orders.png") as png:
        assert png.width > 1000
    kind, _, data = figure.uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data) == figure.svg


def test_the_same_values_give_the_same_bytes():
    ranks = {"a": np.arange(1, 50), "b": np.arange(1, 99, 2)}
    assert recall_figure(ranks, "x") == recall_figure(ranks, "x")


def test_nothing_is_written_for_no_figures(tmp_path):
    write_figures([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_figure_of_a_study_is_shown(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    write_figures([bar_figure("orders", HOSTILE, {"x": [1.0]}, ["a"], "points")], study)
    store = score_store(tmp_path / "s", labelled_dataset(20, 9))
    config = EvaluateConfig(store.uri, str(tmp_path / "out"), studies=(str(study),), cases=0)
    text = evaluate(config).report.read_text(encoding="utf-8")
    assert read_figure(study / "figures" / "orders.svg").uri in text
    assert "<script>" not in text


def test_a_folder_without_a_figure_is_refused(tmp_path):
    store = score_store(tmp_path / "s", labelled_dataset(20, 9))
    config = EvaluateConfig(store.uri, str(tmp_path / "out"), studies=(str(tmp_path),))
    with pytest.raises(DataError, match=r"there is no figure .*orders\.svg"):
        evaluate(config)
