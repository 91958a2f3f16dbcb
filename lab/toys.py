"""Procedural toys: coloured objects with a true front and back, made in Blender from a kind and a seed.

    python -m lab.toys --count 50 --output data/toys.blend                 # 50 of each kind, from seed 1000 on
    python -m lab.toys --names lab/toys.txt --output data/heldout.blend    # those of a list
    python -m training.render --objects data/toys.blend --output data/train

saves each as KIND-SEED.blend, which `training.render` renders like any other file. `build(kind, seed)` puts one mesh
object into the current scene. The front looks along +X, up is +Z (the input view of Zero123++ at azimuth 0 stands on
+X). A toy may have any size, because every object is normalised. Every kind is a function that takes a `Toy` and adds
parts to it; `KINDS` lists those that are trained on, `UNSEEN` those that are held out. Needs the package `bpy`.
"""

import colorsys
import itertools
import math
import random
from pathlib import Path

import bpy  # isort: skip  # the others can be found only after it
import bmesh
from mathutils import Euler, Matrix, Vector
from tqdm import tqdm

from training.blender import silence_blender
from training.render import read_names
from zero123plus.options import Parser, command, count, whole

WOOD = (0.08, 0.45, 0.72)  # hue, saturation, value
PATTERNS = ("plain", "plain", "plain", "stripes", "checks", "spots", "patches")
HALF_PI = math.pi / 2


class Toy:
    """A mesh under construction: primitives are added in the toy's own coordinates, each with one material.

    Args:
        rng (`random.Random`): source of every random choice.

    The primitives share the keywords `at` (x, y, z of the centre), `turn` (XYZ Euler angles in radians, applied before
    `at`) and `paint` (a material index from [`Toy.paint`]).
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.mesh = bmesh.new()
        self.materials = []
        self.hue = rng.random()

    def colour(self) -> tuple[float, float, float]:
        """A random colour as hue, saturation, value in [0, 1]. Each call moves the hue on, so that the colours of one
        toy differ; about one in seven is nearly grey.
        """
        self.hue = (self.hue + self.rng.uniform(0.17, 0.6)) % 1
        if self.rng.random() < 0.15:
            return self.hue, self.rng.uniform(0, 0.15), self.rng.uniform(0.75, 1)
        return self.hue, self.rng.uniform(0.55, 1), self.rng.uniform(0.45, 1)

    def paint(self, colour=None, pattern=None, size: float | None = None) -> int:
        """Adds a material and returns its index.

        Args:
            colour: hue, saturation, value in [0, 1]; random by default.
            pattern: one of `PATTERNS`; random by default, "plain" where a colour is given.
            size: length of a pattern's period in the toy's own units; random in [0.25, 0.6] by default.
        """
        pattern = pattern or ("plain" if colour else self.rng.choice(PATTERNS))
        first, second = (linear_rgba(colour or self.colour()), linear_rgba(self.colour()))
        size = size or self.rng.uniform(0.25, 0.6)
        self.materials.append(make_material(first, second, pattern, size, self.rng))
        return len(self.materials) - 1

    def _place(self, verts, at, turn, paint, smooth=True):
        bmesh.ops.transform(self.mesh, matrix=Matrix.Translation(at) @ Euler(turn).to_matrix().to_4x4(), verts=verts)
        for face in {face for vert in verts for face in vert.link_faces}:
            face.material_index = paint
            face.smooth = smooth

    def box(self, size, at=(0, 0, 0), turn=(0, 0, 0), paint=0, round=0.06, top=1.0):
        """A box of edge lengths `size` (x, y, z) whose edges are rounded by `round`; `top` scales its upper face."""
        verts = bmesh.ops.create_cube(self.mesh, size=1, matrix=Matrix.Diagonal((*size, 1)))["verts"]
        for vert in verts:
            if vert.co.z > 0:
                vert.co.x, vert.co.y = vert.co.x * top, vert.co.y * top
        if round:
            edges = list(
                dict.fromkeys(edge for vert in verts for edge in vert.link_edges)
            )  # not a set, whose order is random
            width = min(round, 0.45 * min(size))
            made = bmesh.ops.bevel(self.mesh, geom=edges, offset=width, segments=2, affect="EDGES", profile=0.5)
            verts = connected(made["verts"])
        self._place(verts, at, turn, paint, smooth=False)

    def ball(self, size, at=(0, 0, 0), turn=(0, 0, 0), paint=0):
        """An ellipsoid with diameters `size` (x, y, z), or one diameter."""
        size = (size,) * 3 if isinstance(size, (int, float)) else size
        scale = Matrix.Diagonal((*size, 1))
        made = bmesh.ops.create_uvsphere(self.mesh, u_segments=24, v_segments=14, radius=0.5, matrix=scale)
        self._place(made["verts"], at, turn, paint)

    def cone(self, radius, top, height, at=(0, 0, 0), turn=(0, 0, 0), paint=0, sides=28):
        """A frustum along z, centred: `radius` below, `top` above; equal radii make a cylinder, `top` 0 a cone."""
        made = bmesh.ops.create_cone(
            self.mesh, cap_ends=True, segments=sides, radius1=radius, radius2=max(top, 1e-3), depth=height
        )
        self._place(made["verts"], at, turn, paint, smooth=False)

    def lathe(self, profile, at=(0, 0, 0), turn=(0, 0, 0), paint=0, sides=28):
        """A surface of revolution around z through the points (radius, z) of `profile`."""
        verts, rings = [], []
        for radius, z in profile:
            angles = (2 * math.pi * k / sides for k in range(sides))
            rings.append([self.mesh.verts.new((radius * math.cos(a), radius * math.sin(a), z)) for a in angles])
            verts += rings[-1]
        for low, high in zip(rings, rings[1:]):
            for k in range(sides):
                self.mesh.faces.new((low[k], low[k - 1], high[k - 1], high[k]))
        bmesh.ops.recalc_face_normals(self.mesh, faces=list(dict.fromkeys(f for v in verts for f in v.link_faces)))
        self._place(verts, at, turn, paint)

    def ring(self, radius, thickness, at=(0, 0, 0), turn=(0, 0, 0), paint=0, arc=2 * math.pi):
        """A torus around z, or the part of it from angle 0 to `arc`; `thickness` is the radius of the tube."""
        sides, steps = 12, max(8, round(28 * arc / (2 * math.pi)))
        closed = arc >= 2 * math.pi
        rings = []
        for i in range(steps if closed else steps + 1):
            a = arc * i / steps
            rings.append([])
            for k in range(sides):
                b = 2 * math.pi * k / sides
                r = radius + thickness * math.cos(b)
                rings[-1].append(self.mesh.verts.new((r * math.cos(a), r * math.sin(a), thickness * math.sin(b))))
        for low, high in zip(rings, rings[1:] + rings[:1] if closed else rings[1:]):
            for k in range(sides):
                self.mesh.faces.new((low[k - 1], low[k], high[k], high[k - 1]))
        self._place([vert for ring in rings for vert in ring], at, turn, paint)

    def prism(self, outline, depth, at=(0, 0, 0), turn=(0, 0, 0), paint=0):
        """The polygon `outline` of points (y, z), extruded by `depth` along x, centred."""
        front = [self.mesh.verts.new((depth / 2, y, z)) for y, z in outline]
        back = [self.mesh.verts.new((-depth / 2, y, z)) for y, z in outline]
        faces = [self.mesh.faces.new(front), self.mesh.faces.new(back[::-1])]
        for k in range(len(outline)):
            faces.append(self.mesh.faces.new((front[k - 1], back[k - 1], back[k], front[k])))
        bmesh.ops.recalc_face_normals(self.mesh, faces=faces)
        self._place(front + back, at, turn, paint, smooth=False)

    def eyes(self, x, y, z, size, dark=None):
        """Two eyes on the front (+X), at +y and -y."""
        dark = self.paint((0, 0, 0.03)) if dark is None else dark
        for side in (-1, 1):
            self.ball(size, at=(x, side * y, z), paint=dark)

    def wheels(self, radius, width, xs, y, paint):
        """Wheels with hubs at every x of `xs`, left and right at distance `y`, standing on z = 0."""
        hub = self.paint((0, 0, 0.85))
        for x in xs:
            for side in (-1, 1):
                self.cone(radius, radius, width, at=(x, side * y, radius), turn=(HALF_PI, 0, 0), paint=paint)
                self.cone(
                    radius / 2, radius / 2, width * 1.2, at=(x, side * y, radius), turn=(HALF_PI, 0, 0), paint=hub
                )

    def finish(self, name: str) -> bpy.types.Object:
        """Links the mesh as one object to the scene and returns it."""
        # Some of Blender's operators return elements in the order of memory addresses, which differs from run to run.
        # Sorting by position makes the mesh a function of the seed.
        for elements, place in (
            (self.mesh.verts, lambda vert: vert.co),
            (self.mesh.faces, lambda face: face.calc_center_median()),
        ):
            order = sorted(elements, key=lambda element: tuple(round(x, 5) for x in place(element)))
            rank = {element: i for i, element in enumerate(order)}
            elements.sort(key=rank.get)
        data = bpy.data.meshes.new(name)
        self.mesh.to_mesh(data)
        self.mesh.free()
        for material in self.materials:
            data.materials.append(material)
        toy = bpy.data.objects.new(name, data)
        bpy.context.scene.collection.objects.link(toy)
        return toy


def connected(verts):
    """All vertices that edges connect to `verts`. (A bevel returns only the vertices that it made.)"""
    found, queue = {}, list(verts)  # a dictionary keeps the order, a set does not
    while queue:
        vert = queue.pop()
        if vert not in found:
            found[vert] = None
            queue += [edge.other_vert(vert) for edge in vert.link_edges]
    return list(found)


def linear_rgba(hsv) -> tuple[float, float, float, float]:
    """Blender's linear colour of a display colour given as hue, saturation, value."""
    return (*(channel**2.2 for channel in colorsys.hsv_to_rgb(*hsv)), 1.0)


