"""The command line: what each flag of torchrun means here."""

from __future__ import annotations

import argparse

import pytest

from lightning_flashrl.cli import flashrun
from lightning_flashrl.cli.flashrun import (
    Place,
    count_nodes,
    count_ranks,
    find_place,
    job_keys,
    parse_arguments,
    parse_streams,
)
from lightning_flashrl.errors import ConfigurationError


def test_a_command_line_of_torchrun_is_understood() -> None:
    line = (
        "--nnodes=1 --nproc_per_node=4 --max-restarts=3 --rdzv-id=7 --rdzv-backend=c10d --rdzv-endpoint=localhost:29400"
        " --monitor-interval 5 --log_dir logs --redirects 3 --tee 0:1 --role trainer --start-method spawn --standalone "
        "train.py --lr 0.1 --log-dir theirs -m --hang x"
    )
    arguments = parse_arguments(line.split())
    assert (arguments.nproc_per_node, arguments.max_restarts, arguments.log_dir, arguments.rdzv_id) == (
        "4",
        3,
        "logs",
        "7",
    )
    assert arguments.program == "train.py"
    assert arguments.arguments == ["--lr", "0.1", "--log-dir", "theirs", "-m", "--hang", "x"]


def test_a_module_and_its_arguments() -> None:
    arguments = parse_arguments(["--nproc-per-node", "2", "-m", "package.train", "--x"])
    assert (arguments.module, arguments.program, arguments.arguments) == (True, "package.train", ["--x"])


def test_chaos_may_be_given_several_times() -> None:
    arguments = parse_arguments(["--chaos", "kill rank=1 step=3", "--chaos", "stop rank=0 step=4", "train.py"])
    assert arguments.chaos == ["kill rank=1 step=3", "stop rank=0 step=4"]


def test_variables_of_torchrun_give_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    monkeypatch.setenv("PET_NODE_RANK", "1")
    arguments = parse_arguments(["--node-rank", "0", "train.py"])
    assert (arguments.nproc_per_node, arguments.node_rank) == ("3", 0)


def test_counts_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashrun.os, "cpu_count", lambda: 6)
    devices = {"/dev/nvidia[0-9]*": ["a", "b", "c"], "/dev/davinci[0-9]*": []}
    monkeypatch.setattr(flashrun.glob, "glob", devices.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [count_ranks(text) for text in ("2", "cpu", "gpu", "auto")] == [2, 6, 3, 3]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert count_ranks("gpu") == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_ranks("auto") == 6


@pytest.mark.parametrize("text", ["0", "-1", "many", "npu"])
def test_impossible_counts_of_ranks(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--nproc-per-node"):
        count_ranks(text)


def test_counts_of_nodes() -> None:
    assert [count_nodes("1"), count_nodes("2:2")] == [1, 2]
    for text in ("1:4", "0", "x", ""):
        with pytest.raises(ConfigurationError, match="--nnodes"):
            count_nodes(text)


@pytest.mark.parametrize("text", ["4", "x", "0:9", "1:2:3", ""])
def test_impossible_streams(text: str) -> None:
    with pytest.raises(ConfigurationError, match="stream"):
        parse_streams(text, 2)


def place(*line: str) -> Place:
    return find_place(parse_arguments([*line, "train.py"]))


def test_places() -> None:
    assert place() == Place(1, 0, True, "127.0.0.1", 29500)
    assert place("--standalone", "--nnodes", "4").num_nodes == 1
    two = ("--nnodes", "2", "--master-addr", "10.1.1.1", "--master-port", "1234")
    assert place(*two, "--node-rank", "0") == Place(2, 0, True, "10.1.1.1", 1234)
    assert place(*two, "--node-rank", "1") == Place(2, 1, False, "10.1.1.1", 1234)
    assert place("--nnodes", "2", "--rdzv-endpoint", "h:7", "--node-rank", "1") == Place(2, 1, False, "h", 7)
    assert place("--nnodes", "2", "--rdzv-endpoint", "[::2]:7", "--node-rank", "1") == Place(2, 1, False, "::2", 7)


@pytest.mark.parametrize("line", [("--nnodes", "2"), ("--nnodes", "2", "--node-rank", "2")])
def test_impossible_places(line: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="--node-rank"):
        place(*line)


def test_a_job_on_several_hosts_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flashrun.SECRET_VARIABLE, raising=False)
    far, near, single = (Place(n, 0, True, host, 1) for n, host in ((2, "10.0.0.1"), (2, "127.0.0.1"), (1, "10.0.0.1")))
    with pytest.raises(ConfigurationError, match=r"FLASHRL_JOB_SECRET is not set.*token_hex"):
        job_keys(far, "id")
    assert job_keys(near, "id") == job_keys(near, "id")
    assert job_keys(near, "id") != job_keys(near, "other")
    assert job_keys(single, "id") is None
    monkeypatch.setenv(flashrun.SECRET_VARIABLE, "secret")
    assert job_keys(far, "id") == job_keys(far, "other")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--nproc-per-node 0 SCRIPT", "--nproc-per-node '0' is neither"),
        ("--hang-timeout -3 SCRIPT", "--hang-timeout -3: give a number of seconds above 0"),
        ("--hang-timeout nan SCRIPT", "--hang-timeout nan: give"),
        ("--restart-window 0 SCRIPT", "--restart-window 0: give"),
        ("--standby -2 SCRIPT", "--standby -2: give 0 or a positive number"),
        ("--max-restarts -1 SCRIPT", "--max-restarts -1: give 0"),
        ("--master-port 99999 SCRIPT", "--master-port 99999: ports are"),
        ("--chaos nonsense SCRIPT", "fault 'nonsense' cannot be read; write"),
        ("--rdzv-conf join_timeout=x SCRIPT", "--rdzv-conf join_timeout=x: give a number"),
        ("--local-ranks-filter x SCRIPT", "--local-ranks-filter 'x': give local ranks"),
        ("--log-dir /proc/nowhere SCRIPT", "--log-dir /proc/nowhere cannot be made"),
        ("nowhere.py", "no such script: nowhere.py; give its path, -m for a module"),
        ("--no-python no-such-command", "--no-python no-such-command: no such command"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(capfd: pytest.CaptureFixture[str], line: str, text: str) -> None:
    assert flashrun.main([__file__ if word == "SCRIPT" else word for word in line.split()]) == 2
    shown = capfd.readouterr().err
    assert shown.startswith(f"[flashrun] error: {text}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("PET_NODE_RANK", "x"), ("FLASHRL_SLOT_MB", "abc"), ("FLASHRL_SLOT_MB", "-1")]
)
def test_a_wrong_variable_is_one_line_and_status_2(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert flashrun.main([__file__]) == 2
    assert capfd.readouterr().err.startswith(f"[flashrun] error: {name}={value!r}")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    parser = flashrun.build_parser()
    assert all(action.option_strings[0] in shown for action in parser._actions if action.option_strings)
    assert isinstance(parser, argparse.ArgumentParser)
