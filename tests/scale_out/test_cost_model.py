"""Wall time on N GPUs: the model against a simulation that moves a clock step by step, and against real workers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrbench.config import validate
from cfrbench.contracts import StageTask
from cfrbench.forecast import wall_seconds
from cfrbench_executor.local import Local


def task(number: int, needs: list[int]) -> StageTask:
    return StageTask("train", f"k{number}", f"stage {number}", tuple(f"k{need}" for need in sorted(set(needs))))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[StageTask], dict[str, int]]:
    """Up to 12 stages of 1 to 9 seconds, each needing some of those before it."""
    count = draw(st.integers(0, 12))
    tasks = [task(n, draw(st.lists(st.integers(0, n - 1), max_size=2)) if n else []) for n in range(count)]
    return tasks, {t.key: draw(st.integers(1, 9)) for t in tasks}


def simulated(tasks: list[StageTask], seconds: dict[str, int], gpus: int) -> int:
    """Second by second: every free GPU takes, of the stages that can start, the one with most stages above it."""

    def above(key: str) -> int:
        return max((1 + above(t.key) for t in tasks if key in t.needs), default=0)

    clock, left, running, done = 0, list(tasks), dict[str, int](), set[str]()
    while len(done) < len(tasks):
        can = sorted((t for t in left if done.issuperset(t.needs)), key=lambda t: (-above(t.key), tasks.index(t)))
        for chosen in can[: gpus - len(running)]:
            left.remove(chosen)
            running[chosen.key] = seconds[chosen.key]
        clock += 1
        running = {key: rest - 1 for key, rest in running.items()}
        done |= {key for key, rest in running.items() if rest == 0}
        running = {key: rest for key, rest in running.items() if rest}
    return clock


@settings(deadline=None)
@given(graphs(), st.integers(1, 4))
def test_the_model_agrees_with_a_simulation_second_by_second(
    graph: tuple[list[StageTask], dict[str, int]], gpus: int
) -> None:
    tasks, seconds = graph
    found = wall_seconds(tasks, {key: float(value) for key, value in seconds.items()}, gpus)
    assert found == simulated(tasks, seconds, gpus)
    work, longest = sum(seconds.values()), max(seconds.values(), default=0)
    assert max(work / gpus, longest) <= found <= work
    if gpus == 1:
        assert found == work


def test_needs_are_waited_for_while_others_use_the_time() -> None:
    tasks = [task(0, []), task(1, []), task(2, [0]), task(3, [2])]
    assert wall_seconds(tasks, {"k0": 4.0, "k1": 3.0, "k2": 2.0, "k3": 1.0}, 2) == 7.0
    assert wall_seconds([], {}, 2) == 0.0


class Sleep:
    """Work that takes as long as the stage's title says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, task: StageTask) -> None:
        began = time.time()
        time.sleep(float(task.recipe["seconds"]))
        (self.folder / task.key).write_text(f"{began} {time.time()}")


@pytest.mark.slow
def test_real_workers_take_what_the_model_says(tmp_path: Path) -> None:
    lengths = [1.0, 2.0, 0.5, 1.5, 1.0, 0.5, 2.0, 1.0]
    needs: list[list[int]] = [[], [], [0], [2], [0], [1], [], [3, 5]]
    tasks = [StageTask("train", f"k{n}", f"stage {n}", tuple(f"k{m}" for m in needs[n]), {"seconds": length})
             for n, length in enumerate(lengths)]  # fmt: skip
    warm = [StageTask("train", f"warm{n}", "warm", (), {"seconds": 4.0}) for n in range(2)]
    above = [StageTask(t.stage, t.key, t.title, (*t.needs, "warm0", "warm1"), t.recipe) for t in tasks]
    assert Local(validate(Local.Config, {"jobs": 2}, "test")).run([*warm, *above], Sleep(tmp_path)) == {}
    spans = [tuple(map(float, (tmp_path / t.key).read_text().split())) for t in tasks]
    took = max(end for _, end in spans) - min(began for began, _ in spans)
    assert took == pytest.approx(wall_seconds(tasks, {t.key: t.recipe["seconds"] for t in tasks}, 2), rel=0.15)
