import os
from pathlib import Path

from fedssl.compute import release_memory


def test_freed_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [b"x" * 65536 + bytes([n % 256]) for n in range(3000)]  # below malloc's own mappings
    last = blocks[-1]  # keeps the heap from shrinking by itself
    full = resident()
    blocks.clear()
    release_memory()
    assert full - resident() > 150e6
    assert len(last) == 65537
