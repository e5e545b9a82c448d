import pytest

from dafm_ray.cli import main
from dafm_ray.uris import above, is_uri, join, last_part, shown

S3 = "s3://key:secret@bucket/runs/a?region=eu-west-1"


def test_what_is_a_uri():
    assert is_uri("s3://bucket/x")
    assert not any(map(is_uri, ("runs/x", "/runs/x", "file:///runs/x", "mean@zscore")))


def test_places_keep_the_options_of_their_uri():
    assert join(S3, "report") == "s3://key:secret@bucket/runs/a/report?region=eu-west-1"
    assert above(S3) == "s3://key:secret@bucket/runs?region=eu-west-1"
    assert last_part(S3) == "a"
    assert join("runs/a", "report") == "runs/a/report"
    assert join("file:///runs/a", "report") == "/runs/a/report"
    assert (above("runs/a"), last_part("runs/a/")) == ("runs", "a")


def test_credentials_are_not_shown():
    assert shown(S3) == "s3://bucket/runs/a?region=eu-west-1"
    assert shown("s3://bucket/a@b") == "s3://bucket/a@b"


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["search", "store", "--image", "a.png", "--text", "b", "--out", S3], "--out"),
        (["demo", "--out", S3], "--out"),
    ],
)
def test_a_uri_never_becomes_a_folder(command, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"{key}: s3://bucket/runs/a" in said
    assert "is a URI" in said
    assert "secret" not in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())
