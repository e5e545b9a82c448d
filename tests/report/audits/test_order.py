from dataclasses import replace

import pytest

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.report.audits.order import SORTED, SOURCE, audit_order
from tests.samples import labelled_dataset, matrix_store, score_matrix


def test_the_leak_of_cirr(reference_material):
    """Figures counted independently from the same files."""
    named = DatasetConfig("", "val", annotations=str(reference_material / "data" / "cirr"))
    found = audit_order("cirr", named)
    shares = {name: cells[:4] for name, *cells in found.table.rows}
    assert shares[SOURCE] == ["16.89", "47.24", "62.64", "67.23"]
    assert shares[SORTED] == ["3.30", "13.49", "18.92", "20.52"]
    assert max(map(float, shares["stored order (hash)"])) < 2.5
    assert "the order of its files leaks" in found.notes[0]


@pytest.mark.parametrize("category", ["dress", "shirt", "toptee"])
def test_fashioniq_does_not_leak_by_its_files_but_sorted(reference_material, category):
    annotations = str(reference_material / "data" / "fashioniq")
    named = DatasetConfig("", "val", annotations=annotations, category=category)
    found = audit_order("fashioniq", named)
    assert "gives no target away" in found.notes[0]
    assert "Sorted by id" in found.notes[1]
    assert found.details[SOURCE]["p"] > 0.05


def test_a_store_remembers_the_order_of_its_files(reference_material, tmp_path, capsys):
    scores = reference_material / "scores" / "cirr_val"
    store = str(tmp_path / "s")
    assert main(["tiles", "ingest", str(scores), "--out", store]) == 0
    capsys.readouterr()
    assert main(["audit", "order", store]) == 0
    assert "16.89 | 47.24 | 62.64 | 67.23" in capsys.readouterr().out


def test_what_is_neither_store_nor_data_set_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'cirr'"):
        audit_order("cir", DatasetConfig(""))
    with pytest.raises(DataError, match="nowhere"):
        audit_order(str(tmp_path / "nowhere"), DatasetConfig(""))


def test_queries_without_targets_have_nothing_to_give_away(tmp_path):
    dataset = labelled_dataset(20, 5)
    matrices = {"test:a@random": score_matrix(dataset, 0)}
    bare = replace(dataset, queries=tuple(replace(q, targets=()) for q in dataset.queries))
    store = matrix_store(tmp_path / "s", bare, matrices)
    with pytest.raises(DataError, match="nothing can be found"):
        audit_order(store.uri, DatasetConfig(""))
