"""`get_images` of SRe2L, CDA and DWA: the whole recover loop of one image index, on the fused engine."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dwa_fast.compat.fields import plain
from dwa_fast.compat.namespace import Recovery, read_namespace
from dwa_fast.config import BackendName, Precision, check_integer
from dwa_fast.data.manifest import image_name
from dwa_fast.data.pixels import denormalise, normalise
from dwa_fast.data.teacher_check import check_predictions
from dwa_fast.data.tensor_files import read_tensor, tensor_file
from dwa_fast.engine.backend import own_modes, resolve_device
from dwa_fast.engine.refine import mean_norm, total_variation
from dwa_fast.engine.synthesis import Batch, Replica, Synthesizer, memory_errors
from dwa_fast.errors import InputError
from dwa_fast.io.decode import READERS, decode
from dwa_fast.io.files import atomic_write, output_folder
from dwa_fast.seeding import generator, normal

log = logging.getLogger("dwa_fast")

Display = Callable[[Tensor, Tensor], Any]  # called with normalised images and their classes

_EVERY = 100  # iterations from one display to the next, as published
_tried: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # teachers that have predicted real images once


def get_images(
    args: Any,
    model_teacher: nn.Module,
    hook_for_display: Display | int | None = None,
    ipc_id: int | None = None,
    *others: Any,
    recipe: str | None = None,
    seed: int | None = None,
    backend: BackendName = "auto",
    precision: Precision = "auto",
    device: str | None = None,
    ignore: Collection[str] = (),
    **unknown: Any,
) -> Tensor:
    """Make image `ipc_id` of every class, as the function of that name in SRe2L, CDA and DWA does.

    Called `get_images(args, teacher, hook_for_display, ipc_id)`, or as in DWA's ImageNet script `get_images(args, teacher, ipc_id)`.
    Fields that `args` lacks have the defaults of its code base; the first call logs what was understood. Images are written only where
    `args.store_best_images` is set, to args.syn_data_path/new007/class007_id000.jpg and so on, as JPEG like the published ones. What the
    published loops do beside their papers is not done: no random numbers without a seed, no drift of the weights from batch to batch, no
    gradients of the ascent in Adam's first step; files of a class folder are taken in sorted order. Autocast, no_grad and inference_mode
    around the call change nothing.

    Args:
        args: the namespace of the script, or a mapping or dataclass: iteration, batch_size, lr, jitter, r_bn, first_bn_multiplier,
            syn_data_path, store_best_images, verifier, verifier_arch; also r_var, rho, steps, init_path, sorted_path and dataset (DWA),
            easy2hard_mode and milestone (CDA), cda (GUARD), tv_l2 and l2_scale (SRe2L), input_size, mean_norm, std_norm, ncls and
            apply_data_augmentation (CV-DD), seed. Fields of other parts of a script are passed over; any other field is refused.
        model_teacher: classifier in eval mode, bare or in a wrapper such as nn.DataParallel; it is copied, never changed.
        hook_for_display: called every 100 iterations with images and their classes, before it the losses are printed.
        ipc_id: index of the images within their classes, at least 0.
        *others, **unknown: nothing; arguments of other methods are refused by name.
        recipe: the recipe whose pixels, normalisation and view hold, where the code bases do not know the data set.
        seed: at least 0; random numbers derive from it, `ipc_id` and the batch; default: args.seed, else 0.
        backend, precision: as in `SynthesisConfig`.
        device: where to compute; default: where the teacher is.
        ignore: names of fields of args that are passed over, as if it lacked them.
    Returns:
        losses of every iteration, [batches, T, 3] on the CPU: cross-entropy, R_mean, R_var.
    Raises:
        TypeError: the teacher is no module, args no namespace, or the arguments are those of another method.
        InputError: a field of args, the teacher or an initial image cannot be used.
    """
    _refuse_other_loops(model_teacher, hook_for_display, ipc_id, others, unknown)
    verified = ipc_id is None  # DWA's ImageNet script, which loads the verifier itself
    index = plain(hook_for_display if ipc_id is None else ipc_id)
    check_integer("ipc_id", index, 0)
    display = None if verified else hook_for_display
    where = resolve_device(device or str(next(iter(model_teacher.parameters()), torch.empty(0)).device))
    recovery = read_namespace(args, model_teacher, recipe=recipe, backend=backend, precision=precision, device=str(where), ignore=ignore)
    _warn_of_devices(len(model_teacher.device_ids) if isinstance(model_teacher, nn.DataParallel) else 1)
    with own_modes():
        return _recover(recovery, model_teacher, index, recovery.seed if seed is None else plain(seed), display, verified=verified)


def _recover(recovery: Recovery, teacher: nn.Module, index: int, seed: int, display: Any, *, verified: bool) -> Tensor:
    """All batches of an image index."""
    check_integer("seed", seed, 0)
    if recovery.output:
        output_folder(recovery.output)  # before hours are spent
    shape = recovery.normalisation.channels, recovery.size, recovery.size
    size, expected = recovery.config.batch_size, recovery.classes or recovery.config.batch_size
    sizes = sorted({min(size, expected), expected % size or size})
    probe = normal(generator(0, "unseen"), (1, *shape))
    with Synthesizer(teacher, probe, recovery.config, recovery.normalisation, batch_sizes=sizes) as run:
        classes = recovery.classes or run.classes
        if run.classes != classes:
            raise InputError(f"the data set has {classes} classes, but the teacher knows {run.classes}")
        if verified and recovery.verifier:
            display = _verifier(recovery.verifier_arch, run.execution.device)
        losses = []
        for batch in _batches(recovery, classes, index):
            if recovery.init_path and recovery.config.sees_images and teacher not in _tried:
                _tried.add(teacher)
                check_predictions(run.logits, [(denormalise(batch.images, recovery.normalisation), batch.labels)], recovery.normalisation)
            with memory_errors(run.execution, [batch]):
                images, terms = _refine(run.replicas[0], batch, seed, recovery, display)
            losses.append(terms.float().cpu())
            if recovery.output:
                _store(recovery.output, denormalise(images, recovery.normalisation), batch.labels, index, classes)
    return torch.stack(losses)


def _refuse_other_loops(teacher: Any, display: Any, ipc_id: Any, others: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """Raise TypeError where the arguments are those of another method's get_images."""
    end = "this is another method's loop: keep it; BNFeatureHook still works in it where the script makes BNFeatureHook(module)"
    if unknown:
        raise TypeError(
            f"get_images takes no {', '.join(unknown)}; beside the scripts' own arguments it takes recipe, seed, backend, precision, "
            f"device and ignore. Where the script passes it, {end}"
        )
    if others:
        raise TypeError(
            f"get_images takes (args, teacher, hook_for_display, ipc_id) or (args, teacher, ipc_id), got {4 + len(others)} arguments: {end}"
        )
    if isinstance(teacher, (list, tuple, dict, nn.ModuleList, nn.ModuleDict)):
        raise TypeError(f"model_teacher must be one torch.nn.Module, got a {type(teacher).__name__} of {len(teacher)}: {end}")
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"model_teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    if isinstance(display, nn.Module):
        raise TypeError(f"hook_for_display must be a function or None, got the network {type(display).__name__}: {end}")
    if ipc_id is not None and display is not None and not callable(display):
        raise TypeError(f"hook_for_display must be a function or None, got {type(display).__name__}")


