"""A textured mesh of the object in six views: the visual hull of their silhouettes, for a quick look on a CPU.

It is no reconstruction: what no silhouette shows, such as the inside of a cup, is filled. For quality use the exports
with nerfstudio or gsplat. Needs the packages of `checks.PACKAGES`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from scipy import ndimage
from scipy.spatial import cKDTree

from pipeline import RADIUS

from .checks import check_packages
from .options import NUM_FACES
from .pictures import cut_out

MIN_GRID, MAX_GRID = 128, 192  # voxels of an edge, for meshes
POINT_GRID = 64  # for points
TRIM_SIGMA, TRIM_LEVEL = 2.5, 0.62  # voxels of `MIN_GRID`; share of a voxel's surroundings that must be solid
TRIM_KEEP = 0.9  # of the most solid voxel of a pixel
SMALL_PART = 0.1  # of the largest part's volume; smaller parts are removed
SMOOTHING, SURFACE_LEVEL = 0.7, 0.46  # voxels; a bit below a half, because smoothing takes edges away
TEXELS = 2  # of a texture, for a pixel of the views
DEPTH_TOLERANCE = 4  # voxels of `MIN_GRID` that a vertex may lie behind the depth buffer and still be seen
OUTLINE_WEIGHT = 0.05  # of colours at a view's outline, which are mixed with the background
MIN_WEIGHT = 0.02  # below which a vertex counts as unseen
# glTF (+Z front, +Y up) to the world of the cameras (+X front, +Z up)
GLTF_TO_WORLD = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


@dataclass
class Mesh:
    """A closed surface in the world of the cameras.

    Args:
        vertices: shape (V, 3).
        faces: indices of vertices, counter-clockwise from outside, shape (F, 3).
        normals: of the vertices, unit, outwards, shape (V, 3).
        corners: of the faces in the texture, (column, row) in [0, 1] from its first texel's corner, shape (F, 3, 2).
        texture: sRGB in [0, 1], shape (H, W, 3).
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    corners: np.ndarray
    texture: np.ndarray


def to_world(voxels: np.ndarray, grid: int) -> np.ndarray:
    """World coordinates of places in a grid of `grid` voxels an edge, whole numbers at the voxels' centres."""
    return (voxels + 0.5) / grid * 2 * RADIUS - RADIUS


