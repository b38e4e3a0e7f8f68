"""The guided filter against its definition in float64, window by window."""

import pytest
import torch

from vosops.models.guided_filter import GuidedFilter, apply_coefficients, box_mean, guided_filter


def naive(guide: torch.Tensor, values: torch.Tensor, radius: int, eps: float) -> torch.Tensor:
    """Ridge regression in every window; each pixel averages the functions of the windows that hold it."""
    _, height, width = guide.shape

    def window(y: int, x: int) -> tuple[slice, slice]:
        return slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1)

    slopes = torch.zeros(height, width, 3, dtype=torch.float64)
    offsets = torch.zeros(height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            rows, columns = window(y, x)
            colours = guide[:, rows, columns].flatten(1).T
            target = values[rows, columns].flatten()
            centred = colours - colours.mean(0)
            covariance = centred.T @ centred / len(target) + eps * torch.eye(3, dtype=torch.float64)
            slopes[y, x] = torch.linalg.solve(covariance, centred.T @ (target - target.mean()) / len(target))
            offsets[y, x] = target.mean() - slopes[y, x] @ colours.mean(0)
    out = torch.zeros(height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            rows, columns = window(y, x)
            out[y, x] = slopes[rows, columns].mean((0, 1)) @ guide[:, y, x] + offsets[rows, columns].mean()
    return out


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 4, 5, 8, 30])
@pytest.mark.parametrize("size", [(13, 17), (1, 9), (1, 1)])
def test_box_mean_is_the_mean_of_the_pixels_inside(radius: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, *size, dtype=torch.float64)
    expected = torch.empty_like(x)
    for i in range(size[0]):
        for j in range(size[1]):
            window = x[:, max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1]
            expected[:, i, j] = window.mean((1, 2))
    torch.testing.assert_close(box_mean(x, radius), expected)


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("eps", [1e-3, 1e-1])
def test_equals_the_definition(radius: int, eps: float) -> None:
    torch.manual_seed(0)
    guide, values = torch.rand(3, 11, 14, dtype=torch.float64), torch.rand(2, 11, 14, dtype=torch.float64)
    expected = torch.stack([naive(guide, v, radius, eps) for v in values])
    torch.testing.assert_close(guided_filter(guide, values, radius, eps), expected)
    single = guided_filter(guide.float(), values.float(), radius, eps)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-4)


def test_finds_the_edge_of_the_image() -> None:
    guide = torch.zeros(3, 32, 32)
    guide[:, :, 16:] = 1
    coarse = torch.linspace(0, 1, 32).expand(1, 32, 32)  # a blurred edge
    sharp = guided_filter(guide, coarse, radius=4, eps=1e-3)
    assert sharp[0, :, 16].min() - sharp[0, :, 15].max() > 0.1 > coarse[0, 0, 16] - coarse[0, 0, 15]


def test_maps_that_sum_to_one_still_do() -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 20, 20).softmax(0)
    torch.testing.assert_close(guided_filter(torch.rand(3, 20, 20), maps).sum(0), torch.ones(20, 20))


def test_coefficients_of_a_small_image_apply_to_a_large_one() -> None:
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(3, 64, 64)
    small = torch.nn.functional.interpolate(ramp[None], scale_factor=0.25, mode="area")[0]
    fitted = GuidedFilter(small, 2, 1e-6).coefficients(2 * small[:1] - 0.5)
    torch.testing.assert_close(apply_coefficients(*fitted, ramp)[0], 2 * ramp[0] - 0.5, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(1, 4, 4), 2, 1e-3), "guide must be"),
        ((torch.rand(3, 4, 4), -1, 1e-3), "radius must be"),
        ((torch.rand(3, 4, 4), 2, 0.0), "eps must be"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[torch.Tensor, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedFilter(*arguments)


def test_values_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="values must be"):
        guided_filter(torch.rand(3, 4, 4), torch.rand(1, 5, 4))
