"""The server behind the page: an ASGI application of Starlette's, over a folder of projects."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from anyio import to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from vosops.io.errors import InputError, VosopsError, disk_errors
from vosops.io.frames import FrameSource
from vosops.io.labels import read_labels
from vosops.io.masks import IGNORE
from vosops.io.seeking import SeekableVideo

from . import runs_of_labels
from .assist import ClickTool, grab_cut
from .corrections import again
from .events import Hub
from .export import EXPORT_KINDS, Exporter, command
from .follow import Engine, FollowRequest, own_reader
from .guard import Guard
from .jobs import Job, JobQueue, Perform, said
from .previews import Previews
from .project import CACHE, EXPORTS, PROJECT, Project, StudioObject, projects_in

__all__ = ["AbsentError", "Studio", "build_app"]

Choice = TypeVar("Choice")

STATIC = Path(__file__).parent / "static"
UPLOADS, PROJECTS = "uploads", "projects"
_MOST_MASK_BYTES = 64 << 20
_SPARE_BYTES = 256 << 20  # of the disk, that an upload leaves free
_SIZES = (240, 360, 480, 720, 1080, -1)
_MOST_DECODERS = 2  # of projects that are looked at in turn; a 4K decoder holds some hundred megabytes
_SECONDS_TO_REST = 10.0  # that a frame in progress has to be finished in when the server ends
_PAGE_HEADER, _LONGEST_PAGE = "x-vosops-page", 40
_RUNS_TYPE = "application/octet-stream"
_PICTURES = {"preview": Previews.preview, "thumbnail": Previews.thumbnail, "whole": Previews.whole}


class AbsentError(LookupError):
    """A request is about something that does not exist."""


class Studio:
    """Projects in a work folder, the engine and the queue: everything but HTTP.

    Args:
        work: The work folder; made when something is written. Uploads, projects and exports are in it, and nothing is
            written elsewhere.
        engine: Follows objects.
        click: What a click selects with; None: no such tool.
    """

    def __init__(self, work: Path, engine: Engine, click: ClickTool | None = None) -> None:
        self.work = work
        self.engine = engine
        self.click = click
        self.hub = Hub()
        self._lock = threading.RLock()
        self._open: dict[str, tuple[Project, Previews]] = {}
        self._looked_at: list[str] = []
        self._closing = threading.Event()
        self._readers: dict[str, threading.Thread] = {}
        engine.offer = self._offer
        exporter = Exporter(engine.settings_of)
        perform = Perform({"follow": engine.follow, "export": exporter.export}, continuing=["follow"])
        self.queue = JobQueue(perform, self.hub.publish)

    def open_path(self, path: Path) -> Project:
        """Open a video file or a folder of frames: its project, or a new one.

        Raises:
            InputError: It cannot be used.
        """
        with self._lock:
            return self._adopt(Project.create(self.work / PROJECTS, path))

    def project(self, name: str) -> Project:
        """Return the project of an id.

        Raises:
            AbsentError: There is none.
            InputError: It cannot be opened.
        """
        return self._entry(name)[0]

    def previews(self, name: str) -> Previews:
        """Return the small pictures of a project; see :meth:`project`."""
        previews = self._entry(name)[1]
        with self._lock:
            self._looked_at = [*(other for other in self._looked_at if other != name), name]
            rest, self._looked_at = self._looked_at[:-_MOST_DECODERS], self._looked_at[-_MOST_DECODERS:]
        for other in rest:
            self._open[other][1].close()
        return previews

    def _entry(self, name: str) -> tuple[Project, Previews]:
        with self._lock:
            if name not in self._open:
                folder = self.work / PROJECTS / name
                if not re.fullmatch(r"[a-z0-9-]+", name) or not (folder / PROJECT).is_file():
                    raise AbsentError(name)
                self._adopt(Project(folder))
            return self._open[name]

    def _adopt(self, project: Project) -> Project:
        if project.id in self._open:
            return self._open[project.id][0]
        reader: FrameSource = project.source
        settled = threading.Event() if isinstance(reader, SeekableVideo) else None
        previews = Previews(own_reader(reader), project.folder / CACHE, settled=settled)
        self._open[project.id] = (project, previews)
        self.queue.adopt(project)
        if settled is not None:
            arguments = (project, previews, settled)
            thread = threading.Thread(target=self._read_times, args=arguments, name="vosops-studio-times")
            self._readers[project.id] = thread
            thread.start()
        return project

    def _read_times(self, project: Project, previews: Previews, settled: threading.Event) -> None:
        """Find where each frame is, while the page shows the first ones."""
        source = project.source
        assert isinstance(source, SeekableVideo)
        try:
            with contextlib.suppress(VosopsError):
                if source.read_times(self._closing.is_set):
                    previews.replace_source(source.twin())
        finally:
            settled.set()
            with self._lock:
                self._readers.pop(project.id, None)
            self.hub.publish({"type": "project", "project": project.id})

    def wait_for_times(self) -> None:
        """Return when every open video was read through."""
        with self._lock:
            readers = list(self._readers.values())
        for thread in readers:
            thread.join()

    def _offer(self, project: Project, frame: int, image: Any) -> None:
        self._open[project.id][1].offer(frame, image)

    def pause(self) -> bool:
        """Stop what is in progress permanently; return whether it is a job, which may take a frame's time."""
        self._closing.set()
        return self.queue.pause_all()

    def resume(self, project: Project, number: int) -> tuple[Job, int | None]:
        """Continue a paused job; where it has passed a frame that was corrected since, follow again from that frame.

        Returns:
            The job, which is another one where it follows again, and the frame that it follows again from.

        Raises:
            InputError: There is no such job, or it is not paused.
        """
        job = self.queue.paused(project, number)
        instead = again(project, job) if job.kind == "follow" else None
        if instead is None:
            return self.queue.resume(project, number), None
        self.queue.stop(project, number)
        return self.queue.submit(project, "follow", instead.request), instead.frame

    def close(self) -> None:
        """Pause the jobs and close the videos."""
        self.pause()
        self.queue.close()
        self.wait_for_times()
        with self._lock:
            for _, previews in self._open.values():
                previews.close()

    def state(self, project: Project) -> dict[str, Any]:
        """Return all that the page shows of a project."""
        settings = self.engine.settings_of(project)
        exports = project.folder / EXPORTS
        files = sorted(exports.iterdir(), key=os.path.getmtime) if exports.is_dir() else []
        return {
            **project.state(),
            "reading": project.id in self._readers,
            "jobs": self.queue.jobs(project)[:50],
            "exports": [
                {"name": file.name, "bytes": file.stat().st_size}
                for file in files
                if not file.name.startswith(".")
            ],
            "export_kinds": [
                {"kind": kind, "title": entry.title, "about": entry.about}
                for kind, entry in EXPORT_KINDS.items()
            ],
            "model": settings.model,
            "weights": settings.weights_notice,
            "size": settings.size,
            "sizes": sorted({*_SIZES, settings.size}, key=lambda size: size if size > 0 else 1 << 30),
            "device": str(settings.place),
            "click": self.click.title if self.click else None,
            "command": command(project, settings),
        }


