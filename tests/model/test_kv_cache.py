"""Layout of the paged key-value pool."""

import torch

from server.model.kv_cache import KVCache, cache_dtype, page_bytes


def test_a_page_is_contiguous_over_the_layers() -> None:
    cache = KVCache(5, 3, 2, 8, dtype=torch.bfloat16)
    assert cache.buffer.shape == (5, 3, 2, 16, 2, 8)
    assert cache.buffer.is_contiguous()
    assert (cache.num_pages, cache.page_size) == (5, 16)
    assert cache.page_bytes == cache.buffer.stride(0) * 2 == page_bytes(3, 2, 8, torch.bfloat16)


def test_the_page_of_the_default_model_has_369_kb() -> None:
    assert page_bytes(30, 3, 64, torch.bfloat16) == 368_640


def test_layer_views_share_the_buffer_and_do_not_overlap() -> None:
    cache = KVCache(4, 2, 2, 8, dtype=torch.float32, page_size=4)
    for layer in range(2):
        for half, view in enumerate(cache.layer(layer)):
            assert view.shape == (4, 4, 2, 8)
            assert view.stride(0) == cache.buffer.stride(0)
            view.fill_(1 + 2 * layer + half)
    assert [int(value) for value in cache.buffer[3, :, :, 0, 0, 0].flatten()] == [1, 2, 3, 4]
    assert int((cache.buffer == 3).sum()) == 4 * 4 * 2 * 8


def test_only_a_float32_model_in_int8_caches_in_fewer_bits() -> None:
    assert cache_dtype(torch.float32, "int8") == torch.float16
    assert cache_dtype(torch.float32, "none") == torch.float32
    assert cache_dtype(torch.bfloat16, "int8") == torch.bfloat16
