import numpy as np

from fedssl.data.decoding import decode


def test_images_of_the_right_size_keep_their_pixels(rng):
    pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    assert np.array_equal(decode(pixels, 12), pixels.transpose(2, 0, 1))


def test_transparent_pixels_become_white_and_16_bits_keep_the_upper_8():
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    assert (decode(clear, 4) == 255).all()
    deep = np.full((4, 4), 0x4321, dtype=np.uint16)
    assert (decode(deep, 4) == 0x43).all()
