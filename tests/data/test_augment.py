"""Crops against torchvision's distribution, pixels against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.making import picture
from selfsup.data import augment
from selfsup.data.augment import SMALL, crop_and_resize, crop_boxes, flips, resize_weights

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def boxes_of(n: int, height: int, width: int, scale=SCALE, ratio=RATIO, seed: int = 0, epoch: int = 0):
    sides = np.full(n, height, dtype=np.int64), np.full(n, width, dtype=np.int64)
    return crop_boxes(seed, epoch, np.arange(n), *sides, scale, ratio)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, SCALE, RATIO),
        (60, 40, (0.08, 1.0), RATIO),
        (10, 90, SCALE, RATIO),
        (40, 40, (0.5, 0.5), (2.0, 2.0)),
    ],
)
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio):
    n = 3000
    ours = boxes_of(n, height, width, scale, ratio)
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert stats.ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3


def test_a_crop_with_uniform_ratio_is_caught():
    """The planted bug: the aspect ratio uniform instead of log-uniform."""
    rng = np.random.default_rng(0)
    wrong = rng.uniform(0.25, 4, 3000)
    ours = boxes_of(3000, 400, 400, (0.01, 0.01), (0.25, 4.0))
    assert stats.ks_2samp(ours[:, 3] / ours[:, 2], wrong).pvalue < 1e-6


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 100), (100, 1), (2, 3), (64, 64), (5, 4096)])
def test_boxes_lie_inside(height, width):
    top, left, h, w = boxes_of(500, height, width, (0.01, 1.0)).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (30, 30)])
def test_the_fallback_is_torchvisions(height, width):
    """A ratio that never fits: the central crop, as torchvision computes it."""
    scale, ratio = (1.0, 1.0), (1.5, 1.6)
    theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), list(ratio))
    assert boxes_of(3, height, width, scale, ratio).tolist() == [list(theirs)] * 3


def test_draws_belong_to_the_sample_alone():
    sizes = np.array([30, 40, 50, 60]), np.array([60, 50, 40, 30])
    position, epoch = np.array([5, 9, 2, 7]), np.array([0, 1, 2, 1])
    together = crop_boxes(3, epoch, position, *sizes, SCALE, RATIO)
    for i in range(4):
        one = slice(i, i + 1)
        alone = crop_boxes(3, int(epoch[i]), position[one], sizes[0][one], sizes[1][one], SCALE, RATIO)
        assert np.array_equal(alone[0], together[i])
    other_view = crop_boxes(3, epoch, position, *sizes, SCALE, RATIO, view=1)
    assert (other_view != together).any(axis=1).all()


def test_flips():
    position = np.arange(4000)
    assert not flips(0, 0, position, 0.0).any() and flips(0, 0, position, 1.0).all()
    assert abs(flips(0, 0, position, 0.3).mean() - 0.3) < 0.03
    assert (flips(0, 0, position, 0.5) != flips(0, 1, position, 0.5)).mean() > 0.4


# ---- pixels ---------------------------------------------------------------------------------------


def crop(image: np.ndarray, box: tuple[int, int, int, int], size: int, mirrored: bool = False) -> np.ndarray:
    return crop_and_resize([image], np.array([box]), np.array([mirrored]), size)[0]


def by_pillow(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cropped, then resized: pixels outside the box have no say (Pillow's own `box=` lets them). In two
    calls, columns first as torchvision does: Pillow 13 else takes the cheaper pass first, and what is
    clipped between the passes depends on the order."""
    top, left, h, w = box
    pixels = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    pixels = pixels.crop((left, top, left + w, top + h)).resize((size, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC))
    return pixels.reshape(size, size, -1).transpose(2, 0, 1)


