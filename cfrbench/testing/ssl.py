"""The laws of an SSL method, checked by training it for a few steps on tiny networks and random crops."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import SSLMethod, StepOutput
from cfrbench.guidance import guidance_loss
from cfrbench.schedules import ema_decay
from cfrbench.testing._lab import (
    SIDES,
    UNLABELLED,
    Lab,
    TinyNet,
    copy_of,
    differences,
    gradient_norm,
    learn,
    require,
)

#: a gradient shorter than this is rounding noise; real ones are above 1e-5 even before a ramp
NO_GRADIENT = 1e-6


def check_ssl(
    method_cls: type[SSLMethod],
    config: Any = None,
    make_net: Callable[[], nn.Module] | None = None,
    *,
    num_classes: int = 2,
) -> None:
    """Raise AssertionError, in a sentence, at the first law of `SSLMethod` that ``method_cls`` breaks.

    make_net builds the networks of methods that need special ones: ``(B, 1, 8, 8, 4) -> (B, num_classes, 8, 8, 4)``,
    with logits that range from unsure to sure, else masks have nothing to select. A config with a field ``ema`` says
    that its teacher's decay is ``min(1 - 1 / (step + 1), ema)``.
    """
    lab = Lab(method_cls, config, make_net or (lambda: TinyNet(num_classes)), num_classes)
    _check_description(lab)
    _check_predictor(lab)
    _check_output(lab)
    _check_losses_teach(lab)
    _check_masks(lab)
    _check_guidance(lab)
    _check_labeller(lab)
    _check_teachers(lab)
    _check_seed(lab)
    _check_resume(lab)
    _check_pseudo_is_unread(lab)


def _check_description(lab: Lab) -> None:
    cls = lab.method_cls
    for field in ("name", "title", "reference"):
        require(bool(getattr(cls, field, "")), f"{lab.name} has no `{field}`.")
    frozen = issubclass(cls.Config, Frozen)
    require(frozen, f"{lab.name}.Config is not derived from cfrbench.config.Frozen, so typing errors pass unseen.")
    phases = lab.build().phases()
    require(bool(phases) and all(p.share > 0 for p in phases), f"{lab.name} has no phase, or one without a share.")
    names = [phase.name for phase in phases]
    require(len(set(names)) == len(names), f"Two phases of {lab.name} have one name: {names}.")


def _check_predictor(lab: Lab) -> None:
    method = lab.build()
    predictor = method.predictor()
    inside = any(module is predictor for module in method.modules())
    require(inside, f"The predictor of {lab.name} is not a submodule of the method, so its weights are not saved.")
    method.eval()
    with torch.no_grad():
        image = lab.batch(0).image
        first, second = predictor(image), predictor(image)
    shape = (len(image), lab.num_classes, *SIDES)
    got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
    require(got == shape, f"The predictor of {lab.name} returns {got} in eval mode, not logits {shape}.")
    require(torch.equal(first, second), f"The predictor of {lab.name} is random in eval mode.")


def _check_output(lab: Lab) -> None:
    method = lab.build()
    for progress in lab.schedule(method):
        batch = lab.batch(progress.step)
        image, label = batch.image.clone(), batch.label.clone()
        output = lab.output(method, progress, batch)
        untouched = torch.equal(batch.image, image) and torch.equal(batch.label, label)
        require(untouched, f"{lab.name} changes its batch in place; crops are views of volumes that others read.")
        require(bool(output.losses), f"{lab.name} returns no loss at step {progress.step}.")
        for name, loss in output.losses.items():
            require(loss.ndim == 0, f"The loss '{name}' of {lab.name} is no scalar but {tuple(loss.shape)}.")
            finite = bool(torch.isfinite(loss))
            require(finite, f"The loss '{name}' of {lab.name} is {loss.item():g} at step {progress.step}.")
        crops = UNLABELLED if output.guided_pseudo is None else len(output.guided_pseudo)
        shape = (crops, lab.num_classes, *SIDES)
        wrong = [tuple(logits.shape) for logits in output.guided if tuple(logits.shape) != shape]
        require(not wrong, f"{lab.name} guides logits of shape {wrong}; the unlabelled crops need {shape}.")


def _check_losses_teach(lab: Lab) -> None:
    """Every loss moves the tested network at some step, and every parameter that trains is reached by some loss."""
    method = lab.build()
    tested = [p for p in method.predictor().parameters() if p.requires_grad]
    require(bool(tested), f"The predictor of {lab.name} is frozen: it can learn nothing.")
    longest: dict[str, float] = defaultdict(float)
    unreached = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    for progress, output in lab.moments(method, lab.optimiser(method)):
        unreached -= _reached(method, output)
        for name, loss in output.losses.items():
            norm = gradient_norm(loss, tested)
            where = f"The loss '{name}' of {lab.name} at step {progress.step}"
            require(math.isfinite(norm), f"{where} has a gradient that is not finite.")
            longest[name] = max(longest[name], norm)
    idle = [name for name, norm in longest.items() if norm < NO_GRADIENT]
    require(not idle, f"These losses of {lab.name} have no gradient in the network that is tested: {idle}. They "
                      "teach nothing: is something detached, under no_grad, or computed and not used?")  # fmt: skip
    require(not unreached, f"No loss of {lab.name} reaches these parameters, though they are not frozen: "
                           f"{sorted(unreached)}. A teacher needs requires_grad_(False).")  # fmt: skip


def _reached(method: SSLMethod, output: StepOutput) -> set[str]:
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    teaching = [loss for loss in output.losses.values() if loss.requires_grad]
    if not teaching:
        return set()
    total = torch.stack(teaching).sum()
    grads = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(named, grads, strict=True) if grad is not None}


def _check_masks(lab: Lab) -> None:
    """A reported mask selects: it is 0 here and 1 there, and its loss has no gradient where it is 0."""
    method = lab.build()
    shown: list[Tensor] = []
    method.predictor().register_forward_hook(lambda module, inputs, logits: shown.append(logits))
    values: dict[str, set[float]] = defaultdict(set)
    for _, output in lab.moments(method, lab.optimiser(method)):
        for name, mask in output.masks.items():
            require(name in output.losses, f"{lab.name} reports a mask of '{name}', which is none of its losses.")
            fits = mask.ndim == 5 and mask.shape[1] in (1, lab.num_classes) and tuple(mask.shape[2:]) == SIDES
            require(fits, f"The mask of '{name}' of {lab.name} is {tuple(mask.shape)}, not (N, 1 or C, H, W, D).")
            values[name] |= set(torch.unique(mask.float()).tolist())
            for logits in shown:
                _require_restricted(lab, name, output.losses[name], mask, logits)
        shown.clear()
    for name, found in values.items():
        odd = sorted(found - {0.0, 1.0})
        require(not odd, f"The mask of '{name}' of {lab.name} holds {odd[:3]}; a mask is 0 or 1.")
        only = sorted(found)
        require(len(only) == 2, f"The mask of '{name}' of {lab.name} is {only} in every voxel of every step: "
                                "nothing is selected.")  # fmt: skip


def _require_restricted(lab: Lab, name: str, loss: Tensor, mask: Tensor, logits: Any) -> None:
    """The gradient of ``loss`` in the network's output is 0 outside the mask and in crops that it does not cover."""
    if not (isinstance(logits, Tensor) and logits.requires_grad and logits.shape[0] >= mask.shape[0]):
        return
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if grad is None:
        return
    counted = torch.zeros(grad.shape[0], 1, *SIDES, dtype=torch.bool)
    counted[-mask.shape[0] :] = mask.bool().any(dim=1, keepdim=True)
    leak = int((grad.masked_fill(counted, 0.0) != 0).any(dim=1).sum())
    require(leak == 0, f"The loss '{name}' of {lab.name} has a gradient in {leak} voxels that its mask excludes: the "
                       "mask is not applied. A part that counts all voxels must be a loss of its own.")  # fmt: skip