def build_app(studio: Studio, *, token: str, hosts: list[str]) -> Starlette:
    """Return the ASGI application.

    Args:
        studio: What it serves.
        token: What a request must have; see :class:`vosops.studio.guard.Guard`.
        hosts: The addresses that it answers to, with ports.
    """
    api = _Api(studio)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # its latest checkpoint is on the disk
            closing = to_thread.run_sync(studio.close, abandon_on_cancel=True)
            await asyncio.wait_for(closing, _SECONDS_TO_REST)

    one = "/api/projects/{project}"
    routes = [
        Route("/", _page),
        Mount("/assets", StaticFiles(directory=STATIC / "assets", check_dir=False)),
        Route("/api/projects", api.projects),
        Route("/api/upload", api.upload, methods=["POST"]),
        WebSocketRoute("/api/events", api.events),
        Route(one, api.state),
        Route(one + "/objects", api.write_objects, methods=["PUT"]),
        Route(one + "/settings", api.write_settings, methods=["PUT"]),
        Route(one + "/frames/{frame:int}/{size}.jpg", api.picture),
        Route(one + "/frames/{frame:int}/mark", api.write_mark, methods=["PUT"]),
        Route(one + "/frames/{frame:int}/mark", api.remove_mark, methods=["DELETE"]),
        Route(one + "/frames/{frame:int}/labels/{layer}", api.labels),
        Route(one + "/frames/{frame:int}/box", api.box, methods=["POST"]),
        Route(one + "/frames/{frame:int}/click", api.click, methods=["POST"]),
        Route(one + "/frames/{frame:int}/read", api.read_mask, methods=["POST"]),
        Route(one + "/jobs", api.submit, methods=["POST"]),
        Route(one + "/jobs/{number:int}/{action}", api.job, methods=["POST"]),
        Route(one + "/runs/last", api.discard, methods=["DELETE"]),
        Route(one + "/exports/{name}", api.download),
    ]
    guard = Middleware(Guard, token=token, hosts=hosts, open_paths=("/assets/", "/favicon.ico"))
    return Starlette(
        routes=routes,
        middleware=[guard],
        exception_handlers={VosopsError: _say, AbsentError: _say_absent},  # type: ignore[dict-item]
        lifespan=lifespan,
    )


