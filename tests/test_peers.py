"""The table of peers: its rows, its page, and that a missing library leaves the rest."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from implementations import BUGS, right

from kdcore.divergences import NAMES
from kdcore.testing import FEATURES

PATH = Path(__file__).parents[1] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("benchmarks_peers", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_peers_are_described(peers):
    assert len({(entry.package, entry.call) for entry in peers.PEERS}) == len(peers.PEERS) >= 20
    for entry in peers.PEERS:
        assert entry.divergence in NAMES and set(entry.features) <= set(FEATURES)
        assert entry.computes and (entry.mapped or entry.package == "kdcore")


def test_the_page(peers, monkeypatch, tmp_path, capsys):
    narrow = ("cross_entropy", "distillation", "temperature", "float64")

    def missing():
        raise ImportError("no such library")

    def no_t_squared():
        from kdcore.testing.adapters import conventions

        return conventions(BUGS["NoTSquared"], scale_t2=False)

    monkeypatch.setattr(
        peers,
        "PEERS",
        [
            peers.Peer("kdcore", "right", "KD", "", "forward_kl", narrow, lambda: right),
            peers.Peer("kdcore", "mapped", "KD", "no T²", "forward_kl", narrow, no_t_squared),
            peers.Peer("kdcore", "wrong", "KD", "", "forward_kl", narrow, lambda: BUGS["NoTSquared"]),
            peers.Peer("kdcore", "raises", "KD", "", "forward_kl", narrow, lambda: lambda *_: 1 // 0),
            peers.Peer("no_such_library", "loss", "KD", "", "forward_kl", narrow, missing),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(tmp_path)])
    peers.main()
    page, data = (tmp_path / "peers.md").read_text(), json.loads((tmp_path / "peers.json").read_text())
    found = {row["call"]: row for row in data["peers"]}
    assert found["right"]["failed"] == [] and found["right"]["comparison"]["loss"] < 1
    assert found["mapped"]["failed"] == []
    assert found["wrong"]["comparison"]["loss"] > 1e6
    assert "F-KD-FORWARD-KL-006" in {result["id"] for result in found["wrong"]["failed"]}
    assert found["loss"]["absent"] == "not installed" and found["loss"]["version"] is None
    rows = [line for line in page.splitlines() if line.startswith("| kdcore")]
    assert [row.endswith("| nothing |") for row in rows] == [True, True, False, False]
    assert "| raises | raises |" in rows[3]
    assert "- no_such_library, loss: not installed." in page
    assert "scaled by T²" in page and "refuted by" in capsys.readouterr().err