def make_material(first, second, pattern, size, rng):
    """A Principled material whose base colour mixes two linear colours by a procedural pattern."""
    material = bpy.data.materials.new(pattern)
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    surface = nodes["Principled BSDF"]
    surface.inputs["Roughness"].default_value = rng.uniform(0.35, 0.9)
    surface.inputs["Base Color"].default_value = first
    if pattern == "plain":
        return material

    mix = nodes.new("ShaderNodeMix")
    mix.data_type = "RGBA"
    mix.inputs["A"].default_value, mix.inputs["B"].default_value = first, second
    coordinates = nodes.new("ShaderNodeTexCoord").outputs["Object"]
    mapping = nodes.new("ShaderNodeMapping")
    mapping.inputs["Rotation"].default_value = rng.choice(((0, 0, 0), (0, HALF_PI, 0), (0, 0, HALF_PI), (0.6, 0.6, 0)))
    mapping.inputs["Location"].default_value = [rng.uniform(-1, 1) for _ in range(3)]
    links.new(coordinates, mapping.inputs["Vector"])

    # Each pattern's scale makes its period `size`; the threshold turns a smooth field into two colours.
    texture, output, scale, threshold = {
        "stripes": ("ShaderNodeTexWave", "Fac", math.pi / 10, 0.5),
        "checks": ("ShaderNodeTexChecker", "Fac", 2, 0.5),
        "spots": ("ShaderNodeTexVoronoi", "Distance", 1, 0.42),
        "patches": ("ShaderNodeTexNoise", "Fac", 1, 0.54),
    }[pattern]
    field = nodes.new(texture)
    field.inputs["Scale"].default_value = scale / size
    links.new(mapping.outputs["Vector"], field.inputs["Vector"])
    step = nodes.new("ShaderNodeMath")
    step.operation, step.inputs[1].default_value = "LESS_THAN", threshold
    links.new(field.outputs[output], step.inputs[0])
    links.new(step.outputs[0], mix.inputs["Factor"])
    links.new(mix.outputs["Result"], surface.inputs["Base Color"])
    return material


def mug(toy):
    r, h = toy.rng.uniform(0.35, 0.5), toy.rng.uniform(0.8, 1.2)
    body, trim = toy.paint(), toy.paint()
    toy.lathe([(0.02, 0), (r * 0.9, 0), (r, h), (r * 0.88, h), (r * 0.78, 0.1), (0.02, 0.1)], paint=body)
    toy.ring(h * 0.28, 0.06, at=(0, r, h / 2), turn=(HALF_PI, 0, HALF_PI), paint=trim)
    toy.ring(r * 0.97, 0.05, at=(0, 0, h * toy.rng.uniform(0.2, 0.8)), paint=trim)
    toy.ball(0.2, at=(r * 0.9, 0, h * 0.5), paint=toy.paint())


def chair(toy):
    w, d, seat, back = (toy.rng.uniform(*span) for span in ((0.6, 0.9), (0.6, 0.9), (0.4, 0.7), (0.5, 1.0)))
    wood, cushion, rest = toy.paint(WOOD), toy.paint(), toy.paint()
    for x in (-1, 1):
        for y in (-1, 1):
            toy.box((0.09, 0.09, seat), at=(x * (d / 2 - 0.06), y * (w / 2 - 0.06), seat / 2), paint=wood)
    toy.box((d, w, 0.12), at=(0, 0, seat), paint=cushion)
    toy.box((0.1, w, back), at=(-d / 2 + 0.05, 0, seat + back / 2), paint=rest)
    if toy.rng.random() < 0.5:
        for side in (-1, 1):
            toy.box((d * 0.8, 0.09, 0.08), at=(0, side * w / 2, seat + back * 0.4), paint=wood)
            toy.box((0.08, 0.08, back * 0.4), at=(d * 0.35, side * w / 2, seat + back * 0.2), paint=wood)


def house(toy):
    d, w, h, roof = (toy.rng.uniform(*span) for span in ((0.7, 1.1), (0.7, 1.2), (0.5, 0.8), (0.3, 0.6)))
    wall, tiles, door, glass = toy.paint(), toy.paint(), toy.paint(), toy.paint((0.55, 0.25, 0.95))
    toy.box((d, w, h), at=(0, 0, h / 2), round=0, paint=wall)
    if toy.rng.random() < 0.5:
        toy.prism([(-w * 0.6, h), (w * 0.6, h), (0, h + roof)], d * 1.15, paint=tiles)
    else:
        toy.cone(max(d, w) * 0.8, 0.1, roof, at=(0, 0, h + roof / 2), turn=(0, 0, math.pi / 4), paint=tiles, sides=4)
    toy.box((0.06, w * 0.24, h * 0.6), at=(d / 2, 0, h * 0.3), paint=door, round=0.02)
    for side in (-1, 1):
        toy.box((0.06, w * 0.2, h * 0.28), at=(d / 2, side * w * 0.32, h * 0.6), paint=glass, round=0.02)
    toy.box((d * 0.3, 0.06, h * 0.28), at=(0, w / 2, h * 0.6), paint=glass, round=0.02)
    toy.box((0.15, 0.15, roof * 1.1), at=(-d * 0.25, w * 0.25, h + roof * 0.6), paint=door)


def rocket(toy):
    r, h = toy.rng.uniform(0.18, 0.3), toy.rng.uniform(0.9, 1.4)
    body, nose, fin = toy.paint(), toy.paint(), toy.paint()
    toy.lathe([(0.01, 0), (r * 0.7, 0), (r, h * 0.3), (r, h * 0.7)], paint=body)
    toy.lathe([(r, h * 0.7), (r * 0.6, h * 0.9), (0.01, h * 1.1)], paint=nose)
    for k in range(toy.rng.choice((3, 4))):
        a = k * 2 * math.pi / 3 + 0.5
        at = (r * 1.3 * math.cos(a), r * 1.3 * math.sin(a), 0.02)
        toy.box((r * 1.4, 0.06, h * 0.35), at=at, turn=(0, 0, a), paint=fin, top=0.5)
    toy.ball((0.12, r * 1.1, r * 1.1), at=(r * 0.92, 0, h * 0.55), paint=toy.paint((0.55, 0.3, 0.95)))
    toy.cone(r * 0.6, r * 0.4, 0.15, at=(0, 0, -0.06), paint=toy.paint((0, 0, 0.1)))


def snowman(toy):
    snow, hat, scarf, dark = toy.paint((0.6, 0.04, 0.95)), toy.paint(), toy.paint(), toy.paint((0, 0, 0.04))
    s = toy.rng.uniform(0.8, 1.1)
    toy.ball(0.9 * s, at=(0, 0, 0.4 * s), paint=snow)
    toy.ball(0.65 * s, at=(0, 0, 1.0 * s), paint=snow)
    toy.ball(0.45, at=(0, 0, 1.0 * s + 0.42), paint=snow)
    head = 1.0 * s + 0.42
    toy.ring(0.21, 0.07, at=(0, 0, head - 0.18), paint=scarf)
    toy.box((0.06, 0.12, 0.35), at=(0.3 * s, 0.12, head - 0.4), paint=scarf)
    toy.cone(0.06, 0, 0.3, at=(0.32, 0, head), turn=(0, HALF_PI, 0), paint=toy.paint((0.07, 0.95, 1)))
    toy.eyes(0.2, 0.09, head + 0.08, 0.07, dark)
    for z in (0.9, 1.05):
        toy.ball(0.08, at=(0.32 * s, 0, z * s), paint=dark)
    if toy.rng.random() < 0.7:
        toy.cone(0.32, 0.32, 0.05, at=(0, 0, head + 0.18), paint=hat)
        toy.cone(0.2, 0.18, 0.3, at=(0, 0, head + 0.33), paint=hat)
    for side in (-1, 1):
        toy.cone(0.03, 0.02, 0.6, at=(0, side * 0.5 * s, 1.15 * s), turn=(-side * 1.0, 0, 0), paint=toy.paint(WOOD))


def mushroom(toy):
    cap, stem, dots = toy.paint(), toy.paint((0.1, 0.15, 0.95)), toy.paint()
    r, h = toy.rng.uniform(0.4, 0.7), toy.rng.uniform(0.4, 0.8)
    toy.lathe([(0.01, 0), (0.24, 0), (0.17, h * 0.5), (0.18, h)], paint=stem)
    toy.lathe([(0.05, h), (r, h - 0.04), (r * 0.95, h + 0.12), (r * 0.6, h + 0.34), (0.01, h + 0.45)], paint=cap)
    for _ in range(toy.rng.randint(4, 9)):
        a, q = toy.rng.uniform(0, 2 * math.pi), toy.rng.uniform(0.2, 0.8)
        toy.ball(0.16, at=(r * q * math.cos(a), r * q * math.sin(a), h + 0.44 - 0.36 * q * q), paint=dots)
    toy.eyes(0.18, 0.08, h * 0.6, 0.07)


