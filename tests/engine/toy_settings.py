"""How the small networks of these tests are trained; each test replaces what it is about."""

from __future__ import annotations

from latentgen.engine.settings import LoopSettings

NEVER = 1000

SETTINGS = LoopSettings(
    steps=8,
    optimizer="adamw",
    learning_rate=0.05,
    schedule="constant",
    warmup_steps=2,
    final_learning_rate=0.0,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.99,
    grad_clip=0.5,
    ema_decay=0.8,
    log_every=NEVER,
    save_every=NEVER,
    keep_last=NEVER,
    preview_every=NEVER,
)
