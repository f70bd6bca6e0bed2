"""The table of peers: its rows, its page, and that a missing library leaves the rest."""

import importlib.util
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
from implementations import BUGS, right

from kdcore.divergences import NAMES
from kdcore.testing import FEATURES, FIXTURES

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


def test_tox_installs_every_peer(peers):
    tox = ConfigParser(interpolation=None)
    tox.read(PATH.parents[1] / "tox.ini", encoding="utf-8")
    section = tox["testenv:peers"]
    found = re.findall(r"([\w-]+)>=[\d.]+", section["deps"] + section["commands_pre"])
    assert {entry.package for entry in peers.PEERS} | {"jax", "requests"} == {*found, "kdcore"}
    assert "python benchmarks/peers.py" in section["commands"]


def test_ordinary_inputs_are_those_of_the_comparison(peers):
    written = json.loads(json.dumps(peers.ordinary()))
    names = ("student", "teacher")
    for name, dtype, count in (("ordinary", float, written["float64"]), ("ordinary, float32", np.float32, None)):
        cases = written["cases"][:count]
        assert len(cases) == len(FIXTURES[name]()) > 60
        for inputs, case in zip(cases, FIXTURES[name](), strict=True):
            assert all(np.array_equal(np.array(inputs[x], dtype), getattr(case, x)) for x in names)
            assert inputs["labels"] == case.labels.tolist()
            assert (inputs["temperature"], inputs["alpha"]) == (case.temperature, case.alpha)


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
    at = found["wrong"]["comparison"]["loss_at"]
    assert at["error"] / at["allowed"] == pytest.approx(found["wrong"]["comparison"]["loss"], rel=1e-9)
    case = json.loads((tmp_path / "ordinary.json").read_text())["cases"][at["case"]]
    arrays = (np.array(case[x]) for x in ("student", "teacher", "labels"))
    loss, _ = peers.implementation("kdcore", "wrong")(*arrays, case["temperature"], case["alpha"])
    assert abs(loss[at["row"]] - at["exact"]) == pytest.approx(at["error"], rel=1e-9)
    assert "F-KD-FORWARD-KL-006" in {result["id"] for result in found["wrong"]["failed"]}
    assert found["loss"]["absent"] == "not installed" and found["loss"]["version"] is None
    rows = [line for line in page.splitlines() if line.startswith("| kdcore")]
    assert [row.endswith("| none of 29 | not claimed |") for row in rows] == [True, True, False, False]
    assert "| raises | raises |" in rows[3]
    assert "- no_such_library, loss: not installed." in page
    assert "scaled by T²" in page and "refuted by" in capsys.readouterr().err
