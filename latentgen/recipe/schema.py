"""The recipe: what a YAML file may say, with types, ranges and defaults. Frozen; unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from latentgen.recipe.schema_data import Data
from latentgen.recipe.schema_finetune import Finetune
from latentgen.recipe.schema_section import Section


def _different(lengths: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(lengths)) < len(lengths):
        raise ValueError("give each length once")
    return lengths


Length = Annotated[float, Field(gt=0, le=0.28)]
Lengths = Annotated[tuple[Length, ...], AfterValidator(_different)]


class StageTrain(Section):
    """Training settings of one network; what is null is taken from the `train` section."""

    steps: int | None = Field(default=None, ge=1)
    global_batch: int | None = Field(default=None, ge=1)
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    optimizer: Literal["adamw", "adamw8bit", "muon"] | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] | None = None
    warmup_steps: int | None = Field(default=None, ge=0)
    final_learning_rate: float | None = Field(default=None, ge=0, le=1)
    weight_decay: float | None = Field(default=None, ge=0)
    beta1: float | None = Field(default=None, ge=0, lt=1)
    beta2: float | None = Field(default=None, ge=0, lt=1)
    grad_clip: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    ema_lengths: Lengths | None = None
    ema_snapshots: int | None = Field(default=None, ge=1)
    validate_every: int | None = Field(default=None, ge=0)


class Autoencoder(Section):
    """The VAE: `from` a model folder, or trained on the data as described here."""

    source: str | None = Field(default=None, alias="from", description="model folder to take the VAE from")
    latent_channels: int = Field(default=8, ge=1)
    channels: tuple[int, ...] = Field(
        default=(16, 32, 64, 128), min_length=1, description="per level; each level halves the side"
    )
    layers_per_block: int = Field(default=1, ge=0)
    norm_groups: int = Field(default=4, ge=1)
    mid_attention: bool = False
    posterior: Literal["sample", "mean"] | None = Field(
        default=None,
        description="what diffusion learns: draws from the encoder's posterior, or its mean "
        "(null: what the model of autoencoder.from learned, else sample)",
    )
    initialise: Literal["default", "residual", "patch"] = "patch"
    patch: int | None = Field(
        default=None, ge=8, description="train on random square cuts of this side (null: whole pictures)"
    )
    patch_steps: int | None = Field(
        default=None, ge=0, description="from this step on whole pictures after all (null: never)"
    )
    patch_tries: int = Field(
        default=1, ge=1, description="squares to choose from, for each picture the one with most contrast"
    )
    loss: Literal["l1", "l2", "l1_l2"] = "l1"
    kl_weight: float = Field(default=1e-6, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0, description="weight of the VGG feature distance")
    perceptual_weights: str | None = Field(default=None, description="VGG16 weights: a safetensors file, or `imagenet`")
    critic_weight: float = Field(default=0.0, ge=0, description="weight of the adversarial loss")
    critic_start: int = Field(default=0, ge=0, description="step at which the adversarial phase begins")
    critic_channels: int = Field(default=32, ge=8)
    train: StageTrain = StageTrain()


class ImageTower(Section):
    """CLIP's image tower."""

    kind: Literal["resnet", "vit"] = Field(
        default="resnet", description="a ResNet learns shapes far sooner than a transformer"
    )
    width: int = Field(default=16, ge=8, description="of a transformer, or of a ResNet's first stage")
    layers: int = Field(default=1, ge=1, description="of a transformer, or blocks in each of a ResNet's four stages")
    heads: int = Field(default=4, ge=1, description="of a transformer, or of the pooling at a ResNet's end")
    patch: int = Field(default=8, ge=1, description="side of a transformer's patches in pixels")


class TextEncoder(Section):
    """CLIP: `from` a model folder, or two towers trained contrastively on the captions."""

    source: str | None = Field(default=None, alias="from", description="model folder to take the text encoder from")
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    context_length: int = Field(default=24, ge=4, description="tokens a caption is padded or cut to, markers included")
    chunks: int = Field(
        default=1,
        ge=1,
        le=8,
        description="a caption that is too long is read in at most so many pieces of that length, side by side; what "
        "is left is cut",
    )
    vocab_size: int = Field(
        default=1024, ge=514, description="size of the byte-pair vocabulary learned from the captions"
    )
    embed_dim: int = Field(default=128, ge=8)
    late: float = Field(
        default=0.0, ge=0, description="weight of the loss that matches single words with places (arXiv 2111.07783)"
    )
    contrasts: int = Field(
        default=0,
        ge=0,
        description="false captions a picture is told from, where the data knows any (arXiv 2210.01936)",
    )
    image: ImageTower = ImageTower()
    train: StageTrain = StageTrain()


