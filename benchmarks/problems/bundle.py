"""Bundle adjustment in small: cameras and points from their images, with made-up data.

Each camera has a rotation vector, a translation, a focal length and two coefficients of radial distortion, as in
Agarwal et al. The scene can be moved, turned and scaled as a whole: the Jacobian has seven singular values of zero.

Source: Agarwal, Snavely, Seitz & Szeliski 2010, Bundle adjustment in the large,
    https://doi.org/10.1007/978-3-642-15552-9_3
"""

from __future__ import annotations

import torch
from torch import Tensor

from problems.fit import Fit
from problems.models import rand, randn
from problems.problem import Function, data

PER_CAMERA, PER_POINT = 9, 3
TINY = 1e-20  # added to a squared angle, so that its root is differentiable at zero


def rotated(vectors: Tensor, points: Tensor) -> Tensor:
    """Points turned about the axes of rotation vectors by their lengths (Rodrigues' formula)."""
    angle = (vectors.square().sum(-1, keepdim=True) + TINY).sqrt()
    axis = vectors / angle
    along = (axis * points).sum(-1, keepdim=True)
    cosine = torch.cos(angle)
    turned: Tensor = cosine * points + torch.sin(angle) * torch.linalg.cross(axis, points) + (1 - cosine) * along * axis
    return turned


def images(cameras: Tensor, points: Tensor) -> Tensor:
    """Where each camera sees the point of the same row, in pixels."""
    seen = rotated(cameras[:, :3], points) + cameras[:, 3:6]
    flat = -seen[:, :2] / seen[:, 2:]
    square = flat.square().sum(1, keepdim=True)
    focal, first, second = cameras[:, 6:7], cameras[:, 7:8], cameras[:, 8:9]
    return focal * (1 + square * (first + second * square)) * flat


def reprojection(n_cameras: int, which_camera: Tensor, which_point: Tensor, seen: Tensor) -> Function:
    def residuals(x: Tensor) -> Tensor:
        cameras = x[: n_cameras * PER_CAMERA].reshape(-1, PER_CAMERA)
        points = x[n_cameras * PER_CAMERA :].reshape(-1, PER_POINT)
        return (images(cameras[which_camera], points[which_point]) - seen.to(x)).reshape(-1)

    return residuals


def scene(n_cameras: int, n_points: int, seed: int, share: float = 0.7, off: float = 1.0, noise: float = 0.5) -> Fit:
    """Cameras on a circle around a cloud of points, each of which sees some of them.

    Args:
        n_cameras, n_points: numbers of both.
        seed: of all that is random.
        share: of the points that a camera sees; every point is seen by the first two cameras at least.
        off: how far the start is from the truth; at 1, a tenth of a radian and a tenth of the cloud.
        noise: standard deviation of the images, in pixels.
    """
    points = rand(seed, n_points, 3) - 0.5
    turn = torch.linspace(0, 2.0, n_cameras, dtype=torch.float64)[:, None] * data(0, 1, 0)
    cameras = torch.cat(
        (
            turn + 0.05 * randn(seed + 1, n_cameras, 3),
            data(0, 0, -3) + 0.1 * randn(seed + 2, n_cameras, 3),
            500 + 20 * randn(seed + 3, n_cameras, 1),
            data(-0.1, 0.01) + 0.01 * randn(seed + 4, n_cameras, 2),
        ),
        1,
    )
    sees = rand(seed + 5, n_cameras, n_points) < share
    sees[:2] = True
    which_camera, which_point = sees.nonzero(as_tuple=True)
    seen = images(cameras[which_camera], points[which_point])
    seen = seen + noise * randn(seed + 6, *seen.shape)
    sizes = data(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 25, 0.01, 0.001)
    start = torch.cat(
        (
            (cameras + off * sizes * randn(seed + 7, n_cameras, PER_CAMERA)).reshape(-1),
            (points + off * 0.1 * randn(seed + 8, n_points, PER_POINT)).reshape(-1),
        )
    )
    residuals = reprojection(n_cameras, which_camera, which_point, seen)
    return Fit(f"bundle-{len(start)}", residuals, start)


def fits() -> list[Fit]:
    return [
        scene(2, 24, seed=1),
        scene(3, 15, seed=11),
        scene(4, 30, seed=21),
        scene(6, 40, seed=31),
        scene(5, 25, seed=41, off=3.0)._replace(name="bundle-120-far"),
        scene(4, 20, seed=51, noise=0.0)._replace(name="bundle-96-exact", minima=(0.0,)),
    ]