def _check_guidance(lab: Lab) -> None:
    method = lab.build()
    tested = list(method.predictor().parameters())
    for progress, output in lab.moments(method, lab.optimiser(method), pseudo_seed=7):
        if not output.guided and not lab.method_cls.uses_unlabelled:
            continue
        require(bool(output.guided), f"{lab.name} uses unlabelled crops but names no logits on them at step "
                                     f"{progress.step} (StepOutput.guided), so it cannot be guided.")  # fmt: skip
        pseudo = lab.batch(progress.step, pseudo_seed=7).pseudo
        assert pseudo is not None
        norm = gradient_norm(guidance_loss(output, pseudo, 1.0), tested)
        require(norm > NO_GRADIENT, f"Guidance has no gradient in the tested network of {lab.name}: are the guided "
                                    "logits detached, or those of a teacher?")  # fmt: skip
        cut = [index for index, logits in enumerate(output.guided) if not logits.requires_grad]
        require(not cut, f"The guided logits {cut} of {lab.name} have no gradient; name those of trained networks.")


def _check_teachers(lab: Lab) -> None:
    """What is frozen gets no gradient and moves in `after_update` only (or is made anew as a phase begins)."""
    method = lab.build()
    optimiser = lab.optimiser(method)
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    still = set(frozen)
    start = copy_of(method)
    for progress in lab.schedule(method):
        before = copy_of(method)
        learn(optimiser, lab.output(method, progress))
        between = copy_of(method)
        if progress.phase_step > 0:
            early = sorted(frozen & set(differences(before, between)))
            require(not early, f"{lab.name} changes the frozen parameters {early} outside `after_update`.")
        taught = [n for n, p in method.named_parameters() if n in frozen and p.grad is not None]
        require(not taught, f"The frozen parameters {taught} of {lab.name} get a gradient.")
        method.after_update(progress)
        moved = set(differences(between, copy_of(method)))
        trained = sorted(moved & {name for name, p in method.named_parameters() if p.requires_grad})
        require(not trained, f"`after_update` of {lab.name} moves {trained}, which the optimiser trains as well: a "
                             "teacher must not train; give its network requires_grad_(False).")  # fmt: skip
        _check_average(lab, method, between, progress.step)
        still -= set(differences(start, copy_of(method)))
    require(not still, f"The frozen parameters {sorted(still)} of {lab.name} never change from their random start.")


