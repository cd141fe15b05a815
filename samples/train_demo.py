"""Train the demo model on one GPU: a text encoder and a transformer, on the latents of a closed-form autoencoder.

    python samples/train_demo.py --out runs/demo --seconds 900
    python samples/train_demo.py --out runs/demo --resume runs/demo/checkpoint.pt --seconds 900
    python samples/train_demo.py --out runs/demo --init samples/demo --seconds 600
    python samples/train_demo.py --out runs/tiny --tiny --steps 4 --device cpu

`--out` receives `checkpoint.pt` (everything, for --resume) and `demo/` (what WanPipeline.from_pretrained loads); with
`--check 32`, also `best/`: of all that was saved, the model that shows best what held-out prompts ask for.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import check_prompts
import demo_world as world
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

# What WanPipeline pads a prompt to; cross-attention sees the padding, so training pads alike.
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Bucket:
    """One clip size and how many of them make a batch."""

    frames: int
    height: int
    width: int
    batch: int
    # Sizes that come up all the time are worth a compilation of their own.
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // 8) * (self.width // 8)


@dataclass(frozen=True)
class Recipe:
    heads: int = 3
    layers: int = 6
    ffn_dim: int = 1024
    text_dim: int = 128
    z_dim: int = 12
    encoder_dim: int = 32
    decoder_dim: int = 64
    # Where frames agree so much, noise hides the layout of a clip only near its very end: train and sample there.
    shift: float = 8.0
    # Deviation of the logit of the noise level: wide, for layout is decided above 0.97 and detail below 0.3.
    level_spread: float = 1.5
    rate: float = 1e-3
    ema: float = 0.999
    # What a linear reading of the middle block must tell of each token, on top of the velocity: the colour, the shape
    # and the direction there. Velocity alone says little about them where noise hides the clip.
    reading: float = 0.3
    # More scenes of two groups than there are in the world: which words belong to which group is the hard part.
    two_groups: float = 0.7
    # Rendering and encoding a clip costs a part of an update: each batch is used this often, with fresh noise.
    updates_per_batch: int = 2
    # Shares of batches while the layout of a scene is learned, then while its details are.
    early_until: float = 0.3
    early: tuple[float, ...] = (0.3, 0.2, 0.0, 0.0, 0.0, 0.5)
    late: tuple[float, ...] = (0.08, 0.76, 0.04, 0.04, 0.04, 0.04)
    buckets: tuple[Bucket, ...] = (
        Bucket(9, 96, 112, 64, compiled=True),
        Bucket(15, 128, 144, 20, compiled=True),
        Bucket(17, 176, 192, 8),
        Bucket(31, 128, 144, 8),
        Bucket(15, 256, 288, 3),
        Bucket(9, 64, 72, 128, compiled=True),
    )


TINY = Recipe(
    heads=2,
    layers=2,
    ffn_dim=256,
    text_dim=32,
    z_dim=8,
    encoder_dim=20,
    decoder_dim=20,
    early=(0.5, 0.5),
    late=(0.5, 0.5),
    buckets=(Bucket(5, 32, 48, 2), Bucket(9, 32, 32, 2)),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>") + world.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_pipeline(recipe: Recipe, seed: int) -> WanPipeline:
    """The untrained model."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=recipe.text_dim,
            d_kv=recipe.text_dim // 4,
            d_ff=3 * recipe.text_dim,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    # Patches of 4 x 4 pixels, every frame on its own: all convolutions run at a quarter of the resolution.
    vae = AutoencoderKLWan(
        base_dim=recipe.encoder_dim,
        decoder_base_dim=recipe.decoder_dim,
        z_dim=recipe.z_dim,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_spatial=4,
        scale_factor_temporal=1,
        latents_mean=[0.0] * recipe.z_dim,
        latents_std=[1.0] * recipe.z_dim,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=recipe.heads,
        attention_head_dim=128,
        in_channels=recipe.z_dim,
        out_channels=recipe.z_dim,
        text_dim=recipe.text_dim,
        freq_dim=128,
        ffn_dim=recipe.ffn_dim,
        num_layers=recipe.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.shift)
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


# The autoencoder in one pass over all frames. AutoencoderKLWan walks a clip a few frames at a time with a cache; its
# convolutions are causal, so one pass over [B, T, H, W, C] gives the same numbers in a fraction of the launches.


