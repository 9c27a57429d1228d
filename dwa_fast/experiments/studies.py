"""The studies of the paper, each as a grid of cells with its tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dwa_fast.config import DataConfig, SynthesisConfig, check_choice
from dwa_fast.errors import InputError, escape_control_chars
from dwa_fast.experiments.cells import REAL, Setup
from dwa_fast.experiments.grid import (
    TOP1,
    Grid,
    GridRunner,
    Outcomes,
    Variant,
    best,
    by_ipc,
    by_student,
    by_time,
    cell_rows,
    environment,
    note,
    series,
    study_settings,
)
from dwa_fast.recipes import METHODS, SEVERAL_TEACHERS, recipe
from dwa_fast.report.records import Chart, HeatMap, Record, Table, preset_data

AblationName = Literal["adjustment", "lambda-var", "k-rho", "matching-weights", "initial", "iterations"]

_TITLES = {"sre2l": "SRe2L", "sre2l++": "SRe2L++", "real-start": "real start", "random-step": "random step", "coupled": "coupled λ"}
TITLES = {REAL: "random real images", **{method: _TITLES.get(method, method.upper()) for method in METHODS}}


def by_method(setup: Setup, methods: Sequence[str]) -> list[Variant]:
    """The sets of several methods. What a method does not set itself is as in DWA; a changed number of iterations and learning rate in all.

    Raises:
        InputError: no such method, or one for several teachers where there is one.
    """
    for method in methods:
        check_choice("method", method, list(TITLES))
        if method in SEVERAL_TEACHERS and len(setup.teachers) == 1:
            raise InputError(f"--teacher must name the checkpoints of several teachers for method {method}, got 1")
    dwa, data = setup.recipe.synthesis, setup.recipe.data
    derived = {name: METHODS[name](dwa, data) for name in methods if name != REAL}
    published = recipe(setup.recipe.name).synthesis
    if dwa.iterations != published.iterations:  # then for methods with a number of their own too
        derived = {name: replace(each, iterations=dwa.iterations if each.iterations else 0) for name, each in derived.items()}
    if dwa.learning_rate != published.learning_rate:
        derived = {name: replace(each, learning_rate=dwa.learning_rate) for name, each in derived.items()}
    return [Variant(name=TITLES[method], synthesis=derived.get(method), all_teachers=method in SEVERAL_TEACHERS) for method in methods]


def compare(run: GridRunner, setup: Setup, *, methods: Sequence[str], ipc: Sequence[int], student: str, seeds: Sequence[int]) -> Record:
    """Methods × ipc."""
    grid = Grid(variants=by_method(setup, methods), ipc=ipc, students=(student,), seeds=seeds)
    return _categories(run, setup, grid, "compare", f"Methods on {setup.recipe.name}")


def cross(
    run: GridRunner,
    setup: Setup,
    *,
    methods: Sequence[str],
    sets: Mapping[str, Path],
    ipc: Sequence[int],
    students: Sequence[str],
    seeds: Sequence[int],
) -> Record:
    """Students of several architectures × methods and sets that were made elsewhere, by name."""
    external = [Variant(name=escape_control_chars(name), external=folder) for name, folder in sets.items()]
    names = [TITLES.get(method, method) for method in methods] + [variant.name for variant in external]
    if len(set(names)) < len(names):
        raise InputError(f"each method and set must have a name of its own, got {', '.join(names)}; --sets NAME=DIR names a set")
    grid = Grid(variants=[*by_method(setup, methods), *external], ipc=ipc, students=students, seeds=seeds)
    outcomes = run(grid)
    title = f"Students of several architectures on {setup.recipe.name}"
    pairs = [by_student(f"{title}, ipc {each}", setup, grid, outcomes, each) for each in ipc]
    tables, charts = [table for table, _ in pairs], [chart for _, chart in pairs]
    return _record(setup, grid, outcomes, "cross", title, tables=tables, charts=charts)


def ablate(
    run: GridRunner,
    setup: Setup,
    *,
    study: AblationName,
    ipc: Sequence[int],
    student: str,
    seeds: Sequence[int],
    lambda_vars: Sequence[float],
    steps: Sequence[int],
    rhos: Sequence[float],
    iterations: Sequence[int],
) -> Record:
    """One of the paper's ablations and sweeps, or accuracy against the number of iterations."""

    def grid(variants: Sequence[Variant]) -> Grid:
        return Grid(variants=variants, ipc=ipc, students=(student,), seeds=seeds)

    if study == "lambda-var":
        return _lambda_var(run, setup, grid, lambda_vars)
    if study == "k-rho":
        return _k_rho(run, setup, grid, steps, rhos)
    if study == "iterations":
        return _iterations(run, setup, grid, iterations)
    variants, title = _CATEGORIES[study]
    return _categories(run, setup, grid(variants(setup.recipe.synthesis, setup.recipe.data)), "ablation", f"{title} on {setup.recipe.name}")


def _adjustment(dwa: SynthesisConfig, data: DataConfig) -> list[Variant]:
    names = {"no step": "real-start", "random step": "random-step", "directed step": "dwa"}
    directed = replace(dwa, ascent="directed")  # whatever the settings say
    return [Variant(name=name, synthesis=METHODS[method](directed, data)) for name, method in names.items()]


def _matching_weights(dwa: SynthesisConfig, _: DataConfig) -> list[Variant]:
    adjusted, original = replace(dwa, matching_weights="adjusted"), replace(dwa, matching_weights="original")
    return [Variant(name="adjusted (published code)", synthesis=adjusted), Variant(name="original (Eq. 15)", synthesis=original)]