def car(toy):
    n, w, h = toy.rng.uniform(1.2, 1.7), toy.rng.uniform(0.6, 0.8), toy.rng.uniform(0.25, 0.4)
    body, cabin, tyre = toy.paint(), toy.paint(), toy.paint((0, 0, 0.05))
    wheel, x = toy.rng.uniform(0.16, 0.24), toy.rng.uniform(-0.25, 0.0)
    toy.box((n, w, h), at=(0, 0, wheel + h / 2), paint=body, round=0.1)
    toy.box((n * 0.5, w * 0.86, h), at=(x, 0, wheel + h * 1.45), paint=cabin, round=0.06, top=0.75)
    glass = toy.paint((0.55, 0.3, 0.9))
    toy.box((0.05, w * 0.62, h * 0.55), at=(x + n * 0.225, 0, wheel + h * 1.42), turn=(0, -0.35, 0), paint=glass)
    toy.wheels(wheel, 0.13, (-n * 0.3, n * 0.3), w / 2, tyre)
    toy.eyes(n / 2, w * 0.32, wheel + h * 0.6, 0.13, toy.paint((0.14, 0.5, 1)))
    for side in (-1, 1):
        at = (-n / 2, side * w * 0.32, wheel + h * 0.6)
        toy.box((0.05, 0.14, 0.08), at=at, paint=toy.paint((0, 0.95, 0.8)), round=0.02)


def truck(toy):
    n, w, wheel = toy.rng.uniform(0.8, 1.2), toy.rng.uniform(0.55, 0.7), toy.rng.uniform(0.14, 0.2)
    cabin, load, tyre = toy.paint(), toy.paint(), toy.paint((0, 0, 0.05))
    toy.box((n + 0.5, w * 0.8, 0.1), at=(0, 0, wheel + 0.03), paint=tyre)
    toy.box((n, w, n * toy.rng.uniform(0.4, 0.8)), at=(-0.25, 0, wheel + 0.1 + n * 0.3), paint=load)
    toy.box((0.45, w * 0.95, 0.5), at=(n / 2 + 0.05, 0, wheel + 0.3), paint=cabin)
    toy.box((0.05, w * 0.7, 0.2), at=(n / 2 + 0.27, 0, wheel + 0.4), paint=toy.paint((0.55, 0.3, 0.9)))
    toy.eyes(n / 2 + 0.27, w * 0.33, wheel + 0.15, 0.11, toy.paint((0.14, 0.5, 1)))
    toy.wheels(wheel, 0.13, (-n * 0.5, n * 0.5), w / 2, tyre)


def train(toy):
    w, wheel = toy.rng.uniform(0.5, 0.65), toy.rng.uniform(0.13, 0.2)
    boiler, cabin, trim = toy.paint(), toy.paint(), toy.paint()
    n = toy.rng.uniform(0.7, 1.0)
    toy.box((n + 0.5, w, 0.12), at=(0, 0, wheel + 0.1), paint=trim)
    toy.cone(w * 0.42, w * 0.42, n, at=(0.2, 0, wheel + 0.1 + w * 0.45), turn=(0, HALF_PI, 0), paint=boiler)
    toy.box((0.4, w, 0.75), at=(-n / 2 - 0.05, 0, wheel + 0.5), paint=cabin)
    toy.box((0.55, w * 1.2, 0.07), at=(-n / 2 - 0.05, 0, wheel + 0.9), paint=trim)
    toy.lathe([(0.07, 0), (0.08, 0.2), (0.16, 0.35), (0.01, 0.35)], at=(0.45, 0, wheel + w * 0.85), paint=trim)
    toy.ball(0.15, at=(0.2 + n / 2, 0, wheel + 0.1 + w * 0.45), paint=toy.paint((0.14, 0.6, 1)))
    toy.wheels(wheel, 0.1, (-n * 0.45, 0, n * 0.45), w / 2, toy.paint((0, 0, 0.08)))


def tree(toy):
    leaves, fruit = toy.paint(pattern="patches"), toy.paint()
    h = toy.rng.uniform(0.4, 0.8)
    toy.cone(0.13, 0.09, h, at=(0, 0, h / 2), paint=toy.paint(WOOD))
    if toy.rng.random() < 0.5:
        for k in range(3):
            toy.cone(0.55 - 0.13 * k, 0.1, 0.4, at=(0, 0, h + 0.15 + 0.28 * k), paint=leaves)
    else:
        for _ in range(5):
            at = (toy.rng.uniform(-0.25, 0.25), toy.rng.uniform(-0.25, 0.25), h + toy.rng.uniform(0.1, 0.5))
            toy.ball(toy.rng.uniform(0.45, 0.7), at=at, paint=leaves)
    for _ in range(toy.rng.randint(2, 6)):
        at = (toy.rng.uniform(0.25, 0.45), toy.rng.uniform(-0.3, 0.3), h + toy.rng.uniform(0.05, 0.3))
        toy.ball(0.14, at=at, paint=fruit)


def robot(toy):
    w, h = toy.rng.uniform(0.5, 0.8), toy.rng.uniform(0.5, 0.8)
    body, head, limb = toy.paint(), toy.paint(), toy.paint()
    toy.box((w * 0.6, w, h), at=(0, 0, 0.4 + h / 2), paint=body)
    toy.box((0.4, 0.45, 0.35), at=(0, 0, 0.62 + h), paint=head)
    toy.eyes(0.2, 0.11, 0.66 + h, 0.11, toy.paint((0.14, 0.7, 1)))
    toy.box((0.05, 0.22, 0.05), at=(0.2, 0, 0.54 + h), paint=toy.paint((0, 0, 0.1)), round=0.01)
    toy.box((0.05, w * 0.55, h * 0.4), at=(w * 0.3, 0, 0.45 + h / 2), paint=toy.paint())
    toy.cone(0.02, 0.02, 0.22, at=(0, 0, 0.88 + h), paint=limb)
    toy.ball(0.11, at=(0, 0, 1.0 + h), paint=toy.paint())
    for side in (-1, 1):
        toy.cone(0.11, 0.11, 0.45, at=(0, side * w * 0.28, 0.2), paint=limb)
        toy.cone(0.09, 0.09, h, at=(0.05, side * (w / 2 + 0.12), 0.4 + h * 0.55), turn=(0, -0.3, 0), paint=limb)


def duck(toy):
    body, bill = toy.paint(), toy.paint((0.08, 0.95, 1))
    n = toy.rng.uniform(0.8, 1.1)
    toy.ball((n, 0.65, 0.55), at=(0, 0, 0.28), paint=body)
    toy.ball((0.35, 0.3, 0.3), at=(-n * 0.45, 0, 0.45), turn=(0, 0.5, 0), paint=body)
    head = toy.rng.uniform(0.65, 0.85)
    toy.cone(0.16, 0.13, 0.4, at=(n * 0.3, 0, head - 0.2), paint=body)
    toy.ball(0.42, at=(n * 0.33, 0, head), paint=toy.paint())
    toy.ball((0.3, 0.2, 0.08), at=(n * 0.33 + 0.26, 0, head - 0.04), paint=bill)
    toy.eyes(n * 0.33 + 0.14, 0.13, head + 0.08, 0.08)
    wing = toy.paint()
    for side in (-1, 1):
        toy.ball((n * 0.5, 0.1, 0.3), at=(-0.08, side * 0.31, 0.32), paint=wing)


def fish(toy):
    body, fin = toy.paint(), toy.paint()
    n, h = toy.rng.uniform(0.9, 1.2), toy.rng.uniform(0.45, 0.75)
    toy.ball((n, 0.32, h), paint=body)
    toy.prism(
        [(0.05, 0), (-0.4, 0.32), (-0.28, 0), (-0.4, -0.32)],
        0.07,
        at=(-n * 0.45, 0, 0),
        turn=(0, 0, HALF_PI * 3),
        paint=fin,
    )
    toy.prism([(-0.3, 0), (0.2, 0), (-0.15, 0.3)], 0.06, at=(0, 0, h * 0.42), turn=(0, 0, HALF_PI * 3), paint=fin)
    for side in (-1, 1):
        toy.ball((0.25, 0.05, 0.14), at=(0.05, side * 0.18, -0.08), turn=(side * 0.5, 0.4, 0), paint=fin)
        toy.ball(0.13, at=(n * 0.32, side * 0.11, h * 0.14), paint=toy.paint((0, 0, 0.95)))
        toy.ball(0.08, at=(n * 0.34, side * 0.145, h * 0.14), paint=toy.paint((0, 0, 0.03)))


def bird(toy):
    body, wing, beak = toy.paint(), toy.paint(), toy.paint((0.1, 0.9, 1))
    toy.ball((0.7, 0.55, 0.6), at=(0, 0, 0.55), turn=(0, -0.4, 0), paint=body)
    toy.ball(0.42, at=(0.25, 0, 0.95), paint=body)
    toy.cone(0.08, 0, 0.25, at=(0.53, 0, 0.94), turn=(0, HALF_PI, 0), paint=beak)
    toy.eyes(0.4, 0.13, 1.02, 0.08)
    spread = toy.rng.uniform(0.1, 0.7)
    for side in (-1, 1):
        at = (-0.1, side * (0.27 + 0.15 * spread), 0.6)
        toy.ball((0.6, 0.08, 0.32), at=at, turn=(side * spread * 1.4, -0.4, 0), paint=wing)
        toy.cone(0.03, 0.03, 0.35, at=(0, side * 0.12, 0.17), paint=beak)
        toy.box((0.2, 0.1, 0.03), at=(0.05, side * 0.12, 0.01), paint=beak, round=0)
    toy.box((0.4, 0.25, 0.05), at=(-0.48, 0, 0.4), turn=(0, -0.5, 0), paint=wing)