@functools.cache
def _warn_of_devices(count: int) -> None:
    """Warn once that the other devices of nn.DataParallel stay idle."""
    if count > 1:
        log.warning(
            "get_images computes on the first of the %d devices of nn.DataParallel: a split batch would have other statistics; "
            "run one process per device, each with its own ipc_start and ipc_end",
            count,
        )


def _batches(recovery: Recovery, classes: int, index: int) -> Iterator[Batch]:
    """The class batches of one image index, with their initial images."""
    size = recovery.config.batch_size
    starts = range(0, classes, size)
    load = _initial_images(recovery, classes, index)
    for number, start in enumerate(starts):
        labels = torch.arange(start, min(start + size, classes))
        yield Batch(index * len(starts) + number, load(labels), labels)


def _initial_images(recovery: Recovery, classes: int, index: int) -> Callable[[Tensor], Tensor]:
    """What gives image `index` of some classes, [n, C, S, S], normalised."""
    shape, folder = (recovery.normalisation.channels, recovery.size, recovery.size), recovery.init_path
    if folder is None:
        return lambda labels: normal(generator(0, "unseen"), (1, *shape)).expand(len(labels), -1, -1, -1)
    if recovery.config.view == "roll" or tensor_file(folder, index).exists():  # as DWA's CIFAR script has them
        tensors = read_tensor(tensor_file(folder, index), (classes, *shape))
        return lambda labels: tensors[labels]
    folders = _class_folders(folder, recovery.sorted_path, classes)

    def read(label: int) -> Tensor:
        return decode(_nth_file(folders[label], index), recovery.size, recovery.normalisation.channels, keep_aspect=False)

    def load(labels: Tensor) -> Tensor:
        return normalise(torch.stack(list(READERS.map(read, labels.tolist()))), recovery.normalisation)

    return load