class UNet(Section):
    """The denoising network: `from` a model folder (fine-tuning), or new."""

    source: str | None = Field(default=None, alias="from", description="model folder to start from")
    channels: tuple[int, ...] = Field(default=(96, 192), min_length=1)
    layers_per_block: int = Field(default=2, ge=1)
    attention: tuple[bool, ...] = Field(default=(True, True), description="cross-attention at this level?")
    heads: int = Field(default=4, ge=1)
    transformer_layers: int = Field(default=1, ge=1)
    norm_groups: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    pooled_text: bool = Field(default=False, description="the whole prompt also enters through the time embedding")
    time_scale_shift: bool = Field(default=False, description="the time embedding scales and shifts, not only adds")
    attention_kernel: Literal["auto", "math", "flash"] = "auto"
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again instead of keeping them: less memory, a third more time"
    )


class Diffusion(Section):
    """The noising process, what the network predicts, and how it is taught."""

    target: Literal["eps", "v", "x0", "flow", "edm", "ve"] | None = Field(
        default=None, description="null: v, or what unet.from predicts"
    )
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_alpha_bar"] = Field(
        default="scaled_linear", description="noise table of a new network that predicts eps, v or x0"
    )
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    zero_terminal_snr: bool = Field(
        default=False, description="the last time of the noise table is pure noise (arXiv 2305.08891; target v or x0)"
    )
    shift: float = Field(
        default=1.0, gt=0, description="flow: more than 1 trains and samples at more noise (arXiv 2403.03206, eq. 23)"
    )
    shift_resolution: int | None = Field(
        default=None,
        ge=1,
        description="flow: the resolution that `shift` is meant for; it grows with data.resolution (null: with none)",
    )
    sigma_data: float = Field(default=1.0, gt=0, description="edm: standard deviation of the latents")
    sigma_min: float | None = Field(default=None, gt=0, description="edm and ve (null: 0.002 and 0.02)")
    sigma_max: float | None = Field(default=None, gt=0, description="edm and ve (null: 80 and 100)")
    augmented_dim: float | None = Field(
        default=None,
        gt=0,
        description="edm: the D of PFGM++, heavier tails of noise (arXiv 2302.04265; null: infinity)",
    )
    learned_variance: bool = Field(
        default=False, description="the network also learns the variance of a step (arXiv 2102.09672; eps, v or x0)"
    )
    vlb_weight: float = Field(default=0.001, gt=0, description="of the bound that teaches the variance")
    density: Literal["uniform", "logit_normal", "log_normal", "cosine_interpolated", "importance"] = Field(
        default="uniform", description="how training draws noise levels; importance: as often as their loss is large"
    )
    density_mean: float = Field(
        default=0.0, description="of logit(t) for logit_normal, of log(sigma) for log_normal (-1.2 in EDM, for pixels)"
    )
    density_std: float = Field(default=1.0, gt=0, description="of the same (1.2 in EDM)")
    density_low: float = Field(
        default=32.0, gt=0, description="cosine_interpolated: picture side whose noise suits the coarse features"
    )
    density_high: float | None = Field(
        default=None, gt=0, description="cosine_interpolated: the same of the fine features (null: data.resolution)"
    )
    weight: Literal["unit", "snr", "min_snr", "soft_min_snr", "p2", "debiased", "edm"] = "min_snr"
    min_snr_gamma: float = Field(default=5.0, gt=0, description="of min_snr and soft_min_snr")
    p2_k: float = Field(default=1.0, gt=0)
    p2_gamma: float = Field(default=1.0, ge=0)
    balanced: bool = Field(
        default=False, description="divide each noise level's error by its own mean, learned along (arXiv 2312.02696)"
    )
    loss: Literal["mse", "huber", "l1"] = "mse"
    huber_c: float = Field(default=0.1, gt=0, le=1, description="errors above it count linearly (arXiv 2403.16728)")
    huber_schedule: Literal["exponential", "snr", "constant"] = Field(
        default="snr", description="how huber_c goes from 1 for clean pictures to its value for noise"
    )
    offset_noise: float = Field(default=0.0, ge=0, description="strength of noise that shifts whole channels")
    pyramid_discount: float = Field(
        default=0.0, ge=0, lt=1, description="strength of coarser noise, of each grid relative to the one before"
    )
    input_perturbation: float = Field(
        default=0.0, ge=0, description="noise that the network sees and its target does not (arXiv 2301.11706)"
    )
    caption_dropout: float = Field(default=0.1, ge=0, le=1, description="share of captions replaced by the empty one")