def _norm_silu(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return F.silu(F.normalize(x.float(), dim=-1) * (x.shape[-1] ** 0.5 * norm.gamma.flatten())).to(x.dtype)


def _causal_conv(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    batch, frames = x.shape[:2]
    weight = conv.weight
    if weight.shape[2] > 1:
        # A convolution over three frames is one over three times the channels.
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
        x = torch.cat([padded[:, shift : shift + frames] for shift in range(3)], -1)
        weight = weight.transpose(1, 2)
    kernel = weight.flatten(1, 2)
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), kernel, conv.bias, 1, kernel.shape[-1] // 2)
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, -1))


def _resnet(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = _causal_conv(block.conv1, _norm_silu(x, block.norm1))
    return x + _causal_conv(block.conv2, _norm_silu(y, block.norm2))


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """clips [B, 3, T, H, W] in [-1, 1] -> latents [B, Z, T, H/4, W/4] float32."""
    encoder = vae.encoder
    x = patchify(clips, vae.config.patch_size).permute(0, 2, 3, 4, 1).contiguous()
    x = _causal_conv(encoder.conv_in, x)
    for resnet in encoder.mid_block.resnets:
        x = _resnet(resnet, x)
    x = _causal_conv(encoder.conv_out, _norm_silu(x, encoder.norm_out))
    x = _causal_conv(vae.quant_conv, x).permute(0, 4, 1, 2, 3).float()
    return x.chunk(2, 1)[0]


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """latents [B, Z, T, H/4, W/4] -> clips [B, 3, T, H, W] float32, not clamped."""
    decoder = vae.decoder
    x = _causal_conv(vae.post_quant_conv, latents.permute(0, 2, 3, 4, 1).contiguous())
    x = _causal_conv(decoder.conv_in, x)
    for resnet in (*decoder.mid_block.resnets, *decoder.up_blocks[0].resnets):
        x = _resnet(resnet, x)
    x = _causal_conv(decoder.conv_out, _norm_silu(x, decoder.norm_out))
    return unpatchify(x.permute(0, 4, 1, 2, 3).float(), vae.config.patch_size)


@torch.no_grad()
def fit_autoencoder(vae: AutoencoderKLWan, clips: torch.Tensor) -> None:
    """Set the weights so that the latents are the principal components of the patches and the decoder undoes them.

    A channel and its negative pass SiLU unchanged, silu(a) - silu(-a) = a, and a constant channel far larger than the
    rest makes the norms scale by a constant: both halves are linear maps, and nothing is left to learn.
    """
    patches = patchify(clips, vae.config.patch_size).transpose(0, 1).flatten(1).double()
    mean = patches.mean(1)
    centred = patches - mean.view(-1, 1)
    values, vectors = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
    components = vectors[:, -vae.config.z_dim :].flip(1).T
    deviation = values[-vae.config.z_dim :].flip(0).sqrt()
    # Between the scale of pixels, where fine detail hides under the noise, and unit deviation, where it weighs as much
    # as colour: each channel keeps the square root of its deviation.
    scale = deviation.sqrt() * deviation.mean().sqrt()
    vae.register_to_config(latents_mean=[0.0] * len(scale), latents_std=[round(v, 4) for v in scale.tolist()])

    identity = torch.eye(len(components), dtype=torch.float64, device=clips.device)
    _linear_network(vae.encoder, components, -components @ mean, torch.cat([identity, 0 * identity]))
    _linear_network(vae.decoder, identity, torch.zeros_like(deviation), components.T)
    vae.decoder.conv_out.bias.add_(mean.to(vae.decoder.conv_out.bias))
    vae.encoder.conv_out.bias[len(components) :] = -12.0
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0], device=clips.device).view_as(conv.weight))
        conv.bias.zero_()


