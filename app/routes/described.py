"""The API description of this very service: FastAPI's, and in it what the settings and the model allow.

A field names its bound (`BOUND` in its type), since the schemas are made before the settings are known.

What the description allows is served. Where tokens or time decide, which no schema can count, it leaves out what may be
served and may be refused: a small window of a preset that refuses longer prompts, several prompts in a reply without a
mask, a few milliseconds. Each is a `not` in the schema.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Route

from app.request.fields import BOUND
from app.service import Service, service_of
from app.threads import BUILDER, on
from encoder import Engine, InvalidField, NotReady, Preset

Schema = dict[str, Any]


def describe(app: FastAPI) -> Schema:
    """What `GET /openapi.json` answers; without bounds before the model is loaded."""
    described = FastAPI.openapi(app)  # which FastAPI keeps
    try:
        return _fill(described, dict(_bounds(service_of(app))))
    except NotReady:
        return _fill(described, {})


def describe_off_loop(app: FastAPI) -> None:
    """Let a thread make FastAPI's part of the description, which takes a fifth of a second.

    The rest takes milliseconds, so an answer is kept once the model is loaded: it changes no more.
    """
    routes = app.router.routes
    place = next(place for place, route in enumerate(routes) if getattr(route, "path", None) == app.openapi_url)
    route = routes[place]
    assert isinstance(route, Route)

    kept: dict[str, bytes] = {}  # by the path that the app is mounted at

    async def openapi(request: Request) -> Response:
        root_path = request.scope.get("root_path", "")
        if root_path in kept:
            return Response(kept[root_path], media_type="application/json")
        await on(BUILDER, FastAPI.openapi, app)
        is_loaded = _is_loaded(service_of(app).engine)  # before: what is kept has the bounds
        response: Response = await route.endpoint(request)
        if is_loaded:
            kept[root_path] = bytes(response.body)
        return response

    routes[place] = Route(route.path, openapi, include_in_schema=False)


def _is_loaded(engine: Engine) -> bool:
    try:
        engine.info  # noqa: B018  # raises before that
    except NotReady:
        return False
    return True


def _bounds(service: Service) -> Iterator[tuple[str, Schema]]:
    """What is allowed under each name, in the words of JSON Schema. Errors: NotReady before the model is loaded."""
    layers = service.engine.info.dims["num_hidden_layers"]
    yield "window", {"maximum": service.settings.max_sequence_length}
    presets = [preset for preset in service.catalog if _fits(preset, service.engine)]
    yield "presets", {"enum": [name for preset in presets for name in names(preset)]}
    yield "windows", {"allOf": [*_windows(presets, service.catalog.get(None))]}
    yield "layers", {"minimum": -layers, "maximum": layers - 1}
    yield "hidden_states", {"minimum": -layers - 1, "maximum": layers}


def _fits(preset: Preset, engine: Engine) -> bool:
    try:
        engine.check(preset)
    except InvalidField:
        return False
    return True


def names(preset: Preset) -> tuple[str, ...]:
    """All names of a preset."""
    return (preset.name, *preset.aliases)


def _windows(presets: Sequence[Preset], default: Preset) -> Iterator[Schema]:
    """For each preset that does not take every window: none below the least one."""
    for preset in presets:
        least = preset.max_sequence_length if preset.overlong == "refused" else preset.dropped_rows + 1
        if least > 1:
            unset = [None] if preset == default else []
            too_small = {
                "preset": {"enum": [*names(preset), *unset]},
                "max_sequence_length": {"type": "integer", "maximum": least - 1},
            }
            required = [name for name in too_small if not (unset and name == "preset")]
            yield {"not": {"properties": too_small, "required": required}}


def _fill(schema: Schema, bounds: dict[str, Schema]) -> Schema:
    """The same, with each bound in place of its name."""
    filled = {key: _filled(value, bounds) for key, value in schema.items() if key != BOUND}
    return filled | bounds.get(schema.get(BOUND, ""), {})


def _filled(value: Any, bounds: dict[str, Schema]) -> Any:
    if isinstance(value, list):
        return [_filled(item, bounds) for item in value]
    return _fill(value, bounds) if isinstance(value, dict) else value
