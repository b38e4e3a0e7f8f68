"""The requests of the page, and those that are refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests import clips
from tests.studio.conftest import COUNT, HOST, TOKEN, finished
from vosops.studio import runs_of_labels


def base(project):
    return f"/api/projects/{project.id}"


def put_mark(client, project, frame, labels):
    return client.put(f"{base(project)}/frames/{frame}/mark", content=runs_of_labels.encode(labels))


# What the page does


def test_drawing_following_and_exporting(client, studio, project, truth):
    assert put_mark(client, project, 0, truth[0]).json() == {"marks": [0]}
    number = client.post(
        f"{base(project)}/jobs", json={"kind": "follow", "request": {"direction": "all"}}
    ).json()
    finished(studio, project, number["number"])
    state = client.get(base(project)).json()
    assert (state["marks"], state["frames"]) == ([0], list(range(COUNT)))
    assert all(0 <= value <= 1 for value in state["confidence"])
    labels = client.get(f"{base(project)}/frames/5/labels/shown").content
    assert (runs_of_labels.decode(labels, clips.SIZE) == truth[5]).mean() > 0.99
    number = client.post(
        f"{base(project)}/jobs", json={"kind": "export", "request": {"kind": "masks"}}
    ).json()
    finished(studio, project, number["number"])
    [entry] = client.get(base(project)).json()["exports"]
    answer = client.get(f"{base(project)}/exports/{entry['name']}")
    assert len(answer.content) == entry["bytes"]
    assert "attachment" in answer.headers["content-disposition"]


def test_the_page_hears_of_each_frame(client, studio, project, truth):
    project.write_mark(0, truth[0])
    with client.websocket_connect(f"/api/events?token={TOKEN}", headers={"host": HOST}) as socket:
        client.post(f"{base(project)}/jobs", json={"kind": "follow", "request": {"direction": "all"}})
        frames, state = [], ""
        while state != "done":
            event = socket.receive_json()
            state = event["job"]["state"]
            if "frame" in event:
                frames.append(event["frame"])
    assert frames == list(range(COUNT))


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_other_pages_hear_what_a_page_changed(client, project, truth, method):
    with client.websocket_connect(f"/api/events?token={TOKEN}", headers={"host": HOST}) as socket:
        runs = runs_of_labels.encode(truth[2])
        headers = {"x-vosops-page": "page-1"}
        client.request(method, f"{base(project)}/frames/2/mark", content=runs, headers=headers)
        heard = socket.receive_json()
    assert heard == {"type": "project", "project": project.id, "by": "page-1", "frame": 2}


def test_videos_that_are_not_looked_at_are_closed(studio, tmp_path):
    names = []
    for number in range(4):
        frames = [clips.picture(boxes) for boxes in clips.moving(2 + number)]
        project = studio.open_path(clips.write_video(tmp_path / f"{number}.mp4", frames))
        studio.wait_for_times()
        studio.previews(project.id).preview(1)
        names.append(project.id)
    open_ones = [name for name in names if studio._open[name][1].source._idle is not None]
    reading = [name for name in names if studio._open[name][1]._reading is not None]
    assert set(open_ones + reading) <= set(names[-2:])
    assert studio.previews(names[0]).preview(0)


def test_a_frame_without_mask_has_no_content(client, project):
    assert client.get(f"{base(project)}/frames/0/labels/shown").status_code == 204


def test_taking_a_mark_back(client, project, truth):
    put_mark(client, project, 2, truth[2])
    assert client.delete(f"{base(project)}/frames/2/mark").json() == {"marks": []}
    assert not list(project.folder.glob("marks/*.png"))


@pytest.mark.parametrize(
    ("size", "shape"), [("preview", (48, 64)), ("thumbnail", (48, 64)), ("whole", (48, 64))]
)
def test_pictures(client, project, size, shape):
    answer = client.get(f"{base(project)}/frames/3/{size}.jpg", headers={"x-vosops-token": ""})
    assert answer.status_code == 401
    answer = client.get(f"{base(project)}/frames/3/{size}.jpg?token={TOKEN}")
    picture = np.array(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int)
    assert picture.shape == (*shape, 3)
    assert np.abs(picture - clips.picture(clips.moving(COUNT, ids=(1, 2))[3])).mean() < 12


def test_a_video_is_sent_and_opened(client, studio, tmp_path):
    frames = [clips.picture(boxes) for boxes in clips.moving(3)]
    data = clips.write_video(tmp_path / "phone.mp4", frames).read_bytes()
    name = client.post("/api/upload?name=phone.mp4", content=data).json()["id"]
    assert studio.project(name).path == (studio.work / "uploads/phone.mp4").resolve()
    studio.wait_for_times()
    state = client.get(f"/api/projects/{name}").json()
    assert (state["count"], state["exact"], state["width"]) == (3, True, 64)
    assert not state["reading"]
    [listed] = client.get("/api/projects").json()
    assert listed["title"] == "phone.mp4"


def test_a_video_of_the_same_name_keeps_the_first(client, studio, tmp_path):
    for count in (2, 3):
        frames = [clips.picture(boxes) for boxes in clips.moving(count)]
        data = clips.write_video(tmp_path / f"{count}.mp4", frames).read_bytes()
        assert client.post("/api/upload?name=a.mp4", content=data).status_code == 200
    assert sorted(path.name for path in (studio.work / "uploads").iterdir()) == ["a-2.mp4", "a.mp4"]


def test_a_file_that_is_no_video_is_refused_and_not_kept(client, studio):
    answer = client.post("/api/upload?name=letter.mp4", content=b"dear reader")
    assert answer.status_code == 400
    assert "letter.mp4" in answer.json()["error"]
    assert str(studio.work) not in answer.json()["error"]
    assert not list((studio.work / "uploads").iterdir())


def test_a_dropped_mask_is_read(client, project, truth, tmp_path):
    path = clips.write_mask(tmp_path / "given.png", truth[0])
    answer = client.post(f"{base(project)}/frames/0/read?name=given.png", content=path.read_bytes())
    assert (runs_of_labels.decode(answer.content, clips.SIZE) == truth[0]).all()
    assert project.marks == []


def test_a_black_and_white_mask_is_object_1(client, project, truth, tmp_path):
    path = clips.write_mask(tmp_path / "given.png", np.where(truth[0] == 1, 255, 0).astype(np.uint8))
    answer = client.post(f"{base(project)}/frames/0/read", content=path.read_bytes())
    assert (runs_of_labels.decode(answer.content, clips.SIZE) == (truth[0] == 1)).all()


@pytest.mark.parametrize("what", ["size", "jpeg", "noise"])
def test_a_file_that_is_no_mask_is_refused(client, studio, project, tmp_path, what):
    path = tmp_path / "given.png"
    if what == "size":
        clips.write_mask(path, np.ones((3, 3), np.uint8))
    elif what == "jpeg":
        Image.fromarray(np.ones(clips.SIZE, np.uint8)).save(path, format="JPEG")
    else:
        path.write_bytes(b"noise")
    answer = client.post(f"{base(project)}/frames/0/read?name=given.png", content=path.read_bytes())
    assert answer.status_code == 400
    assert "given.png" in answer.json()["error"]
    assert not list((studio.work / "uploads").iterdir())


def test_the_size_of_the_computation_is_kept(client, studio, project, folder):
    assert client.put(f"{base(project)}/settings", json={"size": 240}).status_code == 200
    assert client.get(base(project)).json()["size"] == 240
    assert "must be one of" in client.put(f"{base(project)}/settings", json={"size": 7}).json()["error"]


def test_the_page_itself_needs_no_token(client):
    answer = client.get("/", headers={"x-vosops-token": ""})
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "studio.js" in answer.text
    assert client.get("/assets/studio.js", headers={"x-vosops-token": ""}).status_code == 200


# What it does not do


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/projects"),
        ("POST", "/api/upload?name=a.mp4"),
        ("GET", "/api/projects/{}"),
        ("PUT", "/api/projects/{}/frames/0/mark"),
        ("GET", "/api/projects/{}/frames/0/preview.jpg"),
        ("POST", "/api/projects/{}/jobs"),
        ("DELETE", "/api/projects/{}/runs/last"),
    ],
)
def test_without_the_token_nothing_is_done(client, studio, project, token, method, path):
    answer = client.request(method, path.format(project.id), headers={"x-vosops-token": token}, content=b"")
    assert answer.status_code == 401
    assert not (studio.work / "uploads").exists()


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:9999", "localhost.evil.example:8000"]
)
def test_a_name_that_points_here_is_refused(client, host):
    assert client.get("/api/projects", headers={"host": host}).status_code == 403
    assert client.get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_requests_of_other_sites_are_refused_even_with_the_token(client, project, truth, headers):
    runs = runs_of_labels.encode(truth[0])
    answer = client.put(f"{base(project)}/frames/0/mark", content=runs, headers=headers)
    assert answer.status_code == 403
    assert project.marks == []


def test_requests_of_the_page_are_taken(client):
    for headers in (
        {"origin": f"http://{HOST}"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ):
        assert client.get("/api/projects", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"host": HOST, "origin": "http://evil.example"}, {"host": HOST}]
)
def test_the_websocket_is_guarded_too(client, headers):
    from starlette.websockets import WebSocketDisconnect

    token = "wrong" if headers == {"host": HOST} else TOKEN
    del client.headers["x-vosops-token"]
    connection = client.websocket_connect(f"/api/events?token={token}", headers=headers)
    with pytest.raises(WebSocketDisconnect), connection:
        pass


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.mp4",
        "..\\..\\outside.mp4",
        "/etc/outside.mp4",
        "a/../../outside.mp4",
        "%2e%2e%2foutside.mp4",
    ],
)
def test_the_name_of_a_sent_file_leads_nowhere(client, studio, tmp_path, name):
    frames = [clips.picture(boxes) for boxes in clips.moving(2)]
    data = clips.write_video(tmp_path / "v.mp4", frames).read_bytes()
    assert client.post("/api/upload", params={"name": name}, content=data).status_code == 200
    [path] = (studio.work / "uploads").iterdir()
    assert "outside.mp4" in path.name
    assert not list(tmp_path.glob("outside*"))


@pytest.mark.parametrize(
    "path",
    [
        "/api/projects/..%2f..",
        "/api/projects/%2e%2e",
        "/api/projects/{}/exports/..%2fproject.json",
        "/api/projects/{}/exports/..%2f..%2f..%2fsecret",
        "/api/projects/{}/exports/.vosops-part-1",
        "/assets/..%2findex.html",
        "/assets/%2e%2e/%2e%2e/server.py",
    ],
)
def test_paths_lead_nowhere(client, studio, project, path):
    (studio.work / "secret").write_text("secret")
    (project.folder / "exports").mkdir()
    (project.folder / "exports/.vosops-part-1").write_text("secret")
    answer = client.get(path.format(project.id))
    assert answer.status_code == 404
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/frames/99/preview.jpg", None, 400),
        ("GET", "/frames/0/huge.jpg", None, 404),
        ("GET", "/frames/0/labels/other", None, 404),
        ("PUT", "/frames/0/mark", b"abc", 400),
        ("POST", "/frames/0/box", b"[1, 2]", 400),
        ("POST", "/frames/0/box", b'{"box": [1, 2, "3", 4]}', 400),
        ("POST", "/frames/0/click", b'{"points": [[1, 2, 1]]}', 400),
        ("POST", "/jobs", b"not json", 400),
        ("POST", "/jobs", b'{"kind": "other", "request": {}}', 400),
        ("POST", "/jobs", b'{"kind": "follow", "request": {"direction": "up"}}', 400),
        ("POST", "/jobs/7/pause", b"", 400),
        ("POST", "/jobs/7/other", b"", 404),
        ("PUT", "/objects", b'{"objects": [{"id": 1}]}', 400),
        ("DELETE", "/runs/last", b"", 400),
    ],
)
def test_wrong_requests_are_one_line(client, project, method, path, content, status):
    answer = client.request(method, base(project) + path, content=content)
    assert answer.status_code == status
    assert "\n" not in answer.json()["error"]


def test_a_video_that_is_gone_is_said(client, studio, project, folder, engine):
    from starlette.testclient import TestClient

    from vosops.studio.server import Studio, build_app

    folder.rename(folder.with_name("elsewhere"))
    later = Studio(studio.work, engine)
    app = build_app(later, token=TOKEN, hosts=[HOST])
    with TestClient(app, base_url=f"http://{HOST}", headers={"x-vosops-token": TOKEN}) as client:
        answer = client.get(base(project))
        assert answer.status_code == 400
        assert "does not exist" in answer.json()["error"]
        assert json.dumps(client.get("/api/projects").json()).count("clip") >= 1