class Train(Section):
    """The loop. These are the U-Net's settings; `autoencoder.train` and `text_encoder.train` may differ from them."""

    steps: int = Field(default=1000, ge=1)
    global_batch: int = Field(default=64, ge=1, description="examples a step, over all processes and micro-batches")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="examples of one forward pass (null: the process's share; auto: as many as fit into memory)",
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        default="adamw",
        description="muon learns more from a picture, and costs more a step (arXiv 2502.16982); "
        "adamw8bit keeps its moments in a quarter of the memory (arXiv 2110.02861; needs a GPU and bitsandbytes)",
    )
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0)
    final_learning_rate: float = Field(
        default=0.0, ge=0, le=1, description="where cosine and linear end, as a share of the peak"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.995, ge=0, lt=1, description="of the average that is previewed and exported")
    ema_lengths: Lengths = Field(
        default=(),
        description="averages of these relative lengths are tracked too, as [0.05, 0.10]: `latentgen ema` makes any "
        "other of them afterwards (arXiv 2312.02696)",
    )
    ema_snapshots: int | None = Field(
        default=None, ge=1, description="steps between two snapshots of these (null: a twentieth of the stage's steps)"
    )
    ema_precision: Literal["fp16", "fp32"] = Field(
        default="fp16", description="of snapshots; fp32 where weights move little, as in fine-tuning"
    )
    ema_device: Literal["cpu"] | None = Field(
        default=None, description="cpu: averages are kept in main memory, not on the GPU"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    processes: int | None = Field(
        default=None, ge=1, description="refuse to train unless exactly so many processes are found"
    )
    validate_every: int = Field(
        default=500, ge=0, description="steps between two measurements of the held-out loss (0: none)"
    )
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1, description="newest checkpoints kept per stage")
    keep_every: int | None = Field(default=None, ge=1, description="keep those of every so many steps as well")
    keep_best: int = Field(default=0, ge=0, description="keep so many of the lowest validation loss as well")
    bad_steps: int = Field(
        default=10, ge=1, description="stop when so many steps in a row are not finite; each is skipped"
    )
    spikes: float | None = Field(
        default=20.0,
        gt=0,
        description="skip a step whose loss is so many standard deviations above its running mean, and twice that mean "
        "(null: none)",
    )
    rollback_every: int | None = Field(
        default=None,
        ge=1,
        description="keep a good state in main memory every so many steps, and go back to it when many steps in a row "
        "are bad (null: never; the loss's new level is then accepted)",
    )
    trackers: tuple[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"],
        ...,
    ] = Field(default=("tensorboard",), description="where measurements go, beside metrics.jsonl")


class Preview(Section):
    """Pictures drawn while training: the same prompts and seeds every time."""

    every: int = Field(default=500, ge=1)
    prompts: tuple[str, ...] = Field(
        default=(
            "a red circle",
            "two green stars",
            "a blue square above a yellow heart",
            "a large pink cross",
        ),
        min_length=1,
    )
    negative_prompt: str = ""
    num: int = Field(default=2, ge=1, description="pictures a prompt")
    seed: int = 0
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=4.0, ge=0)
    guidance: tuple[str, ...] = Field(default=(), description="NAME[,key=value]... each, as --guidance takes them")
    sampler: str = Field(default="dpmpp_2m", description="NAME[,key=value]..., as --sampler takes it")
    schedule: str | None = Field(default=None, description="as --schedule takes it (null: the model's own)")


