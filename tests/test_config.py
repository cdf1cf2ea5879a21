"""What users write on the command line, read into plain values or refused in a sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.config import Setting, SparseMethod, Sparsity, format_size, parse_disk, parse_size
from flexeval.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1024", 1024),
        (1024, 1024),
        ("16GiB", 16 * 2**30),
        ("16 gib", 16 * 2**30),
        ("16G", 16 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5KiB", 1536),
        ("0", 0),
        ("9" * 30, 10**30),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == pytest.approx(num_bytes, rel=1e-12)


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "3 G i B", "1e9", "GiB", "0x10", "3PB", "nan"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a size.*16GiB"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_sizes_are_written_as_they_are_read(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == pytest.approx(num_bytes, rel=0.06, abs=0.5)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**60, "1048576.0 TiB")],
)
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("name", "weight_bits", "kv_bits", "group_size"),
    [
        ("none", None, None, 64),
        ("w8", 8, None, 64),
        ("w4", 4, None, 64),
        ("w4-g32", 4, None, 32),
        ("w4-g128", 4, None, 128),
        ("kv8", None, 8, 64),
        ("kv2-g32", None, 2, 32),
        ("w8kv4", 8, 4, 64),
        ("w4kv4-g128", 4, 4, 128),
    ],
)
def test_settings_are_named_by_their_parts(
    name: str, weight_bits: int | None, kv_bits: int | None, group_size: int
) -> None:
    assert Setting.parse(name) == Setting(name=name, weight_bits=weight_bits, kv_bits=kv_bits, group_size=group_size)


@pytest.mark.parametrize(
    ("name", "plain"), [("w4-hqq", "w4"), ("w8-g32-hqq", "w8-g32"), ("w4kv4-g128-hqq", "w4kv4-g128")]
)
def test_weights_may_be_refined(name: str, plain: str) -> None:
    refined, unrefined = Setting.parse(name), Setting.parse(plain)
    assert (refined.is_refined, unrefined.is_refined) == (True, False)
    assert dataclasses.replace(refined, name=plain, is_refined=False) == unrefined


@pytest.mark.parametrize(
    "name", ["-hqq", "kv4-hqq", "kv4-g32-hqq", "none-hqq", "w4-hqq-g32", "w4-hqq-hqq", "w4hqq", "w4-HQQ"]
)
def test_a_refinement_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting.*-hqq behind it, of one with w,"):
        Setting.parse(name)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("kv4-perchannel", "kv4"), ("w4kv2-g32-perchannel", "w4kv2-g32"), ("kv4-perchannel-topk10", "kv4-topk10")],
)
def test_keys_may_rest_by_channel(name: str, plain: str) -> None:
    by_channel, along_head = Setting.parse(name), Setting.parse(plain)
    assert (by_channel.has_key_channels, along_head.has_key_channels) == (True, False)
    assert dataclasses.replace(by_channel, name=plain, has_key_channels=False) == along_head
    assert Setting.parse("w4kv4-hqq-perchannel").is_refined


@pytest.mark.parametrize(
    ("name", "plain"), [("w4-embed", "w4"), ("w8-g32-hqq-embed", "w8-g32-hqq"), ("w4kv4-embed-topk10", "w4kv4-topk10")]
)
def test_embedding_and_head_may_rest_as_layers_do(name: str, plain: str) -> None:
    coded, as_loaded = Setting.parse(name), Setting.parse(plain)
    assert (coded.codes_vocabulary, as_loaded.codes_vocabulary) == (True, False)
    assert dataclasses.replace(coded, name=plain, codes_vocabulary=False) == as_loaded
    assert coded.weights == as_loaded.weights, "a prepared model serves both"
    assert Setting.parse("w4kv4-embed-perchannel").has_key_channels


@pytest.mark.parametrize("name", ["kv4-embed", "-embed", "none-embed", "w4-embed-hqq", "w4-embed-g32", "w4embed"])
def test_a_coded_embedding_without_coded_weights_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting.*-embed behind it, of one with w,"):
        Setting.parse(name)


@pytest.mark.parametrize("name", ["w4-perchannel", "perchannel", "kv4-perchannel-g32", "kv4-perchannel-hqq"])
def test_channels_without_coded_keys_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting.*-perchannel behind it, of one with kv,"):
        Setting.parse(name)


@pytest.mark.parametrize(
    ("name", "method", "percent", "rest"),
    [
        ("topk10", "topk", 10, "none"),
        ("topk1", "topk", 1, "none"),
        ("quest99", "quest", 99, "none"),
        ("w4-topk10", "topk", 10, "w4"),
        ("w4kv4-topk10", "topk", 10, "w4kv4"),
        ("kv8-g32-topk25", "topk", 25, "kv8-g32"),
        ("w8kv2-g128-quest5", "quest", 5, "w8kv2-g128"),
        ("w4-g32-hqq-topk10", "topk", 10, "w4-g32-hqq"),
    ],
)
def test_what_is_attended_to_comes_last(name: str, method: str, percent: int, rest: str) -> None:
    sparsity = Sparsity(method=SparseMethod(method), percent=percent)
    assert Setting.parse(name) == dataclasses.replace(Setting.parse(rest), name=name, sparsity=sparsity)


@pytest.mark.parametrize(
    "name",
    [
        "topk",
        "topk0",
        "topk100",
        "topk05",
        "topk1.5",
        "-topk10",
        "w4topk10",
        "topk10-w4",
        "topk10-g32",
        "-g32-topk10",
        "none-topk10",
        "topk10-quest10",
        "w4-topk10-g32",
        "quest",
        "kv4-quest0",
        "Topk10",
        "topk10\n",
        "w4-topk",
        "topk10-",
        "w4-topk10-hqq",
    ],
)
def test_an_attention_written_otherwise_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^unknown setting.*topk10 or quest10, alone or last.*1 to 99") as refused:
        Setting.parse(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "None", "w3", "w2", "w4-g48", "w4-", "w4 ", "w4\n", "kv3", "kv4w4", "-g64", "kv"])
def test_an_unknown_setting_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting.*none, w8, w4, kv8"):
        Setting.parse(name)


@pytest.mark.parametrize(
    ("text", "folder", "num_bytes"),
    [
        ("/scratch", "/scratch", None),
        ("/scratch:5GB", "/scratch", 5 * 10**9),
        ("a:b:1KiB", "a:b", 1024),
        ("a:b", "a:b", None),
        (".", ".", None),
    ],
)
def test_a_disk_is_a_folder_with_or_without_a_size(text: str, folder: str, num_bytes: int | None) -> None:
    assert parse_disk(text) == (Path(folder), num_bytes)


@pytest.mark.parametrize("text", ["", ":5GB"])
def test_a_disk_without_a_folder_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"names no folder.*DIR:SIZE"):
        parse_disk(text)