def _check_average(lab: Lab, method: SSLMethod, before: dict[str, Tensor], step: int) -> None:
    """A frozen twin of the predictor that moved is ``d * teacher + (1 - d) * student``, d the same everywhere."""
    twins = _twins(method)
    students = [_flat(dict(net.named_parameters())) for _, net in twins if _trains(net)]
    limit = getattr(method.config, "ema", None)
    for prefix, network in twins:
        new = dict(network.named_parameters())
        old = _flat({name: before[f"{prefix}.{name}"] for name in new})
        if _trains(network) or torch.equal(old, _flat(new)):
            continue
        error, decay = min(_off_average(old, _flat(new), student, step, limit) for student in students)
        require(error < 1e-5 and -1e-6 < decay < 1.0,
                f"The teacher '{prefix}' of {lab.name} is no moving average after step {step}: it is off "
                f"decay * teacher + (1 - decay) * student by {error:.2g} (decay {decay:.6g}).")  # fmt: skip


def _off_average(old: Tensor, new: Tensor, student: Tensor, step: int, limit: float | None) -> tuple[float, float]:
    """Largest error of the moving average, and its decay, fitted where the method's config does not name it."""
    gap = old - student
    decay = float((new - student) @ gap / (gap @ gap)) if limit is None else ema_decay(step, limit)
    return float((decay * old + (1.0 - decay) * student - new).abs().max()), decay