def airplane(toy):
    body, wing, trim = toy.paint(), toy.paint(), toy.paint()
    n, span, r = toy.rng.uniform(1.2, 1.6), toy.rng.uniform(1.2, 1.7), toy.rng.uniform(0.13, 0.2)
    toy.ball((n, r * 2.2, r * 2.2), paint=body)
    x, z = toy.rng.uniform(-0.05, 0.2), toy.rng.choice((-0.3, 0.8)) * r
    toy.box((0.32, span, 0.05), at=(x, 0, z), paint=wing)
    toy.box((0.2, span * 0.38, 0.04), at=(-n * 0.43, 0, r * 0.4), paint=wing)
    toy.box((0.2, 0.05, 0.35), at=(-n * 0.44, 0, r + 0.1), paint=trim, top=0.6)
    toy.ball((0.35, r * 1.3, r * 1.3), at=(n * 0.18, 0, r * 0.75), paint=toy.paint((0.55, 0.35, 0.9)))
    toy.box((0.03, 0.5, 0.07), at=(n * 0.5, 0, 0), turn=(toy.rng.uniform(0, 3), 0, 0), paint=trim)
    toy.ball(0.12, at=(n * 0.5, 0, 0), paint=trim)


def boat(toy):
    hull, deck, sail = toy.paint(), toy.paint(WOOD), toy.paint()
    n, w, mast = toy.rng.uniform(1.0, 1.4), toy.rng.uniform(0.4, 0.6), toy.rng.uniform(0.8, 1.2)
    toy.ball((n, w, 0.5), at=(0, 0, 0.1), paint=hull)
    toy.ball((n * 0.93, w * 0.9, 0.2), at=(0, 0, 0.26), paint=deck)
    toy.cone(0.03, 0.03, mast, at=(0.1, 0, 0.3 + mast / 2), paint=deck)
    toy.prism(
        [(0.0, 0), (-n * 0.5, 0), (0.0, mast * 0.85)], 0.04, at=(0.06, 0, 0.42), turn=(0, 0, -HALF_PI), paint=sail
    )
    toy.prism(
        [(0.0, 0), (n * 0.35, 0), (0.0, mast * 0.7)],
        0.04,
        at=(0.14, 0, 0.42),
        turn=(0, 0, -HALF_PI),
        paint=toy.paint(),
    )
    toy.box((0.25, w * 0.5, 0.22), at=(-n * 0.25, 0, 0.4), paint=toy.paint())


def lamp(toy):
    shade, foot = toy.paint(), toy.paint()
    h, r = toy.rng.uniform(0.7, 1.1), toy.rng.uniform(0.3, 0.5)
    toy.cone(0.3, 0.2, 0.1, at=(0, 0, 0.05), paint=foot)
    toy.cone(0.04, 0.04, h, at=(-0.05, 0, h / 2), turn=(0, -0.15, 0), paint=foot)
    toy.lathe(
        [(r * 0.5, 0.45), (r, 0), (r * 0.94, 0), (r * 0.45, 0.43)],
        at=(0.1, 0, h - 0.1),
        turn=(0, -0.35, 0),
        paint=shade,
    )
    toy.ball(0.25, at=(0.12, 0, h), paint=toy.paint((0.14, 0.4, 1)))
    toy.ball(0.1, at=(0.22, 0, 0.1), paint=toy.paint())


def guitar(toy):
    body, neck, dark = toy.paint(), toy.paint(WOOD), toy.paint((0, 0, 0.05))
    n, a, b = toy.rng.uniform(0.6, 0.85), toy.rng.uniform(0.6, 0.75), toy.rng.uniform(0.45, 0.55)
    for r, z in ((a, 0.3), (b, 0.72)):
        toy.cone(r / 2, r / 2, 0.18, at=(0, 0, z), turn=(0, HALF_PI, 0), paint=body)
    toy.cone(0.11, 0.11, 0.19, at=(0.01, 0, 0.5), turn=(0, HALF_PI, 0), paint=dark)
    toy.box((0.08, 0.1, n), at=(0.08, 0, 0.8 + n / 2), paint=neck, round=0.02)
    toy.box((0.08, 0.2, 0.22), at=(0.05, 0, 0.85 + n), paint=toy.paint())
    toy.box((0.06, 0.28, 0.05), at=(0.1, 0, 0.24), paint=dark, round=0.01)


def bottle(toy):
    glass, label, cork = toy.paint(), toy.paint(), toy.paint()
    r, h, neck = toy.rng.uniform(0.22, 0.36), toy.rng.uniform(0.5, 0.9), toy.rng.uniform(0.25, 0.5)
    toy.lathe(
        [(0.01, 0), (r, 0), (r, h), (r * 0.8, h + 0.12), (0.1, h + 0.25), (0.1, h + neck), (0.01, h + neck)],
        paint=glass,
    )
    toy.cone(0.12, 0.12, 0.12, at=(0, 0, h + neck), paint=cork)
    toy.box((0.1, r * 1.2, h * 0.5), at=(r * 0.93, 0, h * 0.5), paint=label, round=0.03)
    toy.ball((0.06, 0.2, 0.2), at=(r * 0.93 + 0.06, 0, h * 0.5), paint=toy.paint())


def castle(toy):
    stone, roof, gate = toy.paint(), toy.paint(), toy.paint(WOOD)
    w, h = toy.rng.uniform(0.8, 1.1), toy.rng.uniform(0.4, 0.6)
    toy.box((w, w, h), at=(0, 0, h / 2), round=0, paint=stone)
    for x in (-1, 1):
        for y in (-1, 1):
            tall = h * toy.rng.uniform(1.2, 1.8)
            toy.cone(0.17, 0.15, tall, at=(x * w / 2, y * w / 2, tall / 2), paint=stone)
            toy.cone(0.23, 0, 0.3, at=(x * w / 2, y * w / 2, tall + 0.14), paint=roof)
    toy.box((0.08, 0.3, h * 0.65), at=(w / 2, 0, h * 0.32), paint=gate, round=0.02)
    toy.box((w * 0.4, w * 0.4, h * 0.8), at=(-w * 0.1, 0, h * 1.2), round=0, paint=stone)
    toy.cone(w * 0.35, 0, 0.35, at=(-w * 0.1, 0, h * 1.6 + 0.17), turn=(0, 0, math.pi / 4), paint=roof, sides=4)


def camera(toy):
    body, grip, dark = toy.paint(), toy.paint(), toy.paint((0, 0, 0.06))
    w, h, d = toy.rng.uniform(0.9, 1.3), toy.rng.uniform(0.6, 0.8), toy.rng.uniform(0.3, 0.45)
    toy.box((d, w, h), at=(0, 0, h / 2), paint=body)
    toy.box((d * 1.05, w * 1.02, h * 0.35), at=(0, 0, h * 0.4), paint=grip)
    lens = toy.rng.uniform(0.2, 0.3)
    toy.cone(lens, lens * 0.9, 0.3, at=(d / 2 + 0.12, 0, h * 0.45), turn=(0, HALF_PI, 0), paint=dark)
    toy.ball((0.1, lens * 1.2, lens * 1.2), at=(d / 2 + 0.26, 0, h * 0.45), paint=toy.paint((0.6, 0.6, 0.8)))
    toy.box((d * 0.7, 0.3, 0.16), at=(0, 0, h + 0.05), paint=body)
    toy.cone(0.08, 0.08, 0.1, at=(0, w * 0.36, h + 0.03), paint=toy.paint((0, 0.9, 0.9)))


def dog(toy):
    coat, ear, collar = toy.paint(), toy.paint(), toy.paint()
    n, leg = toy.rng.uniform(0.7, 1.1), toy.rng.uniform(0.25, 0.45)
    toy.ball((n * 1.1, 0.45, 0.42), at=(0, 0, leg + 0.12), paint=coat)
    for x in (-1, 1):
        for y in (-1, 1):
            toy.cone(0.08, 0.1, leg + 0.1, at=(x * n * 0.36, y * 0.13, leg / 2), paint=coat)
    x, z = n * 0.52, leg + 0.45
    toy.cone(0.16, 0.13, 0.35, at=(x - 0.05, 0, z - 0.18), paint=collar)
    toy.ball((0.42, 0.4, 0.38), at=(x, 0, z), paint=coat)
    toy.ball((0.3, 0.22, 0.18), at=(x + 0.22, 0, z - 0.07), paint=coat)
    toy.ball(0.09, at=(x + 0.37, 0, z - 0.04), paint=toy.paint((0, 0, 0.03)))
    toy.eyes(x + 0.17, 0.11, z + 0.08, 0.07)
    for side in (-1, 1):
        at = (x - 0.05, side * 0.19, z + toy.rng.choice((-0.02, 0.16)))
        toy.ball((0.16, 0.08, 0.32), at=at, turn=(side * 0.3, 0, 0), paint=ear)
    toy.cone(0.06, 0.03, 0.4, at=(-n * 0.62, 0, leg + 0.32), turn=(0, -0.6, 0), paint=ear)