def _linear_network(network: nn.Module, into: torch.Tensor, offset: torch.Tensor, out: torch.Tensor) -> None:
    """Make an encoder or a decoder compute out (into x + offset)."""
    small = 0.02
    count = len(into)
    blocks = list(network.mid_block.resnets)
    for up_block in getattr(network, "up_blocks", ()):
        blocks += up_block.resnets
    for block in blocks:
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    for attention in network.mid_block.attentions:
        attention.proj.weight.zero_()
        attention.proj.bias.zero_()
    first, last = network.conv_in, network.conv_out
    width = first.weight.shape[0]
    if width <= 2 * count:
        raise ValueError(f"{count} latent channels need more than {2 * count} channels in the network, not {width}.")
    first.weight.zero_()
    first.bias.zero_()
    for sign, rows in ((1, slice(0, count)), (-1, slice(count, 2 * count))):
        first.weight[rows, :, -1, 1, 1] = (sign * small * into).to(first.weight)
        first.bias[rows] = (sign * small * offset).to(first.bias)
    first.bias[2 * count] = 1.0
    last.weight.zero_()
    last.bias.zero_()
    gain = (out / (small * width**0.5)).to(last.weight)
    last.weight[:, :count, -1, 1, 1] = gain
    last.weight[:, count : 2 * count, -1, 1, 1] = -gain


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Push the singular values of each matrix [N, A, B] towards 1 with five quintic Newton-Schulz steps."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised, for the matrices of the blocks; steps are as large as Adam's."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum"] for parameter in parameters]
                gradients = [p.grad for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
                update = orthogonalise(torch.stack(looked_ahead)).float()
                # An orthogonal matrix scaled so that its entries are about as large as Adam's steps.
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-rate)


@dataclass(frozen=True)
class Limits:
    """When a stage ends: after so many steps, or so many seconds; the learning rate follows whichever is nearer."""

    steps: int | None
    seconds: float | None
    stop_after: int | None = None
    stop_seconds: float | None = None

    def progress(self, step: int, elapsed: float) -> float:
        shares = [step / self.steps] if self.steps is not None else []
        shares += [elapsed / self.seconds] if self.seconds is not None else []
        return max(shares, default=1.0)

    def reached(self, step: int, elapsed: float) -> bool:
        interrupted = self.stop_after is not None and step >= self.stop_after
        interrupted |= self.stop_seconds is not None and elapsed >= self.stop_seconds
        return interrupted or self.progress(step, elapsed) >= 1


def learning_rate(step: int, progress: float, decay_from: float, warm_up: int) -> float:
    """Share of the full rate: a linear rise, a plateau, a linear fall."""
    fall = (1 - progress) / (1 - decay_from) if decay_from < 1 else 1.0
    return max(min((step + 1) / warm_up, 1.0, fall), 0.0)


@dataclass(frozen=True)
class Examples:
    """Scenes, their clips as the transformer sees them, and what lies under each token (world.label)."""

    scenes: tuple[world.Scene, ...]
    latents: torch.Tensor
    labels: torch.Tensor


