"""LoRA files: read and written in the layouts of diffusers, kohya and ComfyUI; merged, extracted, resized, combined."""
