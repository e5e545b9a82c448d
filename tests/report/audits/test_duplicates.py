import json
from dataclasses import replace

from dafm_ray.cli import main
from dafm_ray.report.audits.duplicates import audit_duplicates
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, matrix_store, score_matrix


def twin_store(root, grid=Grid(4, 5, 7)):  # noqa: B008
    """Under both models the first query's target and another candidate score alike, and the first
    query is asked again for another target.
    """
    dataset = labelled_dataset(30, 12)
    first, *others = dataset.queries
    again = replace(first, id="again", targets=(others[0].reference,))
    dataset = replace(dataset, queries=(first, *others[:-1], again))
    target = dataset.gallery.position(first.targets[0])
    twin = next(
        n for n in range(30) if dataset.gallery.ids[n] not in (first.reference, *first.targets)
    )
    matrices = {f"test:{name}@random": score_matrix(dataset, m) for m, name in enumerate("ab")}
    for scores_QN in matrices.values():
        scores_QN[:, twin] = scores_QN[:, target]
    store = matrix_store(root, dataset, matrices, grid)
    return store, {dataset.gallery.ids[target], dataset.gallery.ids[twin]}


def test_twins_and_the_queries_they_decide(tmp_path):
    store, alike = twin_store(tmp_path / "s")
    found = audit_duplicates(store)
    [twins] = found.details["candidates with a twin"]
    assert set(twins) == alike
    unfair = {id for [id] in found.details["queries whose target has a twin that is no target"]}
    expected = {
        query.id
        for query in store.queries
        if set(query.targets) & alike and alike - set(query.targets) - set(query.excluded)
    }
    assert unfair == expected
    assert len(unfair) > 0


def test_the_tiles_do_not_matter(tmp_path):
    one, _ = twin_store(tmp_path / "one")
    other, _ = twin_store(tmp_path / "other", Grid(12, 30, 30))
    assert audit_duplicates(one).details == audit_duplicates(other).details


def test_queries_asked_twice_by_command(tmp_path, capsys):
    store, _ = twin_store(tmp_path / "s")
    file = tmp_path / "found" / "twins.json"
    assert main(["audit", "duplicates", store.uri, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    [same] = found["queries asked more than once"]
    assert "again" in same
    assert found["of these, with other targets"] == [same]
    assert " = ".join(same) in capsys.readouterr().out