def _initial(dwa: SynthesisConfig, _: DataConfig) -> list[Variant]:
    return [
        Variant(name="real images", synthesis=replace(dwa, initial="real")),
        Variant(name="noise", synthesis=replace(dwa, initial="noise")),
    ]


_CATEGORIES: dict[str, tuple[Callable[[SynthesisConfig, DataConfig], list[Variant]], str]] = {
    "adjustment": (_adjustment, "Weight adjustment"),
    "matching-weights": (_matching_weights, "Weights of the matching terms"),
    "initial": (_initial, "Initial images"),
}


def _lambda_var(run: GridRunner, setup: Setup, grid_of: Callable[[Sequence[Variant]], Grid], values: Sequence[float]) -> Record:
    """λ_var alone, λ_mean as the recipe has it, against both at that value."""
    dwa = setup.recipe.synthesis
    kinds: dict[str, Callable[[float], SynthesisConfig]] = {
        f"λ_var alone, λ_mean = {dwa.lambda_mean:g}": lambda value: replace(dwa, lambda_var=value),
        "λ_mean = λ_var": lambda value: replace(dwa, lambda_mean=value, lambda_var=value),
    }
    values = sorted(values)
    grid = grid_of([Variant(name=f"{kind}, {value:g}", synthesis=make(value)) for kind, make in kinds.items() for value in values])
    outcomes, (student,) = run(grid), grid.students
    tables, charts = [], []
    title = f"λ_var on {setup.recipe.name}"
    for ipc in grid.ipc:
        rows = {kind: [outcomes[f"{kind}, {value:g}", ipc, student] for value in values] for kind in kinds}
        lines = [[f"{value:g}", *(str(row[place]) for row in rows.values())] for place, value in enumerate(values)]
        tables.append(Table(title=f"{title}, ipc {ipc}, {TOP1}", columns=["λ_var", *kinds], rows=lines, note=note(setup, grid)))
        curves = [series(kind, row) for kind, row in rows.items()]
        charts.append(Chart(title=f"{title}, ipc {ipc}", x_label="λ_var", y_label=TOP1, x=values, series=curves))
    return _record(setup, grid, outcomes, "ablation", title, tables=tables, charts=charts)


def _k_rho(
    run: GridRunner, setup: Setup, grid_of: Callable[[Sequence[Variant]], Grid], steps: Sequence[int], rhos: Sequence[float]
) -> Record:
    """K × ρ."""
    steps, rhos = sorted(steps), sorted(rhos)

    def name(k: int, rho: float) -> str:
        return f"K = {k}, ρ = {rho:g}"

    grid = grid_of([Variant(name=name(k, rho), synthesis=replace(setup.recipe.synthesis, steps=k, rho=rho)) for rho in rhos for k in steps])
    outcomes, (student,) = run(grid), grid.students
    tables, maps = [], []
    title = f"K and ρ on {setup.recipe.name}"
    for ipc in grid.ipc:
        results = [[outcomes[name(k, rho), ipc, student] for k in steps] for rho in rhos]
        rows = [[f"{rho:g}", *map(str, row)] for rho, row in zip(rhos, results, strict=True)]
        columns = ["ρ", *(f"K = {k}" for k in steps)]
        tables.append(Table(title=f"{title}, ipc {ipc}, {TOP1}", columns=columns, rows=rows, note=note(setup, grid)))
        values = [[each.mean for each in row] for row in results]
        maps.append(HeatMap(title=f"{title}, ipc {ipc}", x_label="K", y_label="ρ", value_label=TOP1, x=steps, y=rhos, values=values))
    return _record(setup, grid, outcomes, "ablation", title, tables=tables, heat_maps=maps)


def _iterations(run: GridRunner, setup: Setup, grid_of: Callable[[Sequence[Variant]], Grid], values: Sequence[int]) -> Record:
    """T, and the time that it takes."""
    values, dwa = sorted(values), setup.recipe.synthesis
    names = [f"T = {value}" for value in values]
    grid = grid_of([Variant(name=name, synthesis=replace(dwa, iterations=value)) for name, value in zip(names, values, strict=True)])
    outcomes, (student,) = run(grid), grid.students
    title = f"Iterations on {setup.recipe.name}, students {student}"
    table, _ = by_ipc(title, setup, grid, outcomes, student)
    curves = [series(f"ipc {ipc}", [outcomes[name, ipc, student] for name in names]) for ipc in grid.ipc]
    chart = Chart(title=title, x_label="T", y_label=TOP1, x=values, series=curves, log_x=True)
    tables, charts = by_time(title, setup, grid, outcomes, student)
    return _record(setup, grid, outcomes, "ablation", title, tables=[table, *tables], charts=[chart, *charts])


def _categories(run: GridRunner, setup: Setup, grid: Grid, kind: str, title: str) -> Record:
    outcomes, (student,) = run(grid), grid.students
    named = f"{title}, students {student}"
    table, chart = by_ipc(named, setup, grid, outcomes, student)
    tables, charts = by_time(named, setup, grid, outcomes, student)
    return _record(setup, grid, outcomes, kind, title, tables=[table, *tables], charts=[chart, *charts])


def _record(setup: Setup, grid: Grid, outcomes: Outcomes, kind: str, title: str, **parts: Any) -> Record:
    return Record(
        kind=kind,
        title=title,
        summary=best(grid, outcomes),
        settings=study_settings(setup, grid),
        environment=environment(setup),
        data={"cells": cell_rows(setup, grid, outcomes), "preset": preset_data(setup.recipe)},
        **parts,
    )