class Trainer:
    """The models, their optimisers and every random state: what a checkpoint holds."""

    def __init__(self, recipe: Recipe, pipe: WanPipeline, device: str, seed: int, compiled: bool = False) -> None:
        self.recipe, self.pipe, self.device, self.compiled = recipe, pipe, device, compiled
        self.vae, self.transformer, self.text_encoder = pipe.vae, pipe.transformer, pipe.text_encoder
        for module in (self.vae, self.transformer, self.text_encoder):
            module.to(device=device, dtype=torch.float32)
        self.scene_generator = torch.Generator().manual_seed(seed)
        self.noise_generator = torch.Generator(device).manual_seed(seed)
        self.step = 0
        self.elapsed = 0.0
        self.trained = list(self.transformer.parameters()) + list(self.text_encoder.parameters())
        width = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        # Only training reads; nothing of it is exported.
        self.reader = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(world.LABELS))).to(device)
        self.read: torch.Tensor | None = None
        middle = self.transformer.blocks[(len(self.transformer.blocks) - 1) // 2]
        middle.register_forward_hook(self.keep)
        matrices = [p for name, p in self.transformer.blocks.named_parameters() if p.ndim == 2 and "weight" in name]
        known = {id(p) for p in matrices}
        others = [p for p in self.trained if id(p) not in known]
        self.optimizers = [
            Muon(matrices, recipe.rate),
            torch.optim.AdamW(others + list(self.reader.parameters()), recipe.rate, (0.9, 0.98), fused=compiled),
        ]
        self.average = [p.detach().clone() for p in self.trained]
        if compiled:
            for block in self.transformer.blocks:
                # Not block.compile(): that would take the hook into the graph.
                block.forward = torch.compile(block.forward, dynamic=False)

    def keep(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.read = output

    def state(self) -> dict:
        return {
            "vae": self.vae.state_dict(),
            "vae_config": {name: list(self.vae.config[name]) for name in ("latents_mean", "latents_std")},
            "transformer": self.transformer.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "generators": [self.scene_generator.get_state(), self.noise_generator.get_state()],
            "counters": [self.step, self.elapsed],
        }

    def load_state(self, state: dict) -> None:
        self.vae.load_state_dict(state["vae"])
        self.vae.register_to_config(**state["vae_config"])
        self.transformer.load_state_dict(state["transformer"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.reader.load_state_dict(state["reader"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch._foreach_copy_(self.average, [p.to(self.device) for p in state["average"]])
        self.scene_generator.set_state(state["generators"][0].cpu())
        self.noise_generator.set_state(state["generators"][1].cpu())
        self.step, self.elapsed = state["counters"]

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.startswith("cuda") else nullcontext()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.noise_generator)

    def pick(self, shares: tuple[float, ...]) -> int:
        return int(torch.multinomial(torch.tensor(shares), 1, generator=self.scene_generator))

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """From what the autoencoder gives to what the transformer sees."""
        mean = torch.tensor(self.vae.config.latents_mean, device=self.device).view(1, -1, 1, 1, 1)
        std = torch.tensor(self.vae.config.latents_std, device=self.device).view(1, -1, 1, 1, 1)
        return (latents - mean) / std

    @torch.no_grad()
    def fit_vae(self) -> None:
        generator = torch.Generator().manual_seed(123)
        bucket = self.recipe.buckets[1]
        clips = []
        for _ in range(24):
            scenes = world.scene_tensors(world.sample_scenes(4, generator), bucket.width / bucket.height)
            clips.append(world.render(scenes.to(self.device), 2, bucket.height, bucket.width))
        fit_autoencoder(self.vae, torch.cat(clips))
        for parameter in self.vae.parameters():
            # From here the exported weights are what the transformer must fit.
            parameter.copy_(parameter.bfloat16())

    @torch.no_grad()
    def psnr(self, clips: int) -> float:
        """Reconstruction at the default size, in decibels, mean over clips."""
        generator = torch.Generator().manual_seed(77)
        bucket = self.recipe.buckets[min(1, len(self.recipe.buckets) - 1)]
        values = []
        for _ in range(clips // 4):
            scenes = world.scene_tensors(world.sample_scenes(4, generator), bucket.width / bucket.height)
            truth = world.render(scenes.to(self.device), bucket.frames, bucket.height, bucket.width)
            with self.autocast():
                again = decode(self.vae, encode(self.vae, truth)).clamp(-1, 1)
            values += (-10 * torch.log10(((again - truth) / 2).square().flatten(1).mean(1))).tolist()
        return sum(values) / len(values)

    def embed(self, captions: list[str]) -> torch.Tensor:
        """Text as WanPipeline encodes it: zeros after the last token, up to TEXT_TOKENS."""
        tokens = self.pipe.tokenizer(captions, padding=True, return_tensors="pt")
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        text = self.text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)
        return F.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))

    @torch.no_grad()
    def examples(self, bucket: Bucket) -> Examples:
        batch = world.sample_scenes(bucket.batch, self.scene_generator, self.recipe.two_groups)
        scenes = world.scene_tensors(batch, bucket.width / bucket.height).to(self.device)
        clips = world.render(scenes, bucket.frames, bucket.height, bucket.width)
        labels = world.label(scenes, bucket.frames, bucket.height // 8, bucket.width // 8)
        return Examples(batch.scenes, self.scale(encode(self.vae, clips)), labels)

    def losses(self, bucket: Bucket, examples: Examples) -> torch.Tensor:
        """One backward pass; returns the loss of flow matching and that of reading, [2]."""
        latents = examples.latents
        chances = torch.rand(bucket.batch, 7, generator=self.scene_generator).tolist()
        captions = [shorten(scene, row) for scene, row in zip(examples.scenes, chances, strict=True)]
        level = torch.sigmoid(self.recipe.level_spread * self.normal(bucket.batch))
        shift = self.recipe.shift
        sigma = shift * level / (1 + (shift - 1) * level)
        noise = self.normal(*latents.shape)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        eager = nullcontext() if bucket.compiled or not self.compiled else torch.compiler.set_stance("force_eager")
        preferred = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with self.autocast():
            text = self.embed(captions)
            with sdpa_kernel(preferred, set_priority=True), eager:
                velocity = self.transformer(noisy, sigma * 1000, text, return_dict=False)[0]
            read = self.reader(self.read).float().flatten(0, 1).split(world.LABELS, -1)
        flow = F.mse_loss(velocity.float(), noise - latents)
        told = examples.labels.transpose(0, 1).flatten(1)
        reading = sum(F.cross_entropy(logits, labels) for logits, labels in zip(read, told, strict=True))
        (flow + self.recipe.reading * reading).backward()
        return torch.stack([flow, reading]).detach()

    def train_transformer(
        self,
        limits: Limits,
        decay_from: float,
        early_until: float,
        log: Callable[[dict], None],
        save: Callable[[], None],
    ) -> None:
        start = time.monotonic() - self.elapsed
        recent: list[torch.Tensor] = []
        while not limits.reached(self.step, self.elapsed):
            progress = limits.progress(self.step, self.elapsed)
            rate = self.recipe.rate * learning_rate(self.step, progress, decay_from, 200)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            chosen = self.pick(self.recipe.early if progress < early_until else self.recipe.late)
            bucket = self.recipe.buckets[chosen]
            examples = self.examples(bucket)
            for _ in range(self.recipe.updates_per_batch):
                losses = self.update(bucket, examples)
                if chosen == 1:
                    recent.append(losses)
            # The host runs ahead of the device; the clock must not.
            self.synchronise()
            self.elapsed = time.monotonic() - start
            if self.step % 100 < self.recipe.updates_per_batch:
                flow, reading = torch.stack(recent).mean(0).tolist() if recent else (None, None)
                line = {"stage": "dit", "step": self.step, "seconds": self.elapsed, "loss": flow, "reading": reading}
                log({**line, "rate": rate})
                recent = []
            save()

    def update(self, bucket: Bucket, examples: Examples) -> torch.Tensor:
        losses = self.losses(bucket, examples)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)
        self.step += 1
        return losses

    def synchronise(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the averaged weights in bfloat16, in files of at most 12 MB."""
        kept = [p.detach().clone() for p in self.trained]
        torch._foreach_copy_(self.trained, self.average)
        for name in ("text_encoder", "transformer", "vae"):
            module = getattr(self.pipe, name)
            state = {key: value.detach().bfloat16().cpu().contiguous() for key, value in module.state_dict().items()}
            shell = type(module)(module.config) if name == "text_encoder" else type(module).from_config(module.config)
            shell.bfloat16().load_state_dict(state)
            shell.save_pretrained(folder / name, max_shard_size="12MB")
        self.pipe.tokenizer.save_pretrained(folder / "tokenizer")
        self.pipe.scheduler.save_pretrained(folder / "scheduler")
        self.pipe.save_config(folder)
        torch._foreach_copy_(self.trained, kept)


def shorten(scene: world.Scene, chances: list[float]) -> str:
    """A caption that leaves some things unsaid, or, one time in ten, everything: the empty prompt of guidance."""
    if chances[0] < 0.1:
        return ""
    groups = scene.groups
    if chances[1] < 0.2:
        groups = tuple(replace(group, texture=None) for group in groups)
    if chances[2] < 0.15:
        groups = tuple(replace(group, size=None) for group in groups)
    scene = replace(scene, groups=groups)
    if chances[3] < 0.15:
        scene = replace(scene, background=None, pattern=None)
    if chances[4] < 0.25:
        scene = replace(scene, camera=None)
    if chances[5] < 0.25:
        scene = replace(scene, light=None)
    return world.caption(scene)


def keep_best(out: Path, num_prompts: int, device: str) -> dict:
    """Check the exported model on held-out prompts and copy it to best/ if it is the best so far."""
    dtype = {"transformer": torch.bfloat16 if device.startswith("cuda") else torch.float32, "default": torch.float32}
    pipe = WanPipeline.from_pretrained(out / "demo", torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    # Other seeds than the check that is reported: choosing by its prompts would flatter the choice.
    settings = check_prompts.Settings(batch=num_prompts)
    result, _ = check_prompts.check(pipe, num_prompts, settings, seed=check_prompts.HELD_OUT_SEED + 10_000)
    # How near the model is to the worse met of its two aims.
    merit = min(result.colour_and_shape / 90, result.direction / 85)
    record = out / "best.json"
    if not record.exists() or merit >= json.loads(record.read_text())["merit"]:
        shutil.rmtree(out / "best", ignore_errors=True)
        shutil.copytree(out / "demo", out / "best")
        record.write_text(json.dumps({"merit": merit}) + "\n")
    return {"merit": merit, **asdict(result)}


def every(seconds: float, steps: int | None, action: Callable[[], None]) -> Callable[[], None]:
    """Call `action` each so many calls, or at most once in so many seconds."""

    def counted() -> Iterator[None]:
        last = time.monotonic()
        calls = 0
        while True:
            calls += 1
            due = calls % steps == 0 if steps else time.monotonic() - last > seconds
            if due:
                action()
                last = time.monotonic()
            yield

    ticks = counted()
    return lambda: next(ticks)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and demo/")
    parser.add_argument("--resume", type=Path, help="a checkpoint.pt: go on exactly where it stopped")
    parser.add_argument("--init", type=Path, help="an exported folder: start from its weights with fresh optimisers")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument(
        "--stop_after", type=int, help="stop at this step of the transformer, as an interruption would"
    )
    parser.add_argument("--stop_seconds", type=float, help="stop there on the way to --seconds, to --resume later")
    parser.add_argument("--rate", type=float, help="learning rate; less than the recipe's, to go on from good weights")
    parser.add_argument(
        "--decay_from", type=float, default=0.6, help="progress at which the learning rate begins to fall"
    )
    parser.add_argument("--early_until", type=float, help="progress at which the sizes change from early to late")
    parser.add_argument("--save_seconds", type=float, default=120.0)
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--check", type=int, default=0, help="prompts to check at each save; the best goes to best/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to test the code")
    chosen = parser.parse_args()
    if chosen.resume is not None and chosen.init is not None:
        parser.error("--resume goes on with a checkpoint and --init starts from exported weights: give one of them.")
    return chosen


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = TINY if args.tiny else Recipe()
    if args.rate is not None:
        recipe = replace(recipe, rate=args.rate)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.init is not None:
        pipe = WanPipeline.from_pretrained(args.init)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.shift)
    else:
        pipe = build_pipeline(recipe, args.seed)
    compiled = args.device.startswith("cuda") and not args.no_compile
    # Weights alone do not say where the random streams were, so a start from them takes a stream of its own.
    trainer = Trainer(recipe, pipe, args.device, args.seed + (1000 if args.init is not None else 0), compiled)
    if args.resume is not None:
        trainer.load_state(torch.load(args.resume, map_location=args.device, weights_only=True))
    sizes = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters())
        for name in ("text_encoder", "vae", "transformer")
    }
    print(json.dumps({"parameters": sizes, "tokens": [bucket.tokens for bucket in recipe.buckets]}), flush=True)

    def log(line: dict) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()}
        text = json.dumps(rounded)
        print(text, flush=True)
        with (args.out / "log.jsonl").open("a") as file:
            file.write(text + "\n")

    def write() -> None:
        partial = args.out / "checkpoint.tmp"
        torch.save(trainer.state(), partial)
        os.replace(partial, args.out / "checkpoint.pt")

    def write_and_export() -> None:
        write()
        trainer.export(args.out / "demo")
        if args.check:
            log({"stage": "check", "step": trainer.step, **keep_best(args.out, args.check, args.device)})

    if args.init is None and args.resume is None:
        trainer.fit_vae()
        log({"stage": "vae", "psnr": trainer.psnr(4 if args.tiny else 16)})
    limits = Limits(args.steps, args.seconds, args.stop_after, args.stop_seconds)
    early_until = recipe.early_until if args.early_until is None else args.early_until
    save = every(args.save_seconds, args.save_steps, write_and_export)
    trainer.train_transformer(limits, args.decay_from, early_until, log, save)
    write_and_export()


if __name__ == "__main__":
    main()