def cactus(toy):
    plant, pot = toy.paint(), toy.paint()
    h = toy.rng.uniform(0.7, 1.1)
    toy.cone(0.25, 0.35, 0.35, at=(0, 0, 0.17), paint=pot)
    toy.ball((0.36, 0.36, h * 1.1), at=(0, 0, 0.35 + h / 2), paint=plant)
    for side in (-1, 1):
        z = 0.4 + h * toy.rng.uniform(0.3, 0.55)
        toy.cone(0.08, 0.08, 0.3, at=(0, side * 0.25, z), turn=(HALF_PI, 0, 0), paint=plant)
        toy.ball((0.18, 0.18, 0.42), at=(0, side * 0.4, z + 0.14), paint=plant)
    toy.ball(0.2, at=(0, 0, 0.38 + h), paint=toy.paint())
    toy.eyes(0.16, 0.07, 0.35 + h * 0.6, 0.07)
    toy.box((0.05, 0.3, 0.12), at=(0.3, 0, 0.2), paint=toy.paint(), round=0.02)


def ladybird(toy):
    shell, dark, dots = toy.paint(), toy.paint((0, 0, 0.06)), toy.paint()
    n = toy.rng.uniform(0.9, 1.1)
    toy.ball((n, 0.85, toy.rng.uniform(0.5, 0.75)), at=(0, 0, 0.2), paint=shell)
    toy.ball(0.42, at=(n * 0.45, 0, 0.2), paint=dark)
    toy.eyes(n * 0.45 + 0.16, 0.11, 0.28, 0.1, toy.paint((0, 0, 0.95)))
    for side in (-1, 1):
        for x, y in ((-0.25, 0.18), (0.05, 0.26), (0.22, 0.12)):
            toy.ball((0.18, 0.18, 0.1), at=(x, side * y, 0.47 - 0.3 * y * y), paint=dots)
            toy.cone(0.03, 0.03, 0.3, at=(x, side * 0.42, 0.02), turn=(side * 0.7, 0, 0), paint=dark)
        toy.cone(0.02, 0.02, 0.3, at=(n * 0.55, side * 0.1, 0.45), turn=(-side * 0.4, 0.4, 0), paint=dark)


def teddy(toy):
    fur, belly = toy.paint(), toy.paint()
    s = toy.rng.uniform(0.85, 1.15)
    toy.ball((0.6, 0.65 * s, 0.75), at=(0, 0, 0.4), paint=fur)
    toy.ball((0.3, 0.42, 0.45), at=(0.2, 0, 0.4), paint=belly)
    toy.ball((0.52, 0.58, 0.52), at=(0, 0, 0.95), paint=fur)
    toy.ball((0.24, 0.26, 0.2), at=(0.22, 0, 0.88), paint=belly)
    toy.ball(0.08, at=(0.34, 0, 0.92), paint=toy.paint((0, 0, 0.03)))
    toy.eyes(0.23, 0.11, 1.03, 0.07)
    for side in (-1, 1):
        toy.ball((0.12, 0.22, 0.22), at=(0, side * 0.24, 1.18), paint=fur)
        toy.ball((0.22, 0.22, 0.5), at=(0.12, side * 0.36 * s, 0.52), turn=(side * 0.7, -0.5, 0), paint=fur)
        toy.ball((0.5, 0.25, 0.25), at=(0.28, side * 0.22, 0.1), paint=fur)
        toy.ball((0.06, 0.18, 0.18), at=(0.52, side * 0.22, 0.1), paint=belly)


def helicopter(toy):
    body, rotor, glass = toy.paint(), toy.paint(), toy.paint((0.55, 0.35, 0.9))
    n = toy.rng.uniform(0.6, 0.9)
    toy.ball((0.75, 0.5, 0.5), at=(0.15, 0, 0.4), paint=body)
    toy.ball((0.42, 0.42, 0.36), at=(0.33, 0, 0.43), paint=glass)
    toy.cone(0.06, 0.12, n, at=(-n * 0.65, 0, 0.45), turn=(0, HALF_PI, 0), paint=body)
    toy.box((0.15, 0.04, 0.32), at=(-n * 1.1, 0, 0.52), paint=rotor)
    toy.cone(0.03, 0.03, 0.2, at=(0.1, 0, 0.7), paint=rotor)
    angle = toy.rng.uniform(0, math.pi)
    for k in range(2):
        toy.box((1.2, 0.09, 0.03), at=(0.1, 0, 0.8), turn=(0, 0, angle + k * HALF_PI), paint=rotor, round=0.01)
    for side in (-1, 1):
        toy.cone(0.03, 0.03, 0.8, at=(0.12, side * 0.22, 0.05), turn=(0, HALF_PI, 0), paint=rotor)
        toy.cone(0.025, 0.025, 0.22, at=(0.12, side * 0.2, 0.13), paint=rotor)


def clock(toy):
    case, face, dark = toy.paint(), toy.paint((0.12, 0.08, 0.97)), toy.paint((0, 0, 0.05))
    r, d = toy.rng.uniform(0.4, 0.55), toy.rng.uniform(0.2, 0.35)
    toy.cone(r, r, d, at=(0, 0, r + 0.1), turn=(0, HALF_PI, 0), paint=case)
    toy.cone(r * 0.85, r * 0.85, 0.04, at=(d / 2, 0, r + 0.1), turn=(0, HALF_PI, 0), paint=face)
    for length, width in ((0.55, 0.08), (0.75, 0.05)):
        a = toy.rng.uniform(-math.pi, math.pi)
        at = (d / 2 + 0.03, -math.sin(a) * r * length / 2, r + 0.1 + math.cos(a) * r * length / 2)
        toy.box((0.03, width, r * length), at=at, turn=(a, 0, 0), paint=dark, round=0)
    bell = toy.paint()
    for side in (-1, 1):
        toy.ball((0.25, 0.28, 0.22), at=(0, side * r * 0.6, 2 * r + 0.02), turn=(-side * 0.6, 0, 0), paint=bell)
        toy.cone(0.05, 0.06, 0.2, at=(0, side * r * 0.6, 0.1), turn=(side * 0.4, 0, 0), paint=bell)


def television(toy):
    case, screen = toy.paint(), toy.paint(pattern="patches")
    w, h, d = toy.rng.uniform(0.9, 1.2), toy.rng.uniform(0.65, 0.85), toy.rng.uniform(0.3, 0.6)
    toy.box((d, w, h), at=(0, 0, 0.12 + h / 2), paint=case)
    toy.box((0.06, w * 0.66, h * 0.72), at=(d / 2, w * 0.1, 0.12 + h / 2), paint=screen)
    for k in (0.3, 0.6):
        toy.ball(0.12, at=(d / 2 + 0.01, -w * 0.38, 0.12 + h * k), paint=toy.paint())
    for side in (-1, 1):
        toy.cone(
            0.02, 0.02, 0.5, at=(-0.05, side * 0.15, h + 0.32), turn=(-side * 0.6, 0, 0), paint=toy.paint((0, 0, 0.5))
        )
        toy.box((d * 0.8, 0.1, 0.14), at=(0, side * w * 0.35, 0.07), paint=toy.paint(WOOD))
    toy.box((0.1, w * 0.4, h * 0.4), at=(-d / 2, 0, 0.12 + h / 2), paint=toy.paint((0, 0, 0.1)))


def icecream(toy):
    cone, dots = toy.paint(WOOD, pattern="checks", size=0.15), toy.paint()
    scoops = toy.rng.randint(1, 3)
    toy.cone(0.04, 0.3, 0.8, at=(0, 0, 0.4), paint=cone)
    for k in range(scoops):
        toy.ball(0.62 - 0.08 * k, at=(0, 0, 0.88 + 0.36 * k), paint=toy.paint())
    top = 0.88 + 0.36 * (scoops - 1)
    toy.ball(0.2, at=(0, 0, top + 0.33), paint=toy.paint((0.98, 0.95, 0.85)))
    toy.box((0.12, 0.05, 0.45), at=(-0.12, 0.14, top + 0.32), turn=(0.4, -0.2, 0), paint=toy.paint(WOOD))
    toy.eyes(0.26, 0.1, 0.93, 0.09)
    for _ in range(6):
        a = toy.rng.uniform(1.5, 4.8)
        toy.ball(0.09, at=(0.29 * math.cos(a), 0.29 * math.sin(a), toy.rng.uniform(0.8, 1.0)), paint=dots)


def penguin(toy):
    coat, belly, beak = toy.paint(), toy.paint((0.1, 0.05, 0.95)), toy.paint((0.08, 0.95, 1))
    h = toy.rng.uniform(0.85, 1.15)
    toy.ball((0.58, 0.62, h), at=(0, 0, h / 2), paint=coat)
    toy.ball((0.4, 0.46, h * 0.75), at=(0.12, 0, h * 0.45), paint=belly)
    toy.ball(0.46, at=(0, 0, h + 0.05), paint=coat)
    toy.cone(0.08, 0, 0.22, at=(0.28, 0, h + 0.02), turn=(0, HALF_PI, 0), paint=beak)
    toy.eyes(0.19, 0.1, h + 0.12, 0.08)
    for side in (-1, 1):
        toy.ball(
            (0.2, 0.08, h * 0.55),
            at=(0, side * 0.34, h * 0.52),
            turn=(side * toy.rng.uniform(0.1, 0.8), 0, 0),
            paint=coat,
        )
        toy.ball((0.32, 0.2, 0.1), at=(0.15, side * 0.15, 0.03), paint=beak)
    toy.ring(0.23, 0.06, at=(0, 0, h * 0.84), paint=toy.paint())


