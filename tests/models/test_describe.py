import json

import pytest
import torch

from dafm_ray.cli import main
from dafm_ray.models.registry import FAMILIES, load_model
from dafm_ray.models.sprc import AUTHORS_KEY


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"lavis"}))
def test_every_family_says_what_it_costs(name, capsys):
    assert main(["models", "describe", name]) == 0
    printed = capsys.readouterr().out
    assert "M parameters" in printed
    assert "bytes) a gallery item" in printed


def test_a_family_without_random_weights_says_what_it_needs(capsys):
    assert main(["models", "describe", "lavis:sum"]) == 0
    assert "lavis:sum: lavis needs a weights file" in capsys.readouterr().out


def test_published_sizes(capsys):
    main(["models", "describe", "tgcir:base"])
    assert "151.9 M parameters, 224 pixels, 512 floats (2,048 bytes)" in capsys.readouterr().out
    main(["models", "describe", "blip4cir"])
    assert "223.7 M parameters, 384 pixels, 256 floats (1,024 bytes)" in capsys.readouterr().out
    main(["models", "describe", "sprc:base"])
    assert "224 pixels, 32 x 256 floats (32,768 bytes)" in capsys.readouterr().out


REAL_LAYOUTS = {
    "clip4cir:sum": "clip4cir/tuned_clip_best.pt",
    "clip4cir:combiner": "clip4cir/tuned_clip_best.pt+clip4cir/combiner_cuda_tagged.pt",
    "tgcir:base": "tgcir/stage1.pt",
    "tgcir:spn": "tgcir/stage2.pt",
    "blip4cir:stage1": "blip4cir/blip_mean.pt",
    "biblip4cir:sum": "biblip4cir/model_base.pth+biblip4cir/tuned_blip_mean.pt",
    "sprc:base": "sprc/tuned_clip_arithmetic.pt",
    "sprc:spn": "sprc_spn_stage2/stage2.pt",
}


@pytest.mark.parametrize("name", REAL_LAYOUTS)
def test_files_in_the_layout_of_the_authors_fit(golden, name, capsys):
    weights = "+".join(str(golden / part) for part in REAL_LAYOUTS[name].split("+"))
    assert main(["models", "check", name, "--weights", weights]) == 0
    printed = capsys.readouterr().out
    assert "holds: " in printed
    assert f"fits {name}" in printed


FULL_SIZE = {
    "clip4cir:sum": ("clip4cir/keys_full", ""),
    "clip4cir:combiner": ("clip4cir/keys_full", ""),
    "tgcir:base": ("tgcir/keys_full", "state_dict"),
    "tgcir:spn": ("tgcir/keys_full_spn_stage2", "state_dict"),
    "blip4cir:stage1": ("blip4cir/keys_full", "BLIP_Retrieval"),
    "biblip4cir:sum": ("biblip4cir/keys_full", ""),
    "biblip4cir:combiner": ("biblip4cir/keys_full", ""),
    "sprc:base": ("sprc/keys_full", AUTHORS_KEY),
    "sprc:spn": ("sprc_spn_stage2/keys_full", "state_dict"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_files_fit(golden, tmp_path, name, capsys):
    keys, nested = FULL_SIZE[name]
    shapes = json.loads((golden / f"{keys}.json").read_text())["keys"]
    tensors = {
        key: torch.empty(shape, dtype=getattr(torch, dtype)).fill_(0.01)
        for key, (shape, dtype) in shapes.items()
    }
    file = tmp_path / "full.pt"
    torch.save({"epoch": 7, **({nested: tensors} if nested else tensors)}, file)
    assert main(["models", "check", name, "--weights", str(file)]) == 0
    printed = capsys.readouterr().out
    file.unlink()
    main(["models", "describe", name])
    described = capsys.readouterr().out.splitlines()[-1]
    fits = printed.splitlines()[-1].removeprefix("fits ")
    assert described.startswith(fits)  # parameters and pixels of the published size


def test_what_does_not_fit_is_named(golden, tmp_path, capsys):
    file = str(golden / "sprc" / "tuned_clip_arithmetic.pt")
    assert main(["models", "check", "sprc:spn", "--weights", file]) == 3
    assert f"it holds: {AUTHORS_KEY}" in capsys.readouterr().err
    assert main(["models", "check", "blip4cir:stage1", "--weights", file]) == 3
    assert "holds no BLIP_Retrieval" in capsys.readouterr().err
    whole = load_model("tgcir:base@random-tiny").module.state_dict()
    kept = {key: tensor for key, tensor in whole.items() if key != "backbone.fc.bias"}
    kept["backbone.text_fc.bias"] = torch.zeros(3)
    kept["extra"] = torch.zeros(1)
    torch.save({"state_dict": kept}, tmp_path / "x.pt")
    assert main(["models", "check", "tgcir:base", "--weights", str(tmp_path / "x.pt")]) == 3
    error = capsys.readouterr().err
    assert "1 missing (backbone.fc.bias)" in error
    assert "1 unexpected (extra)" in error
    assert "1 of another shape (backbone.text_fc.bias (3,) instead of (32,))" in error


def test_wrong_names(capsys):
    assert main(["models", "describe", "clip5cir"]) == 2
    assert main(["models", "describe", "sprc:sum"]) == 2
    assert main(["models", "check", "sprc", "--weights", "x.pt"]) == 2
    assert "name one of sprc:base, sprc:spn" in capsys.readouterr().err
