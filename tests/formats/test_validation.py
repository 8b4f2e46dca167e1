"""Format versions that can and cannot be read."""

from __future__ import annotations

import pytest

from hf_vq.formats import FORMATS, FormatError, check_version


@pytest.mark.parametrize("version", ["1.0", "1.7", "1.12"])
def test_minor_versions_are_read(version: str) -> None:
    check_version(version, "1.0", "gptvq")


@pytest.mark.parametrize("method", FORMATS)
def test_every_format_reads_its_own_version(method: str) -> None:
    check_version(FORMATS[method].version, FORMATS[method].version, method)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.0", r"gptvq: .* version 2\.0, newer than the 1\.0 .*pip install -U hf-vq"),
        ("10.0", "newer than"),
        ("0.9", r"version 0\.9; this hf_vq reads 1\.x only. Quantize the model again"),
        ("1", "format_version is '1', expected a string like '1.0'"),
        ("1.0-rc1", "expected a string"),
        (1.0, r"format_version is 1\.0, expected a string"),
        (None, "format_version is None"),
    ],
)
def test_other_versions_are_refused(version: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        check_version(version, "1.0", "gptvq")