def table(toy):
    wood, top = toy.paint(WOOD), toy.paint()
    d, w, h = toy.rng.uniform(0.6, 1.0), toy.rng.uniform(0.8, 1.3), toy.rng.uniform(0.5, 0.8)
    toy.box((d, w, 0.1), at=(0, 0, h), paint=top)
    if toy.rng.random() < 0.6:
        for x in (-1, 1):
            for y in (-1, 1):
                toy.cone(0.04, 0.06, h, at=(x * d * 0.42, y * w * 0.42, h / 2), paint=wood)
    else:
        toy.cone(0.08, 0.08, h, at=(0, 0, h / 2), paint=wood)
        toy.cone(0.35, 0.1, 0.1, at=(0, 0, 0.05), paint=wood)
    toy.box((0.06, w * 0.4, 0.14), at=(d / 2 - 0.05, 0, h - 0.12), paint=toy.paint(), round=0.02)
    r = toy.rng.uniform(0.08, 0.16)
    y = toy.rng.uniform(-0.3, 0.3) * w
    toy.lathe([(0.01, 0), (r, 0), (r * 0.6, 2 * r), (r * 0.9, 3 * r)], at=(0, y, h + 0.05), paint=toy.paint())
    toy.ball(2.2 * r, at=(0, y, h + 0.05 + 3.6 * r), paint=toy.paint())


def sofa(toy):
    cloth, cushion, wood = toy.paint(), toy.paint(), toy.paint(WOOD)
    d, w, back = toy.rng.uniform(0.6, 0.8), toy.rng.uniform(1.0, 1.6), toy.rng.uniform(0.35, 0.6)
    toy.box((d, w, 0.3), at=(0, 0, 0.25), paint=cloth)
    toy.box((0.2, w, back), at=(-d / 2 + 0.05, 0, 0.35 + back / 2), turn=(0, -0.15, 0), paint=cloth, round=0.1)
    for side in (-1, 1):
        toy.box((d, 0.18, 0.55), at=(0, side * w / 2, 0.35), paint=cloth, round=0.08)
        toy.box((d * 0.75, w * 0.42, 0.14), at=(0.06, side * w * 0.22, 0.44), paint=cushion)
        for x in (-1, 1):
            toy.cone(0.04, 0.06, 0.15, at=(x * d * 0.4, side * w * 0.45, 0.05), paint=wood)
    toy.ball((0.16, 0.34, 0.34), at=(-d * 0.12, toy.rng.uniform(-0.3, 0.3) * w, 0.62), paint=toy.paint())


def drum(toy):
    side, rim, skin = toy.paint(), toy.paint(), toy.paint((0.1, 0.1, 0.95))
    r, h = toy.rng.uniform(0.35, 0.55), toy.rng.uniform(0.4, 0.8)
    toy.cone(r, r, h, at=(0, 0, h / 2), paint=side)
    for z in (0.04, h - 0.04):
        toy.ring(r, 0.05, at=(0, 0, z), paint=rim)
    toy.cone(r * 0.95, r * 0.95, 0.04, at=(0, 0, h), paint=skin)
    for y, turn in ((-0.12, 0.3), (0.14, -0.2)):
        toy.cone(0.025, 0.025, 0.8, at=(0.1, y, h + 0.07), turn=(0, HALF_PI - 0.1, turn), paint=toy.paint(WOOD))
        toy.ball(0.12, at=(0.1 + 0.4 * math.cos(turn), y + 0.4 * math.sin(turn), h + 0.04), paint=rim)
    toy.ball((0.08, 0.26, 0.26), at=(r * 0.97, 0, h / 2), paint=toy.paint())


def umbrella(toy):
    cloth, handle = toy.paint(), toy.paint()
    r, h = toy.rng.uniform(0.5, 0.75), toy.rng.uniform(0.9, 1.2)
    low = h - toy.rng.uniform(0.25, 0.4)
    toy.lathe(
        [(0.01, h), (r * 0.55, h - 0.08), (r, low), (r * 0.96, low), (r * 0.5, h - 0.12), (0.01, h - 0.05)],
        paint=cloth,
    )
    toy.cone(0.025, 0.025, h + 0.1, at=(0, 0, h / 2 + 0.05), paint=toy.paint((0, 0, 0.6)))
    toy.ring(0.1, 0.035, at=(0.1, 0, 0), turn=(-HALF_PI, 0, 0), paint=handle, arc=math.pi)
    toy.ball(0.08, at=(0, 0, h + 0.08), paint=handle)


def lighthouse(toy):
    wall, rock, roof = toy.paint(pattern=toy.rng.choice(("stripes", "plain"))), toy.paint(), toy.paint()
    h, r = toy.rng.uniform(0.9, 1.3), toy.rng.uniform(0.22, 0.32)
    toy.ball((1.1, 0.9, 0.35), at=(-0.1, 0, 0), paint=rock)
    toy.cone(r, r * 0.65, h, at=(0, 0, 0.1 + h / 2), paint=wall)
    toy.cone(r * 1.05, r * 1.05, 0.06, at=(0, 0, h + 0.12), paint=roof)
    toy.cone(r * 0.5, r * 0.5, 0.22, at=(0, 0, h + 0.25), paint=toy.paint((0.14, 0.5, 1)))
    toy.cone(r * 0.75, 0, 0.22, at=(0, 0, h + 0.46), paint=roof)
    toy.box((0.1, 0.16, 0.3), at=(r * 0.93, 0, 0.3), paint=toy.paint(WOOD), round=0.02)
    for k in (0.5, 0.75):
        toy.ball((0.06, 0.1, 0.1), at=(r * (1 - 0.35 * k), 0, 0.1 + h * k), paint=toy.paint((0.55, 0.3, 0.9)))
    toy.box((0.3, 0.35, 0.25), at=(-0.3, toy.rng.choice((-0.2, 0.2)), 0.25), paint=toy.paint())


def cake(toy):
    r, tiers = toy.rng.uniform(0.45, 0.6), toy.rng.randint(1, 3)
    toy.cone(r * 1.2, r * 1.25, 0.05, at=(0, 0, 0), paint=toy.paint((0, 0, 0.9)))
    z = 0.02
    for k in range(tiers):
        h, width = toy.rng.uniform(0.25, 0.35), r * (1 - 0.28 * k)
        toy.cone(width, width, h, at=(0, 0, z + h / 2), paint=toy.paint())
        toy.ring(width, 0.05, at=(0, 0, z + h), paint=toy.paint())
        z += h
    for k in range(toy.rng.randint(1, 5)):
        a, q = 2.4 * k, 0.12 * math.sqrt(k) * 1.3
        at = (q * math.cos(a), q * math.sin(a), z)
        toy.cone(0.03, 0.03, 0.3, at=(at[0], at[1], z + 0.15), paint=toy.paint())
        toy.ball((0.06, 0.06, 0.1), at=(at[0], at[1], z + 0.34), paint=toy.paint((0.12, 0.8, 1)))
    toy.ball(0.16, at=(r, 0, 0.14), paint=toy.paint((0.98, 0.95, 0.85)))


def turtle(toy):
    shell, skin, rim = toy.paint(), toy.paint(), toy.paint()
    n, h = toy.rng.uniform(0.8, 1.1), toy.rng.uniform(0.45, 0.7)
    toy.ball((n, 0.8, h), at=(0, 0, 0.25), paint=shell)
    toy.ball((n * 1.12, 0.92, 0.16), at=(0, 0, 0.2), paint=rim)
    head = toy.rng.uniform(0.3, 0.5)
    toy.cone(0.1, 0.1, 0.4, at=(n * 0.5, 0, (0.2 + head) / 2), turn=(0, 0.9, 0), paint=skin)
    toy.ball((0.32, 0.28, 0.26), at=(n * 0.62, 0, head), paint=skin)
    toy.eyes(n * 0.62 + 0.1, 0.09, head + 0.06, 0.07)
    for x in (-1, 1):
        for side in (-1, 1):
            toy.ball((0.3, 0.2, 0.16), at=(x * n * 0.38, side * 0.42, 0.08), turn=(0, 0, x * side * 0.5), paint=skin)
    toy.cone(0.06, 0, 0.25, at=(-n * 0.6, 0, 0.15), turn=(0, -HALF_PI, 0), paint=skin)


def snail(toy):
    shell, body, swirl = toy.paint(), toy.paint(), toy.paint()
    r = toy.rng.uniform(0.32, 0.45)
    toy.ball((1.3, 0.3, 0.22), at=(0.05, 0, 0.1), paint=body)
    toy.ball((2 * r, 0.42, 2 * r), at=(-0.12, 0, 0.1 + r), paint=shell)
    for k in (0.8, 0.5, 0.22):
        toy.ring(r * k, 0.045, at=(-0.12, 0, 0.1 + r), turn=(HALF_PI, 0, 0), paint=swirl)
        for side in (-1, 1):
            toy.ring(r * k, 0.04, at=(-0.12, side * 0.19 * (1.1 - k), 0.1 + r), turn=(HALF_PI, 0, 0), paint=swirl)
    head = toy.rng.uniform(0.35, 0.55)
    toy.cone(0.13, 0.1, head, at=(0.55, 0, head / 2), turn=(0, 0.15, 0), paint=body)
    toy.ball(0.27, at=(0.6, 0, head), paint=body)
    for side in (-1, 1):
        toy.cone(0.02, 0.02, 0.25, at=(0.63, side * 0.08, head + 0.2), turn=(-side * 0.3, 0.2, 0), paint=body)
        toy.ball(0.09, at=(0.66, side * 0.12, head + 0.33), paint=toy.paint((0, 0, 0.04)))