async def _page(request: Request) -> Response:
    page = STATIC / "index.html"
    if not page.is_file():
        return PlainTextResponse(
            "the page's files are missing: see docs/studio.md on how they are built", 500
        )
    return FileResponse(page, headers={"cache-control": "no-store"})


async def _say(request: Request, error: Exception) -> Response:
    assert isinstance(error, VosopsError)
    return JSONResponse({"error": said(error)}, 400)


async def _say_absent(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "there is no such thing here"}, 404)


class _Api:
    """The requests of the page; each is one method."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    async def projects(self, request: Request) -> Response:
        return JSONResponse(list(projects_in(self.studio.work / PROJECTS)))

    async def upload(self, request: Request) -> Response:
        """Take a video's bytes as they are; ``name`` gives the end of the file's name and nothing else."""
        name = _safe_name(request.query_params.get("name", ""))
        folder = self.studio.work / UPLOADS
        length = request.headers.get("content-length")
        with disk_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            if length and length.isdecimal() and int(length) + _SPARE_BYTES > shutil.disk_usage(folder).free:
                raise VosopsError(f"{name} has {int(length)} bytes, more than the disk has free: make room")
            part = folder / f".part-{os.urandom(8).hex()}"
            try:
                with part.open("xb") as file:
                    async for chunk in request.stream():
                        await run_in_threadpool(file.write, chunk)
                path = _free_name(folder, name)
                os.replace(part, path)
            except ClientDisconnect:
                return Response(status_code=400)
            finally:
                part.unlink(missing_ok=True)
        try:
            project = await run_in_threadpool(self.studio.open_path, path)
        except VosopsError as error:
            path.unlink()
            raise InputError(str(error).replace(str(path), name)) from error
        return JSONResponse({"id": project.id})

    async def events(self, socket: WebSocket) -> None:
        await socket.accept()
        with self.studio.hub.listen() as queue:
            sender = asyncio.create_task(_send_all(socket, queue))
            try:
                while True:
                    await socket.receive_text()
            except WebSocketDisconnect:
                pass
            finally:
                sender.cancel()

    async def state(self, request: Request) -> Response:
        project = await self._project(request)
        return JSONResponse(await run_in_threadpool(self.studio.state, project))

    async def write_objects(self, request: Request) -> Response:
        project, content = await self._project(request), await _json(request)
        try:
            objects = [StudioObject(int(item["id"]), str(item["name"])) for item in content["objects"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("objects must be a list of {id, name}") from error
        await run_in_threadpool(project.write_objects, objects)
        self._changed(request, project)
        return JSONResponse({})

    async def write_settings(self, request: Request) -> Response:
        project, content = await self._project(request), await _json(request)
        size = content.get("size")
        if size not in _SIZES and size != self.studio.engine.settings.size:
            raise InputError(f"size must be one of {', '.join(map(str, _SIZES))}, got {size!r}")
        await run_in_threadpool(project.write_settings, {**project.settings, "size": size})
        self._changed(request, project)
        return JSONResponse({})

    async def picture(self, request: Request) -> Response:
        project, frame = await self._frame(request)
        make = _chosen(_PICTURES, request.path_params["size"])
        content = await run_in_threadpool(make, self.studio.previews(project.id), frame)
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    async def labels(self, request: Request) -> Response:
        project, frame = await self._frame(request)
        layer = request.path_params["layer"]
        if layer not in ("shown", "mark", "result", "before"):
            raise AbsentError(layer)

        def read() -> bytes | None:
            found = project.labels(frame, layer)
            return None if found is None else runs_of_labels.encode(found)

        return _runs(await run_in_threadpool(read))

    async def write_mark(self, request: Request) -> Response:
        project, frame = await self._frame(request)
        data = await _body(request, _MOST_MASK_BYTES)

        def write() -> None:
            project.write_mark(frame, runs_of_labels.decode(data, project.source.size))

        await run_in_threadpool(write)
        self._changed(request, project, frame=frame)
        return JSONResponse({"marks": project.marks})

    async def remove_mark(self, request: Request) -> Response:
        project, frame = await self._frame(request)
        await run_in_threadpool(project.remove_mark, frame)
        self._changed(request, project, frame=frame)
        return JSONResponse({"marks": project.marks})

    async def box(self, request: Request) -> Response:
        project, frame = await self._frame(request)
        left, top, right, bottom = _integers((await _json(request)).get("box"), 4)

        def select() -> bytes:
            image = self.studio.previews(project.id).image(frame)
            return runs_of_labels.encode(grab_cut(image, (left, top, right, bottom)))

        return _runs(await run_in_threadpool(select))

    async def click(self, request: Request) -> Response:
        project, frame = await self._frame(request)
        tool = self.studio.click
        if tool is None:
            raise InputError("no model for clicks was given: start with --click or --sam2")
        height, width = project.source.size
        points = []
        for point in (await _json(request)).get("points") or []:
            x, y, on = _integers(point, 3)
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(f"points must be in the frame of {width}x{height}, got {x}, {y}")
            points.append((x, y, bool(on)))
        if not any(on for _, _, on in points):
            raise InputError("points must include one on the object")

        def select() -> bytes:
            image = self.studio.previews(project.id).image(frame)
            return runs_of_labels.encode(tool.select((project.id, frame), image, points))

        return _runs(await run_in_threadpool(select))

    async def read_mask(self, request: Request) -> Response:
        """Return the labels of a mask that somebody dropped on the page; it is not kept."""
        project, _ = await self._frame(request)
        data = await _body(request, _MOST_MASK_BYTES)
        name = _safe_name(request.query_params.get("name", "mask.png"))
        return _runs(await run_in_threadpool(self._labels_of_file, project, name, data))

    def _labels_of_file(self, project: Project, name: str, data: bytes) -> bytes:
        folder = self.studio.work / UPLOADS
        part = folder / f".mask-{os.urandom(8).hex()}"
        with disk_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
        try:
            labels, _ = read_labels(part)
        except InputError as error:
            raise InputError(str(error).replace(str(part), name)) from error
        finally:
            part.unlink()
        height, width = project.source.size
        if labels.shape != (height, width):
            given = f"{labels.shape[1]}x{labels.shape[0]}"
            raise InputError(
                f"mask {name} is {given}, but the frames are {width}x{height}: give one of that size"
            )
        labels[labels == IGNORE] = 1 if not ((labels > 0) & (labels < IGNORE)).any() else 0
        return runs_of_labels.encode(labels)

    async def submit(self, request: Request) -> Response:
        project, content = await self._project(request), await _json(request)
        kind, wish = content.get("kind"), content.get("request")
        if not isinstance(kind, str) or not isinstance(wish, dict):
            raise InputError("a job must be {kind, request}")
        if kind == "follow":
            FollowRequest.parse(wish, project)
        job = await run_in_threadpool(self.studio.queue.submit, project, kind, wish)
        return JSONResponse({"number": job.number})

    async def job(self, request: Request) -> Response:
        project, number = await self._project(request), request.path_params["number"]
        queue = self.studio.queue
        actions: dict[str, Callable[[Project, int], tuple[Job, int | None]]] = {
            "pause": lambda project, number: (queue.pause(project, number), None),
            "stop": lambda project, number: (queue.stop(project, number), None),
            "resume": self.studio.resume,
        }
        act = _chosen(actions, request.path_params["action"])
        job, frame = await run_in_threadpool(act, project, number)
        return JSONResponse({"state": job.state, "again": frame})

    async def discard(self, request: Request) -> Response:
        project = await self._project(request)

        def discard() -> None:
            for job in self.studio.queue.unfinished(project, "follow"):
                if job.state == "running":
                    raise InputError("a job is running: pause or stop it first")
                self.studio.queue.stop(project, job.number)
            project.discard_last_run()

        await run_in_threadpool(discard)
        self._changed(request, project)
        return JSONResponse({})

    async def download(self, request: Request) -> Response:
        project, name = await self._project(request), request.path_params["name"]
        folder = project.folder / EXPORTS
        if (
            not folder.is_dir()
            or name not in {file.name for file in folder.iterdir()}
            or name.startswith(".")
        ):
            raise AbsentError(name)
        return FileResponse(folder / name, filename=name)

    def _changed(self, request: Request, project: Project, **what: Any) -> None:
        """Tell every page that shows a project that it changed, and which page changed it."""
        by = request.headers.get(_PAGE_HEADER, "")[:_LONGEST_PAGE]
        self.studio.hub.publish({"type": "project", "project": project.id, "by": by, **what})

    async def _project(self, request: Request) -> Project:
        return await run_in_threadpool(self.studio.project, request.path_params["project"])

    async def _frame(self, request: Request) -> tuple[Project, int]:
        project = await self._project(request)
        return project, project.check_frame(request.path_params["frame"])


async def _send_all(socket: WebSocket, queue: asyncio.Queue[dict[str, Any]]) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            await socket.send_json(await queue.get())


async def _body(request: Request, most: int) -> bytes:
    """Return a request's content, which may have this many bytes."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise InputError(f"the file must have at most {most >> 20} MiB")
    return bytes(content)


async def _json(request: Request) -> dict[str, Any]:
    import json

    try:
        found = json.loads(await _body(request, 1 << 20))
    except ValueError as error:
        raise InputError("the request must be JSON") from error
    if not isinstance(found, dict):
        raise InputError("the request must be a JSON object")
    return found


def _chosen(choices: Mapping[str, Choice], name: str) -> Choice:
    if name not in choices:
        raise AbsentError(name)
    return choices[name]


def _integers(value: Any, count: int) -> list[int]:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(v, int) for v in value):
        raise InputError(f"expected a list of {count} integers, got {value!r}")
    return value


def _runs(content: bytes | None) -> Response:
    if content is None:
        return Response(status_code=204)
    return Response(content, media_type=_RUNS_TYPE, headers={"cache-control": "no-store"})


def _safe_name(name: str) -> str:
    """Return the last part of a name, without what has a meaning in paths."""
    last = re.split(r"[\\/]", name)[-1]
    cleaned = re.sub(r"[^\w.\- ]", "_", last).strip(" .")[-100:]
    return cleaned or "video"


def _free_name(folder: Path, name: str) -> Path:
    stem, suffix = os.path.splitext(name)
    path, number = folder / name, 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path
