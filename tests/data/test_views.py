import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from fedssl.config.compose import load_config
from fedssl.data.views import (
    Augmentation,
    draw_crops,
    gaussian_blur,
    make_augmentation,
    recolor,
    resample,
)


def make(**changes):
    nothing = {
        "output_size": 16,
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0),
        "flip": 0.0,
        "rotation": 0.0,
        "shear": 0.0,
        "jitter": 0.0,
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "hue": 0.0,
        "grayscale": 0.0,
        "blur": 0.0,
        "blur_sigma": (0.1, 2.0),
    }
    return Augmentation(**(nothing | changes))


@pytest.fixture
def images():
    """Smooth colour images, uint8 (6, 3, 16, 16), no two alike."""
    noise = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=16, mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ones(count, value=1.0):
    return torch.full((count,), value)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagefolder"])
def test_views_have_their_shape_range_and_type(images, dataset):
    config = load_config("config", [f"dataset={dataset}"])
    views = make_augmentation(config.augment, 12).two_views(images, seeded())
    assert views.shape == (12, 3, 12, 12)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1


def test_the_generator_alone_decides_the_views(images):
    augmentation = make_augmentation(load_config("config", ["dataset=cifar10"]).augment, 16)
    torch.manual_seed(1)
    first = augmentation.two_views(images, seeded(3))
    torch.manual_seed(2)
    assert torch.equal(first, augmentation.two_views(images, seeded(3)))
    assert not torch.equal(first, augmentation.two_views(images, seeded(4)))


def test_every_image_and_view_has_its_own_parameters(images):
    augmentation = make_augmentation(load_config("config", ["dataset=cifar10"]).augment, 16)
    same = images[:1].repeat(6, 1, 1, 1)
    views = augmentation.two_views(same, seeded()).flatten(1)
    assert len(torch.unique(views, dim=0)) == 12


def test_without_strengths_both_views_are_the_image(images):
    views = make().two_views(images, seeded())
    expected = images.float().repeat(2, 1, 1, 1) / 255
    torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)


def test_a_certain_flip_mirrors_every_view(images):
    views = make(flip=1.0).two_views(images, seeded())
    expected = images.float().flip(3).repeat(2, 1, 1, 1) / 255
    torch.testing.assert_close(views, expected, atol=1e-6, rtol=0)


def test_digits_are_not_flipped_and_keep_their_gray():
    config = load_config("config", ["dataset=digits"])
    assert config.augment.flip == 0
    gray = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8).repeat(1, 3, 1, 1)
    views = make_augmentation(config.augment, 8).two_views(gray, seeded())
    torch.testing.assert_close(views[:, 0], views[:, 2], atol=1e-5, rtol=0)


def test_a_crop_equals_torchvisions(images):
    top, left, height, width = 2, 5, 8, 10
    expected = tv.resized_crop(
        images.float() / 255, top, left, height, width, [16, 16], antialias=False
    )
    share_x, share_y = width / 16, height / 16
    center_x, center_y = (2 * left + width) / 16 - 1, (2 * top + height) / 16 - 1
    geometry = torch.tensor([[share_x, 0, center_x], [0, share_y, center_y]]).repeat(6, 1, 1)
    ours = resample(images.float() / 255, geometry, 16)
    # At the crop's edge torchvision repeats its last pixel, ours looks past it.
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


def test_a_rotation_equals_torchvisions(images):
    square = make(rotation=30.0)._draw_geometry(images.shape, seeded(5))
    angles = torch.rad2deg(torch.atan2(square[:, 1, 0], square[:, 0, 0]))
    assert angles.abs().max() <= 30
    assert angles.std() > 5
    ours = resample(images.float() / 255, square, 16)
    for image, view, angle in zip(images.float() / 255, ours, angles, strict=True):
        expected = tv.rotate(image, float(angle), interpolation=tv.InterpolationMode.BILINEAR)
        # Away from the corners, which torchvision fills with black.
        torch.testing.assert_close(view[:, 4:12, 4:12], expected[:, 4:12, 4:12], atol=1e-4, rtol=0)