def _class_folders(folder: Path, names: list[str] | None, classes: int) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"args.init_path must be a folder with a sub-folder of images per class, got {folder}")
    names = names or sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(names) < classes:
        raise InputError(f"args.init_path {folder} has {len(names)} class folders, expected {classes}")
    return [folder / name for name in names]


def _nth_file(folder: Path, index: int) -> Path:
    """Image `index` of a class folder, in sorted order."""
    from torchvision.datasets.folder import IMG_EXTENSIONS  # imported late: torchvision loads Triton, which importing dwa_fast must not

    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    if index >= len(names):
        raise InputError(f"class folder {folder} has {len(names)} images, and image {index} (counted from 0) is needed")
    return folder / names[index]


def _refine(replica: Replica, batch: Batch, seed: int, recovery: Recovery, display: Display | None) -> tuple[Tensor, Tensor]:
    """Refined images and losses of a batch; if requested, both are shown every 100 iterations."""
    total = recovery.config.iterations
    replica.begin(batch, seed)
    stops = range(0, total, _EVERY) if display or recovery.verifier else range(0)
    done = 0
    for stop in sorted({*stops, total - 1}) if stops and recovery.code_base == "cda" else stops:
        replica.advance(stop - done)
        images, _ = replica.finish()
        replica.advance(1)
        done = stop + 1
        _show(replica, images, batch.labels, stop, recovery, display)
    replica.advance(total - done)
    return replica.finish()


def _show(
    replica: Replica,
    images: Tensor,  # [B, C, S, S] before the iteration
    labels: Tensor,
    iteration: int,
    recovery: Recovery,
    display: Display | None,
) -> None:
    """Print the losses of an iteration and call the display with its images, as the published loops do."""
    _, losses = replica.finish()
    labels = labels.to(images.device)
    view = replica.view(images, iteration)
    ce, mean, var = losses[iteration].tolist()
    config = recovery.config
    prior = config.tv_l2 * float(total_variation(view)) + config.l2_scale * float(mean_norm(view))
    print(f"------------iteration {iteration}----------")
    print("loss_ce", ce)
    print("loss_r_bn_feature", mean + recovery.r_var * var)
    print("loss_total", ce + config.lambda_mean * mean + config.lambda_var * var + prior)
    if display is None:
        return
    with torch.no_grad():
        if recovery.code_base == "cda" or recovery.config.view == "roll":  # the scripts that show the view too
            display(view, labels)
        display(images, labels)


def _verifier(name: str, device: torch.device) -> Display:
    """Prints the accuracy of a torchvision network with ImageNet weights on the images."""
    import torchvision.models

    try:
        network = torchvision.models.get_model(name, weights="IMAGENET1K_V1").eval().requires_grad_(False).to(device)
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"args.verifier_arch must be a classifier of torchvision with ImageNet weights, got {name!r}") from error
    except (OSError, RuntimeError) as error:  # no network; a damaged file
        raise InputError(f"the ImageNet weights of verifier {name!r} cannot be fetched: {error}") from error

    def display(images: Tensor, labels: Tensor) -> None:
        print("Verifier accuracy: ", 100 * float((network(images.float()).argmax(1) == labels).double().mean()))

    return display


def _store(
    folder: Path,
    pixels: Tensor,  # [n, C, S, S]
    labels: Tensor,  # [n]
    index: int,
    classes: int,
) -> None:
    """JPEG files of Pillow's default quality, levels cut off rather than rounded: as published."""
    levels = (pixels.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for image, label in zip(levels, labels.tolist(), strict=True):
        path = folder / image_name(label, index, classes, "jpg")
        output_folder(path.parent)
        with atomic_write(path) as target:
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(target, format="JPEG")
