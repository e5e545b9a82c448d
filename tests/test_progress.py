import json
import time

from dafm_ray.progress import followed, progress, status_line


def test_status_counts_what_was_there_before(capsys):
    written = []
    with progress("encode", 10, done=4, write_status=written.append) as shown:
        shown.advance(2, failures=1)
        shown.advance(1)
    last = json.loads(written[-1])
    assert (last["stage"], last["done"], last["total"], last["failures"]) == ("encode", 7, 10, 1)
    assert last["rate"] > 0
    assert capsys.readouterr().err == ""


def test_what_waits_says_so_until_it_goes_on(capsys):
    written = []
    with progress("encode", 10, write_status=written.append) as shown:
        shown.wait("a node was lost")
        shown.wait("a node was lost")
        assert json.loads(written[-1])["waiting"] == "a node was lost"
        shown.advance()
    assert json.loads(written[-1])["waiting"] == ""
    assert capsys.readouterr().err == "waiting: a node was lost\n"


def test_another_process_is_followed(tmp_path):
    status = tmp_path / "status.json"
    with followed("train", 5, status.read_bytes, "epoch"):
        status.write_bytes(b"half a fi")
        time.sleep(1.2)
        status.write_bytes(status_line("train", 3, 5))
    assert json.loads(status.read_text())["done"] == 3
