import pytest

from dafm_ray.config import FusionConfig
from dafm_ray.errors import ConfigError
from dafm_ray.runs import claimed
from dafm_ray.storage import open_storage


def test_a_folder_is_of_one_run_once_that_has_begun(tmp_path):
    out = open_storage(str(tmp_path / "out"))
    one, other = (FusionConfig("store", out.uri, folds=folds) for folds in (3, 5))
    with pytest.raises(ConfigError, match="refused"), claimed(out, one, ()):
        raise ConfigError("refused at its start")
    with claimed(out, other, ()):
        (tmp_path / "out" / "history.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"another configuration \(folds"), claimed(out, one, ()):
        pass
    with claimed(out, other, ()):
        pass
