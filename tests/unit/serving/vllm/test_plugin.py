"""The releases of vLLM that are accepted; tests/vllm has what needs vLLM."""

from __future__ import annotations

import pytest

from rayft.errors import ResourceError
from rayft.serving.engine.vllm.plugin import check_release

TRIED = ["0.26.0", "0.26.9", "0.26.0.post1"]
READ = ["0.27.0", "0.29.1", "0.32.0", "0.32.9"]
UNKNOWN = ["0.20.2", "0.25.1", "0.26.0rc1", "0.33.0", "1.0.0"]


@pytest.mark.parametrize("untested", [False, True])
@pytest.mark.parametrize("version", TRIED)
def test_releases_that_were_tried_on_a_gpu_are_accepted(version: str, untested: bool) -> None:
    check_release(version, untested=untested)


@pytest.mark.parametrize("version", READ)
def test_releases_that_were_only_read_are_accepted_if_asked_for(version: str) -> None:
    check_release(version, untested=True)
    with pytest.raises(
        ResourceError, match=rf"vLLM {version} was not tried on a GPU.*vllm>=0.26,<0.27.*vllm_untested: true"
    ):
        check_release(version, untested=False)


@pytest.mark.parametrize("untested", [False, True])
@pytest.mark.parametrize("version", UNKNOWN)
def test_other_releases_are_refused_even_then(version: str, untested: bool) -> None:
    with pytest.raises(
        ResourceError, match=rf"vLLM {version} is not supported.*vllm>=0.26,<0.27.*rayft\[vllm\]"
    ):
        check_release(version, untested=untested)