class Recipe(Section):
    """One training job, whole."""

    name: str = Field(
        default="run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run folder: runs/NAME"
    )
    seed: int = Field(default=0, ge=0)
    data: Data = Data()
    autoencoder: Autoencoder = Autoencoder()
    text_encoder: TextEncoder = TextEncoder()
    unet: UNet = UNet()
    diffusion: Diffusion = Diffusion()
    finetune: Finetune | None = Field(default=None, description="train parts of `unet.from` (null: all of the U-Net)")
    train: Train = Train()
    preview: Preview = Preview()

    @model_validator(mode="before")
    @classmethod
    def _from_one_model(cls, values: Any) -> Any:
        """A U-Net belongs to its autoencoder and text encoder: `unet.from` alone says where all three come from."""
        unet = values.get("unet") if isinstance(values, dict) else None
        source = unet.source if isinstance(unet, UNet) else unet.get("from") if isinstance(unet, dict) else None
        if source is None:
            return values
        filled = dict(values)
        for name in ("autoencoder", "text_encoder"):
            part = values.get(name)
            if part is None:
                filled[name] = {"from": source}
            elif isinstance(part, dict) and part.get("from") is None:
                filled[name] = {**part, "from": source}
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.finetune is not None:
            self._require_sense(self.finetune)
        a = self.autoencoder
        if a.critic_weight > 0 and (a.patch or self.data.resolution) < 24:
            raise ValueError(
                "autoencoder.patch: the critic needs pictures of 24 pixels or more; leave it out, or enlarge it"
            )
        if a.critic_weight > 0 and (a.train.micro_batch or self.train.micro_batch) is not None:
            raise ValueError(
                "autoencoder.critic_weight: the critic is balanced over the whole batch, leave micro_batch out; "
                "lower autoencoder.train.global_batch instead"
            )
        if a.patch is not None and a.patch > self.data.resolution:
            raise ValueError(f"autoencoder.patch: {a.patch} is larger than data.resolution, {self.data.resolution}")
        if self.text_encoder.train.micro_batch is not None:
            raise ValueError(
                "text_encoder.train.micro_batch: the contrastive loss needs its whole batch at once; "
                "lower text_encoder.train.global_batch instead"
            )
        if len(self.unet.channels) != len(self.unet.attention):
            raise ValueError("unet.attention: give one true/false for each of unet.channels")
        factor = 2 ** (len(self.autoencoder.channels) - 1)
        if self.autoencoder.source is None and self.data.resolution % factor:
            raise ValueError(f"data.resolution: must be a multiple of {factor}, the autoencoder's reduction")
        return self

    def _require_sense(self, f: Finetune) -> None:
        if self.unet.source is None:
            raise ValueError("finetune: say which model to start from: unet.from=FOLDER")
        if f.method == "none" and not f.tokens and f.control is None:
            raise ValueError("finetune.method: none trains nothing; name finetune.tokens or finetune.control")
        if f.control is not None and (f.method != "none" or f.text_encoders or f.tokens):
            raise ValueError("finetune.control: a ControlNet is trained beside a model that stays; say method: none")
        if f.control == "picture" and self.data.source == "shapes":
            raise ValueError("finetune.control: picture: needs data with a second picture for each; shapes has none")
        if f.text_encoders and f.method == "none":
            raise ValueError("finetune.text_encoders: say with which method; none trains words alone")
        if f.method == "loha" and "diffusers" in f.written():
            raise ValueError("finetune.layouts: diffusers knows no loha; write kohya or comfyui")
        if f.prior is not None and not any(f.prior.prompts()):
            raise ValueError("finetune.prior.prompt: say what class the subject belongs to, such as `a dog`")
        if f.prior is not None and f.control is not None:
            raise ValueError("finetune.prior: a ControlNet learns no subject; leave it out")
        if f.preset is not None and f.control is not None:
            raise ValueError("finetune.preset: there is none for a ControlNet; leave it out")

    def stage_train(self, stage: str) -> Train:
        """The training settings of a stage: its own where given, `train`'s otherwise."""
        own = {"vae": self.autoencoder.train, "clip": self.text_encoder.train}.get(stage, StageTrain())
        values = own.model_dump(exclude_none=True)
        return self.train.model_copy(update=values | ({"micro_batch": None} if stage == "clip" else {}))
