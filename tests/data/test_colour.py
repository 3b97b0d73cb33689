"""Every operation on colours, alone and in any order, against torchvision's on one image at a time."""

from itertools import permutations

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from selfsup.data import colour
from selfsup.data.colour import OPERATIONS, Colours, apply_colours, kernel_size

FLAGS = ("jittered", "grey", "blurred", "solarised")
EPS = 1e-5


def pictures(n: int, height: int = 11, width: int = 9, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Whole numbers of 255ths; a third of the pixels have equal channels, or channels of 0 and 1 alone."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, height, width), generator=random)
    images[:, :, :2] = images[:, :1, :2]
    images[:, 1:, 2:3] = images[:, :1, 2:3]
    images[:, :, 3:4] = images[:, :, 3:4] // 128 * 255
    return images.float() / 255


def colours_of(n: int, seed: int = 0, **given) -> Colours:
    """Strengths at random, nothing switched on; `given` fields replace them."""
    random = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> torch.Tensor:
        return torch.rand(n, generator=random) * (high - low) + low

    colours = Colours(
        order=torch.rand(n, 4, generator=random).argsort(dim=1),
        brightness=between(0.2, 1.8),
        contrast=between(0.2, 1.8),
        saturation=between(0.2, 1.8),
        hue=between(-0.5, 0.5),
        sigma=between(0.1, 2.0),
        **{flag: torch.zeros(n, dtype=torch.bool) for flag in FLAGS},
    )
    return colours._replace(**given)


def neutral(n: int, **given) -> Colours:
    """A jitter that changes nothing but what is given."""
    ones = {name: torch.ones(n) for name in OPERATIONS[:3]}
    return colours_of(n, jittered=torch.ones(n, dtype=torch.bool), **{**ones, "hue": torch.zeros(n), **given})


def one_by_one(images: torch.Tensor, colours: Colours, kernel: int) -> torch.Tensor:
    """The slow oracle: torchvision, image by image."""
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    found = []
    for i, image in enumerate(images):
        if colours.jittered[i]:
            for number in colours.order[i].tolist():
                image = functions[number](image, getattr(colours, OPERATIONS[number])[i].item())
        if colours.grey[i]:
            image = F.rgb_to_grayscale(image, len(image))
        if colours.blurred[i]:
            image = F.gaussian_blur(image, [kernel, kernel], [colours.sigma[i].item()] * 2)
        if colours.solarised[i]:
            image = F.solarize(image, 0.5)
        found.append(image)
    return torch.stack(found)


def distance(images: torch.Tensor, colours: Colours, kernel: int = 5) -> float:
    before = images.clone()
    found = apply_colours(images, colours, kernel)
    assert torch.equal(images, before), "the input was changed"
    return (found - one_by_one(images, colours, kernel)).abs().max().item()


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_of_the_jitter(name):
    low, high = (-0.5, 0.5) if name == "hue" else (0, 2.5)
    colours = neutral(40, **{name: torch.linspace(low, high, 40)})
    assert distance(pictures(40), colours) < EPS
    assert (apply_colours(pictures(40), colours, 3) != pictures(40)).flatten(1).any(dim=1)[[0, 5, -1]].all()


@pytest.mark.parametrize("flag", FLAGS[1:])
def test_each_operation_after_the_jitter(flag):
    colours = colours_of(30, **{flag: torch.arange(30) % 3 > 0})
    images = pictures(30)
    assert distance(images, colours) < EPS
    changed = (apply_colours(images, colours, 5) != images).flatten(1).any(dim=1)
    assert not changed[::3].any() and changed[1::3].sum() >= 9  # a blur of sigma 0.1 changes nothing


@pytest.mark.parametrize("kernel", [3, 7, 23])
def test_blurs_of_every_width(kernel):
    """Also wider than float32 can see, and reaching the far border."""
    sigma = torch.cat([torch.linspace(0.1, 2, 12), torch.tensor([5.0, 50.0])])
    images, blurred = pictures(14, 13, 12 if kernel == 23 else 30), torch.ones(14, dtype=torch.bool)
    assert distance(images, colours_of(14, sigma=sigma, blurred=blurred), kernel) < EPS


def test_the_least_blur_leaves_the_image():
    """Also a sigma that float32 rounds to 0."""
    images, sigma = pictures(3), torch.tensor([1e-3, 1e-30, 0.0])
    blurred = torch.ones(3, dtype=torch.bool)
    assert torch.equal(apply_colours(images, colours_of(3, sigma=sigma, blurred=blurred), 5), images)


def test_every_order_of_the_jitter():
    order = torch.tensor(list(permutations(range(4))))
    images, jittered = pictures(24), torch.ones(24, dtype=torch.bool)
    images[:] = images[0]
    same = {name: getattr(colours_of(1), name).expand(24).clone() for name in OPERATIONS}
    colours = colours_of(24, order=order, jittered=jittered, **same)
    assert distance(images, colours) < EPS
    found = apply_colours(images, colours, 3)
    assert (torch.cdist(found.flatten(1), found.flatten(1)) > 1e-3).sum() > 400  # of 552: orders do differ


def everything(n: int = 60) -> Colours:
    return colours_of(n, **{flag: torch.arange(n) % k > 0 for flag, k in zip(FLAGS, (5, 4, 3, 2))})


@pytest.mark.parametrize("shape", [(11, 9), (32, 32), (40, 23)])
def test_the_whole_sequence(shape):
    assert distance(pictures(60, *shape), everything()) < EPS


def test_grey_images():
    assert distance(pictures(60, channels=1), everything()) < EPS


def test_hue_against_colorsys():
    """Another oracle, in float64: the turn is towards green from red."""
    from colorsys import hsv_to_rgb, rgb_to_hsv

    images = pictures(5, 4, 4)
    found = apply_colours(images, neutral(5, hue=torch.full((5,), 0.3)), 3)
    for before, after in zip(images.movedim(1, -1).reshape(-1, 3), found.movedim(1, -1).reshape(-1, 3)):
        hue, saturation, value = rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(hsv_to_rgb((hue + 0.3) % 1, saturation, value), abs=EPS)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    green = apply_colours(red, neutral(1, hue=torch.tensor([1 / 3])), 3)[0, :, 0, 0]
    assert green.tolist() == pytest.approx([0, 1, 0], abs=EPS)


@pytest.mark.parametrize("shape", [(11, 9), (32, 32)])
def test_a_sample_does_not_depend_on_its_neighbours(shape, monkeypatch):
    """Bit by bit: the same batches on any number of processes need that. Nor on how many share the cache."""
    images, colours = pictures(60, *shape), everything()
    together = apply_colours(images, colours, 5)
    for i in range(60):
        alone = apply_colours(images[i : i + 1], Colours(*(field[i : i + 1] for field in colours)), 5)
        assert torch.equal(alone[0], together[i])
    monkeypatch.setattr(colour, "IN_CACHE", 7 * images[0].numel())
    assert torch.equal(apply_colours(images, colours, 5), together)


def test_the_number_of_threads_does_not_matter():
    """Bit by bit: a loader worker has one, a training process with no workers all of them."""
    jittered = torch.ones(6, dtype=torch.bool)
    images, colours = pictures(6, 225, 225), everything(6)._replace(jittered=jittered)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 5, 8):  # shares of an image that end in the middle of a vector
            torch.set_num_threads(threads)
            found.append(apply_colours(images, colours, 5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (11, 9)])
