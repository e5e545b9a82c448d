import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig, ModelConfig, PrecomputeConfig
from dafm_ray.tiles.precompute import precompute
from tests.samples import image_folder, labelled_dataset, score_store

HEAVY = ("torch", "ray", "numpy", "pyarrow", "pandas", "pydantic")


def test_help_answers_without_heavy_imports():
    code = (
        "import sys\n"
        "from dafm_ray.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "precompute" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "dafm_ray", "models", "list"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "clip4cir" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["evaluate"], ["precompute"]])
def test_wrong_usage_ends_with_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_info_verify_and_evaluate_a_store(tmp_path, capsys):
    store = score_store(tmp_path / "s", labelled_dataset(23, 17))
    assert main(["tiles", "info", store.uri]) == 0
    assert "a: 16 of 16 tiles" in capsys.readouterr().out
    assert main(["tiles", "verify", store.uri]) == 0
    assert "every checksum holds" in capsys.readouterr().out
    out = str(tmp_path / "out")
    assert main(["evaluate", store.uri, "--out", out, "--fusion", "mean", "rrf"]) == 0
    printed = capsys.readouterr().out
    assert "| rrf " in printed
    assert "report.html" in printed


def test_models_are_compared_with_chance_and_their_starts(tmp_path, capsys):
    store = score_store(tmp_path / "s", labelled_dataset(23, 17), ("a", "b", "c"))
    job = ["evaluate", store.uri, "--out", str(tmp_path / "out"), "--cases", "0"]
    job += ["--fusion", "mean", "--start"]
    assert main([*job, "b=a", "c=a", "--chance"]) == 0
    assert "its start a at R@10" in capsys.readouterr().out
    for wrong, message in (
        (["b"], "write NAME=START"),
        (["=a"], "write NAME=START"),
        (["b=d"], "there is no model of the store 'd'"),
        (["mean@zscore=a"], "there is no model of the store 'mean@zscore'"),
        (["b=b"], "'b' is its own start (b from b)"),
        (["b=a", "a=b"], "'b' is its own start (b from a from b)"),
        (["b=a", "b=c"], "'b' has two starts, a and c"),
    ):
        assert main([*job, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_store_ends_with_3(tmp_path, capsys):
    store = score_store(tmp_path / "s", labelled_dataset(23, 17))
    tile = next((tmp_path / "s" / "scores").rglob("*.arrow"))
    data = bytearray(tile.read_bytes())
    data[-300] ^= 1
    tile.write_bytes(data)
    assert main(["tiles", "verify", store.uri]) == 3
    captured = capsys.readouterr()
    assert ": damaged" in captured.out
    assert "error: 1 of" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("dataset.name=icosn", 2, "did you mean 'icons'"),
        ("dataset.split=dev", 2, "there is no split of icons 'dev'"),
        ("models.0.id=clip5cir:sum@random", 2, "no model family 'clip5cir'"),
        ("models.0.id=clip4cir:sum@nowhere.pt", 3, "no weights file nowhere.pt"),
        ("encode_blok=2", 2, "did you mean 'encode_block'"),
    ],
)
def test_users_mistakes_end_in_one_message(tmp_path, capsys, setting, code, message):
    config = tmp_path / "job.yaml"
    config.write_text(
        "dataset: {name: icons, split: val}\n"
        "models: [{name: a, id: 'clip4cir:sum@random-tiny'}]\n"
        f"store: {tmp_path / 'store'}\n"
    )
    assert main(["precompute", "--config", str(config), "--set", setting]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("local_ray")
def test_weights_that_do_not_fit_end_in_one_message_and_can_be_replaced(tmp_path, capsys):
    torch.save({"CLIP": {"visual.conv1.weight": torch.zeros(1)}}, tmp_path / "bad.pt")
    config = tmp_path / "job.yaml"
    config.write_text(
        f"dataset: {{name: folder, root: {image_folder(tmp_path / 'images', 8, 4)}}}\n"
        f"models: [{{name: a, id: 'clip4cir:sum@{tmp_path / 'bad.pt'}'}}]\n"
        f"store: {tmp_path / 'store'}\n"
    )
    assert main(["precompute", "--config", str(config)]) == 3
    error = capsys.readouterr().err
    assert "holds no CLIP weights" in error
    assert "Traceback" not in error
    good = "models.0.id=clip4cir:sum@random-tiny"
    assert main(["precompute", "--config", str(config), "--set", good]) == 0


def test_a_bank_is_made_and_used(tmp_path, capsys):
    store = score_store(tmp_path / "s", labelled_dataset(23, 17))
    assert main(["tiles", "bank", store.uri]) == 0
    printed = capsys.readouterr().out
    assert "the queries of the store, less the own fold; t 1.5" in printed
    assert main(["tiles", "bank", store.uri, "--t", "nan"]) == 2
    assert "a: hub statistics from" in printed
    out = str(tmp_path / "out")
    names = ["mean", "mean+bank", "a+bank:0.5"]
    assert main(["evaluate", store.uri, "--out", out, "--fusion", *names]) == 0
    printed = capsys.readouterr().out
    assert "| mean@zscore+bank " in printed
    assert "| a+bank:0.5 " in printed
    for wrong in ("mean+bank:much", "mean+bank:nan", "mean+bank:-3", "mean+bank0.5"):
        capsys.readouterr()
        assert main(["evaluate", store.uri, "--out", out, "--fusion", wrong]) == 2
        assert "write +bank:STRENGTH" in capsys.readouterr().err


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("local_ray")
def test_search_finds_what_the_store_ranks_first(tmp_path, capsys):
    """A query of the store, asked anew, has the scores of its row."""
    root = image_folder(tmp_path / "images")
    models = [
        ModelConfig("a", "clip4cir:sum@random-tiny"),
        ModelConfig("b", "zeroshot:text@random-tiny"),
    ]
    uri = str(tmp_path / "store")
    store = precompute(
        PrecomputeConfig(DatasetConfig("folder", root=str(root)), tuple(models), uri)
    ).store
    query = store.queries[3]
    ranked = ["rank", uri, "--top", "5", "--out", str(tmp_path / "ranks.parquet")]
    assert main(ranked) == 0
    capsys.readouterr()
    page = tmp_path / "answer.html"
    asked = ["search", uri, "--image", str(root / query.reference), "--text", *query.captions]
    asked += ["--exclude", query.reference, "--top", "5", "--out", str(page)]
    assert main(asked) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()[:5]]
    rows = pq.read_table(tmp_path / "ranks.parquet").to_pylist()
    expected = [row for row in rows if row["query"] == query.id]
    assert [id for _, _, id in found] == [row["candidate"] for row in expected]
    scores = [float(score) for _, score, _ in found]
    assert scores == pytest.approx([row["score"] for row in expected], abs=2e-3)
    text = page.read_text()
    assert text.count("data:image/") == 6
    assert main([*asked[:-4], "--top", "0"]) == 2
    assert main(["search", uri, "--image", str(page), "--text", "x"]) == 3
    assert "not an image" in capsys.readouterr().err
    scored = score_store(tmp_path / "s", labelled_dataset(23, 17))
    assert main(["search", scored.uri, "--image", str(root / query.reference), "--text", "x"]) != 0


def test_an_option_given_twice_adds_to_itself(tmp_path, capsys):
    store = score_store(tmp_path / "s", labelled_dataset(40, 30))
    out = str(tmp_path / "out")
    fusions = ["--fusion", "rrf", "--fusion", "borda", "mean@zscore"]
    assert main(["evaluate", store.uri, "--out", out, "--cases", "0", *fusions]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in ("rrf", "borda", "mean@zscore"))
    assert "| combsum" not in printed
