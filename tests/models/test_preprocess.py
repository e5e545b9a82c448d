import json

import numpy as np
from PIL import Image

from dafm_ray.models.preprocess import no_pad, square_pad, target_pad, to_tensor

PIPELINES = {
    "clip4cir_targetpad": target_pad,
    "clip4cir_squarepad": square_pad,
    "clip": no_pad,
    "tgcir_clip": no_pad,
}


def test_equals_the_published_transforms(golden):
    folder = golden / "preprocess"
    expected = np.load(folder / "outputs.npz")
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    worst = 0.0
    for case in cases:
        image = Image.open(folder / case["image"])
        if case["pipeline"] == "tgcir_clip":
            image = image.convert("RGB")
        found = to_tensor(image, case["dim"], PIPELINES[case["pipeline"]]).numpy()
        worst = max(worst, float(np.abs(found - expected[case["key"]]).max()))
    print(f"golden/preprocess: {len(cases)} cases, largest difference {worst}")
    assert len(cases) == 60
    assert worst <= 1e-6


def test_an_odd_excess_rounds_half_to_even():
    ramp = Image.fromarray(np.tile(np.arange(67, dtype=np.uint8), (64, 1)))
    assert to_tensor(ramp, 64, no_pad).shape == (3, 64, 64)
    first = to_tensor(ramp, 64, no_pad)[0, 0, 0].item()
    assert abs((first * 0.26862954 + 0.48145466) * 255 - 2) < 1e-3