def elephant(toy):
    skin, inner, rug = toy.paint(), toy.paint(), toy.paint()
    n, leg = toy.rng.uniform(0.8, 1.0), toy.rng.uniform(0.3, 0.45)
    toy.ball((n, 0.66, 0.64), at=(0, 0, leg + 0.2), paint=skin)
    toy.ball((n * 0.5, 0.69, 0.5), at=(-0.05, 0, leg + 0.29), paint=rug)
    for x in (-1, 1):
        for side in (-1, 1):
            toy.cone(0.12, 0.12, leg + 0.1, at=(x * n * 0.3, side * 0.2, leg / 2), paint=skin)
    x, z = n * 0.52, leg + 0.42
    toy.ball((0.48, 0.46, 0.5), at=(x, 0, z), paint=skin)
    lift = toy.rng.uniform(-0.2, 0.7)
    toy.cone(0.1, 0.08, 0.4, at=(x + 0.28, 0, z - 0.2), turn=(0, -0.3, 0), paint=skin)
    toy.cone(0.08, 0.06, 0.3, at=(x + 0.34, 0, z - 0.44 + 0.1 * lift), turn=(0, -0.3 - lift, 0), paint=skin)
    toy.eyes(x + 0.2, 0.15, z + 0.08, 0.07)
    for side in (-1, 1):
        toy.ball((0.12, 0.42, 0.5), at=(x - 0.1, side * 0.36, z + 0.04), turn=(0, 0, side * 0.4), paint=skin)
        toy.ball((0.12, 0.3, 0.36), at=(x - 0.06, side * 0.37, z + 0.04), turn=(0, 0, side * 0.4), paint=inner)
        toy.cone(0.045, 0, 0.3, at=(x + 0.3, side * 0.14, z - 0.16), turn=(0, 1.9, 0), paint=toy.paint((0, 0, 0.97)))
    toy.cone(0.03, 0.02, 0.4, at=(-n * 0.52, 0, leg + 0.15), turn=(0, 0.3, 0), paint=skin)


def submarine(toy):
    hull, tower, glass = toy.paint(), toy.paint(), toy.paint((0.55, 0.35, 0.9))
    n, r = toy.rng.uniform(1.1, 1.5), toy.rng.uniform(0.24, 0.34)
    toy.ball((n, 2 * r, 2 * r), paint=hull)
    toy.box((0.4, r * 0.9, 0.3), at=(0.05, 0, r + 0.08), paint=tower, top=0.8)
    toy.cone(0.03, 0.03, 0.35, at=(0.1, 0, r + 0.35), paint=tower)
    toy.box((0.16, 0.06, 0.06), at=(0.16, 0, r + 0.52), paint=tower, round=0.02)
    for k in (-0.25, 0.05, 0.33):
        for side in (-1, 1):
            y = r * math.sqrt(max(0.05, 1 - (2 * k) ** 2 * 0.9))
            toy.ball((0.17, 0.1, 0.17), at=(k * n, side * y * 0.95, 0.04), paint=glass)
    toy.ball((0.2, 0.28, 0.28), at=(n * 0.44, 0, 0), paint=glass)
    toy.box((0.2, 4 * r * 0.7, 0.05), at=(-n * 0.4, 0, 0), paint=tower)
    toy.box((0.2, 0.05, 4 * r * 0.6), at=(-n * 0.4, 0, 0), paint=tower)
    toy.cone(0.16, 0.16, 0.05, at=(-n * 0.52, 0, 0), turn=(0, HALF_PI, 0), paint=toy.paint())


def piano(toy):
    case, white, dark = toy.paint(), toy.paint((0, 0, 0.97)), toy.paint((0, 0, 0.04))
    w, h, d = toy.rng.uniform(0.9, 1.2), toy.rng.uniform(0.7, 1.0), toy.rng.uniform(0.25, 0.4)
    toy.box((d, w, h), at=(-d / 2, 0, h / 2), paint=case)
    toy.box((0.32, w, 0.12), at=(0.1, 0, h * 0.5), paint=case)
    toy.box((0.24, w * 0.88, 0.04), at=(0.12, 0, h * 0.5 + 0.07), paint=white, round=0)
    for k in range(7):
        toy.box((0.14, w * 0.05, 0.05), at=(0.06, w * (k - 3) * 0.115, h * 0.5 + 0.1), paint=dark, round=0)
    for side in (-1, 1):
        toy.cone(0.05, 0.05, h * 0.5, at=(0.18, side * w * 0.42, h * 0.25), paint=case)
    toy.box((0.04, w * 0.4, 0.22), at=(0.02, 0, h * 0.8), turn=(0, -0.3, 0), paint=toy.paint((0.1, 0.1, 1)), round=0)
    toy.cone(0.16, 0.2, 0.08, at=(0.55, 0, h * 0.4), paint=toy.paint())
    toy.cone(0.05, 0.05, h * 0.4, at=(0.55, 0, h * 0.2), paint=dark)
    toy.ball(0.2, at=(-d / 2, toy.rng.uniform(-0.4, 0.4) * w, h + 0.06), paint=toy.paint())


def tent(toy):
    cloth, flap, pole = toy.paint(), toy.paint(), toy.paint(WOOD)
    n, w, h = toy.rng.uniform(0.8, 1.3), toy.rng.uniform(0.5, 0.7), toy.rng.uniform(0.6, 0.9)
    toy.prism([(-w, 0), (w, 0), (0, h)], n, paint=cloth)
    toy.prism([(-w * 0.35, 0), (w * 0.35, 0), (0, h * 0.8)], 0.06, at=(n / 2, 0, 0), paint=flap)
    for end in (-1, 1):
        toy.cone(0.03, 0.03, h * 1.15, at=(end * n / 2, 0, h * 0.57), paint=pole)
        toy.ball(0.09, at=(end * n / 2, 0, h * 1.16), paint=toy.paint())
    toy.box((1.2 * n, 2.3 * w, 0.04), at=(0, 0, -0.02), paint=toy.paint(), round=0)
    toy.ball(0.2, at=(n * 0.55, w * toy.rng.uniform(-0.8, 0.8), 0.08), paint=toy.paint())


def tractor(toy):
    body, cabin, tyre = toy.paint(), toy.paint(), toy.paint((0, 0, 0.06))
    n, big = toy.rng.uniform(0.6, 0.9), toy.rng.uniform(0.3, 0.42)
    toy.box((n, 0.4, 0.32), at=(n * 0.35, 0, big + 0.1), paint=body)
    toy.box((0.45, 0.55, 0.5), at=(-n * 0.3, 0, big + 0.3), paint=cabin)
    toy.box((0.55, 0.65, 0.07), at=(-n * 0.3, 0, big + 0.58), paint=body)
    toy.box((0.05, 0.4, 0.26), at=(-n * 0.3 + 0.22, 0, big + 0.38), paint=toy.paint((0.55, 0.3, 0.9)))
    toy.cone(0.04, 0.04, 0.4, at=(n * 0.5, 0.1, big + 0.4), paint=tyre)
    toy.eyes(n * 0.85, 0.14, big + 0.12, 0.1, toy.paint((0.14, 0.5, 1)))
    hub = toy.paint()
    for r, x, width in ((big, -n * 0.3, 0.2), (big * 0.55, n * 0.65, 0.14)):
        for side in (-1, 1):
            at = (x, side * 0.36, r)
            toy.cone(r, r, width, at=at, turn=(HALF_PI, 0, 0), paint=tyre)
            toy.cone(r * 0.5, r * 0.5, width * 1.2, at=at, turn=(HALF_PI, 0, 0), paint=hub)


def trophy(toy):
    metal, foot = toy.paint((toy.rng.choice((0.12, 0.6)), toy.rng.uniform(0.1, 0.9), 0.9)), toy.paint()
    r, h = toy.rng.uniform(0.3, 0.45), toy.rng.uniform(0.5, 0.7)
    toy.box((0.5, 0.5, 0.2), at=(0, 0, 0.1), paint=foot, top=0.85)
    toy.box((0.04, 0.3, 0.12), at=(0.24, 0, 0.1), paint=toy.paint(), round=0.01)
    toy.lathe(
        [(0.2, 0.2), (0.06, 0.3), (0.06, 0.45), (r * 0.7, 0.55), (r, 0.45 + h), (r * 0.9, 0.45 + h), (0.02, 0.6)],
        paint=metal,
    )
    for side in (-1, 1):
        toy.ring(h * 0.3, 0.04, at=(0, side * r, 0.5 + h * 0.55), turn=(HALF_PI, 0, HALF_PI), paint=metal)
    toy.ball((0.08, 0.26, 0.26), at=(r * 0.85, 0, 0.45 + h * 0.6), paint=toy.paint())


def cat(toy):
    coat, chest, inner = toy.paint(), toy.paint(), toy.paint()
    h = toy.rng.uniform(0.55, 0.8)
    toy.ball((0.62, 0.5, h), at=(-0.05, 0, h / 2), paint=coat)
    toy.ball((0.3, 0.34, h * 0.7), at=(0.14, 0, h * 0.5), paint=chest)
    z = h + 0.12
    toy.ball((0.46, 0.5, 0.42), at=(0.12, 0, z), paint=coat)
    toy.eyes(0.31, 0.11, z + 0.05, 0.09, toy.paint((toy.rng.uniform(0.12, 0.5), 0.8, 0.8)))
    toy.ball(0.07, at=(0.35, 0, z - 0.03), paint=toy.paint((0.97, 0.5, 0.9)))
    for side in (-1, 1):
        toy.cone(0.12, 0, 0.26, at=(0.1, side * 0.16, z + 0.24), turn=(-side * 0.25, 0, 0), paint=coat)
        toy.cone(0.06, 0, 0.18, at=(0.15, side * 0.16, z + 0.22), turn=(-side * 0.25, 0, 0), paint=inner)
        toy.cone(0.08, 0.09, h * 0.6, at=(0.24, side * 0.11, h * 0.28), paint=coat)
        toy.ball((0.24, 0.15, 0.12), at=(0.28, side * 0.12, 0.05), paint=chest)
        toy.ball((0.4, 0.2, 0.3), at=(-0.05, side * 0.24, 0.14), paint=coat)
    bend = toy.rng.uniform(-0.6, 0.6)
    toy.cone(0.06, 0.05, 0.6, at=(-0.42, 0, 0.4), turn=(bend, -0.4, 0), paint=coat)


