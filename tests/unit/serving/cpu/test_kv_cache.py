from __future__ import annotations

import torch

from rayft.serving.engine.cpu.kv_cache import PAGE, KVCache, page_tokens


def test_tokens_fill_whole_pages() -> None:
    assert [page_tokens(tokens) for tokens in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]


def test_what_was_appended_stays_when_the_cache_grows() -> None:
    cache, new = KVCache(), torch.randn(2, 3, 2 * PAGE + 5, 4)
    for start, end in ((0, 5), (5, 6), (6, PAGE), (PAGE, PAGE + 1), (PAGE + 1, 2 * PAGE + 5)):
        for layer in (0, 1):
            keys, values = cache.append(layer, (layer + 1) * new[:, :, start:end])
            assert torch.equal(keys[0], (layer + 1) * new[0, :, :end])
            assert torch.equal(values[0], (layer + 1) * new[1, :, :end])
        cache.length = end
    cache.clear()
    assert cache.length == 0
    keys, _ = cache.append(0, new[:, :, :1])
    assert torch.equal(keys[0], new[0, :, :1])
