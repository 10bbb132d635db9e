"""Charts as plotly JSON. Colours of text and grid are set by the page, which knows light from dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipelines.leaderboard import RANKED_KINDS, Board
from pipelines.report.palette import Look
from pipelines.results import Json

_GRID: Final = "rgba(128, 128, 128, 0.22)"
_CLEAR: Final = "rgba(0, 0, 0, 0)"
_KINDS: Final = ("trial", "default", "best", "single")


def as_json(figure: go.Figure) -> Json:
    """Data and layout as JSON types, ready for `Plotly.newPlot`."""
    found: Json = json.loads(figure.to_json())
    return {"data": found["data"], "layout": found["layout"]}


def interval_chart(board: Board, looks: dict[str, Look]) -> go.Figure:
    """Ranked methods downwards: mean and interval of the best configuration, below it the untuned one."""
    ranked = [row for row in board.rows if row.kind in RANKED_KINDS and row.estimate.value is not None]
    place = {row.method: -index for index, row in enumerate(ranked)}
    figure = go.Figure()
    for row in board.rows:
        estimate = row.estimate
        if estimate.value is None or row.method not in place:
            continue
        is_ranked = row.kind in RANKED_KINDS
        y = place[row.method] + (0.0 if is_ranked else -0.28)
        look = looks[row.method]
        figure.add_scatter(
            x=[estimate.value],
            y=[y],
            error_x=_error_bar(estimate.value, estimate.low, estimate.high, look.colour, is_strong=is_ranked),
            mode="markers",
            marker={
                "color": look.colour,
                "symbol": look.symbol if is_ranked else f"{look.symbol}-open",
                "size": 12 if is_ranked else 8,
            },
            hovertemplate=f"{row.method} ({row.kind}) %{{x:.4f}}<extra></extra>",
            showlegend=False,
        )
        values = [value for value in row.seed_values if value is not None]
        if is_ranked and len(values) > 1:
            figure.add_scatter(
                x=values,
                y=[y + 0.24] * len(values),
                mode="markers",
                marker={"color": look.colour, "symbol": "line-ns-open", "size": 8, "opacity": 0.8},
                hovertemplate=f"{row.method}, one seed %{{x:.4f}}<extra></extra>",
                showlegend=False,
            )
    _mark_chance(figure, board.chance)
    figure.update_yaxes(
        tickvals=list(place.values()), ticktext=list(place), range=[-len(place) + 0.3, 0.6], showgrid=False
    )
    figure.update_xaxes(title_text=board.metric)
    return _styled(figure, height=90 + 54 * max(1, len(place)), left=84)


def learning_curves(curves: Sequence[Json], look: Look, *, chance: float | None) -> go.Figure:
    """Loss above, selection metric below; trials light, defaults dashed, seed runs strong."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for kind in _KINDS:
        chosen = [curve for curve in curves if curve["kind"] == kind]
        for row, key in ((1, "loss"), (2, "selection")):
            if any(curve[key] for curve in chosen):
                figure.add_trace(_lines(chosen, key, kind, look), row=row, col=1)
    stopped = [curve for curve in curves if curve["state"] in ("pruned", "failed")]
    for state, symbol in (("pruned", f"{look.symbol}-open"), ("failed", "x")):
        ends = [curve["loss"][-1] for curve in stopped if curve["state"] == state and curve["loss"]]
        if ends:
            figure.add_trace(_ends(ends, state, symbol, look), row=1, col=1)
    _mark_chance(figure, chance, axis="y2")
    metric = next((curve["metric"] for curve in curves if curve["metric"]), "selection metric")
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_yaxes(title_text=metric, row=2, col=1)
    figure.update_xaxes(title_text="step", row=2, col=1)
    return _styled(figure, height=380, left=56)


def response_chart(
    response: Json, look: Look, *, y_range: tuple[float, float], chance: float | None
) -> go.Figure:
    """Selection metric against one searched parameter; a failed trial sits on the lower edge."""
    figure = go.Figure()
    chosen = response["chosen"]
    for state, symbol in (("complete", look.symbol), ("pruned", f"{look.symbol}-open"), ("failed", "x")):
        points = [point for point in response["points"] if point["state"] == state]
        if state != "failed":
            points = [point for point in points if point["y"] is not None]
        if points:
            figure.add_scatter(
                x=[point["x"] for point in points],
                y=[y_range[0] if point["y"] is None else point["y"] for point in points],
                text=[point["run_id"] for point in points],
                mode="markers",
                name=state,
                marker={"color": look.colour, "symbol": symbol, "size": 10, "opacity": 0.85},
                hovertemplate=f"%{{text}} ({state})<br>%{{x}}: %{{y:.4f}}<extra></extra>",
                cliponaxis=False,
            )
    if chosen is not None and response["is_numeric"]:
        figure.add_vline(x=chosen, line={"color": look.colour, "width": 1.5, "dash": "dot"})
    if chance is not None and chance > _padded(y_range)[0]:  # else every trial is above it
        _mark_chance(figure, chance, axis="y")
    figure.update_xaxes(type=_axis_type(response), nticks=6)
    if response["is_log"]:
        ticks = log_ticks(
            min(point["x"] for point in response["points"]), max(p["x"] for p in response["points"])
        )
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(range=_padded(y_range))
    return _styled(figure, height=230, left=48)