def _twins(method: SSLMethod) -> list[tuple[str, nn.Module]]:
    """Every network with the predictor's parameters: itself, its teachers, its peers."""

    def shapes(network: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, parameter.shape) for name, parameter in network.named_parameters()]

    wanted = shapes(method.predictor())
    return [(name, module) for name, module in method.named_modules() if shapes(module) == wanted]


def _trains(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors.values()])


def _check_labeller(lab: Lab) -> None:
    """What labels whole volumes is a frozen part of the method, taken as a phase begins and left alone inside it."""
    method = lab.build()
    optimiser = lab.optimiser(method)
    named = 0
    for progress in lab.schedule(method):
        before = copy_of(method)
        network = method.labeller(progress)
        moved = differences(before, copy_of(method))
        require(progress.phase_step == 0 or not moved, f"Asking for the labeller of {lab.name} inside a phase, as a "
                f"resumed training does, changes {moved[:3]}: copy a network only if phase_step is 0.")  # fmt: skip
        if network is not None:
            named += 1
            require(lab.method_cls.relabels, f"{lab.name} names a labeller but does not say `relabels = True`, so its "
                                             "strides do not enter the key and nobody asks for it.")  # fmt: skip
            inside = any(module is network for module in method.modules())
            require(inside and not _trains(network), f"The labeller of {lab.name} must be a frozen submodule: only "
                                                     "then are its labels the same after a resume.")  # fmt: skip
        lab.advance(method, optimiser, progress)
    silent = lab.method_cls.relabels and not named and lab.config is None
    require(not silent, f"{lab.name} says `relabels = True` but names no labeller in any phase.")


def _check_seed(lab: Lab) -> None:
    """Two trainings from one seed are bit-equal."""
    runs = []
    for _ in range(2):
        method = lab.build()
        optimiser = lab.optimiser(method)
        values = [_values(lab.advance(method, optimiser, progress)) for progress in lab.schedule(method)]
        runs.append((values, copy_of(method)))
    (first, one), (second, two) = runs
    changed = differences(one, two)
    require(first == second and not changed, f"Two trainings of {lab.name} from one seed differ ({changed[:3]}): "
                                             "random numbers must come from torch's global generator.")  # fmt: skip


def _check_resume(lab: Lab) -> None:
    """A training that was cut before any step and went on from its ``state_dict`` ends bit-equal."""
    method = lab.build()
    optimiser = lab.optimiser(method)
    schedule, saved = lab.schedule(method), []
    for progress in schedule:
        saved.append((copy_of(method), copy.deepcopy(optimiser.state_dict())))
        lab.advance(method, optimiser, progress)
    whole = copy_of(method)
    for cut, (state, optimiser_state) in enumerate(saved):
        resumed = lab.build(seed=1)
        resumed.load_state_dict(state)
        again = lab.optimiser(resumed)
        again.load_state_dict(optimiser_state)
        for progress in schedule[cut:]:
            lab.advance(resumed, again, progress)
        changed = differences(whole, copy_of(resumed))
        require(not changed, f"{lab.name}, saved before step {cut} and resumed, ends differently ({changed[:3]}): "
                             "state is kept outside of parameters and buffers.")  # fmt: skip


def _check_pseudo_is_unread(lab: Lab) -> None:
    """Losses do not depend on pseudo-labels, which may be absent: guidance is not the method's business."""
    method = lab.build()
    optimiser = lab.optimiser(method)
    for progress in lab.schedule(method):
        batches = [lab.batch(progress.step, pseudo_seed) for pseudo_seed in (None, 1, 2)]
        values = [_values(lab.output(copy.deepcopy(method), progress, batch)) for batch in batches]
        require(values[0] == values[1] == values[2], f"The losses of {lab.name} change with the pseudo-labels at step "
                f"{progress.step}; a method may move them with their crops but must not learn from them.")  # fmt: skip
        lab.advance(method, optimiser, progress)


def _values(output: StepOutput) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in output.losses.items()}
