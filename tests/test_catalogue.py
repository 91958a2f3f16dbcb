"""Objects with names and licences, and which of them are held out."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from training import catalogue
from training.shards import index_shards, read_object

HEAD = "# a catalogue\nlicense=CC0\n"
OBJ = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nusemtl red\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 1 4 3\n"
TEXTURED = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl red\n"
TEXTURED += "f 1/1 3/2 2/3\nf 1/1 2/2 4/3\nf 2/1 3/2 4/3\nf 1/1 4/2 3/3\n"


def entry(number, name, category="Office", **more):
    fields = {"id": f"Shop#{name}{number}", "name": name, "category": category, "creator": "Ann\\u00e9", **more}
    fields.setdefault("model", f"/shop/{name}/a.obj")
    return "".join(f"{key}#{number}={value}\n" for key, value in fields.items())


def write_archive(path, properties, names=("Chair",), **files):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(catalogue.CATALOGUE, (HEAD + properties).encode("latin-1"))
        for name in names:
            archive.writestr(f"shop/{name}/a.obj", OBJ)
            archive.writestr(f"shop/{name}/a.mtl", "newmtl red\nKd 1 0 0\n")
        for name, data in files.items():
            archive.writestr(name.replace("__", "/"), data)
    return path


def test_objects_of_an_archive_have_names_and_licences(tmp_path):
    properties = entry(1, "Chair", modelRotation="1 0 0 0 0 1 0 -1 0") + entry(2, "Bed", "Bedroom")
    chair, bed = catalogue.archive_items(write_archive(tmp_path / "shop.sh3f", properties, ("Chair", "Bed")))
    assert chair["id"] == "Shop_Chair1" and chair["source"] == "shop.sh3f/shop/Chair/a.obj"
    assert chair["creator"] == "Anné" and chair["licence"] == "CC0" and chair["category"] == "Office"
    assert chair["rotation"] == [1, 0, 0, 0, 0, 1, 0, -1, 0] and "rotation" not in bed
    path = catalogue.extract(bed, str(tmp_path / "out"))
    assert path.read_text() == OBJ and sorted(file.name for file in path.parent.iterdir()) == ["a.mtl", "a.obj"]


def test_other_archives_are_refused(tmp_path):
    (tmp_path / "no.sh3f").write_text("text")
    with pytest.raises(ValueError, match="no.sh3f is no archive of Sweet Home 3D"):
        catalogue.archive_items(tmp_path / "no.sh3f")
    write_archive(tmp_path / "lacks.sh3f", entry(1, "Sofa"))
    with pytest.raises(ValueError, match="names the model 'shop/Sofa/a.obj' of 'Shop#Sofa1', but has no such file"):
        catalogue.archive_items(tmp_path / "lacks.sh3f")


def test_an_archive_writes_nothing_outside_and_no_more_than_it_may(tmp_path, monkeypatch):
    files = {"shop__Chair__..__..__..__evil.txt": "x"}
    (item,) = catalogue.archive_items(write_archive(tmp_path / "shop.sh3f", entry(1, "Chair"), **files))
    catalogue.extract(item, str(tmp_path / "a" / "out"))
    assert not list(tmp_path.glob("evil.txt")) and not list((tmp_path / "a").glob("evil.txt"))
    monkeypatch.setattr(catalogue, "MAX_EXTRACTED", 10)
    with pytest.raises(ValueError, match="bytes with its textures, more than 10"):
        catalogue.extract(item, str(tmp_path / "more"))


def test_a_folder_may_say_names_and_licences(tmp_path):
    path = tmp_path / catalogue.FOLDER_CATALOGUE
    assert catalogue.folder_catalogue(tmp_path) == {}
    path.write_text('{"file": "a.glb", "name": "Chair", "licence": "CC0"}\n')
    found = catalogue.folder_catalogue(tmp_path)
    assert found == {"a.glb": {"name": "Chair", "category": None, "creator": None, "licence": "CC0"}}
    path.write_text('{"file": "a.glb"}\n{"name": "Chair"}\n')
    with pytest.raises(ValueError, match="catalogue.jsonl, line 2: .* is no record such as"):
        catalogue.folder_catalogue(tmp_path)


@pytest.mark.slow
def test_an_archive_is_rendered_without_what_is_held_out(tmp_path):
    pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")
    from training import render

    properties = "".join(entry(i, name) for i, name in enumerate(("Chair", "Bed", "Lamp"), 1))
    write_archive(tmp_path / "shop.sh3f", properties, ("Chair", "Bed", "Lamp"))
    record = {"object": "other", "name": "Bed", "whole_name": True}
    (tmp_path / "out.jsonl").write_text(f"Shop_Lamp3\n{json.dumps(record)}\n")
    command = ["--objects", tmp_path / "shop.sh3f", "--without", tmp_path / "out.jsonl", "--variants", 1]
    command += ["--output", tmp_path / "data", "--size", 24, "--samples", 1, "--workers", 1]
    render.main([str(part) for part in command])
    manifest = [json.loads(line) for line in (tmp_path / "data" / "manifest.jsonl").read_text().splitlines()]
    assert [record["object"] for record in manifest] == ["Shop_Chair1", "Shop_Chair1_v1"]
    assert {record["licence"] for record in manifest} == {"CC0"} and manifest[1]["of"] == "Shop_Chair1"
    assert all(0.7 <= factor <= 1.4 for factor in manifest[1]["stretch"]) and "stretch" not in manifest[0]


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_a_variant_has_the_textures_of_another_object_of_its_category(tmp_path):
    """A red chair and a green one exchange theirs; what is held out and a bed, which are blue, give none."""
    pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")
    from training import render

    colours = {"Chair": (255, 0, 0), "Stool": (0, 255, 0), "Held": (0, 0, 255), "Bed": (0, 0, 255)}
    categories = {"Bed": "Bedroom"}
    properties = "".join(entry(i, name, categories.get(name, "Office")) for i, name in enumerate(colours, 1))
    files = {}
    for name, colour in colours.items():
        files[f"shop__{name}__a.png"] = picture(colour)
        files[f"shop__{name}__a.mtl"] = "newmtl red\nKd 1 1 1\nmap_Kd a.png\n"
        files[f"shop__{name}__a.obj"] = TEXTURED
    write_archive(tmp_path / "shop.sh3f", properties, (), **files)
    (tmp_path / "out.txt").write_text("Shop_Held3\n")
    command = ["--objects", tmp_path / "shop.sh3f", "--without", tmp_path / "out.txt", "--variants", 3]
    command += ["--output", tmp_path / "data", "--size", 24, "--samples", 1, "--workers", 1]
    render.main([str(part) for part in command])
    seen, lent = {}, {}
    for sample in map(read_object, index_shards(tmp_path / "data")):
        view = sample["targets"].reshape(-1, 4).astype(float)
        seen[sample["name"]] = int(np.argmax(view[view[:, 3] > 200, :3].mean(0)))
    for record in map(json.loads, (tmp_path / "data" / "manifest.jsonl").read_text().splitlines()):
        lent[record["object"]] = record.get("textures")
    assert [seen[name] for name in ("Shop_Chair1", "Shop_Stool2", "Shop_Bed4")] == [0, 1, 2]
    assert [seen[f"Shop_Chair1_v{i}"] for i in (1, 2, 3)] == [1, 1, 1]
    assert lent["Shop_Stool2_v1"] == "Shop_Chair1" and seen["Shop_Stool2_v1"] == 0
    assert lent["Shop_Bed4_v1"] is None and seen["Shop_Bed4_v1"] == 2