def by_torchvision(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return F.resized_crop(pixels, *box, [size, size], InterpolationMode.BICUBIC, antialias=True).numpy()


def worst(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def assert_within_a_level(differences: list[np.ndarray]) -> None:
    """At most 1, but for a pixel in a thousand 2: where the first pass rounds the other way."""
    off = np.abs(np.concatenate([difference.ravel() for difference in differences]))
    assert off.max() <= 2 and (off > 1).mean() < 1e-3 and (off > 0).mean() < 0.05


@pytest.mark.parametrize("size", [1, 8, 16, 32, 50, 96])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (64, 64), (17, 40), (1, 5), (64, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_matrices_agree_with_pillow_and_torchvision(height, width, size, channels):
    # Noise, and black and white only: where bicubic overshoots and is clipped.
    noise = np.ascontiguousarray(picture(height * width, height, width)[..., :channels])
    from_pillow, from_torchvision = [], []
    for image in (noise, np.where(noise > 127, np.uint8(255), np.uint8(0))):
        for box in [(0, 0, height, width), *map(tuple, boxes_of(6, height, width).tolist())]:
            ours = crop(image, box, size)
            from_pillow.append(ours.astype(int) - by_pillow(image, box, size))
            from_torchvision.append(ours.astype(int) - by_torchvision(image, box, size))
            # Mirroring is folded into the weights, hence bit for bit.
            assert np.array_equal(crop(image, box, size, mirrored=True), ours[..., ::-1])
    assert_within_a_level(from_pillow)
    assert_within_a_level(from_torchvision)


def test_a_wrong_kernel_is_caught(monkeypatch):
    """The planted bug: bilinear, or a = -0.75 (OpenCV's bicubic), is far more than one level off."""

    def other_bicubic(length: int, size: int) -> np.ndarray:
        x = np.abs(np.arange(length)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * length / size)
        a = -0.75
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        return np.rint(weights / weights.sum(1, keepdims=True) * 2**15).astype(np.float32)

    image, box = picture(0, 32, 32), (3, 4, 20, 17)
    assert worst(crop(image, box, 32), by_pillow(image, box, 32)) <= 1
    monkeypatch.setattr(augment, "resize_weights", other_bicubic)
    assert worst(crop(image, box, 32), by_pillow(image, box, 32)) > 5


def test_whole_images_of_the_right_size_are_left_as_they_are():
    image = picture(1, 32, 32)
    assert np.array_equal(crop(image, (0, 0, 32, 32), 32), image.transpose(2, 0, 1))
    flat = np.full((64, 64, 3), 255, dtype=np.uint8)
    for size in (1, 7, 33):
        assert (crop(flat, (1, 2, 61, 60), size) == 255).all()


@pytest.mark.parametrize("size", [1, 2, 16, 32, 224])
def test_sums_are_exact_in_float32(size):
    """Whole-number weights whose worst sum stays below 2**24, for every length a small image has."""
    for length in range(1, SMALL + 1):
        weights = resize_weights(length, size).astype(np.float64)
        assert np.array_equal(weights, np.rint(weights))
        assert 255 * np.abs(weights).sum(axis=1).max() < 2**24
        assert np.abs(weights.sum(axis=1) - 2**15).max() <= 32


def test_exact_against_integers():
    """The whole matrix route once more in int64: bit for bit, whatever order BLAS adds in."""
    image, (top, left, h, w), size = picture(2, 40, 40), (5, 3, 30, 33), 24
    rows, columns = (resize_weights(length, size).astype(np.int64) for length in (h, w))
    pixels = image[top : top + h, left : left + w].astype(np.int64).transpose(2, 0, 1)
    pixels = np.clip((pixels @ columns.T + 2**14) >> 15, 0, 255)
    pixels = np.clip((rows @ pixels + 2**14) >> 15, 0, 255)
    assert np.array_equal(crop(image, (top, left, h, w), size), pixels)


def test_an_image_is_the_same_whatever_is_beside_it():
    images = [picture(i, h, w) for i, (h, w) in enumerate([(32, 32), (100, 70), (32, 32), (8, 60), (65, 3)])]
    boxes = np.concatenate([boxes_of(1, *image.shape[:2], seed=i) for i, image in enumerate(images)])
    mirrored = np.array([True, True, False, True, False])
    together = crop_and_resize(images, boxes, mirrored, 20)
    for i, image in enumerate(images):
        assert np.array_equal(together[i], crop(image, tuple(boxes[i].tolist()), 20, bool(mirrored[i])))


def test_many_images_of_one_shape():
    """More than go into one matrix product."""
    images = [picture(i, 12, 12) for i in range(70)]
    boxes, mirrored = boxes_of(70, 12, 12), flips(0, 0, np.arange(70), 0.5)
    together = crop_and_resize(images, boxes, mirrored, 8)
    for i, image in enumerate(images):
        assert np.array_equal(together[i], crop(image, tuple(boxes[i].tolist()), 8, bool(mirrored[i])))


def test_large_images_go_through_torchvision():
    image, box = picture(3, SMALL + 36, SMALL + 1), (10, 5, 60, 50)
    assert np.array_equal(crop(image, box, 32), by_torchvision(image, box, 32))
    assert np.array_equal(crop(image, box, 32, mirrored=True), by_torchvision(image, box, 32)[..., ::-1])


def test_matmul_precision_does_not_reach_the_pixels():
    image, box = picture(4, 32, 32), (1, 2, 25, 30)
    exact = crop(image, box, 32)
    torch.set_float32_matmul_precision("medium")
    assert np.array_equal(crop(image, box, 32), exact)