def project(points: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projects points of shape (P, 3) into a view.

    Args:
        points: in the world.
        pose: camera-to-world matrix, OpenGL convention, shape (4, 4).
        intrinsics: shape (3, 3), in pixels.

    Returns:
        Row and column, shape (2, P), whole numbers at the centres of pixels; and the depth, shape (P,).
    """
    x, y, z = intrinsics @ np.diag([1, -1, -1]) @ pose[:3, :3].T @ (points - pose[:3, 3]).T
    return np.stack([y / z, x / z]) - 0.5, z


def grid_points(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of a grid's voxels that lie within the sphere, shape (P, 3), and which these are, booleans of shape
    (grid, grid, grid), along world X, Y and Z.
    """
    axis = to_world(np.arange(grid), grid)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    inside = np.square(points).sum(-1) <= RADIUS**2
    return points[inside], inside


def carve(alphas: np.ndarray, poses: np.ndarray, intrinsics: np.ndarray, grid: int) -> np.ndarray:
    """The visual hull: for each voxel the least opacity that a view has there, shape (grid, grid, grid).

    Args:
        alphas: opacity in [0, 1], shape (N, H, W).
        poses: shape (N, 4, 4).
        intrinsics: shape (3, 3), in pixels.
        grid: voxels of an edge.
    """
    points, inside = grid_points(grid)
    hull, least = np.zeros(inside.shape, np.float32), np.ones(len(points), np.float32)
    for alpha, pose in zip(alphas, poses):
        pixels, _ = project(points, pose, intrinsics)
        least = np.minimum(least, ndimage.map_coordinates(alpha.astype(np.float32), pixels, order=1, cval=0.0))
    hull[inside] = least
    return hull


def trim(hull: np.ndarray, shape: tuple[int, int], poses: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Removes the edges of a hull, where the views' cones meet and the object hardly ever is, as far as its
    silhouettes stay filled. On 32 held-out objects' true views volume IoU rises from 0.737 to 0.763.

    Args:
        hull: of [`carve`].
        shape: height and width of a view.
        poses: shape (N, 4, 4).
        intrinsics: shape (3, 3), in pixels.
    """
    grid = hull.shape[0]
    solid = hull > 0.5
    density = ndimage.gaussian_filter(solid.astype(np.float32), TRIM_SIGMA * grid / MIN_GRID)[solid]
    points = to_world(np.argwhere(solid), grid)
    kept = density > TRIM_LEVEL
    needed = np.zeros_like(kept)
    for pose in poses:
        pixels, _ = project(points, pose, intrinsics)
        row, column = (part.round().astype(int).clip(0, edge - 1) for part, edge in zip(pixels, shape))
        pixel = row * shape[1] + column
        best, filled = np.zeros(shape[0] * shape[1], np.float32), np.zeros(shape[0] * shape[1], bool)
        np.maximum.at(best, pixel, density)
        filled[pixel[kept]] = True
        needed |= ~filled[pixel] & (density >= TRIM_KEEP * best[pixel])
    trimmed = np.zeros_like(solid)
    trimmed[solid] = kept | needed
    trimmed = ndimage.binary_closing(trimmed) & solid  # what is kept here and there would be full of holes
    return np.where(solid & ~trimmed, 0, hull)


def keep_large_parts(hull: np.ndarray) -> np.ndarray:
    """Removes parts of less than `SMALL_PART` of the largest part's volume, and fills hollows."""
    labels, count = ndimage.label(hull > 0.5)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    kept = np.isin(labels, 1 + np.flatnonzero(sizes >= SMALL_PART * sizes.max(initial=0)))
    # A soft border of one voxel stays, so that the surface lies between voxels
    hull = np.where(ndimage.binary_dilation(kept), hull, 0)
    return np.where(ndimage.binary_fill_holes(kept) & ~kept, 1, hull)


def surface(hull: np.ndarray, faces: int):
    """The surface of a hull in the world, a closed `trimesh.Trimesh`. A Gaussian smooths what trimming cut along
    voxels, and closes the tunnels that it left.

    Args:
        hull: shape (grid, grid, grid).
        faces: triangles of the surface, about.
    """
    import trimesh
    from skimage.measure import marching_cubes

    soft = ndimage.gaussian_filter(np.pad(hull, 2), SMOOTHING)  # the pad closes it
    vertices, triangles, _, _ = marching_cubes(soft, SURFACE_LEVEL, gradient_direction="ascent")
    mesh = trimesh.Trimesh(to_world(vertices - 2, hull.shape[0]), triangles, process=False)
    return mesh.simplify_quadric_decimation(face_count=faces) if len(triangles) > faces else mesh


def unwrap(mesh, texels: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Places the faces of a `trimesh.Trimesh` in a texture.

    Args:
        mesh: of [`surface`].
        texels: along an edge of length 1.

    Returns:
        Coordinates (column, row) of the faces' corners, in [0, 1] from the first texel's corner, shape (F, 3, 2); and
        rows and columns of the texture.
    """
    import xatlas

    atlas, options = xatlas.Atlas(), xatlas.PackOptions()
    options.texels_per_unit, options.padding = texels, 2
    atlas.add_mesh(mesh.vertices, mesh.faces)
    atlas.generate(pack_options=options)
    _, corners, coordinates = atlas[0]
    return coordinates[corners].astype(np.float64), (atlas.height, atlas.width)


def bake(mesh, corners: np.ndarray, shape: tuple[int, int], colours, alphas, poses, intrinsics) -> np.ndarray:
    """The texture that views give a surface, sRGB in [0, 1], of shape (*shape, 3).

    Args:
        mesh: of [`surface`].
        corners: of [`unwrap`], as is `shape`.
        colours, alphas, poses, intrinsics: of the views, as [`colour`] takes them.
    """
    corners = corners * shape[::-1] - 0.5  # in texels, whole numbers at their centres
    canvas = PIL.Image.new("I", shape[::-1])
    draw = PIL.ImageDraw.Draw(canvas)
    for i, triangle in enumerate(corners.round(3).reshape(-1, 6).tolist()):
        draw.polygon(triangle, fill=i + 1, outline=i + 1)
    rows, columns = np.nonzero(np.asarray(canvas))
    face = np.asarray(canvas)[rows, columns] - 1
    # Weights of the corners at each texel, which may lie half a texel outside of its triangle
    a, b, c = (corners[face, i] for i in range(3))
    edges = np.stack([b - a, c - a], axis=-1) + 1e-9 * np.eye(2)
    weights = np.linalg.solve(edges, (np.stack([columns, rows], axis=-1) - a)[..., None])[..., 0]
    weights = np.c_[1 - weights.sum(1), weights].clip(0, 1)[..., None]
    weights /= weights.sum(1, keepdims=True)
    points, normals = ((weights * of[mesh.faces[face]]).sum(1) for of in (mesh.vertices, mesh.vertex_normals))
    texture, known = np.zeros((*shape, 3)), np.zeros(shape, bool)
    seen = colour(points, normals, colours, alphas, poses, intrinsics, buffer_size=colours.shape[1])
    texture[rows, columns], known[rows, columns] = seen, True
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return texture[tuple(nearest)]


def colour(points, normals, views, alphas, poses, intrinsics, buffer_size: int) -> np.ndarray:
    """Colours of points of a surface, shape (P, 3), from the views that see them.

    A depth buffer of each view decides what it sees. The weight of a view is the square of the cosine between normal
    and direction to the camera, so that seams are blended. A point that no view sees has the mean colour of the
    nearest that are seen.

    Args:
        points: shape (P, 3).
        normals: shape (P, 3).
        views: in [0, 1], shape (N, H, W, 3).
        alphas: shape (N, H, W).
        poses: shape (N, 4, 4).
        intrinsics: shape (3, 3), in pixels.
        buffer_size: pixels of an edge of the depth buffer, at most so many that it has about one point a pixel.
    """
    spacing = 2 * RADIUS / MIN_GRID
    total, weights = np.zeros((len(points), 3)), np.zeros(len(points))
    for view, alpha, pose in zip(views, alphas, poses):
        pixels, depth = project(points, pose, intrinsics)
        scale = min(1.0, buffer_size / view.shape[0])
        row, column = np.clip((pixels * scale).round().astype(int), 0, int(view.shape[0] * scale))
        buffer = np.full((int(view.shape[0] * scale) + 1,) * 2, np.inf)
        np.minimum.at(buffer, (row, column), depth)
        # The least of 3 x 3 closes gaps
        visible = depth < ndimage.minimum_filter(buffer, 3)[row, column] + DEPTH_TOLERANCE * spacing
        direction = pose[:3, 3] - points
        cosine = (normals * direction).sum(1) / np.linalg.norm(direction, axis=1)
        # The outline's pixels are mixed with the background
        solid = ndimage.map_coordinates(ndimage.minimum_filter(alpha, 3), pixels, order=1, mode="constant")
        weight = visible * np.clip(cosine, 0, 1) ** 2 * (OUTLINE_WEIGHT + (1 - OUTLINE_WEIGHT) * solid)
        sampled = [ndimage.map_coordinates(view[..., i], pixels, order=1, mode="nearest") for i in range(3)]
        total += weight[:, None] * np.stack(sampled, axis=-1)
        weights += weight
    seen = weights > MIN_WEIGHT
    colours = total / np.maximum(weights, 1e-9)[:, None]
    if seen.any() and not seen.all():
        _, nearest = cKDTree(points[seen]).query(points[~seen], k=min(8, int(seen.sum())))
        colours[~seen] = colours[seen][nearest.reshape(len(nearest), -1)].mean(1)
    return colours


def find_solid(views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray, grid: int):
    """The solid that views show: the trimmed hull, shape (grid, grid, grid), and colours of shape (N, H, W, 3),
    opacities of shape (N, H, W) and poses of shape (N, 4, 4) of those views that have a silhouette.

    Args:
        views: RGB pictures of one size, on a plain background, or RGBA, whose alpha is taken.
        poses: camera-to-world matrices in the OpenGL convention, shape (N, 4, 4).
        intrinsics: shape (3, 3), in pixels.
        grid: voxels of an edge.

    Raises:
        ValueError: if fewer than two views have a silhouette, or their silhouettes have nothing in common.
    """
    cut = [view if view.mode == "RGBA" else cut_out(view, f"view_{i}") for i, view in enumerate(views)]
    pixels = np.stack([np.asarray(view, np.float32) / 255 for view in cut])
    colours, alphas = pixels[..., :3], pixels[..., 3]
    # A view that shows nothing, or nothing but the object, says nothing about the outline
    useful = [i for i, alpha in enumerate(alphas) if 0 < (alpha > 0.5).mean() < 0.98]
    if len(useful) < 2:
        raise ValueError(f"{len(useful)} of {len(views)} views have a silhouette, but a mesh needs at least 2.")
    colours, alphas, poses = colours[useful], alphas[useful], poses[useful]
    hull = carve(alphas, poses, intrinsics, grid)
    if not (hull > 0.5).any():
        raise ValueError("The views' silhouettes have no point in common: they do not show one object.")
    return keep_large_parts(trim(hull, alphas.shape[1:], poses, intrinsics)), colours, alphas, poses


def build_mesh(
    views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray, faces: int = NUM_FACES
) -> Mesh:
    """Makes a mesh, of about so many faces, of six views. For arguments and errors see [`find_solid`] and
    [`check_packages`].
    """
    check_packages("glb")
    grid = int(np.clip(views[0].height, MIN_GRID, MAX_GRID))
    hull, *seen = find_solid(views, poses, intrinsics, grid)
    mesh = surface(hull, faces)
    corners, shape = unwrap(mesh, TEXELS * views[0].height)
    texture = bake(mesh, corners, shape, *seen, intrinsics)
    return Mesh(mesh.vertices.view(np.ndarray), mesh.faces.view(np.ndarray), mesh.vertex_normals, corners, texture)


def surface_points(views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray):
    """Points on the surface, shape (P, 3), and their colours, uint8 of shape (P, 3). For arguments and errors see
    [`find_solid`].
    """
    hull, colours, alphas, poses = find_solid(views, poses, intrinsics, POINT_GRID)
    solid = np.pad(hull > 0.5, 1)
    outwards = -np.stack(np.gradient(ndimage.gaussian_filter(solid.astype(np.float32), 1)), axis=-1)
    border = solid & ~ndimage.binary_erosion(solid)
    points = to_world(np.argwhere(border) - 1, POINT_GRID)
    normals = outwards[border] / np.maximum(np.linalg.norm(outwards[border], axis=1, keepdims=True), 1e-9)
    found = colour(points, normals, colours, alphas, poses, intrinsics, POINT_GRID)
    return points, np.round(255 * found.clip(0, 1)).astype(np.uint8)


def write_glb(path: Path, mesh: Mesh):
    """Writes a binary glTF file: metres, +Y up, the input view's side towards +Z, matte, with a texture."""
    import trimesh

    # glTF has one place in the texture for each vertex, so that those at seams are written more than once
    corners = np.c_[mesh.faces.ravel(), mesh.corners.reshape(-1, 2)]
    corners, faces = np.unique(corners, axis=0, return_inverse=True)
    vertex, coordinates = corners[:, 0].astype(int), corners[:, 1:] * (1, -1) + (0, 1)  # trimesh counts from below
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=PIL.Image.fromarray(np.round(255 * mesh.texture.clip(0, 1)).astype(np.uint8)),
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    to_gltf = GLTF_TO_WORLD[:3, :3]  # a row times the matrix is the inverse of a rotation times a column
    solid = trimesh.Trimesh(
        mesh.vertices[vertex] @ to_gltf,
        faces.reshape(-1, 3),
        vertex_normals=mesh.normals[vertex] @ to_gltf,
        visual=trimesh.visual.TextureVisuals(coordinates, material=material),
        process=False,
    )
    path.write_bytes(trimesh.exchange.gltf.export_glb(trimesh.Scene(solid), include_normals=True))