def test_images_of_one_colour_and_of_two_pixels(level, shape):
    for images in (torch.full((60, 3, *shape), level), pictures(60, *shape)):
        found = apply_colours(images, everything(), 3)
        assert (found - one_by_one(images, everything(), 3)).abs().max() < EPS
        assert found.isfinite().all() and found.min() > -EPS and found.max() < 1 + EPS


def test_nothing_goes_through_a_matrix_product(monkeypatch):
    """float32_matmul_precision and TF32 must not reach pixels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    with Calls():
        apply_colours(pictures(60), everything(), 5)
    assert len(names) > 10 and not [n for n in names if "mm" in n or "conv" in n or "dot" in n]


def test_what_is_not_needed_is_not_computed(monkeypatch):
    """All strengths neutral: the very same pixels, hue too, whose way there and back would round."""
    for name in ("brighten", "contrast", "saturate", "turn_hue", "make_grey", "blur", "solarise"):
        monkeypatch.setattr(colour, name, lambda *arguments: pytest.fail("computed"))
    assert torch.equal(apply_colours(pictures(6), neutral(6), 3), pictures(6))
    assert torch.equal(apply_colours(pictures(6), colours_of(6), 3), pictures(6))


def test_kernel_size():
    assert [kernel_size(size) for size in (8, 16, 32, 64, 96, 224)] == [3, 3, 3, 7, 9, 23]
    assert all(kernel_size(size) % 2 == 1 and kernel_size(size) // 2 < size for size in range(2, 600))


# ---- planted bugs ---------------------------------------------------------------------------------

original = {name: getattr(colour, name) for name in ("contrast", "saturate", "turn_hue", "blur", "gaussian")}


def contrast_about_all_channels(images, factor):
    images.sub_(mean := images.mean((1, 2, 3), keepdim=True)).mul_(factor).add_(mean).clamp_(0, 1)


def unclamped_contrast(images, factor):
    mean = colour._luma(images.mean((2, 3), keepdim=True))
    images.mul_(factor).add_(mean * (1 - factor))


def hue_backwards(images, shift):
    original["turn_hue"](images, -shift)


def blur_of_the_square(images, sigma, kernel):
    original["blur"](images, sigma**2, kernel)


def blur_of_one_sigma(images, sigma, kernel):
    original["blur"](images, sigma[:1].expand_as(sigma), kernel)


def short_gaussian(sigma, kernel):
    weights = original["gaussian"](sigma, kernel)
    return weights * (weights > 1e-3)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("contrast", contrast_about_all_channels),
        ("contrast", unclamped_contrast),
        ("saturate", original["contrast"]),
        ("turn_hue", hue_backwards),
        ("blur", blur_of_the_square),
        ("blur", blur_of_one_sigma),
        ("gaussian", short_gaussian),
        ("_LUMA", (0.299, 0.587, 0.114)),
        ("_LUMA", (0.2126, 0.7152, 0.0722)),
    ],
)
def test_planted_bugs_are_caught(name, mutant, monkeypatch):
    monkeypatch.setattr(colour, name, mutant)
    assert distance(pictures(60), everything()) > EPS


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_a_fixed_order_is_caught(order):
    images, colours = pictures(60), everything()
    found = apply_colours(images, colours._replace(order=torch.tensor([order] * 60)), 5)
    assert (found - one_by_one(images, colours, 5)).abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
def test_cuda_changes_colours_the_same_way(channels):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, colours = pictures(60, 32, 32, channels), everything()
    there = apply_colours(images.cuda(), colours, 5).cpu()
    assert (there - apply_colours(images, colours, 5)).abs().max() < EPS
