import numpy as np

from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.fusion.rank import scores_of
from dafm_ray.report.audits.ties import audit_ties
from tests.samples import labelled_dataset, matrix_store, score_matrix, score_store


def coarse_store(root):
    """Whole numbers, so that many scores are equal."""
    dataset = labelled_dataset(60, 80)
    return matrix_store(root, dataset, {"test:a@random": np.round(score_matrix(dataset, 0, 1.5))})


def test_what_ties_decide(tmp_path):
    store = coarse_store(tmp_path / "s")
    found = audit_ties(store)
    name, tied, undecided, worst, stored, best, expected = found.table.rows[0]
    rows = np.arange(80)
    targets = columns_of([query.targets for query in store.queries], store.positions)
    ranks = rank_targets(scores_of(store, rows)[0], targets)
    assert name == "a"
    assert int(tied) == (ranks.tied_others > 0).sum() > 20
    assert int(best) - int(worst) == int(undecided) > 5
    assert int(worst) <= int(stored) <= int(best)
    assert int(worst) <= float(expected) <= int(best)
    assert f"ties decide up to {undecided} of 80 hits" in found.notes[0]


def test_distinct_scores_are_not_tied(tmp_path):
    found = audit_ties(score_store(tmp_path / "s", labelled_dataset(30, 20)))
    assert {row[1:3] for row in found.table.rows} == {("0", "0")}
