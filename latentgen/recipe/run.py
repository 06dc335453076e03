"""A recipe from start to end: VAE, CLIP, caches, U-Net or ControlNet, the folder of the result. Each stage resumes, and
is skipped when done."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen import __version__
from latentgen.core.allocator import keep_memory
from latentgen.core.errors import UserError
from latentgen.core.files import clear_leftovers, write_json, write_text
from latentgen.core.runfolder import RunFolder
from latentgen.data.captions import TagDraws, first_captions
from latentgen.data.fetch import CachedBatches, PictureBatches, squared, to_bytes
from latentgen.data.loader import Loader
from latentgen.data.sources.base import Source, shape_counts
from latentgen.data.sources.mixture import Mixture
from latentgen.engine.agreement import held
from latentgen.engine.guard import require_finite
from latentgen.engine.loop import Loop
from latentgen.engine.settings import StagePaths
from latentgen.engine.task import Task
from latentgen.engine.validation import Measure, Validation
from latentgen.engine.watch import Watch
from latentgen.engine.world import World, make_world
from latentgen.formats.control import save_control
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model, quiet_libraries, save_model
from latentgen.models.autoencoder import Vae
from latentgen.models.clip import Clip, load_clip
from latentgen.models.quick import quicken
from latentgen.models.text import Tower, train_tokenizer
from latentgen.models.unet import checkpoint_activations
from latentgen.pipelines.generate import Request, check, remarks
from latentgen.recipe import build, sources
from latentgen.recipe.captions import some_captions, tag_draws, warn_of_cuts, words_of
from latentgen.recipe.conditions import conditioned, control_kind, previews, write_inputs
from latentgen.recipe.finetune import (
    Training,
    makes_adapter,
    prepare,
    read_trained,
    require_words,
    runs_text,
    write_result,
    write_trained,
)
from latentgen.recipe.load import dump_recipe, load_recipe
from latentgen.recipe.plan import Plan, make_plan
from latentgen.recipe.presets import filled
from latentgen.recipe.prior import class_part, keeps, make_class_pictures, with_prior
from latentgen.recipe.reporting import Reporter, note_start
from latentgen.recipe.sameness import difference, from_weights
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sizes import sizes_of, tell
from latentgen.recipe.validation import validation, wanted
from latentgen.tasks.caching import Share, cache_latents
from latentgen.tasks.clip import ClipTask, finish_clip
from latentgen.tasks.diffusion import LEVELS, DiffusionTask
from latentgen.tasks.vae import VaeTask, finish_vae

logger = logging.getLogger(__name__)


class Run:
    """One recipe in one run folder.

    Args:
        recipe: what to do.
        root: folder of all runs.
        device: "cpu" forces the CPU.

    Raises:
        UserError: the folder belongs to another recipe, or the world is not the one asked for.
    """

    def __init__(self, recipe: Recipe, root: Path, device: str | None = None) -> None:
        self.examples = sources.examples(recipe)
        recipe = filled(recipe, len(self.examples.training))
        self.recipe, self.folder = recipe, RunFolder(root / recipe.name)
        self.report = Reporter(self.folder.path)
        self.world: World = make_world(recipe.train.precision, recipe.train.processes, device)
        self.accelerator: Accelerator = self.world.accelerator
        self.watch = Watch(self.accelerator)
        self.on_cpu = self.accelerator.device.type == "cpu"
        self.sizes = sizes_of(self.examples.training, recipe.data)
        tell(self.sizes, recipe.data)
        weights = from_weights(recipe)
        self.source: Source = with_prior(recipe, self.examples.training, weights)
        self._folders: list[Path] = []
        self.inputs = {"data": self.source.key(), "from": weights}
        self._refuse_another_recipe()

    def train(self) -> Path:
        """Do every stage that is not done; return the folder of the result: the model, or the ControlNet.

        Raises:
            Interrupted: a signal asked to stop; what was trained is saved.
            Lost: another process is gone.
        """
        if self.result.is_dir():
            logger.info("%s is finished; choose another name= to train anew", self.result)
            return self.result
        build.check(self.recipe, self.accelerator.num_processes)
        plan = make_plan(self.recipe, shape_counts(self.source))
        lock = held(self.folder.path, f"the run {self.folder.path}", self.accelerator)
        if self.on_cpu:
            keep_memory()
        with self.watch.stop, self.watch, lock:
            self._refuse_another_recipe()  # what was there before the lock was taken may be another run's since
            self._claim()
            logger.info("%s", plan.table())
            return self._train(plan)

    def _train(self, plan: Plan) -> Path:
        vae = self._vae()
        towers, zero_empty, clip = self._towers()
        model = build.new_model(self.recipe, vae, towers, zero_empty)
        if makes_adapter(self.recipe):
            self._train_unet(model, self.result)
        else:
            trained = dataclasses.replace(self._unet(model), metadata=self._metadata(plan.flops))
            self.watch.mark("writing the model")
            if self.accelerator.is_main_process and trained.control is None:
                save_model(trained, self.result, clip=clip)
            elif self.accelerator.is_main_process and trained.control is not None:
                save_control(trained.control, self.result, trained.metadata)
        if self.accelerator.is_main_process:
            self.report()
        self.accelerator.wait_for_everyone()
        logger.info("the %s is in %s", self.result.name, self.result)
        return self.result

    @property
    def result(self) -> Path:
        """The folder that is there when all is done."""
        if control_kind(self.recipe) is not None:
            return self.folder.control
        return self.folder.adapter if makes_adapter(self.recipe) else self.folder.model

    def _refuse_another_recipe(self) -> None:
        if self.folder.recipe.is_file():
            changed = difference(load_recipe(self.folder.recipe), self.recipe)
            if changed is not None:
                raise UserError(
                    f"{self.folder.path} was made by another recipe ({changed}); "
                    "choose another name=, or remove that folder"
                )
        inputs = self.folder.path / "inputs.json"
        if inputs.is_file() and json.loads(inputs.read_text()) != self.inputs:
            raise UserError(
                f"{self.folder.path} was begun with other data or other `from:` weights than are there now; "
                "bring those back, or choose another name="
            )

    def _claim(self) -> None:
        """Write the recipe down: the first thing written, when all that can be checked beforehand has been."""
        if self.accelerator.is_main_process:
            clear_leftovers(self.folder.path)
            libraries = ", ".join(
                f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate")
            )
            head = f"# latentgen {__version__}, Python {platform.python_version()}, {libraries}\n"
            write_json(self.folder.path / "inputs.json", self.inputs)
            if self.examples.skipped:
                write_json(self.folder.path / "skipped.json", dict(self.examples.skipped))
            if not self.sizes.plain():
                write_json(self.folder.path / "sizes.json", self.sizes.document())
            write_text(self.folder.recipe, head + dump_recipe(self.recipe))
            note_start(self.folder.path, len(self.source), self.accelerator)
        self.accelerator.wait_for_everyone()

    def _metadata(self, flops: float) -> dict[str, Any]:
        recipe = self.recipe.model_dump(mode="json", by_alias=True)
        recipe["autoencoder"]["posterior"] = build.posterior(self.recipe)
        measured = self.folder.result("vae") / "latent_statistics.json"
        statistics = json.loads(measured.read_text()) if measured.is_file() else None
        return {"recipe": recipe, "flops": flops, "latent_statistics": statistics, **self.inputs}

    def _stage(
        self,
        task: Task,
        fetch: Callable[..., Any],
        finish: Callable[[Mapping[str, nn.Module]], None],
        measured: Validation | None,
    ) -> None:
        """Train one task to its end, then let `finish` write its averaged modules; nothing when it is there."""
        train = self.recipe.stage_train(task.name)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        loader = Loader(
            fetch,
            self.source.order(train.global_batch),
            self.recipe.seed,
            task.name,
            build.cut(self.recipe, task.name, rank, world),
            train.steps,
            self.recipe.data.workers,
        )
        folder = self.folder
        paths = StagePaths(
            folder.checkpoints(task.name),
            folder.samples(task.name),
            folder.metrics,
            folder.tensorboard,
            folder.ema(task.name),
        )
        settings = build.loop_settings(self.recipe, task.name)
        loop = Loop(
            *(task, loader, settings, self.accelerator, paths, self.world.sharding, measured, self.report, self.watch)
        )
        loop.run()
        self.watch.mark(f"{task.name}, its result")
        averaged = loop.averaged()
        require_finite(
            {name: dict(module.state_dict()) for name, module in averaged.items()},
            self.accelerator,
            f"the result of stage {task.name}",
        )
        if self.accelerator.is_main_process:
            with self.watch.following(averaged.values()):
                finish(averaged)
        self.watch.mark(f"{task.name}, done")
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _validation(
        self, stage: str, measure: Measure, fetch: Callable[[Source], Callable[..., Any]], **more: Any
    ) -> Validation | None:
        """`fetch` makes the batches of a source; the sources are those of the run's examples."""
        examples = self.examples
        if not wanted(self.recipe, examples, stage):
            return None
        held_out, seen = fetch(examples.held_out), fetch(examples.training)
        world = self.accelerator.num_processes
        return validation(self.recipe, examples, stage, measure, held_out=held_out, seen=seen, world=world, **more)

    def _pictures(self, source: Source, **more: Any) -> PictureBatches:
        data = self.recipe.data
        return PictureBatches(source, flip=data.flip, crop=data.crop == "random", **more)

    def _vae(self) -> Vae:
        if self.recipe.autoencoder.source is not None:
            return self._frozen(load_model(Path(self.recipe.autoencoder.source)).vae)
        result = self.folder.result("vae")
        if not result.is_dir():
            held_out = self.examples.held_out
            pictures = [held_out.image(i) for i in range(len(held_out))]
            task = VaeTask(build.new_vae(self.recipe), build.vae_losses(self.recipe), pictures)
            a = self.recipe.autoencoder
            whole = partial(self._pictures, captions=0)
            fetch = whole(self.source, patch=a.patch, patch_steps=a.patch_steps, patch_tries=a.patch_tries)

            def finish(averaged: Mapping[str, nn.Module]) -> None:
                finish_vae(averaged["vae"], self.source, self.recipe.seed, result)

            self._stage(task, fetch, finish, self._validation("vae", task.measure, whole))
        with quiet_libraries():
            vae = AutoencoderKL.from_pretrained(result)
        assert isinstance(vae, AutoencoderKL)
        return self._frozen(vae)

    def _towers(self) -> tuple[tuple[Tower, ...], bool, Clip | None]:
        """The text encoders, whether no text is zeros to them, and both contrastive towers where they are at hand."""
        if self.recipe.text_encoder.source is not None:
            folder = Path(self.recipe.text_encoder.source)
            model = load_model(folder)
            clip = load_clip(folder / "clip") if (folder / "clip").is_dir() else None
            for tower in model.towers:
                self._frozen(tower.encoder)
            return model.towers, model.zero_empty, clip
        result, t = self.folder.result("clip"), self.recipe.text_encoder
        if not result.is_dir():
            limit = self.recipe.data.captions
            captions = (caption for i in range(len(self.source)) for caption in first_captions(self.source, i, limit))
            tokenizer = train_tokenizer(captions, t.vocab_size, t.context_length)
            if self.accelerator.is_main_process:
                warn_of_cuts(some_captions(self.source, limit), tokenizer, 1, key="text_encoder.context_length")
            held_out = self.examples.held_out
            numbers = range(len(held_out))
            side = self.recipe.data.resolution  # of the squares that the image tower sees
            pictures = to_bytes([squared(held_out.image(i), side) for i in numbers])
            pairs = pictures, [held_out.captions(i)[0] for i in numbers]
            assert isinstance(tokenizer.eos_token_id, int)
            clip = build.new_clip(self.recipe, len(tokenizer), tokenizer.eos_token_id)
            task = ClipTask(clip, tokenizer, pairs, t.late)
            shown = partial(self._pictures, captions=limit, square=side)
            fetch = shown(self.source, contrasts=t.contrasts, tags=self._tags(self.source))

            def plain(source: Source) -> PictureBatches:
                return shown(source, tags=self._tags(source))

            measured = self._validation("clip", task.measure, plain, together=True)
            self._stage(task, fetch, lambda averaged: finish_clip(averaged["clip"], tokenizer, result), measured)
        with quiet_libraries():
            text_encoder = CLIPTextModel.from_pretrained(result / "text_encoder")
            tokenizer = CLIPTokenizer.from_pretrained(result / "tokenizer")
        return (Tower("text_encoder", self._frozen(text_encoder), tokenizer),), False, load_clip(result / "clip")

    def _class_pictures(self, model: Model) -> None:
        """Draw them, while the model still is what training starts from."""
        if class_part(self.source) is not None:
            model.unet.to(self.accelerator.device)
            self.watch.mark("class pictures")
            with self.watch.following(model.networks().values()):
                make_class_pictures(self.recipe, model, self.source, self._share())

    def _unet(self, model: Model) -> Model:
        """The model with the networks that this stage trained, read back from its result."""
        result = self.folder.result("unet")
        if not result.is_dir():
            self._train_unet(model, result)
        return read_trained(self.recipe, model, result)

    def _previews(self, model: Model) -> list[Request]:
        folder, held_out = self.folder.samples("unet"), self.examples.held_out
        if self.accelerator.is_main_process:
            write_inputs(self.recipe, model, held_out, folder)
        self.accelerator.wait_for_everyone()
        requests = previews(self.recipe, model, held_out, folder)
        for request in requests:
            check(request, model)
        if self.accelerator.is_main_process:
            for line in dict.fromkeys(line for request in requests for line in remarks(request, model)):
                logger.warning("preview: %s", line)
        return requests

    def _train_unet(self, model: Model, result: Path) -> None:
        recipe = self.recipe
        if result.is_dir():
            return
        self._class_pictures(model)
        training = prepare(recipe, model)
        model = training.model
        for network in model.networks().values():
            network.to(self.accelerator.device)
        requests = self._previews(model)
        self._check_captions(model)
        fetch = self._cached(training, self.source)
        task = DiffusionTask(
            model,
            build.objective(recipe, model),
            requests,
            columns=recipe.preview.num,
            trains=training.trains,
            rates=training.rates,
            kernel=recipe.unet.attention_kernel,
            dtype=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
            keeps=keeps(recipe),
        )

        def fetched(source: Source) -> CachedBatches:
            return fetch if source is self.source else self._cached(training, source)

        measured = self._validation("unet", task.measure, fetched, parts=LEVELS)
        for network in (model.unet, model.control):
            if network is not None and self.on_cpu and task.dtype == torch.float32:
                quicken(network)
            if network is not None and recipe.unet.gradient_checkpointing:
                checkpoint_activations(network, task.kernel, dtype=task.dtype)

        def finish(averaged: Mapping[str, nn.Module]) -> None:
            if makes_adapter(recipe):
                write_result(recipe, training, averaged, result)
            else:
                write_trained(recipe, training, averaged, result)

        self._stage(task, fetch, finish, measured)

    def _tags(self, source: Source) -> TagDraws | None:
        """What is drawn of the captions of a source; those of class pictures, which follow the subject's, stay."""
        return tag_draws(self.recipe.data, len(self.examples.training) if source is self.source else None)

    def _check_captions(self, model: Model) -> None:
        """Refuse words to learn that no caption has; say what of captions is cut."""
        limit = self.recipe.data.captions
        require_words(self.recipe, model, self.source, limit)
        if self.accelerator.is_main_process:
            captions = some_captions(self.source, limit)
            warn_of_cuts(captions, model.towers[0].tokenizer, model.chunks, key="text_encoder.chunks")

    def _share(self) -> Share:
        return Share(self.accelerator.process_index, self.accelerator.num_processes, self.watch.move, self._folders)

    def caches(self) -> list[Path]:
        """Make what the U-Net's stage reads, and nothing else; returns the folders of these caches.

        Raises:
            UserError: the autoencoder or the text encoder is not there yet.
        """
        for stage, section in (("vae", self.recipe.autoencoder), ("clip", self.recipe.text_encoder)):
            if section.source is None and not self.folder.result(stage).is_dir():
                name = "autoencoder" if stage == "vae" else "text_encoder"
                raise UserError(
                    f"{name}: {self.folder.path} has not trained it yet, and and caches depend on it; train it "
                    f"first, or take one that is there: {name}.from=FOLDER"
                )
        build.check(self.recipe, self.accelerator.num_processes)
        with self.watch.stop, self.watch:
            vae = self._vae()
            towers, zero_empty, _ = self._towers()
            model = build.new_model(self.recipe, vae, towers, zero_empty)
            self._class_pictures(model)
            training = prepare(self.recipe, model)
            examples = self.examples
            measured = (examples.held_out, examples.training) if wanted(self.recipe, examples, "unet") else ()
            for source in (self.source, *(other for other in measured if other is not self.source)):
                self._cached(training, source)
        return list(dict.fromkeys(self._folders))

    def _cached(self, training: Training, source: Source) -> CachedBatches:
        model = training.model
        share = self._share()
        cache, data = Path(self.recipe.data.cache), self.recipe.data
        with self.watch.following([model.vae, *(tower.encoder for tower in model.towers)]):
            latents, pictures = None, {}
            if data.keeps_latents():
                self.watch.mark("caching latents")
                latents = cache_latents(model, source, cache, flip=data.flip, share=share)
            else:
                pictures = {"pictures": source, "flip": data.flip, "crop": data.crop == "random"}
            self.watch.mark("caching text states")
            live, tags = runs_text(training), self._tags(source)
            words = words_of(self.recipe, model, source, cache, share, live=live, tags=tags)
        values = {}
        if isinstance(source, Mixture):
            values["weight"] = source.example_weights()
            if keeps(self.recipe) and source is self.source:
                values["kept"] = source.part_numbers() == 1  # with_prior: the class is the second part
        batches = CachedBatches(latents, words, values, weighing=source if data.mask else None, **pictures)
        return conditioned(self.recipe, model, source, batches)

    def _frozen(self, network: Any) -> Any:
        return network.eval().requires_grad_(False).to(self.accelerator.device)


def train_recipe(recipe: Recipe, root: Path, device: str | None = None) -> Path:
    """Train a recipe, or go on with it; returns the folder of the result. See `Run` for what it raises."""
    torch.set_flush_denormal(True)  # denormal weights and moments are many times slower on the CPU, and mean nothing
    run = Run(recipe, root, device)
    model = run.train()
    run.accelerator.end_training()  # leaves the process group: its threads, cut off at exit, may abort the process
    return model


def make_caches(recipe: Recipe, root: Path, device: str | None = None) -> list[Path]:
    """Make the caches of a recipe's U-Net stage; returns their folders. See `Run.caches` for what it raises."""
    torch.set_flush_denormal(True)
    run = Run(recipe, root, device)
    made = run.caches()
    run.accelerator.end_training()
    return made
