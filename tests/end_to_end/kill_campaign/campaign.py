"""Many runs, each disturbed again and again, then ended and compared with one that nothing disturbed."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from flax_trainer.random_model import write_random_model
from shared.data.sources.circles import draw
from tests.end_to_end.kill_campaign import places
from tests.end_to_end.kill_campaign.attempt import Place, disturbed
from tests.end_to_end.kill_campaign.faults import Fault, FolderPlan, Means, folder_plan, plans, steps_for
from tests.end_to_end.kill_campaign.hub import Hub
from tests.end_to_end.kill_campaign.judging import differences, resumable_step
from tests.end_to_end.kill_campaign.kinds import KINDS, Inputs
from tests.end_to_end.kill_campaign.outcome import Outcome
from tests.end_to_end.support.running import PROJECT
from tests.end_to_end.support.tiny_runs import ONE_RESOLUTION, SIZE
from tests.shared.run.fake_hub import WRITER, serve

THE_END = "the end"
_MOST_ROUNDS = 3  # for faults that came too late, in further folders


@dataclass
class Campaign:
    """What is to be done.

    Attributes:
        counts: how many faults of each means.
        kinds: of runs, names of `KINDS`.
        work: where all of it happens; what failed stays there.
        note: called with every outcome as it comes.
    """

    seed: int
    counts: Mapping[Means, int]
    kinds: Sequence[str]
    workers: int
    work: Path
    note: Callable[[Outcome], None]
    steps: int = 0
    whole: dict[str, Path] = field(default_factory=dict)


def run(campaign: Campaign) -> list[Outcome]:
    """All outcomes: of faults, those that could not be delivered left out, and of the ends of folders."""
    inputs = _make_inputs(campaign.work / "inputs")
    todo = plans(campaign.seed, campaign.counts, campaign.kinds)
    campaign.steps = steps_for(todo)
    found: list[Outcome] = []
    with ThreadPoolExecutor(campaign.workers) as workers:
        names = sorted({plan.kind for plan in todo})
        for name, folder in zip(names, workers.map(lambda name: _whole(campaign, inputs, name), names), strict=True):
            campaign.whole[name] = folder
        for round_ in range(_MOST_ROUNDS):
            late: list[FolderPlan] = []
            for outcomes, left in workers.map(lambda plan: _folder(campaign, inputs, plan), todo):
                found += outcomes
                late += left
            todo = [replace(plan, number=100 * (round_ + 1) + plan.number) for plan in late]
            if not todo:
                break
    return found


def _make_inputs(folder: Path) -> Inputs:
    base_model, condition = folder / "base", folder / "condition.png"
    write_random_model(ONE_RESOLUTION, base_model)
    draw(0, SIZE, seed=1).conditioning_image.save(condition)
    return Inputs(base_model, condition)


@contextmanager
def _place(campaign: Campaign, inputs: Inputs, kind: str, name: str, *, small_disk: bool = False) -> Iterator[Place]:
    """A folder for a run, gone afterwards unless something failed there."""
    own = campaign.work / f"{kind.replace(', ', '-').replace(' ', '-')}-{name}"
    own.mkdir()
    hub = Hub()
    with ExitStack() as closing:
        address = closing.enter_context(serve(hub))
        disk = places.SmallDisk(own / "disk") if small_disk else None
        if disk is not None:
            closing.callback(disk.remove)
        folder = (own if disk is None else disk.folder) / "run"
        whole = campaign.whole.get(kind)
        checkpoint = 0 if whole is None else _size(next(whole.glob("checkpoint-*")))
        environment = _environment(address)
        command = KINDS[kind].command(inputs, folder, campaign.steps)
        yield Place(KINDS[kind], folder, disk, hub, own, command, environment, campaign.steps, checkpoint)


def _environment(hub: str) -> dict[str, str]:
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(PROJECT / ".pytest_cache" / "d" / "compiled-programs"))
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": WRITER, "JAX_COMPILATION_CACHE_DIR": compiled}
    return {**os.environ, **own}


def _whole(campaign: Campaign, inputs: Inputs, kind: str) -> Path:
    """The folder of a run that nothing disturbs. It also leaves the compiled programs, which the others only read."""
    with _place(campaign, inputs, kind, "undisturbed") as place:
        _run_to_the_end(place)
        return place.folder


def _run_to_the_end(place: Place) -> None:
    output = place.work / "output.txt"
    run = place.kind.start(place.command, place.environment, output)
    try:
        codes = run.wait(900)
    finally:
        run.kill()
    if codes is None or any(codes):
        raise RuntimeError(f"{place.command} ended with {codes}: {output.read_text(errors='replace')[-3000:]}")


def _folder(campaign: Campaign, inputs: Inputs, plan: FolderPlan) -> tuple[list[Outcome], list[FolderPlan]]:
    """All that happens to one run, and the faults for which it was over too soon."""
    outcomes: list[Outcome] = []
    late: list[Fault] = []
    with _place(campaign, inputs, plan.kind, str(plan.number), small_disk=plan.has_full_disk) as place:
        for fault in plan.faults:
            outcome = Outcome(plan.kind, plan.number, fault.means, _told(fault), _victim(fault))
            disturbed(place, fault, outcome)
            campaign.note(outcome)
            if outcome.delivered or outcome.failures:
                outcomes.append(outcome)
            else:
                late.append(fault)
        end = _end(campaign, place, plan)
        campaign.note(end)
        outcomes.append(end)
    if not any(outcome.failures for outcome in outcomes):
        shutil.rmtree(place.work)
    return outcomes, [folder_plan(plan.kind, plan.number, late)] if late else []


def _end(campaign: Campaign, place: Place, plan: FolderPlan) -> Outcome:
    """The same command once more, undisturbed, and what is left then."""
    began = time.monotonic()
    outcome = Outcome(plan.kind, plan.number, THE_END, "", "")
    try:
        _run_to_the_end(place)
        outcome.resumable = outcome.logged = resumable_step(place.folder)
        whole = campaign.whole[plan.kind]
        outcome.failures += differences(place.folder, whole, place.hub.files)
    except (RuntimeError, ValueError, OSError) as error:
        outcome.failures.append(f"{type(error).__name__}: {error}")
    if outcome.failures and place.disk is not None:
        shutil.copytree(place.folder, place.work / "copy of the run")
    outcome.seconds = time.monotonic() - began
    return outcome


def _told(fault: Fault) -> str:
    return fault.means if fault.means in (Means.FULL_DISK, Means.READ_ONLY) else fault.moment


def _victim(fault: Fault) -> str:
    return f"process {fault.victim}" if fault.victim.isdigit() else fault.victim


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