def blocks(toy):
    """Solids of all sorts beside and on top of each other: no kind of thing, but every kind of shape."""
    z = 0.0
    for _ in range(toy.rng.randint(2, 4)):
        h = toy.rng.uniform(0.2, 0.5)
        for y in toy.rng.choice(((0,), (-0.3, 0.3), (-0.25, 0.25), (0,))):
            x, paint = toy.rng.uniform(-0.15, 0.15), toy.paint()
            w, d = toy.rng.uniform(0.3, 0.6), toy.rng.uniform(0.3, 0.6)
            at, turn = (x, y, z + h / 2), (0, 0, toy.rng.uniform(0, math.pi))
            shape = toy.rng.choice(("box", "ball", "cylinder", "cone", "ring", "wedge"))
            if shape == "box":
                toy.box((d, w, h), at=at, turn=turn, paint=paint, top=toy.rng.choice((1, 1, 0.6)))
            elif shape == "ball":
                toy.ball((d, w, h), at=at, turn=turn, paint=paint)
            elif shape == "cylinder":
                toy.cone(w / 2, w / 2, h, at=at, paint=paint, sides=toy.rng.choice((28, 6)))
            elif shape == "cone":
                toy.cone(w / 2, toy.rng.choice((0, w / 4)), h, at=at, paint=paint, sides=toy.rng.choice((28, 4)))
            elif shape == "ring":
                toy.ring(w * 0.4, min(w * 0.15, h / 2), at=at, turn=(toy.rng.choice((0, HALF_PI)), 0, 0), paint=paint)
            else:
                toy.prism([(-w / 2, 0), (w / 2, 0), (0, h)], d, at=(x, y, z), turn=turn, paint=paint)
        z += h


def variation(toy):
    """One or two toys of other kinds, stretched and turned: shapes and sides that no kind has."""
    high = Vector((0, 0, 0))  # the upper corner of the box around the first
    for kind in toy.rng.sample([kind for kind in KINDS.values() if kind is not variation], toy.rng.choice((1, 1, 2))):
        before = set(toy.mesh.verts)
        kind(toy)
        verts = [vert for vert in toy.mesh.verts if vert not in before]
        turn = Euler((0, 0, toy.rng.uniform(0, 2 * math.pi)))
        if toy.rng.random() < 0.3:  # lies on its side, or any way
            turn = Euler([toy.rng.uniform(0, 2 * math.pi) for _ in range(3)])
        stretch = Matrix.Diagonal([toy.rng.uniform(0.6, 1.4) for _ in range(3)])
        bmesh.ops.transform(toy.mesh, matrix=(turn.to_matrix() @ stretch).to_4x4(), verts=verts)
        corners = [Vector(function(vert.co[i] for vert in verts) for i in range(3)) for function in (min, max)]
        size = toy.rng.uniform(0.5, 1) / max(corners[1] - corners[0])
        foot = Vector(((corners[0].x + corners[1].x) / 2, (corners[0].y + corners[1].y) / 2, corners[0].z))
        half = (corners[1] - corners[0]) * size / 2
        place = Vector((0, 0, high.z * 0.9))  # on top of the first
        if toy.rng.random() < 0.5:  # beside it
            angle = toy.rng.uniform(0, 2 * math.pi)
            place = Vector((math.cos(angle) * (high.x + half.x), math.sin(angle) * (high.y + half.y), 0))
        at = place if high.z else Vector((0, 0, 0))
        matrix = Matrix.Translation(at) @ Matrix.Scale(size, 4) @ Matrix.Translation(-foot)
        bmesh.ops.transform(toy.mesh, matrix=matrix, verts=verts)
        high = Vector((half.x, half.y, 2 * half.z))


def teapot(toy):
    body, trim = toy.paint(), toy.paint()
    r = toy.rng.uniform(0.4, 0.5)
    toy.ball((2 * r, 2 * r, 1.7 * r), at=(0, 0, 0.8 * r), paint=body)
    toy.ring(r * 0.5, 0.05, at=(0, -r * 1.05, 0.85 * r), turn=(HALF_PI, 0, HALF_PI), paint=trim)
    toy.cone(0.12, 0.05, 0.5, at=(0, r * 1.15, r), turn=(-0.8, 0, 0), paint=trim)
    toy.cone(r * 0.55, r * 0.2, 0.12, at=(0, 0, 1.65 * r), paint=trim)
    toy.ball(0.13, at=(0, 0, 1.65 * r + 0.1), paint=body)
    toy.ball((0.1, 0.3, 0.3), at=(r * 0.92, 0, 0.8 * r), paint=toy.paint())


def windmill(toy):
    wall, roof, sail = toy.paint(), toy.paint(), toy.paint()
    h = toy.rng.uniform(0.8, 1.1)
    toy.cone(0.4, 0.25, h, at=(0, 0, h / 2), paint=wall)
    toy.cone(0.33, 0, 0.35, at=(0, 0, h + 0.17), paint=roof)
    toy.box((0.08, 0.22, 0.35), at=(0.37, 0, 0.18), paint=toy.paint(WOOD), round=0.02)
    angle = toy.rng.uniform(0, HALF_PI)
    for k in range(4):
        a = angle + k * HALF_PI
        at = (0.36, -math.sin(a) * 0.36, h * 0.9 + math.cos(a) * 0.36)
        toy.box((0.03, 0.16, 0.7), at=at, turn=(a, 0, 0), paint=sail, round=0)
    toy.ball(0.14, at=(0.36, 0, h * 0.9), paint=roof)


def bed(toy):
    wood, sheet, pillow = toy.paint(WOOD), toy.paint(), toy.paint()
    n, w = toy.rng.uniform(1.1, 1.5), toy.rng.uniform(0.6, 1.0)
    toy.box((n, w, 0.2), at=(0, 0, 0.25), paint=wood)
    toy.box((n * 0.97, w * 0.95, 0.18), at=(0, 0, 0.4), paint=sheet)
    toy.box((0.08, w, 0.75), at=(-n / 2, 0, 0.4), paint=wood)
    toy.box((0.08, w, 0.45), at=(n / 2, 0, 0.25), paint=wood)
    toy.ball((0.35, w * 0.7, 0.2), at=(-n * 0.36, 0, 0.52), paint=pillow)


KINDS = {
    kind.__name__: kind
    for kind in (mug, chair, house, rocket, snowman, mushroom, car, truck, train, tree, robot, duck, fish, bird,
    airplane,
                 boat, lamp, guitar, bottle, castle, camera, dog, cactus, ladybird, teddy, helicopter, clock,
                 television, icecream, penguin, table, sofa, drum, umbrella, lighthouse, cake, turtle, snail, elephant,
                 submarine, piano, tent, tractor, trophy, cat, blocks, variation)
}  # fmt: skip
UNSEEN = {"teapot": teapot, "windmill": windmill, "bed": bed}


def build(kind: str, seed: int) -> bpy.types.Object:
    """Adds one toy to the current scene. The toy depends on `kind` and `seed` alone.

    Args:
        kind: a key of `KINDS` or `UNSEEN`.
        seed: any integer.

    Returns:
        The mesh object: front along +X, up along +Z, of free size and position.

    Raises:
        ValueError: if there is no such kind.
    """
    kinds = KINDS | UNSEEN
    if kind not in kinds:
        raise ValueError(f"`kind` is {kind!r}, but must be one of {', '.join(kinds)}.")
    toy = Toy(random.Random(f"{kind}-{seed}"))
    kinds[kind](toy)
    return toy.finish(f"{kind}-{seed}")


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Save procedural toys as .blend files.")
    parser.add_argument("--count", type=count, default=40, help="toys of each kind")
    parser.add_argument("--first-seed", type=whole, default=1000, help="the toys' seeds count up from here")
    parser.add_argument("--names", type=Path, help="text file of the toys to save instead, one KIND-SEED a line")
    parser.add_argument("--output", type=Path, required=True, help="folder; toys that are there are left out")
    o = parser.parse_args(argv)
    seeds = range(o.first_seed, o.first_seed + o.count)
    names = read_names(o.names) if o.names else [f"{k}-{seed}" for seed, k in itertools.product(seeds, KINDS)]
    o.output.mkdir(parents=True, exist_ok=True)
    silence_blender()
    for name in tqdm(names, unit="toy"):
        path = o.output.absolute() / f"{name}.blend"
        if path.exists():
            continue
        kind, _, seed = name.rpartition("-")
        bpy.ops.wm.read_factory_settings(use_empty=True)
        build(kind, int(seed))
        partial = path.with_suffix(".partial")
        bpy.ops.wm.save_as_mainfile(filepath=str(partial), compress=True, check_existing=False)
        partial.rename(path)


if __name__ == "__main__":
    main()