def age_chart(ages: dict[int, int], look: Look) -> go.Figure:
    """Rows by how many steps older than the trainer's teacher their scores were."""
    figure = go.Figure()
    figure.add_bar(
        x=list(ages),
        y=list(ages.values()),
        marker={"color": look.colour},
        hovertemplate="%{y} rows, %{x} steps old<extra></extra>",
    )
    figure.update_xaxes(title_text="age of the score in steps", nticks=8)
    figure.update_yaxes(title_text="rows")
    return _styled(figure, height=230, left=56)


def shared_range(responses: Sequence[Json]) -> tuple[float, float]:
    """Smallest and largest selection metric over all given responses."""
    values = [point["y"] for response in responses for point in response["points"] if point["y"] is not None]
    return (min(values), max(values)) if values else (0.0, 1.0)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around a range, with their 2 and 5 multiples while that stays readable."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [float(f"{m}e{decade}") for decade in decades for m in multiples]


def _lines(curves: Sequence[Json], key: str, kind: str, look: Look) -> go.Scatter:
    """All runs of one kind in one trace, gaps between them: a hundred traces would be slow."""
    points = [(*point, curve["run_id"]) for curve in curves for point in [*curve[key], (None, None)]]
    is_strong = kind in ("best", "single")
    return go.Scatter(
        x=[point[0] for point in points],
        y=[point[1] for point in points],
        text=[point[2] for point in points],
        name={"trial": "trials", "default": "untuned", "best": "best, seeds", "single": "run"}[kind],
        legendgroup=kind,
        showlegend=key == "loss",
        mode="lines+markers" if key == "selection" and is_strong else "lines",
        connectgaps=False,
        opacity={"trial": 0.35, "default": 0.8}.get(kind, 1.0),
        marker={"symbol": look.symbol, "size": 6},
        line={
            "color": look.colour,
            "width": 2.4 if is_strong else 1.2,
            "dash": "dash" if kind == "default" else "solid",
        },
        hovertemplate="%{text}<br>step %{x}: %{y:.4f}<extra></extra>",
    )


def _ends(points: Sequence[tuple[int, float]], state: str, symbol: str, look: Look) -> go.Scatter:
    return go.Scatter(
        x=[step for step, _ in points],
        y=[value for _, value in points],
        mode="markers",
        name=state,
        marker={"color": look.colour, "symbol": symbol, "size": 9},
        hovertemplate=f"{state} at step %{{x}}<extra></extra>",
    )


def _error_bar(value: float, low: float | None, high: float | None, colour: str, *, is_strong: bool) -> Json:
    if low is None or high is None:
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value],
        "arrayminus": [value - low],
        "color": colour,
        "thickness": 2.2 if is_strong else 1.1,
        "width": 5 if is_strong else 3,
    }


def _mark_chance(figure: go.Figure, chance: float | None, *, axis: str = "x") -> None:
    """A thin dashed line; shapes of their own, because `add_hline` repeats over subplots."""
    if chance is None:
        return
    along: dict[str, Any] = {"line": {"color": "rgba(128, 128, 128, 0.9)", "width": 1, "dash": "dash"}}
    text = {"text": "chance", "showarrow": False, "font": {"size": 11}}
    if axis == "x":
        figure.add_shape(type="line", x0=chance, x1=chance, y0=0, y1=1, yref="paper", **along)
        figure.add_annotation(x=chance, y=1, yref="paper", yanchor="bottom", **text)
        return
    domain = {"xref": "x domain" if axis == "y" else "x2 domain", "yref": axis}
    figure.add_shape(type="line", x0=0, x1=1, y0=chance, y1=chance, **domain, **along)
    figure.add_annotation(x=1, y=chance, xanchor="right", yanchor="bottom", **domain, **text)


def _axis_type(response: Json) -> str:
    if not response["is_numeric"]:
        return "category"
    return "log" if response["is_log"] else "linear"


def _padded(y_range: tuple[float, float]) -> list[float]:
    margin = 0.08 * ((y_range[1] - y_range[0]) or 0.1)
    return [y_range[0] - margin, y_range[1] + margin]


def _styled(figure: go.Figure, *, height: int, left: int) -> go.Figure:
    figure.update_layout(
        template=go.layout.Template(),  # plotly's own adds 7 kB to every chart
        height=height,
        margin={"l": left, "r": 12, "t": 24, "b": 40},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"size": 12},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 11}},
        hovermode="closest",
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, automargin=True)
    return figure