def test_a_shear_slants_the_rows_and_keeps_the_middle(images):
    geometry = make(shear=0.4)._draw_geometry(images.shape, seeded(2))
    slant = geometry[:, 0, 1]
    assert 0.1 < slant.abs().max() <= 0.4
    straight = torch.eye(2, 3).repeat(6, 1, 1)
    straight[:, 0, 1] = slant
    torch.testing.assert_close(geometry, straight)
    ramp = torch.arange(16.0).expand(6, 3, 16, 16) / 16  # brighter to the right
    height = (torch.arange(16.0) - 7.5) / 16  # of each row above or below the middle
    expected = ramp + slant.view(6, 1, 1, 1) * height.view(1, 1, 16, 1)
    view = resample(ramp, geometry, 16)
    torch.testing.assert_close(view[..., 4:12], expected[..., 4:12], atol=1e-5, rtol=0)


def test_crops_keep_to_scale_and_ratio():
    boxes = draw_crops(4000, 32, 32, (0.2, 1.0), (3 / 4, 4 / 3), seeded())
    center, share = boxes[:, :2], boxes[:, 2:]
    area, ratio = share.prod(dim=1), share[:, 0] / share[:, 1]
    assert area.min() >= 0.2
    assert area.max() <= 1.0001
    assert ratio.min() >= 0.7499
    assert ratio.max() <= 1.3334
    assert (center.abs() + share <= 1.0001).all()
    assert 0.5 < area.mean() < 0.65  # a uniform area loses some large boxes that don't fit
    torch.testing.assert_close(center.mean(dim=0), torch.zeros(2), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("place", "adjust", "factor", "tolerance"),
    [
        (0, tv.adjust_brightness, 0.7, 1e-6),
        (1, tv.adjust_contrast, 0.6, 1e-4),  # torchvision rounds its luma weights
        (2, tv.adjust_saturation, 0.4, 1e-4),
    ],
)
def test_colour_jitter_equals_torchvisions(images, place, adjust, factor, tolerance):
    pixels = images.float() / 255
    parameters = [ones(6), ones(6), ones(6), ones(6, 0.0)]
    parameters[place] = ones(6, factor)
    expected = adjust(pixels, factor)
    torch.testing.assert_close(recolor(pixels, *parameters), expected, atol=tolerance, rtol=0)


def test_a_hue_turn_keeps_the_luma_and_a_full_turn_changes_nothing(images):
    pixels = 0.4 + 0.1 * images.float() / 255  # no clamping
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned = recolor(pixels, ones(6), ones(6), ones(6), ones(6, 0.3))
    assert (turned - pixels).abs().max() > 0.01
    torch.testing.assert_close(
        torch.einsum("bchw,c->bhw", turned, luma),
        torch.einsum("bchw,c->bhw", pixels, luma),
        atol=1e-4,
        rtol=0,
    )
    whole = recolor(pixels, ones(6), ones(6), ones(6), ones(6))
    torch.testing.assert_close(whole, pixels, atol=1e-4, rtol=0)


def test_a_small_hue_turn_goes_torchvisions_way(images):
    pixels = 0.3 + 0.4 * images.float() / 255
    ours = recolor(pixels, ones(6), ones(6), ones(6), ones(6, 0.05)) - pixels
    theirs = tv.adjust_hue(pixels, 0.05) - pixels
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert cosine > 0.5  # HSV moves the luma too, so never 1


def test_certain_grayscale_leaves_no_colour(images):
    views = make(grayscale=1.0).two_views(images, seeded())
    expected = tv.rgb_to_grayscale(images.float() / 255, 3).repeat(2, 1, 1, 1)
    torch.testing.assert_close(views, expected, atol=1e-3, rtol=0)


def test_each_image_is_blurred_by_its_own_sigma(images):
    pixels = images.float() / 255
    sigma = torch.tensor([0.5, 0.8, 1.0, 1.3, 1.6, 2.0])
    ours = gaussian_blur(pixels, sigma, radius=4)
    for image, view, own in zip(pixels, ours, sigma.tolist(), strict=True):
        expected = tv.gaussian_blur(image, [9, 9], [own, own])
        torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def test_shares_of_flips_and_blurs_follow_their_probabilities(images):
    many = images[:1].repeat(2000, 1, 1, 1)
    plain = many[0].float() / 255
    flipped = make(flip=0.3).two_views(many, seeded())
    changed = (flipped - plain).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert np.isclose(changed.float().mean(), 0.3, atol=0.03)
    blurred = make(blur=0.4, blur_sigma=(1.0, 2.0)).two_views(many, seeded())
    changed = (blurred - plain).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert np.isclose(changed.float().mean(), 0.4, atol=0.03)
